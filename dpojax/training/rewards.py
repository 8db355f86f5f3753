"""A micro-batch -> the rewards of its responses and pairs, read by a scalar head."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.data.packing import PackedBatch
from dpojax.models.decoder import Model
from dpojax.models.logits import read_scalar
from dpojax.training.micro_batches import stacked
from dpojax.training.pairs import gather_pairs
from dpojax.training.scores import hidden_by_shard


def response_rewards(model: Model, params: Any, mb: PackedBatch) -> Float[Array, "A S"]:
    """r(x, y) of every response: the head's number at its last token, EOS included, float32.

    Numbers of padding mean nothing. The token is found by its place in the row, never by its id, so
    that an EOS in the prompt, or a padding id that is EOS, changes nothing.
    """
    hidden, _ = hidden_by_shard(model, params, mb)
    last = jnp.take_along_axis(hidden, mb.last[..., None], axis=1)
    return read_scalar(model.head(params), last)


def pair_rewards(
    model: Model, params: Any, mb: PackedBatch
) -> tuple[Float[Array, "A P"], Float[Array, "A P"]]:
    """(r(x, y_w), r(x, y_l)) of every pair; 0 at padding."""
    chosen, rejected = gather_pairs(mb, response_rewards(model, params, mb))
    shape = mb.valid.shape
    return (
        jnp.where(mb.valid, chosen.reshape(shape), 0.0),
        jnp.where(mb.valid, rejected.reshape(shape), 0.0),
    )


def shares_of_groups(batch: PackedBatch) -> Float[Array, "*M A P"]:
    """One over the number of pairs of its prompt, for every pair; 0 at padding.

    A prompt with K ranked responses then counts as one, whatever C(K, 2) is (Ouyang et al. 2022,
    arXiv:2203.02155, section 3.4). All pairs of a prompt lie in one data shard's micro-batch.
    """
    same = batch.row_id[..., :, None] == batch.row_id[..., None, :]
    count = jnp.sum(same & batch.valid[..., None, :], axis=-1)
    return jnp.where(batch.valid, 1.0 / jnp.maximum(count, 1), 0.0)


def make_rewards_step(model: Model):
    """The pass (params, batch) -> the rewards of all responses, [M, A, S]."""

    def step(params: Any, batch: PackedBatch) -> Float[Array, "M A S"]:
        def rewards(mb: PackedBatch, i) -> Float[Array, "A S"]:
            return response_rewards(model, params, mb)

        return stacked(rewards, batch)

    return step
