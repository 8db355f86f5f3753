"""Hugging Face directories (config.json + safetensors) <-> parameters, without torch or transformers.

Both ways go tensor by tensor: the host holds a part of one tensor at a time, beside the arrays themselves.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dpojax.data.records import fingerprint_file
from dpojax.data.tokens import TOKENIZER_NAMES, copy_companions, load_tokenizer
from dpojax.errors import ConfigError
from dpojax.models.config import ModelConfig
from dpojax.models.families import FAMILIES, Family, Source, model_config, read_fields
from dpojax.models.table import ParamRow, layer_rows, model_rows
from dpojax.plain_data import check_output, parse_json, read_json

INDEX, SINGLE, CHECKSUMS = "model.safetensors.index.json", "model.safetensors", "checksums.json"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
PART_BYTES = 4 << 20  # of a tensor that is copied at a time
MAX_HEADER_BYTES = 100 << 20  # the library's own limit
MAX_RANK = 8  # dimensions of a tensor; no parameter has more than three


def read_config(folder: pathlib.Path, ignore: Collection[str] = ()) -> ModelConfig:
    """The decoder that a directory describes: its config.json (see `families.model_config`), and whether it stores a head."""
    config = model_config(read_fields(folder), folder / "config.json", ignore)
    untied = config.tie_embeddings and _holds_another_head(folder, config)
    return dataclasses.replace(config, tie_embeddings=False) if untied else config


def _holds_another_head(folder: pathlib.Path, config: ModelConfig) -> bool:
    """Whether a directory of tied embeddings stores a head that differs from its table: transformers uses both then."""
    if not ((folder / SINGLE).is_file() or (folder / INDEX).is_file()):
        return False
    names, tensors = FAMILIES[config.family].names, Directory(folder).tensors
    table, head = (tensors.get(f"{names[x].name}.weight") for x in ("embed", "unembed"))
    if table is None:  # a file of the bare model
        table = tensors.get(f"{names['embed'].name.split('.', 1)[-1]}.weight")
    if table is None or head is None:
        return False
    rows = max(1, PART_BYTES // max(1, table[:1].nbytes))
    same = table.shape == head.shape and all(
        np.array_equal(table[i : i + rows].astype(np.float32), head[i : i + rows].astype(np.float32))
        for i in range(0, len(table), rows)
    )
    return not same


# --- safetensors ------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """What a safetensors header says of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes after the header
    end: int


def _entry(name: str, values: Any) -> Entry:
    """Raises ValueError, naming the tensor, for an entry that is none."""
    if not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r:.80} is {values!r:.80}; it must have dtype, shape and data_offsets")
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r:.80} is of type {dtype!r:.40}; weights are {', '.join(DTYPES)}")
    for field, numbers in {"shape": shape, "data_offsets": offsets}.items():
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{name!r:.80} has {field}={numbers!r:.80}; it must be a list of numbers >= 0")
    if len(offsets) != 2 or len(shape) > MAX_RANK:
        raise ValueError(f"{name!r:.80} has shape={shape!r:.80} and data_offsets={offsets!r:.80}")
    start, end = offsets
    if end - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(f"{name!r:.80} has data_offsets={offsets}, which are not the bytes of its shape {shape} in {dtype}")
    return Entry(name, dtype, tuple(shape), start, end)


def _read_header(path: pathlib.Path) -> tuple[list[Entry], int]:
    """(the tensors in the order of their bytes, where these start). Raises ValueError for a damaged header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"its header would have {length:,} bytes, the file has {size:,}")
        header = parse_json(file.read(length))
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(v, str) for v in notes.values()):
        raise ValueError("'__metadata__' does not map names to strings")
    entries = sorted((_entry(n, v) for n, v in header.items()), key=lambda e: (e.start, e.end))
    end = 0
    for entry in entries:  # the format has neither gaps nor shared bytes
        if entry.start != end:
            raise ValueError(f"{entry.name!r:.80} has data_offsets from {entry.start}, and the tensor before it ends at {end}")
        end = entry.end
    if end != size - 8 - length:
        raise ValueError(f"its tensors have {end:,} bytes, and the file holds {size - 8 - length:,}: it is not whole")
    return entries, 8 + length


def open_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file, mapped into memory and not read. Raises ConfigError for a damaged file.

    By hand, because the library cannot hand out a part of a bf16 tensor without a copy of it on a device.
    """
    if not path.is_file():  # open() would wait for ever at a pipe
        raise ConfigError(f"{path}: it is no plain file, or does not exist")
    tensors = {}
    try:
        entries, first = _read_header(path)
        for entry in entries:
            dtype = DTYPES[entry.dtype]
            # A tensor of no elements cannot be mapped.
            empty = entry.start == entry.end
            tensors[entry.name] = (
                np.zeros(entry.shape, dtype) if empty else np.memmap(path, dtype, "r", first + entry.start, entry.shape)
            )
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file: {error}") from error
    return tensors


