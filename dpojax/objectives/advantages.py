"""Rewards -> advantages: which samples of a step are made likelier, and by how much.

N responses are the samples of one whole step, T tokens, group = the prompt of each response. The
statistics are those of the arrays that are given: the caller passes a whole step, whatever its
devices and micro-batches. A reward that is NaN means that there is none; a response without a
reward or without tokens takes no part in any statistic. Groups are compared by their rewards, never
by a rounded standard deviation, so that equal rewards give advantages of exactly 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.errors import ConfigError, did_you_mean

SCALES = ("none", "group", "step")

# TRL's, in (r - mean) / (std + 1e-4).
STD_EPSILON = 1e-4


class GroupStatistics(NamedTuple):
    """Of the group of each response, over the responses that take part."""

    count: Float[Array, " N"]
    mean: Float[Array, " N"]
    std: Float[Array, " N"]  # ddof 1; 0 for a group of one
    varies: Bool[Array, " N"]  # False: all values of the group are equal


def group_statistics(
    values: Float[Array, " N"], group: Int[Array, " N"], valid: Bool[Array, " N"]
) -> GroupStatistics:
    """Count, mean and standard deviation (ddof 1) of each response's group.

    Args:
      values: of each response; what is not valid may be anything.
      group: the prompt of each response: any whole numbers, in any order.
      valid: True: the response takes part.
    """
    size = values.shape[0]
    _, numbers = jnp.unique(group, return_inverse=True, size=size)
    numbers = numbers.reshape(size)
    zero = jnp.zeros_like(values)

    def total(x: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(valid, x, zero), numbers, num_segments=size)[numbers]

    count = total(jnp.ones_like(values))
    known = jnp.where(valid, values, zero)
    mean = total(known) / jnp.maximum(count, 1)
    squares = total(jnp.square(known - mean))
    std = jnp.sqrt(squares / jnp.maximum(count - 1, 1))
    largest = jax.ops.segment_max(jnp.where(valid, values, -jnp.inf), numbers, num_segments=size)[
        numbers
    ]
    least = jax.ops.segment_min(jnp.where(valid, values, jnp.inf), numbers, num_segments=size)[
        numbers
    ]
    return GroupStatistics(count=count, mean=mean, std=std, varies=largest > least)


def scored(rewards: Float[Array, " N"], mask: Bool[Array, "N T"]) -> Bool[Array, " N"]:
    """True: the response has a reward and at least one token."""
    return ~jnp.isnan(rewards) & jnp.any(mask, axis=-1)


def informative_groups(
    rewards: Float[Array, " N"], group: Int[Array, " N"], valid: Bool[Array, " N"]
) -> Bool[Array, " N"]:
    """True: the response's group has two different rewards, so that it has something to teach.

    DAPO's dynamic sampling draws again for the prompts of the others (Yu et al. 2025,
    arXiv:2503.14476, Eq. 11). It takes the reward of the task, before penalties for length or KL.
    """
    return valid & group_statistics(rewards, group, valid).varies


# --- one number for a response --------------------------------------------------------------------


def sequence_returns(
    rewards: Float[Array, " N"],
    old_logps: Float[Array, "N T"],
    ref_logps: Float[Array, "N T"] | None,
    mask: Bool[Array, "N T"],
    *,
    beta: float,
) -> Float[Array, " N"]:
    """r - beta sum_t log pi_old(y_t) / ref(y_t): the reward with the KL (k1) of the whole response.

    With these returns the expected policy gradient is that of E[r] - beta KL(pi || ref), exactly
    (Ziegler et al. 2019, arXiv:1909.08593, Eq. 2). At beta 0 `ref_logps` is not read.
    """
    if beta == 0:
        return rewards
    if ref_logps is None:
        raise ConfigError(f"ref_logps is None; beta is {beta}, and the KL needs the reference")
    inside = jnp.where(mask, old_logps, 0.0) - jnp.where(mask, ref_logps, 0.0)
    return rewards - beta * jnp.sum(inside, axis=-1)


def return_advantages(
    returns: Float[Array, " N"], group: Int[Array, " N"], valid: Bool[Array, " N"]
) -> Float[Array, " N"]:
    """REINFORCE without a baseline (Williams 1992): A_i = R_i."""
    del group  # every advantage function takes the same
    return jnp.where(valid, returns, 0.0)


def group_mean_advantages(
    returns: Float[Array, " N"], group: Int[Array, " N"], valid: Bool[Array, " N"]
) -> Float[Array, " N"]:
    """A_i = R_i - mean of the group (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783).

    Its expected gradient is (G - 1) / G of that of E[R], because the mean holds R_i itself. A group
    of one, or of equal returns, has advantages of exactly 0.
    """
    groups = group_statistics(returns, group, valid)
    centred = jnp.where(valid, returns, 0.0) - groups.mean
    return jnp.where(valid & groups.varies, centred, 0.0)


def leave_one_out_advantages(
    returns: Float[Array, " N"], group: Int[Array, " N"], valid: Bool[Array, " N"]
) -> Float[Array, " N"]:
    """RLOO (Ahmadian et al. 2024, arXiv:2402.14740): A_i = R_i - mean of the group's other returns.

    It is G / (G - 1) times the difference from the group's mean, and its expected gradient is that
    of E[R].
    """
    count = group_statistics(returns, group, valid).count
    factor = count / jnp.maximum(count - 1, 1)
    return factor * group_mean_advantages(returns, group, valid)


ADVANTAGES = {
    "return": return_advantages,
    "group_mean": group_mean_advantages,
    "leave_one_out": leave_one_out_advantages,
}


def scale_advantages(
    advantages: Float[Array, " N"],
    returns: Float[Array, " N"],
    rewards: Float[Array, " N"],
    group: Int[Array, " N"],
    valid: Bool[Array, " N"],
    *,
    scale: str,
    epsilon: float = STD_EPSILON,
) -> Float[Array, " N"]:
    """A / (std(R) + epsilon), the standard deviation with ddof 1, as in TRL.

    Where all rewards are equal (without the KL in them) the advantage is 0: what varies there is
    the KL alone, which a division by its own standard deviation would blow up.

    Args:
      advantages: one for each response. [N].
      returns: what the standard deviation is of. [N].
      rewards: what decides whether there is any variance. [N].
      group: the prompt of each response. [N].
      valid: True: the response takes part. [N].
      scale: "none"; "group" (GRPO): of the response's group; "step": of the whole step.
      epsilon: added to the standard deviation.
    Raises: ConfigError for an unknown scale.
    """
    if scale not in SCALES:
        raise ConfigError(
            f"scale is {scale!r}; it must be one of {', '.join(SCALES)}"
            f"{did_you_mean(scale, SCALES)}"
        )
    if scale == "none":
        return advantages
    if scale == "step":
        group = jnp.zeros_like(group)
    std = group_statistics(returns, group, valid).std
    varies = group_statistics(rewards, group, valid).varies
    return jnp.where(varies, advantages / jnp.where(varies, std + epsilon, 1.0), 0.0)


def overlong_penalty(
    lengths: Int[Array, " N"], *, max_tokens: int, cache_tokens: int
) -> Float[Array, " N"]:
    """DAPO's soft punishment of long responses (arXiv:2503.14476, Eq. 13), to add to the reward.

    It is 0 up to max_tokens - cache_tokens tokens, falls to -1 at max_tokens, and stays there.

    Args:
      lengths: response tokens (not characters), EOS included. [N].
      max_tokens: the paper's L_max, > 0.
      cache_tokens: the paper's L_cache, 1 to max_tokens.
    """
    if not 1 <= cache_tokens <= max_tokens:
        raise ConfigError(
            f"cache_tokens is {cache_tokens} and max_tokens is {max_tokens}; cache_tokens must be 1"
            " to max_tokens"
        )
    excess = (lengths - (max_tokens - cache_tokens)) / cache_tokens
    return -jnp.clip(excess, 0.0, 1.0)


# --- one number for a token -----------------------------------------------------------------------


def token_advantages(
    advantages: Float[Array, " N"], mask: Bool[Array, "N T"]
) -> Float[Array, "N T"]:
    """The response's advantage at each of its tokens, 0 elsewhere."""
    return jnp.where(mask, advantages[:, None], 0.0)


