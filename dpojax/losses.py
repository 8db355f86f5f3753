"""Log-probs of pairs -> per-pair loss and rewards: pure functions, one per paper, that never reduce.

Notation, as in the papers: a = log pi(y_w|x) - log ref(y_w|x), b the same for y_l, h = a - b; all in
nats. B pairs. A loss is minimised; the caller takes the mean over the pairs of the whole step.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class PairLogps(NamedTuple):
    """Log-probs of both responses of every pair under one model."""

    chosen: Float[Array, "B"]  # log pi(y_w | x), nats
    rejected: Float[Array, "B"]  # log pi(y_l | x), nats
    chosen_lengths: Int[Array, "B"]  # response tokens, EOS included
    rejected_lengths: Int[Array, "B"]


class PairInfo(NamedTuple):
    """What is known of a pair besides its log-probs; None where the data does not say."""

    weight: Float[Array, "B"] | None = None  # multiplies the pair's loss; 0 at padding
    soft_label: Float[Array, "B"] | None = None  # probability that the chosen one is the better one
    margin: Float[Array, "B"] | None = None  # score of chosen minus score of rejected
    mean_chosen_length: Float[Array, ""] | None = None  # of the whole step: sum of |y_w| / number of pairs


class LossOutput(NamedTuple):
    """Per-pair results. The rewards are for logging and carry no gradient."""

    loss: Float[Array, "B"]
    chosen_rewards: Float[Array, "B"]  # beta log pi(y_w|x)/ref(y_w|x)
    rejected_rewards: Float[Array, "B"]


Loss = Callable[..., LossOutput]


def log_ratios(policy: PairLogps, ref: PairLogps) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """(a, b): log pi/ref of the chosen and of the rejected response, nats."""
    return policy.chosen - ref.chosen, policy.rejected - ref.rejected


def sigmoid_loss(policy: PairLogps, ref: PairLogps, *, beta: float, label_smoothing: float) -> Float[Array, "B"]:
    """DPO, Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290): -log s(beta h).

    With label_smoothing e > 0 it is conservative DPO (Mitchell's cDPO note, Eq. 3), for labels that are
    wrong with probability e: -(1 - e) log s(beta h) - e log s(-beta h); its optimum is beta h = logit(1 - e).

    Args:
      policy, ref: log-probs of both responses. [B] each, nats.
      beta: strength of the pull to the reference, > 0.
      label_smoothing: e, in [0, 0.5).
    Returns: per-pair loss, nats. [B]. The caller averages.
    """
    a, b = log_ratios(policy, ref)
    z = beta * (a - b)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def ipo_loss(policy: PairLogps, ref: PairLogps, *, beta: float, average: bool) -> Float[Array, "B"]:
    """IPO, Eq. 17 of Azar et al. 2023 (arXiv:2310.12036): (h - 1 / (2 beta))^2.

    Args:
      policy, ref: log-probs of both responses. [B] each, nats.
      beta: the paper's tau, > 0; larger keeps the policy nearer the reference.
      average: divide each log-ratio by its response's length first (the authors' advice for language models).
    Returns: per-pair loss, nats^2. [B]. The caller averages.
    """
    a, b = log_ratios(policy, ref)
    if average:
        a = a / jnp.maximum(policy.chosen_lengths, 1)
        b = b / jnp.maximum(policy.rejected_lengths, 1)
    return jnp.square(a - b - 1 / (2 * beta))


def hinge_loss(policy: PairLogps, ref: PairLogps, *, beta: float) -> Float[Array, "B"]:
    """Hinge: SLiC (Zhao et al. 2023, arXiv:2305.10425) on log-ratios, as in RSO (arXiv:2309.06657): relu(1 - beta h).

    Args:
      policy, ref: log-probs of both responses. [B] each, nats.
      beta: RSO's gamma, > 0: the margin is 1 / beta nats.
    Returns: per-pair loss. [B]. The caller averages.
    """
    a, b = log_ratios(policy, ref)
    return jax.nn.relu(1 - beta * (a - b))


def sft_loss(policy: PairLogps, info: PairInfo | None, *, normalize: str) -> Float[Array, "B"]:
    """Negative log-likelihood of the chosen response, as an addition to a preference loss.

    "token" (Llama 3, arXiv:2407.21783): -log pi(y_w) / mean |y_w|, whose mean over the pairs is the mean over
    the chosen tokens of the whole step. "pair" (RPO, arXiv:2404.19733): -log pi(y_w) / |y_w|.

    Returns: nats per token. [B].
    """
    if normalize == "pair":
        return -policy.chosen / jnp.maximum(policy.chosen_lengths, 1)
    mean_length = None if info is None else info.mean_chosen_length
    if mean_length is None:
        mean_length = jnp.mean(policy.chosen_lengths.astype(policy.chosen.dtype))
    return -policy.chosen / mean_length


def dpo_gradient(policy: PairLogps, ref: PairLogps, *, beta: float) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Eq. 8 of Rafailov et al. 2023, by hand: d loss / d log pi(y_w|x) and d loss / d log pi(y_l|x).

    -beta s(r_l - r_w) [grad log pi(y_w) - grad log pi(y_l)], with the implicit rewards r = beta log pi/ref: pairs
    that the policy's own reward ranks wrongly weigh most.

    Returns: (-w, +w) with w = beta s(r_l - r_w). [B] each.
    """
    a, b = log_ratios(policy, ref)
    weight = beta * jax.nn.sigmoid(beta * b - beta * a)
    return -weight, weight


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table below: a loss function; its keyword arguments are its settings."""

    function: Callable[..., Float[Array, "B"]]
    closed_form: Callable[..., float]  # settings -> the value at policy == reference


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(sigmoid_loss, lambda beta, label_smoothing: math.log(2)),
    "ipo": Objective(ipo_loss, lambda beta, average: 1 / (4 * beta**2)),
    "hinge": Objective(hinge_loss, lambda beta: 1.0),
}

# What an unset setting means. Only neutral values: they leave the paper's equation as it stands.
NEUTRAL = {"label_smoothing": 0.0, "average": True, "sft_weight": 0.0, "sft_normalize": "token"}

# Valid ranges, checked when the loss is made: name -> (test, what it must be).
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "beta": (lambda v: math.isfinite(v) and v > 0, "a finite number > 0"),
    "label_smoothing": (lambda v: 0 <= v < 0.5, "in [0, 0.5)"),
    "average": (lambda v: isinstance(v, bool), "True or False"),
    "sft_weight": (lambda v: math.isfinite(v) and v >= 0, "a finite number >= 0"),
    "sft_normalize": (lambda v: v in ("token", "pair"), "'token' or 'pair'"),
}

COMMON = ("sft_weight", "sft_normalize")  # settings that every objective takes


def objective_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The full settings of objective `name`: unset ones at their neutral value.

    Raises: ValueError for an unknown name, a setting that the objective does not take, one out of range,
      or one missing that has no neutral value (beta).
    """
    if name not in OBJECTIVES:
        raise ValueError(f"loss.name is {name!r}; it must be one of {', '.join(OBJECTIVES)}")
    parameters = inspect.signature(OBJECTIVES[name].function).parameters.values()
    takes = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] + list(COMMON)
    full = {key: NEUTRAL[key] for key in takes if key in NEUTRAL}
    for key, value in settings.items():
        if value is None:
            continue
        if key not in takes:
            raise ValueError(f"loss.{key} is {value!r}, but {name} takes only {', '.join(takes)}; leave it unset")
        test, must = RANGES[key]
        try:
            valid = test(value)
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(f"loss.{key} is {value!r}; it must be {must}")
        full[key] = value
    missing = [key for key in takes if key not in full]
    if missing:
        raise ValueError(f"loss.{missing[0]} is not set; {name} needs it")
    return full