@runtime_checkable
class Tensors(Protocol):
    """Named tensors of a checkpoint, read when they are asked for."""

    def names(self) -> Collection[str]: ...
    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray: ...


def _read_index(path: pathlib.Path) -> dict[str, str]:
    """Tensor -> file of an index. Raises ConfigError for a file that is none."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ConfigError(f"{path}: weight_map is {where!r:.80}; it must map tensors to files")
    for tensor, name in where.items():
        plain = isinstance(name, str) and pathlib.PurePath(name).name == name and name.endswith(".safetensors")
        if not plain:
            raise ConfigError(f"{path}: {name!r:.80} ({tensor!r:.80}) is not the plain name of a safetensors file")
    return where


class Directory:
    """The tensors of a directory: one safetensors file, or several with an index."""

    def __init__(self, folder: pathlib.Path):
        self.folder, index = folder, folder / INDEX
        self.tensors: dict[str, np.ndarray] = {}
        if not index.exists():
            if not (folder / SINGLE).exists():
                raise ConfigError(f"model.init={str(folder)!r}: it holds no {SINGLE} (and no index of several)")
            self.tensors = open_safetensors(folder / SINGLE)
            return
        where = _read_index(index)
        if (folder / SINGLE).exists():
            raise ConfigError(f"{folder}: it holds {SINGLE} and {INDEX}; remove the one that is old")
        for name in sorted(set(where.values())):
            tensors = open_safetensors(folder / name)
            twice = next((t for t in tensors if t in self.tensors), None)
            if twice is not None:
                raise ConfigError(f"{folder / name}: another file of {INDEX} holds the tensor {twice!r:.80} too")
            lacks = next((t for t, file in where.items() if file == name and t not in tensors), None)
            if lacks is not None:
                raise ConfigError(f"{folder / name}: the tensor {lacks!r:.80}, which {INDEX} sees in it, is missing")
            self.tensors |= tensors

    def names(self) -> Collection[str]:
        return self.tensors

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Raises ConfigError if the tensor is missing or of another shape."""
        if name not in self.tensors:
            raise ConfigError(f"{self.folder}: the tensor {name!r} is missing")
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise ConfigError(f"{self.folder}: {name} has the shape {tensor.shape}; config.json makes it {shape}")
        return tensor


