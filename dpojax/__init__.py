"""dpojax: Direct Preference Optimization in JAX, from a laptop to a TPU pod.

Importing this package touches no device and imports neither jax, torch nor transformers: a name is
loaded from its room when it is first used. README.md has the first loop, dpojax/README.md the
rooms.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpojax import exact as exact
    from dpojax import losses as losses
    from dpojax.config import from_config_dict as from_config_dict
    from dpojax.config import load_config_file as load_config_file
    from dpojax.generation.open_model import open_model as open_model
    from dpojax.generation.sampler import SampleSettings as SampleSettings
    from dpojax.objectives.loss import Loss as Loss
    from dpojax.objectives.loss import make_loss as make_loss
    from dpojax.objectives.pairs import PairInfo as PairInfo
    from dpojax.objectives.pairs import PairLogps as PairLogps
    from dpojax.objectives.pairs import ResponseLogps as ResponseLogps
    from dpojax.objectives.pairs import pair_logps as pair_logps
    from dpojax.objectives.policy_loss import make_policy_loss as make_policy_loss
    from dpojax.objectives.pull import loss_gradients as loss_gradients
    from dpojax.objectives.table import OBJECTIVES as OBJECTIVES
    from dpojax.own_loop import make_step as make_step
    from dpojax.own_loop import open_batches as open_batches
    from dpojax.runtime.subprocess_run import run_in_process as run_in_process
    from dpojax.whole_run import run_config as run

__version__ = "0.2.0"

# Name -> the module that holds it, and its name there ("" for the module itself).
_HOMES = {
    "exact": ("dpojax.exact", ""),
    "losses": ("dpojax.losses", ""),
    "from_config_dict": ("dpojax.config", "from_config_dict"),
    "load_config_file": ("dpojax.config", "load_config_file"),
    "open_model": ("dpojax.generation.open_model", "open_model"),
    "SampleSettings": ("dpojax.generation.sampler", "SampleSettings"),
    "Loss": ("dpojax.objectives.loss", "Loss"),
    "make_loss": ("dpojax.objectives.loss", "make_loss"),
    "PairInfo": ("dpojax.objectives.pairs", "PairInfo"),
    "PairLogps": ("dpojax.objectives.pairs", "PairLogps"),
    "ResponseLogps": ("dpojax.objectives.pairs", "ResponseLogps"),
    "pair_logps": ("dpojax.objectives.pairs", "pair_logps"),
    "make_policy_loss": ("dpojax.objectives.policy_loss", "make_policy_loss"),
    "loss_gradients": ("dpojax.objectives.pull", "loss_gradients"),
    "OBJECTIVES": ("dpojax.objectives.table", "OBJECTIVES"),
    "make_step": ("dpojax.own_loop", "make_step"),
    "open_batches": ("dpojax.own_loop", "open_batches"),
    "run_in_process": ("dpojax.runtime.subprocess_run", "run_in_process"),
    "run": ("dpojax.whole_run", "run_config"),
}

__all__ = [
    "OBJECTIVES",
    "Loss",
    "PairInfo",
    "PairLogps",
    "ResponseLogps",
    "SampleSettings",
    "exact",
    "from_config_dict",
    "load_config_file",
    "loss_gradients",
    "losses",
    "make_loss",
    "make_policy_loss",
    "make_step",
    "open_batches",
    "open_model",
    "pair_logps",
    "run",
    "run_in_process",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpojax' has no attribute {name!r}")
    place, attribute = _HOMES[name]
    module = importlib.import_module(place)
    return getattr(module, attribute) if attribute else module


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
