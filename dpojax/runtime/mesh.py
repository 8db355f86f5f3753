"""The devices of a run as a mesh of named axes, and which of its shards lie in this process."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dpojax.config.model import MeshConfig
from dpojax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

ROW_AXES = ("data", "fsdp")  # rows of a batch are spread over both


def make_mesh(
    *,
    data: int,
    fsdp: int,
    tensor: int,
    sequence: int = 1,
    num_slices: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The device mesh; -1 takes the devices that are left.

    Args:
      num_slices: groups of devices with a fast network inside and a slow one between them (TPU
        slices, or hosts without a fast fabric): only the data axis crosses from one to the next, so
        that gradients alone travel there.
      devices: None: all of them.
    Raises: ConfigError if the product is not the number of devices.
    """
    if devices is None:
        devices = jax.devices()
    sizes = [data, fsdp, sequence, tensor]
    count = len(devices)
    named = ", ".join(f"mesh.{k}={v}" for k, v in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ConfigError(
            f"{named}: sizes are at least 1, and one of them may be -1 (what is left)"
        )
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // math.prod(s for s in sizes if s != -1)
    if math.prod(sizes) != count:
        raise ConfigError(f"{named}: the product must be the number of devices, {count}")
    types = (AxisType.Auto,) * len(sizes)
    if num_slices == 1:
        placed = mesh_utils.create_device_mesh(
            tuple(sizes), devices, allow_split_physical_axes=True
        )
        return Mesh(placed, MESH_AXES, axis_types=types)
    if sizes[0] % num_slices:
        raise ConfigError(
            f"mesh.num_slices={num_slices}: it must divide mesh.data, which is {sizes[0]}: the data"
            " axis alone crosses slices"
        )
    inside = (sizes[0] // num_slices, *sizes[1:])
    across = (num_slices, 1, 1, 1)
    slices = {getattr(d, "slice_index", None) for d in devices}
    if len(slices) == num_slices:
        placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices)
    elif jax.process_count() % num_slices == 0 or len({d.process_index for d in devices}) == 1:
        # No device knows its slice: neighbouring processes, or simulated devices of one process,
        # make one.
        placed = np.asarray(devices).reshape(sizes)
    else:
        raise ConfigError(
            f"mesh.num_slices={num_slices}: the devices belong to {len(slices)} slice(s) and"
            f" {jax.process_count()} processes"
        )
    return Mesh(placed, MESH_AXES, axis_types=types)


def config_mesh(section: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run; with as many slices as its TPUs say where the config says nothing."""
    if devices is None:
        devices = jax.devices()
    return make_mesh(
        data=section.data,
        fsdp=section.fsdp,
        sequence=section.sequence,
        tensor=section.tensor,
        num_slices=section.num_slices or len({_tpu_slice(device) for device in devices}),
        devices=devices,
    )


def _tpu_slice(device: Any) -> int:
    """The slice of a TPU; 0 for other devices.

    GPUs have a slice_index too, which is their machine's, whatever the network between them is.
    """
    if device.platform != "tpu":
        return 0
    return getattr(device, "slice_index", None) or 0


def num_shards(mesh: Mesh) -> int:
    """Data shards: the groups of devices that hold different rows."""
    return math.prod(mesh.shape[a] for a in ROW_AXES)


def local_shards(mesh: Mesh) -> list[int]:
    """The data shards of which this process holds a device."""
    here = jax.process_index()
    by_shard = mesh.devices.reshape(num_shards(mesh), -1)
    return [
        i for i, devices in enumerate(by_shard) if any(d.process_index == here for d in devices)
    ]


def mesh_axes(rule: str) -> tuple[str, ...]:
    """The mesh axes that a rule names, separated by commas; the first is the outermost."""
    return tuple(filter(None, (name.strip() for name in rule.split(","))))
