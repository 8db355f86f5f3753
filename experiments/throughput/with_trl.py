"""Trains with TRL on FOLDER's rows and weights as `run.py` asks for, and prints what every step
took. Run by `run.py`.
"""

import json
import pathlib
import resource
import sys
import time

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]  # TRL loads lazily

folder, settings = sys.argv[1], json.loads(sys.argv[2])
rows = [json.loads(line) for line in pathlib.Path(folder, "rows.jsonl").read_text().splitlines()]
words = Tokenizer(
    models.WordLevel({f"w{i}": i for i in range(settings["vocab_size"])}, unk_token="w0")
)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w2", bos_token="w1"
)
gpu, half = settings["device"] == "gpu", settings["dtype"] == "bfloat16"
assert torch.cuda.is_available() == gpu, (
    f"--device={settings['device']}, and CUDA is {torch.cuda.is_available()}"
)
seconds, losses = [], []


class Timer(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - self.start)


class Rows(DPOTrainer):
    """The rows hold token ids already."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if "loss" in logs:
            losses.append(logs["loss"])


# Of adapters alone, the frozen base may be in the dtype of the computation.
dtype = torch.bfloat16 if half and settings["lora"] else torch.float32
adapters = None
if settings["lora"]:
    adapters = LoraConfig(
        r=settings["lora"], lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def load():
    return AutoModelForCausalLM.from_pretrained(
        f"{folder}/model", dtype=dtype, attn_implementation="sdpa"
    )


arguments = DPOConfig(
    output_dir=f"{folder}/trl",
    max_steps=settings["steps"],
    per_device_train_batch_size=settings["micro"],
    gradient_accumulation_steps=settings["pairs"] // settings["micro"],
    train_sampling_strategy="sequential",
    precompute_ref_log_probs=settings["cached"],
    learning_rate=1e-4,
    lr_scheduler_type="constant",
    beta=0.1,
    max_length=None,
    max_grad_norm=1.0,
    gradient_checkpointing=settings["remat"],
    bf16=half,
    use_cpu=not gpu,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
start = time.perf_counter()
trainer = Rows(
    model=load(),
    ref_model=None if adapters else load(),
    args=arguments,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=adapters,
    callbacks=[Timer()],
)
made = time.perf_counter() - start  # with the reference's log-probs, where they are computed first
trainer.train()
memory = (
    torch.cuda.max_memory_allocated()
    if gpu
    else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
)
found = {"loss": losses, "seconds": seconds, "peak_gib": memory / 2**30}
print("RESULT" + json.dumps(found | {"cache_seconds": made if settings["cached"] else 0.0}))
