"""safetensors files: headers, shards and checksums, which are checked before use; and writing."""

import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dpojax.data.records import fingerprint_file
from dpojax.errors import ConfigError
from dpojax.untrusted.plain_data import parse_json, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CHECKSUMS = "checksums.json"

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

PART_BYTES = 4 << 20  # of a tensor are copied at a time: the host holds no second copy of it

MAX_HEADER_BYTES = 100 << 20  # the library's own limit

MAX_RANK = 8  # dimensions of a tensor; no parameter has more than three


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
        raise ValueError(
            f"{name!r:.80} is {values!r:.80}; it must have dtype, shape and data_offsets"
        )
    dtype = values["dtype"]
    shape = values["shape"]
    offsets = values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r:.80} is of type {dtype!r:.40}; weights are {', '.join(DTYPES)}")
    for field, numbers in {"shape": shape, "data_offsets": offsets}.items():
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(
                f"{name!r:.80} has {field}={numbers!r:.80}; it must be a list of numbers >= 0"
            )
    if len(offsets) != 2 or len(shape) > MAX_RANK:
        raise ValueError(f"{name!r:.80} has shape={shape!r:.80} and data_offsets={offsets!r:.80}")
    start, end = offsets
    if end - start != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise ValueError(
            f"{name!r:.80} has data_offsets={offsets}, which are not the bytes of its shape {shape}"
            f" in {dtype}"
        )
    return Entry(name, dtype, tuple(shape), start, end)


def _read_header(path: pathlib.Path) -> tuple[list[Entry], int]:
    """(the tensors in the order of their bytes, where these start).

    Raises ValueError for a damaged header.
    """
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
            raise ValueError(
                f"{entry.name!r:.80} has data_offsets from {entry.start}, and the tensor before it"
                f" ends at {end}"
            )
        end = entry.end
    if end != size - 8 - length:
        raise ValueError(
            f"its tensors have {end:,} bytes, and the file holds {size - 8 - length:,}: it is not"
            " whole"
        )
    return entries, 8 + length


def open_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file, mapped into memory and not read. Raises ConfigError for a damaged
    file.

    dpojax reads the format itself: the library gives no part of a bf16 tensor without a copy of the
    tensor on a device.
    """
    if not path.is_file():  # open() would wait for ever at a pipe
        raise ConfigError(f"{path}: it is no plain file, or does not exist")
    tensors = {}
    try:
        entries, first = _read_header(path)
        for entry in entries:
            dtype = DTYPES[entry.dtype]
            if entry.start == entry.end:  # nothing can be mapped
                tensors[entry.name] = np.zeros(entry.shape, dtype)
                continue
            offset = first + entry.start
            tensors[entry.name] = np.memmap(path, dtype, "r", offset, entry.shape)
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
        plain = (
            isinstance(name, str)
            and pathlib.PurePath(name).name == name
            and name.endswith(".safetensors")
        )
        if not plain:
            raise ConfigError(
                f"{path}: {name!r:.80} ({tensor!r:.80}) is not the plain name of a safetensors file"
            )
    return where


class Directory:
    """The tensors of a directory: one safetensors file, or several with an index."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        index = folder / INDEX
        self.tensors: dict[str, np.ndarray] = {}
        if not index.exists():
            if not (folder / SINGLE).exists():
                raise ConfigError(
                    f"model.init={str(folder)!r}: it holds no {SINGLE} (and no index of several)"
                )
            self.tensors = open_safetensors(folder / SINGLE)
            return
        where = _read_index(index)
        if (folder / SINGLE).exists():
            raise ConfigError(
                f"{folder}: it holds {SINGLE} and {INDEX}; remove the one that is old"
            )
        for name in sorted(set(where.values())):
            tensors = open_safetensors(folder / name)
            twice = next((t for t in tensors if t in self.tensors), None)
            if twice is not None:
                raise ConfigError(
                    f"{folder / name}: another file of {INDEX} holds the tensor {twice!r:.80} too"
                )
            lacks = next(
                (t for t, file in where.items() if file == name and t not in tensors), None
            )
            if lacks is not None:
                raise ConfigError(
                    f"{folder / name}: the tensor {lacks!r:.80}, which {INDEX} sees in it, is"
                    " missing"
                )
            self.tensors |= tensors

    def names(self) -> Collection[str]:
        return self.tensors

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Raises ConfigError if the tensor is missing or of another shape."""
        if name not in self.tensors:
            raise ConfigError(f"{self.folder}: the tensor {name!r} is missing")
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise ConfigError(
                f"{self.folder}: {name} has the shape {tensor.shape}; config.json makes it {shape}"
            )
        return tensor


def verify_checksums(folder: pathlib.Path) -> None:
    """Compares the files with checksums.json, where an export left one.

    Raises ConfigError naming the first that changed.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return
    noted = read_json(path)
    for name, digest in noted.items():
        file = folder / name
        if pathlib.PurePath(name).name != name or not isinstance(digest, str):
            raise ConfigError(
                f"{path}: {name!r:.80}: {digest!r:.80} is not the checksum of a file beside it"
            )
        if not file.is_file() or fingerprint_file(file) != digest:
            raise ConfigError(
                f"{file}: its bytes are not those that were exported; if that is meant, remove"
                f" {path}"
            )


def _first_bad(x: jax.Array) -> jax.Array:
    """The first index of the leading axis with a number that is not finite; -1: there is none."""
    bad = jnp.any(~jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1)


first_bad_of_all = jax.jit(lambda tree: jax.tree.map(_first_bad, tree))


def write_safetensors(
    path: pathlib.Path,
    tensors: Sequence[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
    dtype: np.dtype,
    write: bool,
) -> dict[str, str]:
    """Writes one file, tensor by tensor; returns the file's checksum by its name.

    Args:
      tensors: name, shape, and how it is fetched.
      write: whether this process writes. All of them fetch.
    """
    code = {np.dtype(v): k for k, v in DTYPES.items()}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in tensors:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": code,
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    temporary = path.with_suffix(".tmp")
    file = None
    if write:
        file = temporary.open("wb")

    def out(data: bytes | memoryview) -> None:
        if file is not None:
            digest.update(data)
            file.write(data)

    out(len(text).to_bytes(8, "little") + text)
    for _, _, get in tensors:
        out(get().view(np.uint8).data.cast("B"))
    if file is not None:
        file.close()
        temporary.replace(path)
    return {path.name: digest.hexdigest()}
