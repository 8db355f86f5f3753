"""Your own preferences on your own weights.

    python -m dpojax.main --config=dpo --config.model.init=DIR --config.data.train=pairs.jsonl

One epoch at the rates of base.py, which the field uses for full fine-tuning of a model that has
seen SFT; 512 tokens of prompt and as many of response (TRL's default: 1,024 together). Adapters
take about 20 times the rate: `--config.lora.rank=16 --config.optim.learning_rate=2e-5`. Prompts are
written by the checkpoint's chat template where it has one, texts too; 5 % of the prompts are held
out unless data.eval names a file.

`:sft` trains on responses alone (rows of prompt and completion, or the chosen side of
pairs): 3 x 10^-5, no preference stage. Hardware: any; TinyStories-656K takes a minute for 1,000
pairs on 2 CPU cores, other models were not measured.
"""

from ml_collections import ConfigDict

from dpojax.configs import base
from dpojax.errors import did_you_mean


def get_config(arg: str = "") -> ConfigDict:
    """The run's settings; `arg` is "" or "sft"."""
    if arg not in ("", "sft"):
        raise ValueError(
            f"unknown argument {arg!r}; it is 'sft' or nothing{did_you_mean(arg, ('sft',))}"
        )
    c = base.get_config()
    c.export = True
    c.data.eval_share = 0.05
    c.data.text_as_chat = True
    c.model.remat = "full"
    if arg == "sft":
        c.num_steps = 0
        c.num_epochs = 0.0
        c.data.eval_share = 0.0
        c.sft.num_steps = 500
    return c
