"""Anthropic HH: single-turn and multi-turn dialogue preferences.

    python -m dpojax.main --config=hh --config.data.train=FILE --config.data.eval=FILE
    --config.model.init=DIR
    python -m dpojax.main --config=hh:paper ...

Rows are whole "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts, as published; rows that hold no
usable pair are dropped and counted. `:paper` holds the settings of Rafailov et al. 2023:
Pythia-2.8B after SFT, beta 0.1, batch 64, RMSprop at 1e-6, 150 warmup steps, lengths 512 and 256,
one epoch. Hardware: accelerators; the time depends on them and was not measured. Without `:paper`:
settings for a small model on a CPU; minutes.
"""

from ml_collections import ConfigDict

from dpojax.configs import tldr


def get_config(arg: str = "") -> ConfigDict:
    """The run's settings; `arg` is "" or "paper"."""
    config = tldr.get_config(arg)
    config.loss.beta = 0.1
    config.data.prompt_template = ""
    config.data.max_prompt_tokens = 256
    config.data.max_response_tokens = 256
    config.sft.num_steps = 0
    if arg == "paper":
        config.num_steps = 2512  # one epoch of the 160,800 training pairs
    else:
        config.num_steps = 200
        config.optim.learning_rate = 1e-4
        config.sample.num_prompts = 64
    return config
