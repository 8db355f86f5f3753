"""The attention rule of prefix-shared rows, on plain XLA.

Legend: R rows, L row length, H query heads, K kv heads, J query heads per kv head, E head dim,
Q queries and S keys of one call, N blocks of C tokens. The rule itself is `dpojax.data.packing.visible`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dpojax.data.packing import visible

NO_WINDOW = 2**30  # larger than any distance
SAVED = "attention"  # the name under which a remat policy finds what the backward pass needs of the forward pass
MASKED = -1e30  # exp(MASKED - max) is exactly 0 in float32, and a row without a visible key stays finite


class Rows(NamedTuple):
    """What attention must know of the tokens of packed rows."""

    group: Int[Array, "R L"]
    branch: Int[Array, "R L"]
    position: Int[Array, "R L"]


class Kernel(NamedTuple):
    """One way to compute the rule."""

    prepare: Callable[[Rows], Any]  # once a pass
    attend: Callable[..., Array]  # (q, k, v, what `prepare` made, window, softcap=) -> out; q is scaled already


def _cap(scores, softcap: float | None):
    """Soft-capped scores, cap tanh(s / cap) (Gemma 2, arXiv:2408.00118, section 2)."""
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def attend(
    q: Float[Array, "R Q H E"],
    k: Float[Array, "R S K E"],
    v: Float[Array, "R S K E"],
    mask: Bool[Array, "R Q S"],
    *,
    softcap: float | None,
) -> Float[Array, "R Q H E"]:
    """Softmax attention where `mask` is True; grouped heads; scores and softmax in float32. q is scaled already."""
    rows, queries, heads, head_dim = q.shape
    q = q.reshape(rows, queries, k.shape[2], heads // k.shape[2], head_dim)
    scores = _cap(jnp.einsum("RQKJE,RSKE->RKJQS", q, k, preferred_element_type=jnp.float32), softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("RKJQS,RSKE->RQKJE", weights.astype(v.dtype), v)
    return out.reshape(rows, queries, heads, head_dim)


def full_attention(q, k, v, rows: Rows, window=None, *, softcap: float | None = None):
    """The rule through one [L, L] mask: the oracle of every faster path. Arguments as `attend_blocks`'s, with `Rows`."""
    index = jnp.arange(q.shape[1])
    group, branch, position = rows
    mask = visible(index[:, None], index[None, :], group[:, :, None], group[:, None, :], branch[:, :, None],
                   branch[:, None, :], position[:, :, None] - position[:, None, :], window)  # fmt: skip
    return attend(q, k, v, mask, softcap=softcap)


class Blocks(NamedTuple):
    """What a block of queries may see; of rows that were chained and cut into blocks by `prepare_blocks`."""

    group: Int[Array, "N R C"]
    branch: Int[Array, "N R C"]
    position: Int[Array, "N R C"]
    start: Int[Array, "N R C"]  # the first token of each token's group
    first: Int[Array, "N"] | None  # the first block with a visible key, over all rows; None where layers differ in it
    window: Int[Array, ""] | None


