"""Advantages -> the policy's loss: ratios, clipping, the KL's placement, and the mean over a step.

N responses, T tokens; log-probs in nats. mask is True at a token of the response; what stands
elsewhere is never computed with, so it may be NaN. Every term is a number for each token: those of
a response add up to its own objective, whichever ratio it has, so that on-policy gradients do not
depend on the ratio. Sums over the micro-batches of a step add up to the step's loss, because each
is divided by the `Denominators` of the whole step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpojax.errors import ConfigError, did_you_mean

RATIOS = ("token", "sequence", "geometric")
AGGREGATES = ("token", "sequence", "constant")
KL_PLACEMENTS = ("reward", "loss_k2_sequence", "loss_k3", "loss_k3_ratio", "none")

_NO_REFERENCE = (
    "its gradient does not contain the reference, so it is no penalty at all: on-policy its mean is"
    " 0, and divided by lengths it pushes lengths"
)

# Placements that other trainers have, each with what its gradient is (algorithms.md, A0).
REFUSED_KL_PLACEMENTS = {
    "loss_k1": _NO_REFERENCE,
    "reward_k3": (
        "its gradient is that of KL(pi || ref) - KL(ref || pi), which almost vanishes near the"
        " reference and has no fixed point: responses that are rare under the policy die out"
    ),
}


def check_kl(kl: str) -> None:
    """Refuses a placement of the KL that has no gradient towards the reference, or that is unknown.

    Raises: ConfigError with the reason.
    """
    if kl in REFUSED_KL_PLACEMENTS:
        raise ConfigError(
            f"kl is {kl!r}; {REFUSED_KL_PLACEMENTS[kl]}; take reward (k1, exact) or"
            " loss_k2_sequence (exact)"
        )
    if kl not in KL_PLACEMENTS:
        raise ConfigError(
            f"kl is {kl!r}; it must be one of {', '.join(KL_PLACEMENTS)}"
            f"{did_you_mean(str(kl), (*KL_PLACEMENTS, *REFUSED_KL_PLACEMENTS))}"
        )


# --- estimators of the KL -------------------------------------------------------------------------


def k1(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """log pi/ref, of a sample of pi: unbiased for KL(pi || ref), of either sign (Schulman 2020,
    "Approximating KL divergence").
    """
    return log_ratio


def k2(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """(log pi/ref)^2 / 2: its gradient, not its value, is unbiased on-policy."""
    return jnp.square(log_ratio) / 2


def k3(log_ratio: Float[Array, "..."]) -> Float[Array, "..."]:
    """ref/pi - 1 - log ref/pi: unbiased and never negative; its gradient is KL(ref || pi)'s."""
    return jnp.expm1(-log_ratio) + log_ratio


def log_ratios(
    logps: Float[Array, "N T"], base: Float[Array, "N T"], mask: Bool[Array, "N T"]
) -> Float[Array, "N T"]:
    """log pi(y_t) / base(y_t), 0 where the mask is False; the base has no gradient."""
    fixed = jax.lax.stop_gradient(jnp.where(mask, base, 0.0))
    return jnp.where(mask, logps, 0.0) - fixed


def _length(mask: Bool[Array, "N T"], dtype) -> Float[Array, "N 1"]:
    return jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True, dtype=dtype), 1)


def _spread(sums: Float[Array, "N 1"], mask: Bool[Array, "N T"]) -> Float[Array, "N T"]:
    """A response's number, in equal parts over its tokens."""
    return jnp.where(mask, sums / _length(mask, sums.dtype), 0.0)


