"""Attention of new tokens over two caches: their prompts' and their own.

Legend: R prompts, G samples of each, B = R G rows, P prompt columns, T sampled columns, H query
heads, K kv heads, J query heads per kv head, E head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.models.attention.blocks import MASKED, soft_capped


class KeyValues(NamedTuple):
    """Keys and values of one layer, laid out as decoding's products read them.

    With keys laid out as values are, the scores of few queries take seven times as long on CPUs.
    """

    k: Float[Array, "R K E S"]
    v: Float[Array, "R K S E"]


class Cache(NamedTuple):
    """What decoding keeps of the tokens so far: one entry a layer.

    A prompt's keys and values are there once, whatever the number of its samples.
    """

    prompts: tuple[KeyValues, ...]  # R rows of P columns
    samples: tuple[KeyValues, ...]  # B rows of T columns


class Seen(NamedTuple):
    """Where the columns of both caches stand, and the query of every row."""

    is_key: Bool[Array, "R P"]  # columns that hold a token of the prompt
    prompt_lengths: Int[Array, " R"]
    step: Int[Array, ""]  # the column of the samples' cache that the new token takes


def seen_columns(
    seen: Seen, rows: int, columns: int, window: int | None
) -> tuple[Bool[Array, "R G P"], Bool[Array, "R G T"]]:
    """Which columns of both caches a new token sees.

    Args:
      rows, columns: B and T.
      window: a key is seen only at a distance of positions below it; None: at any.
    """
    prompts = seen.is_key.shape[0]
    column = jnp.arange(columns)
    of_prompt = seen.is_key
    of_sample = column <= seen.step
    if window is not None:
        position = jnp.cumsum(seen.is_key, axis=1) - 1
        query = seen.prompt_lengths[:, None] + seen.step
        of_prompt &= query - position < window
        of_sample &= seen.step - column < window
    samples = rows // prompts
    return (
        jnp.broadcast_to(of_prompt[:, None], (prompts, samples, of_prompt.shape[1])),
        jnp.broadcast_to(of_sample, (prompts, samples, columns)),
    )


def attend_cached(
    q: Float[Array, "B H E"],
    prompts: KeyValues,
    samples: KeyValues,
    seen: tuple[Bool[Array, "R G P"], Bool[Array, "R G T"]],
    *,
    softcap: float | None,
) -> Float[Array, "B H E"]:
    """One softmax over both caches.

    The samples of a prompt meet its keys in one matrix product. Scores and softmax are float32; q
    is scaled already.
    """
    rows, heads, head_dim = q.shape
    num_prompts, kv_heads = prompts.k.shape[:2]
    num_samples = rows // num_prompts
    per_kv = heads // kv_heads

    def by_prompt(x):
        """[B, K, J, ...] -> [R, K, G J, ...]: the queries that share keys side by side."""
        x = x.reshape(num_prompts, num_samples, *x.shape[1:])
        x = jnp.swapaxes(x, 1, 2)
        return x.reshape(num_prompts, kv_heads, num_samples * per_kv, *x.shape[4:])

    def by_row(x):
        """The inverse of `by_prompt`."""
        x = x.reshape(num_prompts, kv_heads, num_samples, per_kv, *x.shape[3:])
        return jnp.swapaxes(x, 1, 2).reshape(rows, kv_heads, per_kv, *x.shape[4:])

    def masked_scores(queries, keys, mask):
        scores = jnp.einsum("RKQE,RKES->RKQS", queries, keys, preferred_element_type=jnp.float32)
        return jnp.where(mask, soft_capped(scores, softcap), MASKED)

    of_prompt, of_sample = seen
    queries = q.reshape(rows, kv_heads, per_kv, head_dim)
    mask = jnp.repeat(of_prompt, per_kv, axis=1)[:, None]
    prompt_scores = masked_scores(by_prompt(queries), prompts.k, mask)
    sample_scores = masked_scores(queries, samples.k, of_sample.reshape(rows, 1, 1, -1))

    top = jnp.maximum(by_row(prompt_scores.max(axis=-1)), sample_scores.max(axis=-1))
    prompt_weights = jnp.exp(prompt_scores - by_prompt(top)[..., None])
    sample_weights = jnp.exp(sample_scores - top[..., None])
    total = by_row(prompt_weights.sum(axis=-1)) + sample_weights.sum(axis=-1)
    prompt_weights = prompt_weights / by_prompt(total)[..., None]
    sample_weights = sample_weights / total[..., None]

    def weighted(weights, values):
        return jnp.einsum("RKQS,RKSE->RKQE", weights.astype(values.dtype), values)

    out = by_row(weighted(prompt_weights, prompts.v)) + weighted(sample_weights, samples.v)
    return out.reshape(rows, heads, head_dim)


def write_column(
    cache: KeyValues, k: Float[Array, "B K E"], v: Float[Array, "B K E"], column: Int[Array, ""]
) -> KeyValues:
    """The samples' cache with the new token's key and value in its column."""
    write = jax.lax.dynamic_update_slice_in_dim
    return KeyValues(
        write(cache.k, k[..., None], column, axis=3), write(cache.v, v[:, :, None], column, axis=2)
    )
