"""A packed batch -> its responses as rows of tokens [N, W], as policy-gradient losses take them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.data.packing import PackedBatch


def response_tokens(
    mb: PackedBatch, values: Float[Array, "A T"], width: int
) -> Float[Array, "N W"]:
    """Values of scored tokens, a row for each response, from its first token on; 0 elsewhere.

    N = A S responses of a micro-batch, the padding's too.

    Args:
      width: W, at least the tokens of the longest response.
    """

    def shard(values, weight, response, lengths):
        live = weight > 0
        before = jnp.cumsum(live) - live  # scored tokens of the shard before this one
        first = jax.ops.segment_min(before, response, lengths.shape[0])
        place = jnp.where(live, before - first[response], width)
        rows = jnp.zeros((lengths.shape[0], width), values.dtype)
        return rows.at[response, place].set(values, mode="drop")

    rows = jax.vmap(shard)(values, mb.weight, mb.response, mb.lengths)
    return rows.reshape(-1, width)


def token_mask(lengths: Int[Array, "..."], width: int) -> Bool[Array, "N W"]:
    """True at the tokens of each response."""
    return jnp.arange(width) < lengths.reshape(-1, 1)


class StepResponses(NamedTuple):
    """The responses of a whole step; those of padding have no tokens. N = M A S."""

    rewards: Float[Array, " N"]  # NaN: it has none
    mask: Bool[Array, "N W"]
    group: Int[Array, " N"]  # the prompt's row of the source, -1 at padding


def step_responses(batch: PackedBatch, width: int) -> StepResponses:
    """The responses of a batch of rollouts, whose rewards are the margins of their own pairs."""

    def shard(chosen, margin, valid, lengths):
        rewards = jnp.full(lengths.shape, jnp.nan, jnp.float32)
        place = jnp.where(valid, chosen, lengths.shape[0])
        return rewards.at[place].set(margin.astype(jnp.float32), mode="drop")

    rewards: Any = jax.vmap(jax.vmap(shard))(batch.chosen, batch.margin, batch.valid, batch.lengths)
    return StepResponses(
        rewards=rewards.reshape(-1),
        mask=token_mask(batch.lengths, width),
        group=batch.response_row.reshape(-1),
    )