def kl_terms(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    ref_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    kl: str,
    ratio: str,
) -> Float[Array, "N T"]:
    """The KL's part of the loss, without beta; 0 everywhere for `reward` and `none`.

    loss_k2_sequence: (sum_t log pi/ref)^2 / 2 of the response; its on-policy gradient is KL(pi ||
    ref)'s. loss_k3: k3 of each token, as DeepSeekMath's Eq. 4 (arXiv:2402.03300); its fixed point
    is `exact_policy.k3_fixed_point`, not pi*. loss_k3_ratio: times the ratio to the old policy, as
    TRL 1.16 and DeepSeek-V3.2 have it: the gradient of each token's KL, without its effect on later
    ones.
    """
    if kl in ("reward", "none"):
        return jnp.zeros_like(logps)
    to_ref = log_ratios(logps, ref_logps, mask)
    if kl == "loss_k2_sequence":
        return _spread(k2(jnp.sum(to_ref, axis=-1, keepdims=True)), mask)
    if kl == "loss_k3":
        return k3(to_ref)
    # A sequence's own ratio would make the gradient exact, but it is not what TRL has.
    level = "geometric" if ratio == "geometric" else "token"
    weight = jnp.exp(policy_log_ratios(logps, old_logps, mask, ratio=level))
    return jnp.where(mask, weight * k3(to_ref), 0.0)


# --- the clipped objective ------------------------------------------------------------------------


def policy_log_ratios(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    ratio: str,
) -> Float[Array, "N T"]:
    """The logarithm of the ratio that weighs each token's advantage.

    token: pi/old of the token (PPO, GRPO). sequence: of the whole response (RLOO). geometric: the
    geometric mean over the response's tokens, (pi(y)/old(y))^(1/|y|) (GSPO, Zheng et al. 2025,
    arXiv:2507.18071, Eq. 7).
    """
    if ratio not in RATIOS:
        raise ConfigError(
            f"ratio is {ratio!r}; it must be one of {', '.join(RATIOS)}"
            f"{did_you_mean(str(ratio), RATIOS)}"
        )
    of_token = log_ratios(logps, old_logps, mask)
    if ratio == "token":
        return of_token
    of_response = jnp.sum(of_token, axis=-1, keepdims=True)
    if ratio == "geometric":
        of_response = of_response / _length(mask, of_response.dtype)
    return jnp.where(mask, of_response, 0.0)


class Surrogate(NamedTuple):
    """What is maximised, for each token, and where it was clipped."""

    objective: Float[Array, "N T"]
    ratio: Float[Array, "N T"]  # without gradient; 1 where the mask is False
    clipped_low: Bool[Array, "N T"]
    clipped_high: Bool[Array, "N T"]


