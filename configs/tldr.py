"""The main job: summarisation preferences, SFT then DPO.

    python -m dpojax.main --config=tldr

Alone, it runs the embedded world on a CPU: posts, summaries and labels that dpojax generates
itself. Hardware: 2 CPU cores. Time: under 4 minutes. Expected: a win rate of the DPO policy over
the SFT policy clearly above 50 % by the world's true reward; README.md quotes the last measured
one.

    python -m dpojax.main --config=tldr:paper --config.model.init=DIR --config.data.train=FILE ...

`:paper` holds the TL;DR settings of Rafailov et al. 2023 (section 6 and appendix B;
arXiv:2305.18290): GPT-J-6B after SFT, beta 0.5, batch 64, RMSprop at 1e-6 with 150 warmup steps. It
needs accelerators, the data and weights.

Every setting is explained in base.py beside this file.
"""

from ml_collections import ConfigDict

from dpojax.configs import base
from dpojax.errors import did_you_mean

SAMPLED = ("rloo", "grpo", "ppo", "online_dpo")
ARGUMENTS = ("paper", "reward_model", *SAMPLED)


def get_config(arg: str = "") -> ConfigDict:
    """The run's settings; `arg` is "" (embedded default) or one of ARGUMENTS."""
    if arg not in ("", *ARGUMENTS):
        raise ValueError(
            f"unknown argument {arg!r}; it is one of {', '.join(ARGUMENTS)}, or nothing"
            f"{did_you_mean(arg, ARGUMENTS)}"
        )
    config = base.get_config()
    embedded(config)
    if arg == "reward_model":
        reward_model(config)
    if arg in SAMPLED:
        sampled(config, arg)
    if arg == "paper":
        paper(config)
        config.loss.beta = 0.5
        config.data.prompt_template = "{prompt}\n\nTL;DR:"
    return config


def embedded(c: ConfigDict) -> None:
    """The rates, lengths and samples of the embedded world, whose model starts from random
    weights.
    """
    c.num_steps = 150
    c.num_epochs = 0.0
    c.eval_every_steps = 50
    c.checkpoint_every_steps = 100
    c.data.max_prompt_tokens = 512
    c.data.max_response_tokens = 128
    c.sft.learning_rate = 5e-3
    c.sft.warmup_steps = 50
    c.optim.learning_rate = 1e-4
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 15
    c.optim.warmup_ratio = 0.0
    c.sample.num_prompts = 512
    c.sample.kl_prompts = 128
    c.sample.max_new_tokens = 48


def reward_model(c: ConfigDict) -> None:
    """A Bradley-Terry reward model on the embedded world, after the same SFT stage."""
    c.stages = "sft,reward_model"
    c.reward_model.num_steps = 150
    c.reward_model.learning_rate = 1e-3
    c.reward_model.warmup_steps = 15


def sampled(c: ConfigDict, name: str) -> None:
    """Training on samples of the embedded world by its exact reward, after the same SFT stage."""
    c.batch_size = 16  # prompts
    c.num_steps = 60
    c.log_every_steps = 5
    c.optim.learning_rate = 2e-4
    c.optim.warmup_steps = 5
    if name == "online_dpo":
        c.stages = "sft,online_dpo"
        c.online_dpo.num_samples = 4
        return
    c.stages = "sft,policy_gradient"
    c.policy_gradient.preset = name
    if name == "ppo":
        c.num_steps = 40
        c.policy_gradient.value_learning_rate = 1e-3


def paper(c: ConfigDict) -> None:
    """The hyper-parameters that Rafailov et al. 2023 share between
    their experiments (appendix B).
    """
    c.batch_size = 64
    c.num_steps = 1450  # about one epoch of the 92,858 TL;DR comparisons
    c.eval_every_steps = 312
    c.checkpoint_every_steps = 312
    c.data.max_prompt_tokens = 256
    c.data.max_response_tokens = 256
    c.data.micro_batch_tokens = 8192
    c.data.eval_max_pairs = 0
    c.data.workers = 4
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.logps_chunk_tokens = 1024
    c.sft.num_steps = 0  # the policy starts from an SFT checkpoint
    c.loss.beta = 0.1
    c.optim.name = "rmsprop"
    c.optim.learning_rate = 1e-6
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 150
    c.optim.clip_norm = 10.0
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.sample.num_prompts = 256
    c.sample.max_new_tokens = 128
