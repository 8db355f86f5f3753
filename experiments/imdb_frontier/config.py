"""The runs of the experiment: a small language model of reviews, and what is trained from it."""

from ml_collections import ConfigDict

from dpojax.configs import base


def get_config(arg: str = "") -> ConfigDict:
    """The run's settings; `arg` is "lm", "policy" or "reward_model"."""
    c = base.get_config()
    c.num_epochs = 0.0
    c.log_every_steps = 5
    c.checkpoint_every_steps = 100_000  # at the end
    c.data.max_prompt_tokens = 16
    c.data.max_response_tokens = 96
    c.data.micro_batch_tokens = 8192
    c.self_check = "off"
    c.sample.max_new_tokens = 32
    c.sample.batch_size = 512
    c.sample.num_prompts = 0
    if arg == "lm":
        c.export = True
        c.num_steps = 0
        c.model.hidden_size = 128
        c.model.intermediate_size = 352
        c.model.num_layers = 4
        c.model.num_heads = 4
        c.model.num_kv_heads = 4
        c.model.head_dim = 32
        c.model.max_positions = 256
        c.model.remat = "none"
        c.sft.batch_size = 64
        c.sft.learning_rate = 3e-3
        c.sft.warmup_steps = 50
        return c
    c.sft.num_steps = 0
    c.data.max_response_tokens = 32
    c.model.remat = "none"
    c.optim.schedule = "constant"
    c.optim.warmup_ratio = 0.0
    c.optim.warmup_steps = 5
    c.optim.learning_rate = 3e-4
    if arg == "reward_model":
        c.stages = "reward_model"
        c.reward_model.learning_rate = 1e-3
        return c
    c.sample.num_prompts = 512
    c.sample.kl_prompts = 512
    return c
