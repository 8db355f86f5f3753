"""Logical axes -> mesh axes: shardings of parameters, states and batches, and putting a batch on
the devices.

Which logical axis goes to which mesh axis is data (config.mesh.rules); this module only applies it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from dpojax.errors import ConfigError
from dpojax.runtime.mesh import MESH_AXES, ROW_AXES, local_shards, mesh_axes, num_shards


def _dimension(mesh_axes: tuple[str, ...]) -> tuple[str, ...] | str | None:
    """The mesh axes of a dimension as JAX itself writes them in a PartitionSpec, so that two specs
    of the same sharding are equal.
    """
    if not mesh_axes:
        return None
    if len(mesh_axes) == 1:
        return mesh_axes[0]
    return mesh_axes


def partition_spec(shape, axes, mesh: Mesh, rules: Mapping[str, str]) -> P:
    """Which mesh axes each dimension of an array is split over.

    A dimension that does not divide, or whose mesh axis another dimension has, is not split.
    """
    used: set[str] = set()
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        taken: tuple[str, ...] = ()
        for target in mesh_axes(rules.get(axis, "")):
            parts = math.prod(mesh.shape[a] for a in (*taken, target))
            if target not in used and size % parts == 0:
                taken = (*taken, target)
        used.update(taken)
        spec.append(_dimension(taken))
    return P(*spec)


def param_shardings(
    params: Any, axes: Any, mesh: Mesh, rules: Mapping[str, str], memory: str = "device"
) -> Any:
    """A NamedSharding for every parameter.

    Args:
      params: tree of arrays or ShapeDtypeStructs; a quantised parameter is several of them.
      axes: tree of logical axes, shaped like `params`.
      rules: logical axis -> mesh axis; "" or absent: not split.
      memory: of the devices; "pinned_host": the host's memory.
    """
    for axis, rule in rules.items():
        for target in mesh_axes(rule):
            if target not in MESH_AXES:
                raise ConfigError(
                    f"mesh rule {axis}={rule!r}: the mesh has the axes {', '.join(MESH_AXES)}"
                )

    def is_axes(x):
        return isinstance(x, tuple)

    def shard(parameter_axes, parameter):
        def shard_leaf(x):
            spec = partition_spec(x.shape, parameter_axes, mesh, rules)
            return NamedSharding(mesh, spec, memory_kind=memory)

        return jax.tree.map(shard_leaf, parameter)

    return jax.tree.map(shard, axes, params, is_leaf=is_axes)


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a training state: leaves that mirror a parameter have its sharding, and every
    device holds all others.

    A leaf mirrors a parameter if its path ends in the parameter's path and the shapes are the same.
    """
    flat_params, _ = jax.tree_util.tree_flatten_with_path(params)
    flat_shardings = jax.tree.leaves(shardings)
    by_path = {
        jax.tree_util.keystr(p): (x.shape, s)
        for (p, x), s in zip(flat_params, flat_shardings, strict=True)
    }
    replicated = NamedSharding(mesh, P())

    def find(path, leaf):
        for start in range(len(path)):
            shape, sharding = by_path.get(jax.tree_util.keystr(path[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(find, state)


def rows_sharding(mesh: Mesh, *, leading: int) -> NamedSharding:
    """Rows (or shards) spread over the data axes, after `leading` unsplit dimensions."""
    return NamedSharding(mesh, P(*[None] * leading, ROW_AXES))


def constrain_rows(mesh: Mesh, *, split_tokens: bool = True) -> Callable[[Array], Array]:
    """Keeps [R, L, ...] activations spread over the mesh: XLA may gather them otherwise.

    Args:
      split_tokens: whether a row's tokens are spread over the sequence axis too.
    """
    spec = P(ROW_AXES)
    if split_tokens and mesh.shape["sequence"] > 1:
        spec = P(ROW_AXES, "sequence")
    sharding = NamedSharding(mesh, spec)
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def constrain_logits(mesh: Mesh, rules: Mapping[str, str]):
    """Spreads the vocabulary of [..., V] logits over the devices that share a sequence.

    All of them hold the sequence's tokens where scores are computed by shard, and would compute the
    same logits. It leaves the logits of a sampled token alone.
    """
    if mesh.shape["sequence"] == 1:
        return lambda x: x
    axes = tuple(dict.fromkeys((*mesh_axes(rules.get("vocab", "")), "sequence")))
    size = math.prod(mesh.shape[a] for a in axes)

    def constrain(x):
        here = jax.sharding.get_abstract_mesh()
        if here.empty or x.shape[-1] % size:
            return x
        spec = P(*[None] * (x.ndim - 1), axes)
        return jax.lax.with_sharding_constraint(x, NamedSharding(here, spec))

    return constrain


def attention_axes(mesh: Mesh, rules: Mapping[str, str]) -> tuple[str, ...]:
    """The mesh axes over which attention's heads are spread: those of the heads' rule, and that of
    sequences, whose tokens are all on each device there.
    """
    head_axes = [a for a in mesh_axes(rules.get("heads", "")) if a not in ROW_AXES]
    return tuple(a for a in dict.fromkeys((*head_axes, "sequence")) if mesh.shape[a] > 1)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Shardings of a PackedBatch: [M, rows or shards, ...] spread over the data axes; plan scalars
    replicated.
    """
    rows = rows_sharding(mesh, leading=1)
    replicated = NamedSharding(mesh, P())

    def shard(x):
        if np.ndim(x) > 1:
            return rows
        return replicated

    return jax.tree.map(shard, batch)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's part of a batch on its devices, as one global array per field.

    Args:
      batch: numpy arrays whose second axis holds the rows (or shards) of `local_shards(mesh)`, in
        that order.
    """
    shardings = batch_shardings(batch, mesh)
    shards = local_shards(mesh)
    total = num_shards(mesh)
    if shards == list(range(total)):
        return jax.device_put(batch, shardings)

    def put(x, sharding):
        if np.ndim(x) <= 1:
            return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
        size = x.shape[1] // len(shards)  # rows per shard
        shape = (x.shape[0], size * total, *x.shape[2:])

        def local(index):
            first = shards.index((index[1].start or 0) // size)
            return x[:, first * size : (first + 1) * size]

        return jax.make_array_from_callback(shape, sharding, local)

    return jax.tree.map(put, batch, shardings)


class HeadSharding(NamedTuple):
    """How the head lies on the mesh: every data shard scores its tokens with the full head, which
    is gathered once a pass.
    """

    mesh: Mesh
    axes: tuple[str, ...]  # over which rows are spread
    specs: tuple[tuple[str, P], ...]  # name in the head -> its dimensions' mesh axes, out of `axes`
    # the head in the dtype of the computation, so that half the bytes travel
    cast: Callable[[Any], Any]

    def gather(self, head: Any) -> Any:
        """A device's part -> the full head, inside shard_map."""
        return self._each(
            self.cast(head), lambda x, dim, axes: jax.lax.all_gather(x, axes, axis=dim, tiled=True)
        )

    def scatter(self, grads: Any) -> Any:
        """The gradients of the full head on every shard -> a device's part of their sum.

        shard_map's transpose takes the sum over the axes that a parameter is not split over.
        """
        return self._each(
            grads,
            lambda x, dim, axes: jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True),
        )

    def _each(self, tree: Any, move: Callable[[Array, int, tuple[str, ...]], Array]) -> Any:
        out = dict(tree)
        for name, spec in self.specs:
            for dim, axes in enumerate(spec):
                if isinstance(axes, str):
                    axes = (axes,)
                if axes:
                    out[name] = move(out[name], dim, axes)
        return out


def placed_shapes(abstract: Any, shardings: Any) -> Any:
    """A tree of shapes as ShapeDtypeStructs in these shardings, of which each may stand for a whole
    subtree.
    """
    whole = jax.tree.broadcast(shardings, abstract)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, whole
    )
