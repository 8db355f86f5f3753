"""Trains with TRL's GRPOTrainer on FOLDER's prompts and weights as `run.py` asks for, and prints
what every step took. Run by `run.py`.
"""

import json
import pathlib
import resource
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]  # TRL loads lazily

folder, settings = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
seconds, tokens = [], []


class Timer(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        seconds.append(time.perf_counter() - self.start)


def length(completions: list[Any], completion_ids: list[Any], **kwargs: Any) -> Any:
    """The reward: how many characters a response has."""
    tokens.append(sum(map(len, completion_ids)))
    return [float(len(text)) for text in completions]


model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(settings["model"])
samples = settings["samples"]
arguments = GRPOConfig(
    output_dir=str(folder / "trl"),
    per_device_train_batch_size=settings["micro_batch"],
    gradient_accumulation_steps=settings["prompts"] * samples // settings["micro_batch"],
    num_generations=samples,
    max_completion_length=settings["new_tokens"],
    max_steps=settings["steps"],
    beta=0.04,
    learning_rate=1e-6,
    temperature=1.0,
    loss_type="grpo",
    use_cpu=True,
    gradient_checkpointing=False,
    report_to=[],
    save_strategy="no",
    logging_steps=1000,
    disable_tqdm=True,
)
reward: Any = length  # TRL gives it prompts as a keyword
trainer = GRPOTrainer(
    model=model,
    reward_funcs=reward,
    args=arguments,
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    callbacks=[Timer()],
)
trainer.train()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print("RESULT " + json.dumps({"seconds": seconds, "tokens": tokens, "peak_gib": peak}))
