"""Prefix-shared rows <-> ordinary causal sequences.

For attention kernels that know nothing of shared prefixes.

Everything but attention runs on rows [x1 y11 y12 x2 y21 y22 ...]. For attention alone, lane k holds
[x1 y1k x2 y2k ...]: every response behind a copy of its prompt, so that causality within a group is
the whole rule, and index distance is position distance. An output is read where its token's own
response is; a prompt's, from the first lane. The values and gradients are those of `full_attention`
up to rounding, at the price of computing prompt-prompt scores once a lane.

Legend: R rows, L row length, K lanes (responses of a group), N places of a lane, H heads, E head
dim.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.models.attention.blocks import Rows


class Lanes(NamedTuple):
    """Which token stands where. Every field is a function of `Rows`, computed once a pass."""

    source: Int[Array, "R K N"]  # row index of the token at a lane's place; L: the place is empty
    place: Int[Array, "R K L"]  # a token's place in a lane; N: it is not in that lane
    read_from: Int[Array, "R L"]  # the lane from which a token's output is read
    segment: Int[Array, "R K N"]  # the group of the token at a place; 0: empty


def _with_sources(place, lane_of, group, size: int) -> Lanes:
    """Lanes from the tokens' places, which rise along a row; a place of `size` is none.

    The inverse is a search and not a scatter: with --xla_gpu_deterministic_ops, XLA rewrites
    scatters, and wrongly (openxla/xla#31746, #34870).
    """
    length = place.shape[2]
    risen = jax.lax.cummax(jnp.where(place < size, place, -1), axis=2)
    search = functools.partial(jnp.searchsorted, v=jnp.arange(size))
    source = jax.vmap(jax.vmap(search))(risen).astype(jnp.int32)
    taken = jnp.take_along_axis(
        jnp.pad(risen, ((0, 0), (0, 0), (0, 1)), constant_values=-1), source, axis=2
    )
    source = jnp.where(taken == jnp.arange(size), source, length)
    padded = jnp.pad(group, ((0, 0), (0, 1)))
    segment = jnp.take_along_axis(padded[:, None], source, axis=2)
    return Lanes(source, place, lane_of, segment)


def _members(rows: Rows, num_lanes: int):
    """Which tokens are in which lane, [R, K, L], and from which lane each is read, [R, L]."""
    branch = rows.branch[:, None]
    lane = 1 + jnp.arange(num_lanes)[:, None]
    member = (rows.group > 0)[:, None] & ((branch == 0) | (branch == lane))
    return member, jnp.maximum(rows.branch, 1) - 1


def dense_lanes(rows: Rows, num_lanes: int) -> Lanes:
    """Lanes as long as the row, groups one after another: for causal kernels with segment ids."""
    length = rows.group.shape[1]
    member, lane_of = _members(rows, num_lanes)
    place = jnp.where(member, jnp.cumsum(member, axis=2) - 1, length)
    return _with_sources(place, lane_of, rows.group, length)


def one_sequence_each(rows: Rows, num_lanes: int, num_groups: int, longest: int) -> Lanes:
    """Lanes of `num_groups` sequences of `longest` places each.

    For causal kernels with a length per sequence.

    Args:
      num_groups: at least the groups of any row.
      longest: at least the tokens of any prompt and response.
    """
    member, lane_of = _members(rows, num_lanes)
    place = ((rows.group - 1) * longest + rows.position)[:, None]
    return _with_sources(
        jnp.where(member, place, num_groups * longest), lane_of, rows.group, num_groups * longest
    )


def _take(x, index):
    """x[r, index[r, ...]] along the second axis of x; zeros where the index is past its end."""
    flat = index.reshape(index.shape[0], -1)
    shape = (*flat.shape, *[1] * (x.ndim - 2))
    values = jnp.take_along_axis(x, flat.reshape(shape), axis=1, mode="fill", fill_value=0)
    return values.reshape(*index.shape, *x.shape[2:])


def _gather_outputs(y, lanes: Lanes):
    rows, count, size = lanes.source.shape
    place = jnp.take_along_axis(lanes.place, lanes.read_from[:, None], axis=1)[:, 0]
    index = jnp.where(place < size, lanes.read_from * size + place, count * size)
    return _take(y.reshape(rows, count * size, *y.shape[3:]), index)


# The transposes are gathers too: a place has one token, and a token one place in each lane.


@jax.custom_vjp
def to_lanes(x: Float[Array, "R L H E"], lanes: Lanes) -> Float[Array, "R K N H E"]:
    """The tokens of rows at their places in the lanes; zeros at empty places."""
    return _take(x, lanes.source)


def _to_lanes_fwd(x, lanes):
    return to_lanes(x, lanes), lanes


def _to_lanes_bwd(lanes, g):
    return sum(_take(g[:, k], lanes.place[:, k]) for k in range(g.shape[1])), None


to_lanes.defvjp(_to_lanes_fwd, _to_lanes_bwd)


@jax.custom_vjp
def collect(y: Float[Array, "R K N H E"], lanes: Lanes) -> Float[Array, "R L H E"]:
    """The output of every token, from the lane of its response; zeros at padding."""
    return _gather_outputs(y, lanes)


def _collect_fwd(y, lanes):
    return collect(y, lanes), lanes


def _collect_bwd(lanes, g):
    rows, count, size = lanes.source.shape
    lane_of = jnp.take_along_axis(
        jnp.pad(lanes.read_from, ((0, 0), (0, 1)), constant_values=-1)[:, None],
        lanes.source,
        axis=2,
    )
    mine = lane_of == jnp.arange(count)[:, None]
    return _take(g, jnp.where(mine, lanes.source, g.shape[1])), None


collect.defvjp(_collect_fwd, _collect_bwd)