def clipped_surrogate(
    log_ratio: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    *,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """min(rho A, clip(rho, 1 - low, 1 + high) A), PPO's Eq. 7 (arXiv:1707.06347).

    The gradient is exactly 0 for rho > 1 + high with A > 0 and for rho < 1 - low with A < 0, and
    that of rho A elsewhere. There is no second bound for A < 0 (verl's dual clip). Infinite bounds
    clip nothing.
    """
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    clipped_low = (ratio < 1 - clip_low) & (advantages < 0)
    clipped_high = (ratio > 1 + clip_high) & (advantages > 0)
    clipped = clipped_low | clipped_high
    # exp of a large log-ratio would be infinite, and 0 * inf in its gradient is NaN.
    free = jnp.exp(jnp.where(clipped, 0.0, log_ratio)) * advantages
    bound = jnp.where(clipped_low, 1 - clip_low, 1 + clip_high)
    limit = jnp.where(clipped, bound, 1.0) * advantages
    return Surrogate(
        objective=jnp.where(clipped, limit, free),
        ratio=ratio,
        clipped_low=clipped_low,
        clipped_high=clipped_high,
    )


def policy_surrogate(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    advantages: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    ratio: str,
    clip_low: float,
    clip_high: float,
) -> Surrogate:
    """`clipped_surrogate` of the ratio's kind, 0 where the mask is False.

    With `sequence` the response has one objective, in equal parts over its tokens: its gradient
    on-policy is then A times that of the sum of log-probs, as with `token`.
    """
    log_ratio = policy_log_ratios(logps, old_logps, mask, ratio=ratio)
    known = jax.lax.stop_gradient(jnp.where(mask, advantages, 0.0))
    surrogate = clipped_surrogate(log_ratio, known, clip_low=clip_low, clip_high=clip_high)
    objective = surrogate.objective
    if ratio == "sequence":
        objective = objective / _length(mask, objective.dtype)
    return surrogate._replace(objective=jnp.where(mask, objective, 0.0))


# --- the mean over a step -------------------------------------------------------------------------


class Denominators(NamedTuple):
    """Of a whole step, whatever its devices and micro-batches."""

    tokens: Float[Array, ""]  # response tokens
    responses: Float[Array, ""]  # responses with at least one token


def count_denominators(mask: Bool[Array, "N T"], dtype=jnp.float32) -> Denominators:
    """The denominators of the step whose responses these are; a row of padding counts nothing."""
    return Denominators(
        tokens=jnp.sum(mask, dtype=dtype),
        responses=jnp.sum(jnp.any(mask, axis=-1), dtype=dtype),
    )


def aggregate_terms(
    terms: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    denominators: Denominators,
    *,
    aggregate: str,
    max_tokens: float = 1.0,
) -> Float[Array, ""]:
    """Terms of tokens -> their part of the step's loss.

    token: the sum over the tokens of the step (DAPO). sequence: the mean over a response's tokens,
    then over responses (GRPO); its expected gradient is not that of E[r], because long responses
    count less. constant: the sum over tokens by max_tokens, a number that no batch changes, then
    the mean over responses (Dr. GRPO); with max_tokens 1 it is the mean over responses of their
    sums.

    Args:
      terms: of each token; what the mask leaves out may be anything. [N, T].
      mask: True: a token of the response. [N, T].
      denominators: those of the whole step.
      aggregate: "token", "sequence" or "constant".
      max_tokens: of "constant" alone, > 0.
    Raises: ConfigError for an unknown aggregate.
    """
    inside = jnp.where(mask, terms, 0.0)
    tokens = jnp.maximum(denominators.tokens, 1).astype(inside.dtype)
    responses = jnp.maximum(denominators.responses, 1).astype(inside.dtype)
    if aggregate == "token":
        return jnp.sum(inside) / tokens
    sums = jnp.sum(inside, axis=-1, keepdims=True)
    if aggregate == "sequence":
        return jnp.sum(sums / _length(mask, sums.dtype)) / responses
    if aggregate == "constant":
        return jnp.sum(sums) / (responses * max_tokens)
    raise ConfigError(
        f"aggregate is {aggregate!r}; it must be one of {', '.join(AGGREGATES)}"
        f"{did_you_mean(str(aggregate), AGGREGATES)}"
    )


# --- beside the policy ----------------------------------------------------------------------------


def value_terms(
    values: Float[Array, "N T"],
    old_values: Float[Array, "N T"],
    returns: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    clip: float,
) -> Float[Array, "N T"]:
    """PPO's value loss of each token: max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2.

    A step away from V_old by more than `clip` that would help has no gradient. An infinite clip
    leaves half the squared error. The caller takes the mean over the step's tokens with
    `aggregate_terms`.

    Args:
      values: V of the state in which each token was drawn, trained. [N, T].
      old_values: what the value net said when the responses were drawn. [N, T].
      returns: advantages + old values, before whitening. [N, T].
      mask: True: a token of the response. [N, T].
      clip: in units of the reward, > 0.
    """
    value = jnp.where(mask, values, 0.0)
    old = jax.lax.stop_gradient(jnp.where(mask, old_values, 0.0))
    target = jax.lax.stop_gradient(jnp.where(mask, returns, 0.0))
    near = jnp.clip(value, old - clip, old + clip)
    return jnp.maximum(jnp.square(value - target), jnp.square(near - target)) / 2


def adaptive_beta(
    beta: float, kl: float, *, target: float, horizon: float, num_samples: int
) -> float:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), Ziegler et al. 2019
    (arXiv:1909.08593), section 2.2.

    Args:
      beta: of this step.
      kl: mean over this step's responses of log pi/ref, nats.
      target: the KL that beta shall hold, nats, > 0.
      horizon: samples over which a constant error of 20 % or more is integrated, > 0.
      num_samples: n, responses of this step.
    Returns: beta of the next step.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * num_samples / horizon)
