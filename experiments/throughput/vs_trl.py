"""Pairs per second of dpojax and TRL 1.16 on the same CPU, model, weights and real TL;DR pairs, measured in turn in one run.

    python experiments/throughput/vs_trl.py --data=tldr/train.jsonl.gz --tokenizer=llama2/tokenizer.model --out=DIR

A Llama of 256 x 6 layers x 4 heads with an untied vocabulary of 32,000, float32, live reference in both, 8 pairs a step, AdamW.
TRL runs twice: as its settings come (8 pairs a micro-batch), and at its best here (1 pair a micro-batch, 8 accumulated). The
losses of the first step must be log 2 in all, and those of the later steps agree, so that the work is provably the same.
Needs the `parity` extra.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

SIZES = {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6, "num_attention_heads": 4}


def make_inputs(folder: pathlib.Path, data: str, tokenizer: str, pairs: int) -> None:
    """Token rows and random weights that both trainers read."""
    import torch
    import transformers

    from dpojax.data.index import Dataset
    from dpojax.data.records import open_records
    from dpojax.data.tokens import Limits, load_tokenizer
    from dpojax.data.triples import Dropped, RowReader

    dataset = Dataset(open_records(data), RowReader("{prompt}\n\nTL;DR:"), load_tokenizer(tokenizer), Limits(512, 128))
    rows, row = [], 0
    while len(rows) < pairs:
        try:
            group, _ = dataset.token_group(row)
            ids = [x.tolist() for x in (group.prompt, *group.responses)]
            rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)))
        except Dropped:
            pass
        row += 1
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")


def run_dpojax(folder: pathlib.Path, steps: int, name: str) -> dict:
    settings = {
        "data.train": folder / "rows.jsonl",
        "data.eval": folder / "rows.jsonl",
        "model.init": folder / "model",
        "data.shuffle": False,
        "data.eval_max_pairs": 8,
        "batch_size": 8,
        "num_steps": steps,
        "log_every_steps": 1,
        "eval_every_steps": 1000,
        "checkpoint_every_steps": 1000,
        "self_check": "off",
        "sft.num_steps": 0,
        "loss.beta": 0.1,
        "optim.learning_rate": 1e-4,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "sample.num_prompts": 0,
    }
    flags = [f"--config.{k}={v}" for k, v in settings.items()]
    workdir = folder / name
    argv = [sys.executable, "-m", "dpojax.main", "--config=configs/tldr.py", f"--workdir={workdir}", *flags]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    rows = [r for r in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
    return {"loss": [r["loss"] for r in rows], "seconds": [r["step_time_s"] for r in rows]}


TRL = """
import json, sys, time, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from tokenizers import Tokenizer, models
from trl import DPOConfig, DPOTrainer
folder, steps, micro = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rows = [json.loads(l) for l in open(folder + "/rows.jsonl")]
words = {f"w{i}": i for i in range(32000)}
tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", pad_token="w0", eos_token="w2", bos_token="w1")
seconds, losses = [], []
class Timer(TrainerCallback):
    def on_step_begin(self, *a, **k): self.t = time.perf_counter()
    def on_step_end(self, *a, **k): seconds.append(time.perf_counter() - self.t)
class Rows(DPOTrainer):
    def _prepare_dataset(self, dataset, *a, **k): return dataset
    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if "loss" in logs: losses.append(logs["loss"])
load = lambda: AutoModelForCausalLM.from_pretrained(folder + "/model", dtype=torch.float32)
args = DPOConfig(output_dir=folder + "/trl", max_steps=steps, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro,
    train_sampling_strategy="sequential", learning_rate=1e-4, lr_scheduler_type="constant", beta=0.1, max_length=None, max_grad_norm=1.0,
    gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True)
Rows(model=load(), ref_model=load(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tok, callbacks=[Timer()]).train()
print("RESULT" + json.dumps({"loss": losses, "seconds": seconds}))
"""


def run_trl(folder: pathlib.Path, steps: int, micro: int) -> dict:
    argv = [sys.executable, "-c", TRL, str(folder), str(steps), str(micro)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.split("RESULT")[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[dict]] = {"dpojax": [], "TRL": [], "TRL, 1 pair a micro-batch": []}
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        make_inputs(folder, args.data, args.tokenizer, 8 * args.steps)
        for i in range(args.rounds):
            found["dpojax"].append(run_dpojax(folder, args.steps, f"dpojax{i}"))
            found["TRL"].append(run_trl(folder, args.steps, 8))
            found["TRL, 1 pair a micro-batch"].append(run_trl(folder, args.steps, 1))
    for name, runs in found.items():
        assert np.allclose([r["loss"] for r in runs], found["dpojax"][0]["loss"], atol=2e-3), (name, runs)
    # The machine is shared: ratios are taken within a round, whose runs follow each other.
    speed = {name: [8 / float(np.median(r["seconds"][1:])) for r in runs] for name, runs in found.items()}
    lines = ["| trainer | pairs/s, median of the rounds | dpojax is faster by (least to most) |", "|---|---|---|"]
    for name, values in speed.items():
        ratios = [a / b for a, b in zip(speed["dpojax"], values, strict=True)]
        lines.append(
            f"| {name} | {np.median(values):.2f} | {np.median(ratios):.1f} x ({min(ratios):.1f} to {max(ratios):.1f}) |"
        )
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(json.dumps({"pairs_per_second": speed, "runs": found}, indent=1))
    (out / "result.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
