"""The attention rule of prefix-shared rows, on plain XLA.

Legend: R rows, L row length, H query heads, K kv heads, J query heads per kv head, E head dim,
Q queries and S keys of one call, N blocks of C tokens, P = N C. The rule itself is
`dpojax.data.packing.visible`.
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

# the name under which a remat policy finds what the backward pass needs of the forward pass
SAVED = "attention"

# exp(MASKED - max) is exactly 0 in float32, and a row without a visible key stays finite
MASKED = -1e30


class Rows(NamedTuple):
    """What attention must know of the tokens of packed rows."""

    group: Int[Array, "R L"]
    branch: Int[Array, "R L"]
    position: Int[Array, "R L"]


class Kernel(NamedTuple):
    """One way to compute the rule."""

    prepare: Callable[[Rows], Any]  # once a pass
    # (q, k, v, what `prepare` made, window, softcap=) -> out; q is scaled already
    attend: Callable[..., Array]


def matmul_precision(dtype: Any) -> jax.lax.Precision | None:
    """The precision with which products of this dtype are what the dtype says.

    None: the default is.

    By default, JAX rounds the operands of float32 products: to tf32 on NVIDIA GPUs, to bfloat16 on
    TPUs.
    """
    if dtype == jnp.float32:
        return jax.lax.Precision.HIGHEST
    return None


def soft_capped(scores, softcap: float | None):
    """Soft-capped scores, cap tanh(s / cap) (Gemma 2, arXiv:2408.00118, section 2)."""
    if softcap is None:
        return scores
    return softcap * jnp.tanh(scores / softcap)


def attend(
    q: Float[Array, "R Q H E"],
    k: Float[Array, "R S K E"],
    v: Float[Array, "R S K E"],
    mask: Bool[Array, "R Q S"],
    *,
    softcap: float | None,
) -> Float[Array, "R Q H E"]:
    """Softmax attention where `mask` is True; grouped heads.

    Scores and softmax are float32. q is scaled already.
    """
    rows, queries, heads, head_dim = q.shape
    q = q.reshape(rows, queries, k.shape[2], heads // k.shape[2], head_dim)
    scores = soft_capped(
        jnp.einsum("RQKJE,RSKE->RKJQS", q, k, preferred_element_type=jnp.float32), softcap
    )
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("RKJQS,RSKE->RQKJE", weights.astype(v.dtype), v)
    return out.reshape(rows, queries, heads, head_dim)


def full_attention(q, k, v, rows: Rows, window=None, *, softcap: float | None = None):
    """The rule through one [L, L] mask: the oracle of every faster path.

    Arguments as `attend_blocks`'s, with `Rows`.
    """
    index = jnp.arange(q.shape[1])
    group, branch, position = rows
    mask = visible(
        index[:, None],
        index[None, :],
        group[:, :, None],
        group[:, None, :],
        branch[:, :, None],
        branch[:, None, :],
        position[:, :, None] - position[:, None, :],
        window,
    )
    return attend(q, k, v, mask, softcap=softcap)


class Blocks(NamedTuple):
    """What queries may see, of rows that `prepare_blocks` chained.

    The rows are padded to full blocks.
    """

    group: Int[Array, "R P"]
    branch: Int[Array, "R P"]
    position: Int[Array, "R P"]
    start: Int[Array, "R P"]  # the first token of each token's group


class _Seen(NamedTuple):
    """`Blocks` for one layer: with how far back its queries see."""

    blocks: Blocks
    first: Int[Array, " N"]  # the first block with a visible key, over all rows
    window: Int[Array, ""] | None


def _dot(x, y, x_dim: int, y_dim: int):
    """Batched over (R, K); contracts dimension x_dim of x with y_dim of y; float32 out."""
    dims = (((x_dim,), (y_dim,)), ((0, 1), (0, 1)))
    precision = matmul_precision(x.dtype)
    return jax.lax.dot_general(x, y, dims, precision, preferred_element_type=jnp.float32)


def spans(most: int) -> list[int]:
    """Numbers of blocks up to `most`, each at most a quarter larger than needed.

    1 to 8, 10, 12, 14, 16, 20, ...
    """
    sizes = []
    n = 1
    while n < most:
        sizes.append(n)
        n += max(1, 2 ** (n.bit_length() - 1) // 4)
    return [*sizes, most]


def _each_block(
    seen: _Seen, most: int, body: Callable[[Any, Any, int, Any], Any], carry: Any
) -> Any:
    """body(i, j, n, carry) for every block of queries i.

    Blocks [j, j + n) hold all keys that it sees.

    n is static, so that a block's scores are one matrix product: blocks of one n share a loop, and
    the loops' trip counts are read from the data.
    """
    count = seen.first.shape[0]
    sizes = spans(most)
    which = jnp.searchsorted(jnp.asarray(sizes), jnp.arange(count) + 1 - seen.first)
    order = jnp.argsort(which)
    edges = jnp.searchsorted(which[order], jnp.arange(len(sizes) + 1))
    for kind, n in enumerate(sizes):

        def step(t, carry, n=n):
            i = order[t]
            return body(i, jnp.maximum(i + 1 - n, 0), n, carry)

        carry = jax.lax.fori_loop(edges[kind], edges[kind + 1], step, carry)
    return carry


def _bias(seen: _Seen, i, j, n: int, block: int, heads: int):
    """0 where the queries of block i see the keys of blocks [j, j + n).

    MASKED elsewhere. [R, 1, J C, n C].
    """
    of_query, of_key = (
        functools.partial(_tokens, first=f, count=c, block=block) for f, c in ((i, 1), (j, n))
    )
    b = seen.blocks
    mask = visible(
        (i * block + jnp.arange(block))[:, None],
        j * block + jnp.arange(n * block),
        of_query(b.group)[:, :, None],
        of_key(b.group)[:, None],
        of_query(b.branch)[:, :, None],
        of_key(b.branch)[:, None],
        of_query(b.position)[:, :, None] - of_key(b.position)[:, None],
        seen.window,
    )
    return jnp.tile(jnp.where(mask, 0.0, MASKED), (1, heads, 1))[:, None]


def _tokens(x, *, first, count: int, block: int, axis: int = 1):
    """The tokens of blocks [first, first + count)."""
    return jax.lax.dynamic_slice_in_dim(x, first * block, count * block, axis=axis)


def _forward(q, k, v, seen: _Seen, softcap, block: int, most: int):
    """Output and log-sum-exp, one block of queries at a time."""
    heads = q.shape[3] // block

    def queries(i, j, n, carry):
        own_k, own_v = (_tokens(x, first=j, count=n, block=block, axis=2) for x in (k, v))
        scores = soft_capped(_dot(q[i], own_k, 3, 3), softcap) + _bias(seen, i, j, n, block, heads)
        top = scores.max(axis=-1)
        weights = jnp.exp(scores - top[..., None])
        total = weights.sum(axis=-1)
        out = _dot(weights.astype(v.dtype), own_v, 3, 2) / total[..., None]
        outs, lses = carry
        return outs.at[i].set(out.astype(outs.dtype)), lses.at[i].set(top + jnp.log(total))

    return _each_block(
        seen, most, queries, (jnp.zeros_like(q), jnp.zeros(q.shape[:4], jnp.float32))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _blocked(
    q: Float[Array, "N R K JC E"],
    k: Float[Array, "R K P E"],
    v: Float[Array, "R K P E"],
    seen: _Seen,
    softcap,
    block,
    most,
):
    return _forward(q, k, v, seen, softcap, block, most)[0]


def _blocked_fwd(q, k, v, seen, softcap, block, most):
    out, lse = (checkpoint_name(x, SAVED) for x in _forward(q, k, v, seen, softcap, block, most))
    return out, (q, k, v, seen, out, lse)


def _blocked_bwd(softcap, block, most, residuals, d_out):
    """Scores are computed anew from the log-sum-exp.

    FlashAttention-2, arXiv:2307.08691, section 2.3.2.

    Keys come before queries in every array: CPUs are slow at products that contract the first
    dimension of their left side.
    """
    q, k, v, seen, out, lse = residuals
    heads = q.shape[3] // block
    turned = jnp.swapaxes(k, 2, 3)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def queries(i, j, n, carry):
        tokens = functools.partial(_tokens, first=j, count=n, block=block)
        scores = soft_capped(_dot(tokens(k, axis=2), q[i], 3, 3), softcap)
        weights = jnp.exp(
            scores + jnp.swapaxes(_bias(seen, i, j, n, block, heads), 2, 3) - lse[i][..., None, :]
        )
        d_scores = weights * (_dot(tokens(v, axis=2), d_out[i], 3, 3) - delta[i][..., None, :])
        if softcap is not None:
            d_scores = d_scores * (1 - (scores / softcap) ** 2)
        weights = weights.astype(q.dtype)
        d_scores = d_scores.astype(q.dtype)

        def add(total, part):
            return jax.lax.dynamic_update_slice_in_dim(
                total, tokens(total, axis=2) + part, j * block, axis=2
            )

        dq, dk, dv = carry
        own_dq = jnp.swapaxes(_dot(tokens(turned, axis=3), d_scores, 3, 2), 2, 3)
        return (
            dq.at[i].set(own_dq),
            add(dk, _dot(d_scores, q[i], 3, 2)),
            add(dv, _dot(weights, d_out[i], 3, 2)),
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = _each_block(seen, most, queries, start)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_blocked.defvjp(_blocked_fwd, _blocked_bwd)


def first_of_group(group: Int[Array, "R L"]) -> Int[Array, "R L"]:
    """The index of the first token with each token's group.

    By sorting: XLA's scatters cannot be relied on.
    """
    order = jnp.argsort(group, axis=1, stable=True)
    ordered = jnp.take_along_axis(group, order, axis=1)
    begins = jnp.diff(ordered, axis=1, prepend=ordered[:, :1] - 1) != 0
    begin = jax.lax.cummax(jnp.where(begins, jnp.arange(group.shape[1]), 0), axis=1)
    first = jnp.take_along_axis(order, begin, axis=1)
    return jnp.take_along_axis(first, jnp.argsort(order, axis=1), axis=1)


def prepare_blocks(rows: Rows, *, block: int, chains: int) -> Blocks:
    """Chains and pads rows for `attend_blocks`, and finds where every group starts.

    Args:
      block: C, tokens per block.
      chains: the rows are chained into this many long rows first (0: they are not), so that no row
        waits for the longest group that stands at the same place of another.
    """
    group, branch, position = rows
    if chains and group.shape[0] % chains == 0:
        # Groups are counted anew in each row; in a chain they need different numbers.
        row = jnp.arange(group.shape[0])[:, None] * group.shape[1]
        group = jnp.where(group > 0, group + row, 0)
        group, branch, position = (x.reshape(chains, -1) for x in (group, branch, position))
    num_rows, length = group.shape
    index = jnp.broadcast_to(jnp.arange(length), group.shape)
    start = jnp.where(group > 0, first_of_group(group), index)
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, -length % block)))
    # Padding behind the rows' end stands for itself, so that its blocks see nothing else.
    return Blocks(pad(group), pad(branch), pad(position), pad(start, constant_values=length))


def attend_blocks(
    q: Float[Array, "R L H E"],
    k: Float[Array, "R L K E"],
    v: Float[Array, "R L K E"],
    blocks: Blocks,
    window: Int[Array, ""] | None = None,
    *,
    block: int,
    softcap: float | None = None,
) -> Float[Array, "R L H E"]:
    """The rule, one block of queries at a time.

    It starts at the block in which the first query's group starts.

    The work follows the groups that are really there and not the row's length. Nothing larger than
    the scores of a block of queries with the longest group exists in either pass.

    Args:
      q: scaled already.
      blocks: from `prepare_blocks`, with the same `block`.
      window: a key is seen only at a distance of positions below it; None: at any.
      softcap: bounds the scores, or None.
    """
    shape = q.shape
    (num_rows, padded) = blocks.group.shape
    q, k, v = (x.reshape(num_rows, -1, *x.shape[2:]) for x in (q, k, v))
    _, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    count = padded // block
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))) for x in (q, k, v))
    q = q.reshape(num_rows, count, block, kv_heads, heads // kv_heads, head_dim).transpose(
        1, 0, 3, 4, 2, 5
    )
    q = q.reshape(count, num_rows, kv_heads, -1, head_dim)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    start = blocks.start
    # a token of branch k stands at or behind its group's start + its position
    if window is not None:
        start = start + jnp.maximum(0, blocks.position - window + 1)
    first = jnp.minimum(
        start.reshape(num_rows, count, block).min(axis=(0, 2)) // block, jnp.arange(count)
    )
    most = min(count, -(-shape[1] // block) + 1)  # blocks that a group of a whole row can touch
    out: Array = _blocked(q, k, v, _Seen(blocks, first, window), softcap, block, most)
    out = out.reshape(count, num_rows, kv_heads, heads // kv_heads, block, head_dim).transpose(
        1, 0, 4, 2, 3, 5
    )
    return out.reshape(num_rows, padded, heads, head_dim)[:, :length].reshape(shape)


def blocked(*, block: int, chains: int) -> Kernel:
    """The rule on plain XLA, for any device; arguments as `prepare_blocks`'."""
    return Kernel(
        functools.partial(prepare_blocks, block=block, chains=chains),
        functools.partial(attend_blocks, block=block),
    )


def masked() -> Kernel:
    """The oracle: `full_attention`."""
    return Kernel(lambda rows: rows, full_attention)


def causal() -> Kernel:
    """Plain causal attention over rows of one sequence each.

    It knows neither groups, branches nor `visible`.

    What follows a sequence in its row may be anything. The start-up check takes it for the truth.
    """

    def attend_rows(q, k, v, rows: Rows, window=None, *, softcap: float | None = None):
        index = jnp.arange(q.shape[1])
        distance = index[:, None] - index[None, :]
        mask = distance >= 0
        if window is not None:
            mask &= distance < window
        return attend(q, k, v, jnp.broadcast_to(mask, (q.shape[0], *mask.shape)), softcap=softcap)

    return Kernel(lambda rows: rows, attend_rows)
