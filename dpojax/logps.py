"""Hidden states -> log pi(y | x): only at response positions, chunked over tokens, in float32.

Legend: A data shards, U tokens of a shard's rows, T scored tokens of a shard, C tokens of a chunk,
V vocabulary, D model, S responses. No array of [rows, length, vocabulary] exists anywhere.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Unembed = Callable[[Any, Array], Array]  # (head, hidden [..., D]) -> float32 logits [..., V]


class TokenScores(NamedTuple):
    """What is known of every scored token. Only `logps` carries a gradient."""

    logps: Float[Array, "A T"]  # nats
    entropy: Float[Array, "A T"]  # of the next-token distribution, nats
    correct: Bool[Array, "A T"]  # the target is the most likely token
    mean_logit: Float[Array, "A T"]  # over the vocabulary, TRL's logits/*


def _is_target(target, vocab_size):
    # A comparison instead of a gather: it stays local when the vocabulary is sharded.
    return target[..., None] == jax.lax.broadcasted_iota(jnp.int32, (*target.shape, vocab_size), target.ndim)


def _target_logit(logits, target):
    return jnp.sum(jnp.where(_is_target(target, logits.shape[-1]), logits, 0.0), axis=-1)


def _chunk(x, index, size):
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _gather(hidden, predictor):
    return jnp.take_along_axis(hidden, predictor[..., None], axis=1)


def _pad(x, size):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)))


def _num_chunks(count, size):
    return (count + size - 1) // size


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 7))
def token_scores(
    unembed: Unembed,
    head: Any,
    hidden: Float[Array, "A U D"],
    predictor: Int[Array, "A T"],
    target: Int[Array, "A T"],
    count: Int[Array, ""],
    details: Bool[Array, ""],
    chunk: int,
) -> TokenScores:
    """log pi(target | prefix) of every scored token, in nats, and what is logged of it.

    The logits exist one chunk of tokens at a time, in both passes: the backward pass computes them
    anew and accumulates the head's gradient in float32. Work follows `count`, not T; the chunks past it are 0.

    Args:
      unembed: (head, hidden) -> float32 logits.
      head: parameters of `unembed`.
      hidden: final hidden states of a shard's rows, flattened.
      predictor: which token's hidden state predicts each scored token.
      target: the scored token ids.
      count: most scored tokens in use in any shard; the rest is padding.
      details: whether to compute more than `logps`; the other fields are 0 if not.
      chunk: C, tokens per chunk and shard.
    """
    target, predictor, size = _pad(target, chunk), _pad(predictor, chunk), target.shape[1]

    def body(i, out):
        y = _chunk(target, i, chunk)
        logits = unembed(head, _gather(hidden, _chunk(predictor, i, chunk)))
        lse, own = jax.nn.logsumexp(logits, axis=-1), _target_logit(logits, y)
        logps = own - lse

        def describe():
            entropy = lse - jnp.sum(jnp.exp(logits - lse[..., None]) * logits, axis=-1)
            return TokenScores(logps, entropy, own >= logits.max(axis=-1), logits.mean(axis=-1))

        zero = jnp.zeros_like(logps)
        part = jax.lax.cond(details, describe, lambda: TokenScores(logps, zero, zero.astype(bool), zero))
        return jax.tree.map(lambda o, p: jax.lax.dynamic_update_slice_in_dim(o, p, i * chunk, axis=1), out, part)

    zero = jnp.zeros(target.shape, jnp.float32)
    start = TokenScores(zero, zero, jnp.zeros(target.shape, bool), zero)
    out = jax.lax.fori_loop(0, _num_chunks(count, chunk), body, start)
    return jax.tree.map(lambda x: x[:, :size], out)


def _token_scores_fwd(unembed, head, hidden, predictor, target, count, details, chunk):
    scores = token_scores(unembed, head, hidden, predictor, target, count, details, chunk)
    return scores, (head, hidden, predictor, target, count)


def _token_scores_bwd(unembed, chunk, residuals, cotangents):
    head, hidden, predictor, target, count = residuals
    target, predictor, cotangent = _pad(target, chunk), _pad(predictor, chunk), _pad(cotangents.logps, chunk)
    shard = jnp.arange(hidden.shape[0])[:, None]

    def body(i, carry):
        d_head, d_hidden = carry
        index, y, g = (_chunk(x, i, chunk) for x in (predictor, target, cotangent))
        logits, pullback = jax.vjp(unembed, head, _gather(hidden, index))
        lse = jax.nn.logsumexp(logits, axis=-1)
        d_logits = (_is_target(y, logits.shape[-1]) - jnp.exp(logits - lse[..., None])) * g[..., None]
        d_head_chunk, d_hidden_chunk = pullback(d_logits)
        d_head = jax.tree.map(lambda total, part: total + part.astype(jnp.float32), d_head, d_head_chunk)
        return d_head, d_hidden.at[shard, index].add(d_hidden_chunk.astype(jnp.float32))

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (head, hidden))
    d_head, d_hidden = jax.lax.fori_loop(0, _num_chunks(count, chunk), body, zeros)
    d_head = jax.tree.map(lambda g, x: g.astype(x.dtype), d_head, head)
    return d_head, d_hidden.astype(hidden.dtype), None, None, None, None


token_scores.defvjp(_token_scores_fwd, _token_scores_bwd)


def token_logps(unembed: Unembed, head, hidden, predictor, target, count, chunk: int) -> Float[Array, "A T"]:
    """`token_scores` without the details."""
    scores: TokenScores = token_scores(unembed, head, hidden, predictor, target, count, jnp.asarray(False), chunk)
    return scores.logps


def response_sums(
    values: Float[Array, "A T"], weight: Float[Array, "A T"], slot: Int[Array, "A T"], num_slots: int
) -> Float[Array, "A S"]:
    """Sums per-token values over each response: log pi(y | x) when the values are token log-probs."""
    # `where` and not a product: padding may hold anything, and 0 * inf is nan.
    values = jnp.where(weight > 0, values * weight, 0.0)
    return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_slots))(values, slot)
