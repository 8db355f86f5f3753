"""TRL's DPOTrainer on ready token ids: python tests/oracles/trl_oracle.py MODEL ROWS OUT.json [STEPS].

Float32, file order, AdamW with a constant rate of 1e-4, clip 1.0, 8 pairs a step. Shares no code
with dpojax.
"""

import json
import pathlib
import sys
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

SETTINGS = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "ipo": {"loss_type": ["ipo"]},
    "sigmoid_sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
}

# What both oracles train with: float32 on a CPU, in the file's order, at a constant rate, every
# step logged.
PLAIN = dict(
    train_sampling_strategy="sequential",
    lr_scheduler_type="constant",
    optim="adamw_torch",
    max_grad_norm=1.0,
    max_length=None,
    gradient_checkpointing=False,
    bf16=False,
    use_cpu=True,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)

KEYS = (
    *(
        "loss",
        "grad_norm",
        "rewards/margins",
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
    ),
    *("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"),
)


class TokenRows(DPOTrainer):
    """TRL has no path for rows that are token ids already; its preparation is left out, nothing
    else.
    """

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if "loss" in logs:
            self.records.append({k: float(logs[k]) for k in KEYS})


def run(model: str, rows: list[dict], setting: str, steps: int) -> dict[str, list[float]]:
    def load():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    with tempfile.TemporaryDirectory() as out:
        args = DPOConfig(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            beta=0.1,
            **PLAIN,
            **SETTINGS[setting],
        )
        TokenRows.records = []
        tokenizer = AutoTokenizer.from_pretrained(model)
        data = Dataset.from_list(rows)
        TokenRows(
            model=load(),
            ref_model=load(),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
        ).train()
    return {k: [r[k] for r in TokenRows.records] for k in TokenRows.records[0]}


def main(model: str, rows: str, out: str, steps: str = "20") -> None:
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    read = [
        {k: r[k] for k in keys}
        for r in map(json.loads, pathlib.Path(rows).read_text().splitlines())
    ]
    found = {name: run(model, read, name, int(steps)) for name in SETTINGS}
    pathlib.Path(out).write_text(json.dumps({"settings": found}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