def token_rewards(
    rewards: Float[Array, " N"],
    old_logps: Float[Array, "N T"],
    ref_logps: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    beta: float,
) -> Float[Array, "N T"]:
    """PPO's rewards: -beta log pi_old(y_t) / ref(y_t), and the score at the last token of the
    response.

    The last token is EOS, or the last one that fitted. (OpenAI's code and its followers put the
    score behind it, with one more value; the returns are the same for lambda = 1 alone.)
    """
    inside = jnp.where(mask, old_logps, 0.0) - jnp.where(mask, ref_logps, 0.0)
    later = jnp.cumsum(mask[:, ::-1], axis=-1)[:, ::-1]
    is_last = mask & (later == 1)
    score = jnp.where(is_last, rewards[:, None], 0.0)  # 0 * NaN would reach the other tokens
    return score.astype(inside.dtype) - beta * inside


class TokenAdvantages(NamedTuple):
    """What PPO's two losses take."""

    advantages: Float[Array, "N T"]  # 0 where the mask is False
    returns: Float[Array, "N T"]  # advantage + value: the value loss's target


def gae_advantages(
    rewards: Float[Array, "N T"],
    values: Float[Array, "N T"],
    mask: Bool[Array, "N T"],
    *,
    gamma: float,
    lam: float,
) -> TokenAdvantages:
    """Generalised advantages (Schulman et al. 2015, arXiv:1506.02438, Eq. 16), over a response's
    tokens alone.

    What the mask leaves out (padding, or the output of a tool in the middle) is passed over: the
    next token's value is that of the next token of the response. After the last one it is 0: a
    response that was cut off keeps its score and is not bootstrapped.

    Args:
      rewards: of each token; what the mask leaves out may be anything. [N, T].
      values: V of the state in which each token was drawn; likewise. [N, T].
      mask: True: a token of the response. [N, T].
      gamma: discount, in [0, 1].
      lam: lambda, in [0, 1].
    """
    known_rewards = jnp.where(mask, rewards, 0.0)
    known_values = jnp.where(mask, values, 0.0)

    def step(carry, token):
        next_advantage, next_value = carry
        reward, value, inside = token
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * lam * next_advantage
        carry = (
            jnp.where(inside, advantage, next_advantage),
            jnp.where(inside, value, next_value),
        )
        return carry, jnp.where(inside, advantage, 0.0)

    start = jnp.zeros_like(known_values[:, 0])
    _, advantages = jax.lax.scan(
        step, (start, start), (known_rewards.T, known_values.T, mask.T), reverse=True
    )
    advantages = advantages.T
    return TokenAdvantages(advantages=advantages, returns=advantages + known_values)


def whiten(
    values: Float[Array, "N T"], mask: Bool[Array, "N T"], *, shift_mean: bool = True
) -> Float[Array, "N T"]:
    """(x - mean) / std over all tokens of the step, ddof 1; with the mean left as it was if not
    `shift_mean`.

    PPO whitens advantages with `shift_mean`, and rewards (where it does) without. The shift takes
    (N - 1) / N of the expected gradient, the division changes its length alone. Values without
    variance become 0 (or stay as they are).
    """
    known = jnp.where(mask, values, 0.0)
    count = jnp.sum(mask, dtype=known.dtype)
    mean = jnp.sum(known) / jnp.maximum(count, 1)
    centred = jnp.where(mask, known - mean, 0.0)
    variance = jnp.sum(jnp.square(centred)) / jnp.maximum(count - 1, 1)
    largest = jnp.max(jnp.where(mask, values, -jnp.inf))
    least = jnp.min(jnp.where(mask, values, jnp.inf))
    white = jnp.where(largest > least, centred * jax.lax.rsqrt(variance + 1e-8), 0.0)
    if shift_mean:
        return white
    return jnp.where(mask, white + mean, 0.0)