def make_loss(name: str, **settings) -> Loss:
    """The objective `name` as a pure function (policy, ref, info=None) -> LossOutput.

    Args:
      name: a key of OBJECTIVES.
      **settings: its settings; None means unset. `sft_weight` adds that much of `sft_loss`.
    Returns: a function of two PairLogps (policy and ref) and a PairInfo or None.
    Raises: ValueError as `objective_settings`.
    """
    full = objective_settings(name, settings)
    sft_weight, sft_normalize = full.pop("sft_weight"), full.pop("sft_normalize")
    function = OBJECTIVES[name].function

    def loss(policy: PairLogps, ref: PairLogps, info: PairInfo | None = None) -> LossOutput:
        ref = jax.lax.stop_gradient(ref)  # the one place where the reference is cut off
        value = function(policy, ref, **full)
        if info is not None and info.soft_label is not None:
            swapped = [PairLogps(x.rejected, x.chosen, x.rejected_lengths, x.chosen_lengths) for x in (policy, ref)]
            value = info.soft_label * value + (1 - info.soft_label) * function(*swapped, **full)
        if sft_weight:
            value = value + sft_weight * sft_loss(policy, info, normalize=sft_normalize)
        if info is not None and info.weight is not None:
            value = value * info.weight
        a, b = jax.lax.stop_gradient(log_ratios(policy, ref))
        return LossOutput(value, full["beta"] * a, full["beta"] * b)

    return loss


def closed_form(name: str, **settings) -> float:
    """The objective's value at policy == reference, without its SFT term: log 2 for DPO."""
    full = objective_settings(name, settings)
    return OBJECTIVES[name].closed_form(**{k: v for k, v in full.items() if k not in COMMON})
