"""The embedded default with an objective that is not dpojax's: python -m dpojax.main
--config=experiments/own_objective/config.py.

Hardware: 2 CPU cores. Time: 3 minutes. Expected: README.md beside this file.
"""

import pathlib

from ml_collections import ConfigDict

from dpojax.configs import tldr


def get_config() -> ConfigDict:
    """The run's settings."""
    config = tldr.get_config()
    config.loss.name = f"{pathlib.Path(__file__).with_name('loss.py')}:even_dpo"
    config.loss.extra.sharpness = 0.5
    return config
