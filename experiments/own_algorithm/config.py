"""The embedded world: SFT, then an algorithm that is not dpojax's, reinforce.py beside this file.

python -m dpojax.main --config=experiments/own_algorithm/config.py

Hardware: 2 CPU cores. Time: 3 minutes. Expected: README.md beside this file.
"""

import pathlib

from ml_collections import ConfigDict

from configs import tldr


def get_config() -> ConfigDict:
    """The run's settings."""
    config = tldr.get_config()
    config.stages = f"sft,{pathlib.Path(__file__).with_name('reinforce.py')}:REINFORCE"
    config.num_steps = 60
    config.log_every_steps = 5
    config.optim.learning_rate = 1e-4
    config.sample.max_new_tokens = 40
    return config
