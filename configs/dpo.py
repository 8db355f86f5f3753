"""Your own preferences on your own weights.

    python -m dpojax.main --config=configs/dpo.py --config.model.init=DIR --config.data.train=pairs.jsonl

One epoch at the rates that the field uses for full fine-tuning of a model that has seen SFT: AdamW at 1e-6 with a tenth of the
steps as warmup, beta 0.1, 32 pairs a step, 512 tokens of prompt and as many of response (TRL's defaults: 1e-6, 0.1, 1,024
together; Tunstall et al. 2023, arXiv:2310.16944: 5e-7, 32 pairs, 10 % warmup). Adapters take about 20 times the rate:
`--config.lora.rank=16 --config.optim.learning_rate=2e-5`. Prompts are written by the checkpoint's chat template where it has
one, texts too; 5 % of the prompts are held out unless data.eval names a file.

`configs/dpo.py:sft` trains on responses alone (rows of prompt and completion, or the chosen side of pairs): 3 x 10^-5, no
preference stage. Hardware: any; TinyStories-656K takes a minute for 1,000 pairs on 2 CPU cores, other models were not measured.
"""

from ml_collections import ConfigDict

from configs import tldr


def get_config(arg: str = "") -> ConfigDict:
    """The run's settings; `arg` is "" or "sft"."""
    if arg not in ("", "sft"):
        raise ValueError(f"unknown argument {arg!r}; it is 'sft' or nothing")
    c = tldr.default()
    c.num_steps = -1
    c.num_epochs = 1.0
    c.eval_every_steps = 100
    c.checkpoint_every_steps = 200
    c.export = True
    c.data.eval_share = 0.05
    c.data.text_as_chat = True
    c.data.max_prompt_tokens = 0
    c.data.max_response_tokens = 0
    c.model.remat = "full"
    c.optim.learning_rate = 1e-6
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 0
    c.optim.warmup_ratio = 0.1
    c.sft.learning_rate = 3e-5
    c.sft.warmup_steps = 20
    c.sample.num_prompts = 16
    c.sample.kl_prompts = 0
    c.sample.max_new_tokens = 128
    if arg == "sft":
        c.num_steps = 0
        c.num_epochs = 0.0
        c.data.eval_share = 0.0
        c.sft.num_steps = 500
    return c