def _dot(x, y, x_dim: int, y_dim: int):
    """Batched over (R, K); contracts dimension x_dim of x with y_dim of y; float32 out."""
    dims = (((x_dim,), (y_dim,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)


def _bias(blocks: Blocks, i, j, heads: int):
    """0 where block i's queries see block j's keys, MASKED elsewhere. [R, 1, J C, C]."""
    size = blocks.group.shape[2]
    index = jnp.arange(size)
    mask = visible(
        (i * size + index)[:, None], j * size + index,
        blocks.group[i][:, :, None], blocks.group[j][:, None],
        blocks.branch[i][:, :, None], blocks.branch[j][:, None],
        blocks.position[i][:, :, None] - blocks.position[j][:, None], blocks.window,
    )  # fmt: skip
    bias = jnp.where(mask, 0.0, MASKED)
    return jnp.tile(bias, (1, heads, 1))[:, None]


def _forward(q, k, v, blocks: Blocks, softcap):
    """Output and log-sum-exp, block of queries by block, keys folded in one block at a time."""
    heads, first = q.shape[3] // k.shape[3], blocks.first
    assert first is not None

    def queries(i, carry):
        def keys(j, state):
            top, total, out = state
            scores = _cap(_dot(q[i], k[j], 3, 3), softcap) + _bias(blocks, i, j, heads)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            out = out * shrink[..., None] + _dot(weights.astype(v.dtype), v[j], 3, 2)
            return new_top, total * shrink + weights.sum(axis=-1), out

        zero = jnp.zeros(q.shape[1:4], jnp.float32)
        start = (zero + MASKED, zero, jnp.zeros(q.shape[1:], jnp.float32))
        top, total, out = jax.lax.fori_loop(first[i], i + 1, keys, start)
        outs, lses = carry
        return outs.at[i].set((out / total[..., None]).astype(outs.dtype)), lses.at[i].set(top + jnp.log(total))

    return jax.lax.fori_loop(0, q.shape[0], queries, (jnp.zeros_like(q), jnp.zeros(q.shape[:4], jnp.float32)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocked(
    q: Float[Array, "N R K JC E"], k: Float[Array, "N R K C E"], v: Float[Array, "N R K C E"], blocks: Blocks, softcap
):
    return _forward(q, k, v, blocks, softcap)[0]


def _blocked_fwd(q, k, v, blocks, softcap):
    out, lse = (checkpoint_name(x, SAVED) for x in _forward(q, k, v, blocks, softcap))
    return out, (q, k, v, blocks, out, lse)


def _blocked_bwd(softcap, residuals, d_out):
    """Scores are computed anew from the log-sum-exp (FlashAttention-2, arXiv:2307.08691, section 2.3.2)."""
    q, k, v, blocks, out, lse = residuals
    heads, first = q.shape[3] // k.shape[3], blocks.first
    assert first is not None
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def queries(i, carry):
        def keys(j, state):
            dq, dk, dv = state
            scores = _cap(_dot(q[i], k[j], 3, 3), softcap)
            weights = jnp.exp(scores + _bias(blocks, i, j, heads) - lse[i][..., None])
            d_scores = weights * (_dot(d_out[i], v[j], 3, 3) - delta[i][..., None])
            if softcap is not None:
                d_scores = d_scores * (1 - (scores / softcap) ** 2)
            weights, d_scores = weights.astype(q.dtype), d_scores.astype(q.dtype)
            dv = dv.at[j].add(_dot(weights, d_out[i], 2, 2))
            dk = dk.at[j].add(_dot(d_scores, q[i], 2, 2))
            return dq + _dot(d_scores, k[j], 3, 2), dk, dv

        dqs, dk, dv = carry
        start = (jnp.zeros(q.shape[1:], jnp.float32), dk, dv)
        dq, dk, dv = jax.lax.fori_loop(first[i], i + 1, keys, start)
        return dqs.at[i].set(dq), dk, dv

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, q.shape[0], queries, start)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def prepare_blocks(rows: Rows, *, block: int, chains: int) -> Blocks:
    """Chains and cuts rows for `attend_blocks`, and finds where every group starts.

    Args:
      block: C, tokens per block.
      chains: the rows are chained into this many long rows first (0: they are not), so that no row waits for the
        longest group that stands at the same place of another.
    """
    group, branch, position = rows
    if chains and group.shape[0] % chains == 0:
        # Groups are counted anew in each row; in a chain they need different numbers.
        row = jnp.arange(group.shape[0])[:, None] * group.shape[1]
        group = jnp.where(group > 0, group + row, 0)
        group, branch, position = (x.reshape(chains, -1) for x in (group, branch, position))
    num_rows, length = group.shape
    index = jnp.broadcast_to(jnp.arange(length), group.shape)
    at = (jnp.arange(num_rows)[:, None], group)
    start = jnp.full((num_rows, length + 1), length, jnp.int32).at[at].min(index)[at]
    start = jnp.where(group > 0, start, index)
    padding = -length % block

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, padding)))
        return x.reshape(num_rows, -1, block).transpose(1, 0, 2)

    # Padding behind the rows' end stands for itself, so that its blocks see nothing else.
    start = jnp.pad(start, ((0, 0), (0, padding)), constant_values=length)
    start = start.reshape(num_rows, -1, block).transpose(1, 0, 2)
    return Blocks(split(group), split(branch), split(position), start, None, None)


def attend_blocks(
    q: Float[Array, "R L H E"],
    k: Float[Array, "R L K E"],
    v: Float[Array, "R L K E"],
    blocks: Blocks,
    window: Int[Array, ""] | None = None,
    *,
    softcap: float | None = None,
) -> Float[Array, "R L H E"]:
    """The rule, one block of queries at a time, from the block in which the query's group starts.

    The work follows the groups that are really there and not the row's length: a loop over blocks of
    keys with a trip count read from `group`. Nothing larger than a block of scores exists in either pass.

    Args:
      q: scaled already.
      blocks: from `prepare_blocks`.
      window: a key is seen only at a distance of positions below it; None: at any.
      softcap: bounds the scores, or None.
    """
    shape, (count, num_rows, block) = q.shape, blocks.group.shape
    q, k, v = (x.reshape(num_rows, -1, *x.shape[2:]) for x in (q, k, v))
    _, length, heads, head_dim = q.shape
    kv_heads, padding = k.shape[2], count * block - length
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    q = q.reshape(num_rows, count, block, kv_heads, heads // kv_heads, head_dim).transpose(1, 0, 3, 4, 2, 5)
    q = q.reshape(count, num_rows, kv_heads, -1, head_dim)
    k, v = (x.reshape(num_rows, count, block, kv_heads, head_dim).transpose(1, 0, 3, 2, 4) for x in (k, v))
    start = blocks.start
    if window is not None:  # a token of branch k stands at or behind its group's start + its position
        start = start + jnp.maximum(0, blocks.position - window + 1)
    first = jnp.minimum(start.min(axis=(1, 2)) // block, jnp.arange(count))
    out: Array = _blocked(q, k, v, blocks._replace(first=first, window=window), softcap)
    out = out.reshape(count, num_rows, kv_heads, heads // kv_heads, block, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(num_rows, count * block, heads, head_dim)[:, :length].reshape(shape)


def blocked(*, block: int, chains: int) -> Kernel:
    """The rule on plain XLA, for any device; arguments as `prepare_blocks`'."""
    return Kernel(functools.partial(prepare_blocks, block=block, chains=chains), attend_blocks)


def masked() -> Kernel:
    """The oracle: `full_attention`."""
    return Kernel(lambda rows: rows, full_attention)
