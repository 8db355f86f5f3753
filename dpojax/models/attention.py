"""The attention rule of prefix-shared rows, on plain XLA.

Legend: R rows, L row length, H query heads, K kv heads, G query heads per kv head, E head dim.
The rule itself is defined once, in `dpojax.data.packing.visible`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.data.packing import visible

MASKED = -1e30  # exp(MASKED - max) is exactly 0 in float32, and a row without a visible key stays finite


def attend(
    q: Float[Array, "R Q H E"],
    k: Float[Array, "R S K E"],
    v: Float[Array, "R S K E"],
    mask: Bool[Array, "R Q S"],
) -> Float[Array, "R Q H E"]:
    """Softmax attention where `mask` is True; grouped heads; scores and softmax in float32."""
    rows, queries, heads, head_dim = q.shape
    q = q.reshape(rows, queries, k.shape[2], heads // k.shape[2], head_dim) * head_dim**-0.5
    scores = jnp.einsum("RQKGE,RSKE->RKGQS", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    # Dividing the output, not the weights, saves a pass over the largest array.
    total = jnp.moveaxis(weights.sum(axis=-1), -1, 1)[..., None]
    out = jnp.einsum("RKGQS,RSKE->RQKGE", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / total).astype(v.dtype).reshape(rows, queries, heads, head_dim)


def full_attention(q, k, v, group, branch):
    """The rule through one [L, L] mask: the oracle of every faster path. Shapes as `banded_attention`."""
    index = jnp.arange(q.shape[1])
    mask = visible(index[:, None], index[None, :], group[:, :, None], group[:, None, :], branch[:, :, None],
                   branch[:, None, :])  # fmt: skip
    return attend(q, k, v, mask)


def banded_attention(
    q: Float[Array, "R L H E"],
    k: Float[Array, "R L K E"],
    v: Float[Array, "R L K E"],
    group: Int[Array, "R L"],
    branch: Int[Array, "R L"],
    *,
    span: int,
    block: int,
) -> Float[Array, "R L H E"]:
    """The rule, block of queries by block: each sees only the keys that its group can reach.

    A key of the same group is at most `span - 1` tokens back, so the cost grows with the longest
    group and not with the row; causality halves it again. The scores of a block are computed anew
    in the backward pass.

    Args:
      span: tokens of the longest group in any row.
      block: queries per block; the last block may be shorter.
    """
    length = q.shape[1]
    index = jnp.arange(length)

    @functools.partial(jax.checkpoint, static_argnums=(0, 1, 2))
    def one_block(start, stop, first, q, k, v):
        rows, keys = slice(start, stop), slice(first, stop)
        mask = visible(index[rows, None], index[None, keys], group[:, rows, None], group[:, None, keys],
                       branch[:, rows, None], branch[:, None, keys])  # fmt: skip
        return attend(q, k, v, mask)

    out = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = max(0, start - span + 1) // block * block
        out.append(one_block(start, stop, first, q[:, start:stop], k[:, first:stop], v[:, first:stop]))
    return jnp.concatenate(out, axis=1)


def make_attention(name: str, *, span: int, row_tokens: int):
    """The function (q, k, v, group, branch) -> out that `model.attention` names."""
    if name in ("auto", "xla"):
        # At most 16 blocks are unrolled: more of them cost more compile time than they save.
        block = max(128, -(-row_tokens // 16 // 128) * 128)
        return functools.partial(banded_attention, span=span, block=block)
    if name == "full":
        return full_attention
    raise ValueError(f"model.attention is {name!r}; it must be auto, xla or full")
