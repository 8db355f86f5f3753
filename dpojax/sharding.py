"""Logical axes -> mesh axes: the device mesh, parameter shardings, and putting a batch on the devices.

Which logical axis goes to which mesh axis is data (config.mesh.rules); this module only applies it.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpojax.config import MeshConfig
from dpojax.errors import ConfigError
from dpojax.logps import Spread
from dpojax.models import experts

# Logical axis -> mesh axis, where a run's config says nothing else: "" keeps it whole.
RULES = dict(
    vocab="tensor", embed="fsdp", heads="tensor", kv_heads="tensor", mlp="tensor", norm="", layers="", experts="tensor"
)
MESH_AXES = ("data", "fsdp", "sequence", "tensor")
ROW_AXES = ("data", "fsdp")  # rows of a batch are spread over both


def make_mesh(
    *, data: int, fsdp: int, tensor: int, sequence: int = 1, num_slices: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """The device mesh; -1 takes the devices that are left.

    Args:
      num_slices: groups of devices with a fast network inside and a slow one between them (TPU slices, or hosts without
        a fast fabric): only the data axis crosses from one to the next, so that gradients alone travel there.
      devices: None: all of them.
    Raises: ConfigError if the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, sequence, tensor], len(devices)
    named = ", ".join(f"mesh.{k}={v}" for k, v in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ConfigError(f"{named}: sizes are at least 1, and one of them may be -1 (what is left)")
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // math.prod(s for s in sizes if s != -1)
    if math.prod(sizes) != count:
        raise ConfigError(f"{named}: the product must be the number of devices, {count}")
    types = (AxisType.Auto,) * len(sizes)
    if num_slices == 1:
        placed = mesh_utils.create_device_mesh(tuple(sizes), devices, allow_split_physical_axes=True)
        return Mesh(placed, MESH_AXES, axis_types=types)
    if sizes[0] % num_slices:
        raise ConfigError(
            f"mesh.num_slices={num_slices}: it must divide mesh.data, which is {sizes[0]}: the data axis alone crosses slices"
        )
    inside, across = (sizes[0] // num_slices, *sizes[1:]), (num_slices, 1, 1, 1)
    slices = {getattr(d, "slice_index", None) for d in devices}
    if len(slices) == num_slices:
        placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices)
    elif jax.process_count() % num_slices == 0 or len({d.process_index for d in devices}) == 1:
        # No slices are known: neighbouring processes (or devices of one process, simulated) make one.
        placed = np.asarray(devices).reshape(sizes)
    else:
        raise ConfigError(
            f"mesh.num_slices={num_slices}: the devices belong to {len(slices)} slice(s) and {jax.process_count()} processes"
        )
    return Mesh(placed, MESH_AXES, axis_types=types)


def config_mesh(section: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run; with as many slices as its TPUs say where the config says nothing."""
    devices = jax.devices() if devices is None else devices
    # GPUs have a slice_index too: their machine's, whatever the network between them is.
    slices = section.num_slices or len({(d.platform == "tpu" and getattr(d, "slice_index", None)) or 0 for d in devices})
    sizes = {axis: getattr(section, axis) for axis in MESH_AXES}
    return make_mesh(**sizes, num_slices=slices, devices=devices)


def num_shards(mesh: Mesh) -> int:
    """Data shards: the groups of devices that hold different rows."""
    return math.prod(mesh.shape[a] for a in ROW_AXES)


def local_shards(mesh: Mesh) -> list[int]:
    """The data shards of which this process holds a device."""
    here = jax.process_index()
    by_shard = mesh.devices.reshape(num_shards(mesh), -1)
    return [i for i, devices in enumerate(by_shard) if any(d.process_index == here for d in devices)]


def mesh_axes(rule: str) -> tuple[str, ...]:
    """The mesh axes that a rule names, separated by commas; the first is the outermost."""
    return tuple(filter(None, (name.strip() for name in rule.split(","))))


def _spec(shape, axes, mesh: Mesh, rules: Mapping[str, str]) -> P:
    used: set[str] = set()
    spec = []
    for size, axis in zip(shape, axes, strict=True):
        # A dimension that does not divide, or whose mesh axis is taken, stays whole on every device.
        own: tuple[str, ...] = ()
        for target in mesh_axes(rules.get(axis, "")):
            if target not in used and size % math.prod(mesh.shape[a] for a in (*own, target)) == 0:
                own = (*own, target)
        used.update(own)
        spec.append(own[0] if len(own) == 1 else own or None)
    return P(*spec)


def param_shardings(params: Any, axes: Any, mesh: Mesh, rules: Mapping[str, str], memory: str = "device") -> Any:
    """A NamedSharding for every parameter.

    Args:
      params: tree of arrays or ShapeDtypeStructs; in the place of one there may be a quantised one of several.
      axes: tree of logical axes, shaped like `params`.
      rules: logical axis -> mesh axis; "" or absent: not split.
      memory: of the devices; "pinned_host": the host's memory.
    """
    for axis, rule in rules.items():
        for target in mesh_axes(rule):
            if target not in MESH_AXES:
                raise ConfigError(f"mesh rule {axis}={rule!r}: the mesh has the axes {', '.join(MESH_AXES)}")
    is_axes = lambda x: isinstance(x, tuple)
    own = lambda a: lambda x: NamedSharding(mesh, _spec(x.shape, a, mesh, rules), memory_kind=memory)
    return jax.tree.map(lambda a, x: jax.tree.map(own(a), x), axes, params, is_leaf=is_axes)


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a training state: leaves that mirror a parameter follow it, the rest is replicated.

    A leaf mirrors a parameter if its path ends in the parameter's path and the shapes are the same.
    """
    flat_params, _ = jax.tree_util.tree_flatten_with_path(params)
    flat_shardings = jax.tree.leaves(shardings)
    by_path = {jax.tree_util.keystr(p): (x.shape, s) for (p, x), s in zip(flat_params, flat_shardings, strict=True)}
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


def constrain_rows(mesh: Mesh, *, whole: bool = False):
    """Keeps [R, L, ...] activations spread: rows over the data axes, and their tokens over the sequence axis unless `whole`."""
    split = mesh.shape["sequence"] > 1 and not whole
    sharding = NamedSharding(mesh, P(ROW_AXES, "sequence") if split else P(ROW_AXES))
    return lambda x: jax.lax.with_sharding_constraint(x, sharding)


def constrain_logits(mesh: Mesh, rules: Mapping[str, str]):
    """Spreads the vocabulary of [..., V] logits over the devices that share a sequence, which all hold its tokens here.

    It acts where scores are computed by shard; a sampled token's logits stay as they are.
    """
    if mesh.shape["sequence"] == 1:
        return lambda x: x
    axes = tuple(dict.fromkeys((*mesh_axes(rules.get("vocab", "")), "sequence")))
    size = math.prod(mesh.shape[a] for a in axes)

    def constrain(x):
        here = jax.sharding.get_abstract_mesh()
        if here.empty or x.shape[-1] % size:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(here, P(*[None] * (x.ndim - 1), axes)))

    return constrain


def head_spread(mesh: Mesh, shapes: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]], rules: Mapping[str, str], cast):
    """How the head lies on the mesh, for `logps.scores_by_shard`; None on one device.

    Args:
      shapes: name -> (shape, logical axes) of every parameter of the head.
      cast: the head in the dtype of the computation.
    """
    if mesh.size == 1:
        return None
    own = lambda axes: tuple(a for a in (axes if isinstance(axes, tuple) else (axes,)) if a in ROW_AXES)
    specs = {name: [own(a) if a else None for a in _spec(*of, mesh, rules)] for name, of in shapes.items()}
    return Spread(mesh, ROW_AXES, tuple((name, P(*(a or None for a in spec))) for name, spec in specs.items()), cast)


