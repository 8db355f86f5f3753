"""The presets of policy gradients: one algorithm, each a row of one table."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from dpojax.errors import ConfigError, did_you_mean
from dpojax.objectives.advantages import ADVANTAGES, SCALES, STD_EPSILON
from dpojax.objectives.policy_gradient import AGGREGATES, RATIOS, check_kl

INFINITE = math.inf


@dataclasses.dataclass(frozen=True)
class PolicySettings:
    """A row of the table."""

    advantage: str  # "return", "group_mean", "leave_one_out", or "given" by a value net
    scale: str  # of the advantages: "none", or by the deviation of the "group" or of the "step"
    ratio: str  # to the old policy: "token", "sequence" or "geometric"
    clip_low: float  # the ratio is held above 1 - clip_low; infinite: not at all
    clip_high: float  # and below 1 + clip_high
    aggregate: str  # "token", "sequence" or "constant"
    kl: str  # where the KL goes: one of policy_gradient.KL_PLACEMENTS
    beta: float  # strength of the pull to the reference; not read with kl=none
    epochs: int  # how often a step's samples are trained on
    max_tokens: float = 1.0  # what a response's sum is divided by with aggregate=constant
    epsilon: float = STD_EPSILON  # added to the standard deviation


# Sources: reinforce Williams 1992; rloo arXiv:2402.14740, as TRL 1.16; grpo arXiv:2402.03300;
# dr_grpo arXiv:2503.20783; dapo arXiv:2503.14476; gspo arXiv:2507.18071; ppo arXiv:2403.17031.
# Those that were published without a KL have beta 0 and take one with k1 in the reward.
PRESETS = {
    "reinforce": PolicySettings(
        advantage="return",
        scale="none",
        ratio="sequence",
        clip_low=INFINITE,
        clip_high=INFINITE,
        aggregate="constant",
        kl="reward",
        beta=0.05,
        epochs=1,
    ),
    "rloo": PolicySettings(
        advantage="leave_one_out",
        scale="none",
        ratio="sequence",
        clip_low=0.2,
        clip_high=0.2,
        aggregate="constant",
        kl="reward",
        beta=0.05,
        epochs=1,
    ),
    "grpo": PolicySettings(
        advantage="group_mean",
        scale="group",
        ratio="token",
        clip_low=0.2,
        clip_high=0.2,
        aggregate="sequence",
        kl="loss_k3",
        beta=0.04,
        epochs=1,
    ),
    "dr_grpo": PolicySettings(
        advantage="group_mean",
        scale="none",
        ratio="token",
        clip_low=0.2,
        clip_high=0.2,
        aggregate="constant",
        kl="reward",
        beta=0.0,
        epochs=1,
    ),
    "dapo": PolicySettings(
        advantage="group_mean",
        scale="group",
        ratio="token",
        clip_low=0.2,
        clip_high=0.28,
        aggregate="token",
        kl="reward",
        beta=0.0,
        epochs=1,
    ),
    "gspo": PolicySettings(
        advantage="group_mean",
        scale="group",
        ratio="geometric",
        clip_low=3e-4,
        clip_high=4e-4,
        aggregate="sequence",
        kl="reward",
        beta=0.0,
        epochs=1,
    ),
    "ppo": PolicySettings(
        advantage="given",
        scale="none",
        ratio="token",
        clip_low=0.2,
        clip_high=0.2,
        aggregate="token",
        kl="reward",
        beta=0.05,
        epochs=4,
    ),
}

SETTINGS = tuple(field.name for field in dataclasses.fields(PolicySettings))


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ConfigError(
            f"{name} is {value!r}; it must be one of {', '.join(choices)}"
            f"{did_you_mean(str(value), choices)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _check_bound(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise ConfigError(f"{name} is {value!r}; it must be a number > 0, or None for no bound")


def _check_least(name: str, value: Any, least: float) -> None:
    if not _is_number(value) or math.isinf(value) or value < least:
        raise ConfigError(f"{name} is {value!r}; it must be a finite number >= {least:g}")


def _check_settings(preset: str, settings: PolicySettings) -> None:
    _check_choice("advantage", settings.advantage, (*ADVANTAGES, "given"))
    _check_choice("scale", settings.scale, SCALES)
    _check_choice("ratio", settings.ratio, RATIOS)
    _check_bound("clip_low", settings.clip_low)
    _check_bound("clip_high", settings.clip_high)
    _check_choice("aggregate", settings.aggregate, AGGREGATES)
    check_kl(settings.kl)
    _check_least("beta", settings.beta, 0)
    _check_least("epochs", settings.epochs, 1)
    _check_least("max_tokens", settings.max_tokens, 1)
    _check_least("epsilon", settings.epsilon, 0)
    if settings.advantage == "given" and settings.scale == "group":
        raise ConfigError(
            f"scale is 'group'; the advantages of {preset} are given for each token: scale=step"
            " whitens them over the step, scale=none leaves them"
        )


def policy_settings(preset: str, **settings: Any) -> PolicySettings:
    """A row of `PRESETS` with the settings that are given.

    Args:
      preset: a key of `PRESETS`.
      settings: fields of `PolicySettings`; a clip of None is no bound.
    Raises: ConfigError for an unknown preset, setting or value, with the nearest known one.
    """
    _check_choice("preset", preset, PRESETS)
    for name in settings:
        if name not in SETTINGS:
            raise ConfigError(
                f"{preset} has no setting {name!r}; it has {', '.join(SETTINGS)}"
                f"{did_you_mean(name, SETTINGS)}"
            )
    for name in ("clip_low", "clip_high"):
        if name in settings and settings[name] is None:
            settings[name] = INFINITE
    row = dataclasses.replace(PRESETS[preset], **settings)
    _check_settings(preset, row)
    return dataclasses.replace(
        row,
        clip_low=float(row.clip_low),
        clip_high=float(row.clip_high),
        beta=float(row.beta),
        max_tokens=float(row.max_tokens),
        epsilon=float(row.epsilon),
    )
