"""Trains with Tunix on FOLDER's rows and weights as `run.py` asks for, and prints what every step
took. Run by `run.py`.

Tunix has one dtype for weights and computation: in bfloat16 its weights and moments are of it too,
where dpojax and TRL keep float32.
"""

import json
import pathlib
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params
from tunix.sft import hooks
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput

folder, settings = sys.argv[1], json.loads(sys.argv[2])
rows = [json.loads(line) for line in pathlib.Path(folder, "rows.jsonl").read_text().splitlines()][
    : settings["steps"] * settings["pairs"]
]
shape = json.loads(pathlib.Path(folder, "model/config.json").read_text())
config = llama3.ModelConfig(
    num_layers=shape["num_hidden_layers"],
    vocab_size=shape["vocab_size"],
    embed_dim=shape["hidden_size"],
    hidden_dim=shape["intermediate_size"],
    num_heads=shape["num_attention_heads"],
    head_dim=shape["head_dim"],
    num_kv_heads=shape["num_key_value_heads"],
    rope_theta=int(shape["rope_parameters"]["rope_theta"]),
    norm_eps=shape["rms_norm_eps"],
    weight_tying=shape["tie_word_embeddings"],
    remat_config=llama3.RematConfig.DECODER if settings["remat"] else llama3.RematConfig.NONE,
)
longest = {
    name: max(len(r[f"{name}_ids"]) for r in rows) for name in ("prompt", "chosen", "rejected")
}
# one shape: nothing compiles twice
longest["chosen"] = longest["rejected"] = max(longest["chosen"], longest["rejected"])


def padded(batch, name):
    """Ids and mask of a micro-batch; prompts are padded on the left."""
    size, own = longest[name], [r[f"{name}_ids"] for r in batch]
    spare = [[0] * (size - len(x)) for x in own]
    mask = [[1] * len(x) for x in own]
    sides = [
        (s + x, s + m) if name == "prompt" else (x + s, m + s)
        for x, m, s in zip(own, mask, spare, strict=True)
    ]
    return {
        f"{name}_ids": np.array([x for x, _ in sides]),
        f"{name}_mask": np.array([m for _, m in sides]),
    }


def micro_batches():
    for i in range(0, len(rows), settings["micro"]):
        batch = rows[i : i + settings["micro"]]
        yield TrainingInput(
            **padded(batch, "prompt"), **padded(batch, "chosen"), **padded(batch, "rejected")
        )


class Timer(hooks.TrainingHooks):
    """When the parameters of each optimizer step were there, and its loss.

    Tunix reports losses a step late, without waiting.
    """

    def __init__(self):
        self.times, self.losses, self.micro_batches = [], [], 0

    def _note(self):
        jax.block_until_ready(nnx.state(policy, nnx.Param))
        self.times.append(time.perf_counter())

    def on_train_start(self, train_ctx): ...

    def on_train_end(self, train_ctx):
        self._note()

    def on_train_step_start(self, train_ctx):
        if self.micro_batches * settings["micro"] % settings["pairs"] == 0:
            self._note()
        self.micro_batches += 1

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        self.losses.append(float(train_loss))

    def on_eval_step_start(self, train_ctx): ...

    def on_eval_step_end(self, train_ctx, eval_loss): ...


dtype = jnp.dtype(settings["dtype"])
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
timer = Timer()
with mesh:
    policy, reference = (
        params.create_model_from_safe_tensors(f"{folder}/model", config, mesh, dtype)
        for _ in range(2)
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0),
    )
    own = DPOTrainingConfig(
        eval_every_n_steps=10**6,
        max_steps=settings["steps"],
        gradient_accumulation_steps=settings["pairs"] // settings["micro"],
        beta=0.1,
    )
    trainer = DPOTrainer(policy, reference, optimizer, own)
    trainer.with_training_hooks(timer)
    trainer.train(micro_batches())
stats = jax.devices()[0].memory_stats()
memory = (
    stats["peak_bytes_in_use"]
    if stats
    else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
)
found = {
    "loss": timer.losses,
    "seconds": np.diff(timer.times).tolist(),
    "peak_gib": memory / 2**30,
    "cache_seconds": 0.0,
}
print("RESULT" + json.dumps(found))