def attention_axes(mesh: Mesh, rules: Mapping[str, str]) -> tuple[str, ...]:
    """The mesh axes over which attention's heads are spread: the heads' own, and that of sequences, which are whole there."""
    own = tuple(a for a in mesh_axes(rules.get("heads", "")) if a not in ROW_AXES)
    return tuple(a for a in dict.fromkeys((*own, "sequence")) if mesh.shape[a] > 1)


def spread_experts(mesh: Mesh, rules: Mapping[str, str]):
    """`experts.mix` over the mesh: tokens stay on their data shard, experts on the devices of their mesh axis."""
    axis = rules.get("experts", "")
    if mesh.size == 1:
        return experts.mix
    if axis and axis not in MESH_AXES[2:]:
        raise ConfigError(f"mesh.rules.experts={axis!r}: the rows are spread over {', '.join(ROW_AXES)}; take 'tensor', or ''")

    def mix(x, weights, ids, gate, up, down, *, activation):
        own = axis if axis and gate.shape[0] % mesh.shape[axis] == 0 else None
        function = functools.partial(experts.mix, activation=activation, axis=own)
        rows, held = P(ROW_AXES), P(own)
        return jax.shard_map(function, mesh=mesh, in_specs=(rows,) * 3 + (held,) * 3, out_specs=rows)(
            x, weights, ids, gate, up, down
        )

    return mix


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """Shardings of a PackedBatch: [M, rows or shards, ...] spread over the data axes; plan scalars replicated."""
    rows, whole = rows_sharding(mesh, leading=1), NamedSharding(mesh, P())
    return jax.tree.map(lambda x: rows if np.ndim(x) > 1 else whole, batch)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts this process's part of a batch on its devices, as one global array per field.

    Args:
      batch: numpy arrays whose second axis holds the rows (or shards) of `local_shards(mesh)`, in that order.
    """
    shardings = batch_shardings(batch, mesh)
    shards, total = local_shards(mesh), num_shards(mesh)
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
