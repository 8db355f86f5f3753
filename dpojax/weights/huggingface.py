"""Hugging Face directories (config.json + safetensors) <-> parameters, without torch or
transformers.

Both ways go tensor by tensor: the host holds a part of one tensor at a time, beside the arrays
themselves.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.errors import ConfigError
from dpojax.models.config import ModelConfig
from dpojax.models.families.fields import Family, Source
from dpojax.models.families.table import FAMILIES, model_config, read_fields
from dpojax.models.params import ParamRow, layer_rows, model_rows
from dpojax.weights.safetensors import (
    INDEX,
    PART_BYTES,
    SINGLE,
    Directory,
    Tensors,
    first_bad_of_all,
    verify_checksums,
)


def read_config(folder: pathlib.Path, ignore: Collection[str] = ()) -> ModelConfig:
    """The decoder that a directory describes: its config.json (see `families.model_config`), and
    whether it stores a head.
    """
    config = model_config(read_fields(folder), folder / "config.json", ignore)
    if config.scalar_head:
        return config
    if config.tie_embeddings and _holds_another_head(folder, config):
        return dataclasses.replace(config, tie_embeddings=False)
    return config


def _holds_another_head(folder: pathlib.Path, config: ModelConfig) -> bool:
    """Whether a directory of tied embeddings stores a head that differs from its table.

    transformers then uses both, whatever config.json says.
    """
    if not ((folder / SINGLE).is_file() or (folder / INDEX).is_file()):
        return False
    names = FAMILIES[config.family].names
    tensors = Directory(folder).tensors
    table = tensors.get(f"{names['embed'].name}.weight")
    head = tensors.get(f"{names['unembed'].name}.weight")
    if table is None:  # a file of the bare model, whose names lack their first word
        table = tensors.get(f"{names['embed'].name.split('.', 1)[-1]}.weight")
    if table is None or head is None:
        return False
    rows = max(1, PART_BYTES // max(1, table[:1].nbytes))
    same = table.shape == head.shape and all(
        np.array_equal(
            table[i : i + rows].astype(np.float32), head[i : i + rows].astype(np.float32)
        )
        for i in range(0, len(table), rows)
    )
    return not same


class Place(NamedTuple):
    """Where a parameter lies in a tensor."""

    name: str  # of the tensor, with {i} for the layer and {e} for the expert
    shape: tuple[int, ...]  # of the tensor
    groups: int  # of its outputs: heads, or 1
    start: int  # of the parameter's outputs in every group
    stop: int  # after the last of them
    of: int  # outputs of a group
    inputs: int  # of the map; 0: the tensor has outputs alone
    transposed: bool  # whether the tensor is [outputs, inputs]

    def outputs_first(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter's part of a tensor, as a view [outputs, inputs] or [outputs]."""
        if self.inputs and not self.transposed:
            tensor = tensor.T
        grouped = tensor.reshape(self.groups, self.of, *tensor.shape[1:])
        part = grouped[:, self.start : self.stop]
        if self.groups == 1:
            return part[0]
        return part.reshape(-1, *tensor.shape[1:])  # a copy: parts of several groups are no view


def linear_sizes(row: ParamRow) -> tuple[int, int]:
    """(inputs, outputs) of a row's tensor; inputs 0 where it is no linear map."""
    if not row.in_dims:
        return 0, math.prod(row.shape)
    inputs, outputs = row.map_shape
    return math.prod(inputs), math.prod(outputs)


