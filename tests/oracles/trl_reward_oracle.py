"""TRL's RewardTrainer on ready token ids:
python tests/oracles/trl_reward_oracle.py MODEL ROWS OUT.json [STEPS].

MODEL is a classifier with one label. Float32, file order, AdamW with a constant rate of 1e-4, clip
1.0, 8 pairs a step. Shares no code with dpojax.
"""

import json
import pathlib
import sys
import tempfile
from typing import ClassVar

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer
from trl_oracle import PLAIN

SETTINGS = {"plain": {}, "centred": {"center_rewards_coefficient": 0.01}}
KEYS = ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")


class TokenRows(RewardTrainer):
    """TRL has no path for rows that are token ids already; its preparation is left out, nothing
    else.
    """

    records: ClassVar[list[dict[str, float]]] = []

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if "loss" in logs:
            self.records.append({k: float(logs[k]) for k in KEYS})


def run(model: str, rows: list[dict], setting: str, steps: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as out:
        args = RewardConfig(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            **PLAIN,
            **SETTINGS[setting],
        )
        TokenRows.records = []
        classifier = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=torch.float32, num_labels=1
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.pad_token_id = classifier.config.pad_token_id
        TokenRows(
            model=classifier,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        ).train()
        return {k: [r[k] for r in TokenRows.records] for k in KEYS}


def main() -> None:
    model, rows, out = sys.argv[1:4]
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 20
    lines = [json.loads(line) for line in pathlib.Path(rows).read_text().splitlines()]
    made = [
        {
            "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
            "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
        }
        for row in lines
    ]
    found = {name: run(model, made, name, steps) for name in SETTINGS}
    pathlib.Path(out).write_text(json.dumps({"steps": steps, "settings": found}) + "\n")


if __name__ == "__main__":
    main()