# --- a parameter and its tensor ---------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a parameter lies in a tensor."""

    name: str  # with {i} and {e}
    shape: tuple[int, ...]  # of the tensor
    groups: int  # the outputs are this many groups (heads), in each of which
    start: int  # the parameter stands from here
    stop: int
    of: int  # out of so many
    inputs: int  # 0: the tensor has outputs alone
    transposed: bool

    def outputs_first(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter's part of a tensor, as a view [outputs, inputs] or [outputs]."""
        if self.inputs and not self.transposed:
            tensor = tensor.T
        grouped = tensor.reshape(self.groups, self.of, *tensor.shape[1:])
        part = grouped[:, self.start : self.stop]
        # A part of every group is no view; a part of the whole is.
        return part[0] if self.groups == 1 else part.reshape(-1, *tensor.shape[1:])


def _sizes(row: ParamRow) -> tuple[int, int]:
    """(inputs, outputs) of a row's tensor; inputs 0 where it is no linear map."""
    if not row.in_dims:
        return 0, math.prod(row.shape)
    inputs, outputs = row.map_shape
    return math.prod(inputs), math.prod(outputs)


def place(row: ParamRow, rows: Mapping[str, ParamRow], family: Family) -> Place:
    """Where `row` lies in a checkpoint of the family; `rows` are all rows by name."""
    ends = "_bias" if row.name.endswith("_bias") else ""
    base = row.name.removesuffix("_bias")
    source: Source = family.names[base]
    name = source.name + (".bias" if ends else ".weight")
    inputs, outputs = _sizes(row)
    if not row.in_dims and len(row.shape) > 1 and row.axes[-1] == "embed":  # a table: rows by position, as it is
        return Place(name, row.shape, 1, 0, row.shape[0], row.shape[0], row.shape[1], True)
    parts = source.parts or (base,)
    groups = rows["q"].shape[1] if source.per_head else 1
    sizes = {p: _sizes(rows[p + ends])[1] // groups for p in parts}
    start = sum(list(sizes.values())[: parts.index(base)])
    whole = sum(sizes.values())
    shape = (whole * groups,) if not inputs else (whole * groups, inputs) if source.transposed else (inputs, whole * groups)
    return Place(name, shape, groups, start, start + outputs // groups, whole, inputs, source.transposed)


def places(config: ModelConfig) -> tuple[list[tuple[ParamRow, Place]], list[tuple[ParamRow, Place]]]:
    """Every parameter with its place: (those outside the layers, those of a layer)."""
    outside, layer = model_rows(config), layer_rows(config)
    rows, family = {r.name: r for r in (*outside, *layer)}, FAMILIES[config.family]
    return [(r, place(r, rows, family)) for r in outside], [(r, place(r, rows, family)) for r in layer]


def num_tensors(config: ModelConfig) -> int:
    """How many reads `load_params` takes."""
    return len(model_rows(config)) + config.num_layers * sum(row.experts or 1 for row in layer_rows(config))


# --- import -----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnums=0)
def _write_in_place(buffer, part, start):
    return jax.lax.dynamic_update_slice(buffer, part.astype(buffer.dtype), start)


class _Filler:
    """One parameter's shards on this process's devices, filled part by part."""

    def __init__(self, shape: tuple[int, ...], sharding, dtype):
        self.shape, self.sharding = shape, sharding
        self.ranges, self.buffers = {}, {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            own = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
            self.ranges[device] = own
            self.buffers[device] = jnp.zeros(tuple(map(len, own)), dtype, device=device)

    def put(self, lead: tuple[int, ...], value: np.ndarray) -> None:
        """Writes `value`, a view of the parameter at the leading indices `lead` (layer, expert)."""
        for device, own in self.ranges.items():
            if not all(i in r for i, r in zip(lead, own, strict=False)):
                continue
            start = [i - r.start for i, r in zip(lead, own, strict=False)]
            mine = value[tuple(slice(r.start, r.stop) for r in own[len(lead) :])]
            rows = max(1, PART_BYTES // max(1, mine[:1].nbytes))
            for first in range(0, len(mine), rows):
                part = np.ascontiguousarray(mine[first : first + rows])
                part = jax.device_put(part.reshape((1,) * len(lead) + part.shape), device)
                place = (*start, first, *[0] * (mine.ndim - 1))
                self.buffers[device] = jax.block_until_ready(_write_in_place(self.buffers[device], part, place))

    def array(self) -> jax.Array:
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, list(self.buffers.values()))


def _shaped(row: ParamRow, part: np.ndarray) -> np.ndarray:
    """A tensor's part, [outputs, inputs] or [outputs], in the row's dimensions: a view where it is one piece."""
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
    tensors = Directory(source) if isinstance(source, pathlib.Path) else source
    if isinstance(source, pathlib.Path):
        verify_checksums(source)
    names, read = set(tensors.names()), set()
    outside, layer = places(config)
    by_name = {r.name: p for r, p in outside}
    head = FAMILIES[config.family].names["unembed"].name + ".weight"

    def get(name: str, shape) -> np.ndarray:
        if name == by_name["embed"].name and name not in names and config.tie_embeddings and head in names:
            name = head  # the one table may stand under either name, or under both
        # Files of the bare model lack the first word of the names ("model." or "transformer.").
        bare = name.split(".", 1)[-1]
        found = name if name in names or bare not in names else bare
        read.add(found)
        return tensors.get(found, shape)

    if config.tie_embeddings:
        read.add(head)
    # Every tensor is asked for before room for any is made: an impossible size in config.json is found here.
    for _, at in outside:
        get(at.name, at.shape)
    for i in range(config.num_layers):
        for row, at in layer:
            for e in range(row.experts or 1):
                get(at.name.format(i=i, e=e), at.shape)
    _refuse_extra(names - read, source)
    done = 0

    def load(row: ParamRow, at: Place, sharding, layers: int | None) -> jax.Array:
        nonlocal done
        filler = _Filler(row.shape if layers is None else (layers, *row.shape), sharding, dtype)
        for i in range(layers or 1):
            for e in range(row.experts or 1):
                part = at.outputs_first(get(at.name.format(i=i, e=e), at.shape))
                lead = (() if layers is None else (i,)) + ((e,) if row.experts else ())
                filler.put(lead, _shaped(row, part))
                done += 1
                progress(done)
        return filler.array()

    params: dict[str, Any] = {r.name: load(r, p, shardings[r.name], None) for r, p in outside}
    params["layers"] = {r.name: load(r, p, shardings["layers"][r.name], config.num_layers) for r, p in layer}
    return params


def _refuse_extra(names: Collection[str], source: Any) -> None:
    """Raises ConfigError for tensors that no parameter takes; tables that a model computes itself may lie there."""
    computed = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", "attention.bias", "attention.masked_bias")
    extra = sorted(n for n in names if not n.endswith(computed))
    if extra:
        raise ConfigError(f"{source}: the tensors {', '.join(extra[:3])} belong to no parameter of this model")


def verify_checksums(folder: pathlib.Path) -> None:
    """Compares the files with checksums.json, where an export left one. Raises ConfigError naming the first that changed."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return
    noted = read_json(path)
    for name, digest in noted.items():
        file = folder / name
        if pathlib.PurePath(name).name != name or not isinstance(digest, str):
            raise ConfigError(f"{path}: {name!r:.80}: {digest!r:.80} is not the checksum of a file beside it")
        if not file.is_file() or fingerprint_file(file) != digest:
            raise ConfigError(f"{file}: its bytes are not those that were exported; if that is meant, remove {path}")


def _first_bad(x: jax.Array) -> jax.Array:
    """The first index of the leading axis with a number that is not finite; -1: there is none."""
    bad = jnp.any(~jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1)


_first_bad_of_all = jax.jit(lambda tree: jax.tree.map(_first_bad, tree))


def non_finite_tensor(params: Any, config: ModelConfig) -> str | None:
    """The name of the first tensor that holds a number that is not finite, as the family's files call it; None: there is none."""
    first = jax.device_get(_first_bad_of_all(params))
    outside, layer = places(config)
    for row, at in outside:
        if first[row.name] >= 0:
            return at.name
    for row, at in layer:
        if first["layers"][row.name] >= 0:
            return at.name.format(i=int(first["layers"][row.name]), e="*")
    return None


# --- export -----------------------------------------------------------------------------------------------------------


def special_ids(folder: pathlib.Path | None) -> dict[str, int | None]:
    """bos_id and eos_id of the tokenizer in a folder, for `llama_fields`."""
    if folder is None or not any((folder / n).is_file() for n in TOKENIZER_NAMES):
        return {"bos_id": None, "eos_id": None}
    tokenizer = load_tokenizer(str(folder))
    return {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}


def llama_fields(config: ModelConfig, *, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """A config.json for a decoder that was made here. Raises ConfigError for one that Llama cannot express."""
    if config.norm != "rms" or config.mlp != "gated" or config.family != "llama":
        raise ConfigError(f"export: Llama has norm='rms' and mlp='gated', not {config.norm!r} and {config.mlp!r}")
    names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": names[config.activation],
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def _fetch(array: jax.Array, index: tuple[int, ...], dtype) -> np.ndarray:
    """array[index] on the host, whole, of an array that is spread over devices and processes."""
    part = array
    if index:
        part = _at(array, index)
    if not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part).astype(dtype)


@jax.jit
def _at(array, index):
    return array[tuple(index)]


def _tensors_of(params: Any, config: ModelConfig, dtype) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """(name, shape, how to get it) of every tensor of an export, in the order of the table."""
    outside, layer = places(config)

    def whole(members: list[tuple[ParamRow, Place]], tree: Any, lead: tuple[int, ...]) -> np.ndarray:
        at = members[0][1]
        parts = []
        for row, _ in members:
            own = _fetch(tree[row.name], lead, dtype)
            inputs, outputs = _sizes(row)
            flat = own.reshape(inputs, outputs).T if row.in_dims else own.reshape(at.shape if at.inputs else (outputs,))
            parts.append(flat.reshape(at.groups, -1, *flat.shape[1:]))
        joined = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        joined = joined.reshape(-1, *joined.shape[2:])
        return np.ascontiguousarray(joined if at.transposed or not at.inputs else joined.T).reshape(at.shape)

    def by_tensor(pairs):
        grouped: dict[str, list[tuple[ParamRow, Place]]] = {}
        for row, at in pairs:
            grouped.setdefault(at.name, []).append((row, at))
        return [sorted(members, key=lambda m: m[1].start) for members in grouped.values()]

    for members in by_tensor(outside):
        yield members[0][1].name, members[0][1].shape, lambda m=members: whole(m, params, ())
    for i in range(config.num_layers):
        for members in by_tensor(layer):
            row, at = members[0]
            for e in range(row.experts or 1):
                lead = (i, e) if row.experts else (i,)
                yield at.name.format(i=i, e=e), at.shape, lambda m=members, lead=lead: whole(m, params["layers"], lead)


def write_safetensors(path: pathlib.Path, tensors, dtype: np.dtype, write: bool) -> dict[str, str]:
    """One file, tensor by tensor; returns the file's checksum by its name. All processes fetch, one writes."""
    code = {np.dtype(v): k for k, v in DTYPES.items()}[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, _ in tensors:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    temporary = path.with_suffix(".tmp")
    file = temporary.open("wb") if write else None

    def out(data: bytes | memoryview) -> None:
        if file is not None:
            digest.update(data)
            file.write(data)

    out(len(text).to_bytes(8, "little") + text)
    for _, _, get in tensors:
        out(memoryview(get().view(np.uint8)).cast("B"))
    if file is not None:
        file.close()
        temporary.replace(path)
    return {path.name: digest.hexdigest()}


def export_params(
    params: Any,
    config: ModelConfig,
    folder: pathlib.Path,
    *,
    fields: dict[str, Any],
    dtype: Any,
    companions: pathlib.Path | None,
    write: bool = True,
    max_shard_bytes: int = 5 << 30,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes a Hugging Face directory that transformers opens: config.json, safetensors, and what lies beside them.

    Args:
      fields: of config.json: those of the checkpoint that the model came from, or `llama_fields`.
      dtype: of the weights on disk.
      companions: directory whose tokenizer files and generation_config.json go with it, or None.
      write: whether this process writes (one does; all take part in fetching).
      max_shard_bytes: a larger model gets several files and an index.
      progress: called with the number of tensors written so far.
    Raises: ConfigError if the folder cannot be written.
    """
    try:
        _export(params, config, folder, fields, np.dtype(dtype), companions, write, max_shard_bytes, progress)
    except OSError as error:
        raise ConfigError(f"{folder}: the export cannot be written: {error.strerror or error}") from error


def _export(
    params, config: ModelConfig, folder: pathlib.Path, fields, dtype, companions, write, max_shard_bytes, progress
) -> None:
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        for place in folder.iterdir():  # a pipe would be waited for, a device replaced
            if not place.is_dir():
                check_output(place)
    done = 0

    def counted(get):
        def fetch():
            nonlocal done
            done += 1
            progress(done)
            return get()

        return fetch

    shards: list[list] = [[]]
    size = 0
    for name, shape, get in _tensors_of(params, config, dtype):
        own = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + own > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape, counted(get)))
        size += own
    many = len(shards) > 1
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if many else [SINGLE]
    checksums: dict[str, str] = {}
    if write:  # what an older export left would be read beside this one, or in its place
        for old in (*folder.glob("model*.safetensors"), folder / INDEX, folder / CHECKSUMS):
            old.unlink(missing_ok=True)
    for name, tensors in zip(files, shards, strict=True):
        checksums |= write_safetensors(folder / name, tensors, dtype, write)
    if not write:
        return
    if many:
        where = {name: file for file, tensors in zip(files, shards, strict=True) for name, _, _ in tensors}
        total = sum(math.prod(shape) * dtype.itemsize for tensors in shards for _, shape, _ in tensors)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    fields = {k: v for k, v in fields.items() if k not in ("torch_dtype", "dtype")} | {"torch_dtype": dtype.name}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    if companions is not None:
        copy_companions(companions, folder)
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n")