def place(row: ParamRow, rows: Mapping[str, ParamRow], family: Family) -> Place:
    """Where `row` lies in a checkpoint of the family; `rows` are all rows by name."""
    base = row.name.removesuffix("_bias")
    suffix = row.name.removeprefix(base)
    source: Source = family.names[base]
    name = f"{source.name}.weight"
    if suffix:
        name = f"{source.name}.bias"
    inputs, outputs = linear_sizes(row)
    # A table of vectors lies in its tensor as it is.
    if len(row.shape) == 2 and not row.in_dims and row.axes[-1] == "embed":
        count, width = row.shape
        return Place(
            name,
            row.shape,
            groups=1,
            start=0,
            stop=count,
            of=count,
            inputs=width,
            transposed=True,
        )
    parts = source.parts or (base,)
    groups = 1
    if source.per_head:
        groups = rows["q"].shape[1]
    sizes = [linear_sizes(rows[part + suffix])[1] // groups for part in parts]
    start = sum(sizes[: parts.index(base)])
    size = sum(sizes)
    shape = (inputs, size * groups)
    if not inputs:
        shape = (size * groups,)
    elif source.transposed:
        shape = (size * groups, inputs)
    return Place(
        name,
        shape,
        groups=groups,
        start=start,
        stop=start + outputs // groups,
        of=size,
        inputs=inputs,
        transposed=source.transposed,
    )


def places(
    config: ModelConfig,
) -> tuple[list[tuple[ParamRow, Place]], list[tuple[ParamRow, Place]]]:
    """Every parameter with its place: (those outside the layers, those of a layer)."""
    outside = model_rows(config)
    layer = layer_rows(config)
    rows = {r.name: r for r in (*outside, *layer)}
    family = FAMILIES[config.family]
    return [(r, place(r, rows, family)) for r in outside], [
        (r, place(r, rows, family)) for r in layer
    ]


def num_tensors(config: ModelConfig) -> int:
    """How many reads `load_params` takes."""
    return len(model_rows(config)) + config.num_layers * sum(
        row.experts or 1 for row in layer_rows(config)
    )


@functools.partial(jax.jit, donate_argnums=0)
def _write_in_place(buffer, part, start):
    return jax.lax.dynamic_update_slice(buffer, part.astype(buffer.dtype), start)


class _Filler:
    """One parameter's shards on this process's devices, filled part by part."""

    def __init__(self, shape: tuple[int, ...], sharding, dtype):
        self.shape = shape
        self.sharding = sharding
        self.ranges = {}
        self.buffers = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            ranges = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
            self.ranges[device] = ranges
            self.buffers[device] = jnp.zeros(tuple(map(len, ranges)), dtype, device=device)

    def put(self, lead: tuple[int, ...], value: np.ndarray) -> None:
        """Writes `value`, a view of the parameter at the leading indices `lead` (layer, expert)."""
        for device, ranges in self.ranges.items():
            leading = ranges[: len(lead)]
            if not all(i in r for i, r in zip(lead, leading, strict=True)):
                continue
            start = [i - r.start for i, r in zip(lead, leading, strict=True)]
            shard = value[tuple(slice(r.start, r.stop) for r in ranges[len(lead) :])]
            rows = max(1, PART_BYTES // max(1, shard[:1].nbytes))
            for first in range(0, len(shard), rows):
                part = np.ascontiguousarray(shard[first : first + rows])
                part = jax.device_put(part.reshape((1,) * len(lead) + part.shape), device)
                place = (*start, first, *[0] * (shard.ndim - 1))
                self.buffers[device] = jax.block_until_ready(
                    _write_in_place(self.buffers[device], part, place)
                )

    def array(self) -> jax.Array:
        return jax.make_array_from_single_device_arrays(
            self.shape, self.sharding, list(self.buffers.values())
        )


def _shaped(row: ParamRow, part: np.ndarray) -> np.ndarray:
    """A tensor's part, [outputs, inputs] or [outputs], in the row's dimensions.

    It is a view where the part lies in one piece.
    """
    if not row.in_dims:
        return part.reshape(row.shape)
    inputs, outputs = row.map_shape
    shaped = part.reshape(*outputs, *inputs)
    return shaped.transpose(*range(len(outputs), shaped.ndim), *range(len(outputs)))


def load_params(
    source: pathlib.Path | Tensors,
    config: ModelConfig,
    shardings: Any,
    dtype: Any,
    progress: Callable[[int], None] = lambda done: None,
) -> Any:
    """Reads weights straight into their sharded arrays, part by part of one tensor at a time.

    Args:
      source: a directory, or tensors of another origin.
      shardings: tree of NamedShardings, shaped like the parameters.
      dtype: of the resulting parameters.
      progress: called with the number of tensors read so far.
    Raises: ConfigError for missing, extra, misshapen or damaged tensors.
    """
    if isinstance(source, pathlib.Path):
        verify_checksums(source)
        tensors: Tensors = Directory(source)
    else:
        tensors = source
    reader = _Reader(tensors, config, progress)
    outside, layer = places(config)
    # Every tensor is asked for before room for any is made: an impossible size in config.json is
    # said then, and fills no memory.
    for row, place in outside:
        reader.check(row, place, num_layers=1)
    for row, place in layer:
        reader.check(row, place, num_layers=config.num_layers)
    _refuse_extra(reader.names - reader.read, source)

    def load(row: ParamRow, place: Place, sharding, num_layers: int | None) -> jax.Array:
        shape = row.shape
        if num_layers is not None:
            shape = (num_layers, *row.shape)
        filler = _Filler(shape, sharding, dtype)
        for i in range(num_layers or 1):
            for e in range(row.experts or 1):
                lead: tuple[int, ...] = ()
                if num_layers is not None:
                    lead += (i,)
                if row.experts:
                    lead += (e,)
                filler.put(lead, _shaped(row, reader.part(place, i, e)))
        return filler.array()

    params: dict[str, Any] = {
        row.name: load(row, place, shardings[row.name], None) for row, place in outside
    }
    params["layers"] = {
        row.name: load(row, place, shardings["layers"][row.name], config.num_layers)
        for row, place in layer
    }
    return params


class _Reader:
    """Tensors by the names that they have in a file, whichever of several that is.

    Attributes:
      names: of all tensors.
      read: the names that were asked for.
    """

    def __init__(self, tensors: Tensors, config: ModelConfig, progress: Callable[[int], None]):
        self.tensors = tensors
        self.progress = progress
        self.done = 0
        self.names = set(tensors.names())
        self.read: set[str] = set()
        source_of = FAMILIES[config.family].names
        self.table = f"{source_of['embed'].name}.weight"
        self.head = f"{source_of['unembed'].name}.weight"
        self.tied = config.tie_embeddings
        if self.tied:
            self.read.add(self.head)

    def _stored_name(self, name: str) -> str:
        """The name under which the file holds a tensor."""
        if name in self.names:
            return name
        if name == self.table and self.tied and self.head in self.names:
            return self.head  # the only table may stand under either name, or under both
        # Files of the bare model lack the first word of the names ("model." or "transformer.").
        bare = name.split(".", 1)[-1]
        if bare in self.names:
            return bare
        return name

    def _get(self, place: Place, i: int, e: int) -> np.ndarray:
        name = self._stored_name(place.name.format(i=i, e=e))
        self.read.add(name)
        return self.tensors.get(name, place.shape)

    def check(self, row: ParamRow, place: Place, *, num_layers: int) -> None:
        """Raises ConfigError if a tensor of the parameter is missing or misshapen."""
        for i in range(num_layers):
            for e in range(row.experts or 1):
                self._get(place, i, e)

    def part(self, place: Place, i: int, e: int) -> np.ndarray:
        """The parameter's part of the tensor of layer i and expert e."""
        part = place.outputs_first(self._get(place, i, e))
        self.done += 1
        self.progress(self.done)
        return part


def _refuse_extra(names: Collection[str], source: Any) -> None:
    """Raises ConfigError for tensors that no parameter takes; tables that a model computes itself
    may lie there.
    """
    computed = (
        "rotary_emb.inv_freq",
        ".attn.bias",
        ".attn.masked_bias",
        "attention.bias",
        "attention.masked_bias",
    )
    extra = sorted(n for n in names if not n.endswith(computed))
    if extra:
        raise ConfigError(
            f"{source}: the tensors {', '.join(extra[:3])} belong to no parameter of this model"
        )


def non_finite_tensor(params: Any, config: ModelConfig) -> str | None:
    """The name of the first tensor that holds a number that is not finite, as the family's files
    call it; None: there is none.
    """
    first = jax.device_get(first_bad_of_all(params))
    outside, layer = places(config)
    for row, at in outside:
        if first[row.name] >= 0:
            return at.name
    for row, at in layer:
        if first["layers"][row.name] >= 0:
            return at.name.format(i=int(first["layers"][row.name]), e="*")
    return None
