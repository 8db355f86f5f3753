"""TRL's DPOTrainer on message lists: python tests/oracles/trl_chat_oracle.py MODEL ROWS OUT.json STEPS
PAIRS RATE.

Everything is TRL's own: the prompt out of the messages, the model's chat template, the collator.
Float32, file order, AdamW with a constant rate, clip 1.0, PAIRS pairs a step. Shares no code with
dpojax.
"""

import json
import pathlib
import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl_oracle import PLAIN


class Recorded(DPOTrainer):
    """Keeps what is logged."""

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if "loss" in logs:
            self.records.append(
                {k: float(logs[k]) for k in ("loss", "grad_norm", "rewards/margins")}
            )


def main(model: str, rows: str, out: str, steps: str, pairs: str, rate: str) -> None:
    def load():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    read = map(json.loads, pathlib.Path(rows).read_text().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder,
            max_steps=int(steps),
            per_device_train_batch_size=int(pairs),
            learning_rate=float(rate),
            beta=0.1,
            **PLAIN,
        )
        Recorded.records = []
        data = Dataset.from_list([{k: r[k] for k in ("chosen", "rejected")} for r in read])
        tokenizer = AutoTokenizer.from_pretrained(model)
        Recorded(
            model=load(),
            ref_model=load(),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
        ).train()
    pathlib.Path(out).write_text(json.dumps(Recorded.records))


if __name__ == "__main__":
    main(*sys.argv[1:])
