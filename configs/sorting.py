"""The world of sorting: SFT on a careless writer, then rewards that can be verified.

    python -m dpojax.main --config=sorting

A prompt is "sort 73916 =", its answer "13679". Demonstrations slip in 60 % of the rows, so that the
policy after SFT sorts right about as often as their writer; the rewards of its own samples teach it
the rest.

Hardware: 2 CPU cores. Time: 4 to 8 minutes. Expected: pass@1 at temperature 1 on 512 held-out
prompts is 35 to 50 % after SFT and over 85 % after 100 steps of GRPO (seen: 44.1 % and 91.0 %).

Every setting is explained in base.py beside this file.
"""

from ml_collections import ConfigDict

from dpojax.configs import base


def get_config() -> ConfigDict:
    """The run's settings."""
    c = base.get_config()
    c.stages = "sft,policy_gradient"
    c.policy_gradient.preset = "grpo"
    c.data.train = "world:sorting"
    c.batch_size = 32  # prompts a step
    c.num_steps = 100
    c.num_epochs = 0.0
    c.eval_every_steps = 25
    c.checkpoint_every_steps = 100
    c.data.max_prompt_tokens = 20
    c.data.max_response_tokens = 12
    c.model.max_positions = 64
    c.sft.steps_from_random = 300
    c.sft.batch_size = 64
    c.sft.learning_rate = 3e-3
    c.sft.warmup_steps = 40
    c.optim.learning_rate = 3e-4
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 5
    c.optim.warmup_ratio = 0.0
    c.sample.num_prompts = 512
    c.sample.max_new_tokens = 12
    c.sample.batch_size = 512
    return c
