"""The algorithms by the name that config.stages gives them."""

from dpojax.algorithms import dpo, online_dpo, policy_gradient, reward_model, sft
from dpojax.algorithms.face import Algorithm
from dpojax.config.schema import Config
from dpojax.untrusted.user_function import load_function

ALGORITHMS: dict[str, Algorithm] = {
    "sft": sft.ALGORITHM,
    "dpo": dpo.ALGORITHM,
    "reward_model": reward_model.ALGORITHM,
    "policy_gradient": policy_gradient.ALGORITHM,
    "online_dpo": online_dpo.ALGORITHM,
}


def find_algorithm(name: str) -> Algorithm:
    """One of dpojax's own, or an Algorithm that `file.py:name` or `module:name` names.

    Raises: ConfigError if there is none.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    return load_function(name, "stages", kind=Algorithm)


def stage_algorithms(config: Config) -> list[Algorithm]:
    """The algorithms of config.stages, in order."""
    return [find_algorithm(name) for name in config.stage_names]
