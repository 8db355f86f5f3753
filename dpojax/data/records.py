"""Files -> rows (dict) by number, without any knowledge of what a dataset means.

jsonl · jsonl.gz · json (a list of objects) · parquet · arrayrecord (one JSON object per record) · hf:NAME[:SPLIT]
"""

import gzip
import hashlib
import importlib
import json
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.errors import ConfigError, DataError

Row = dict[str, Any]
MAX_LINE_BYTES = 8 * 2**20  # a longer line is damage, not a preference


class Records(NamedTuple):
    """Rows of one file by number. `get` raises DataError, naming file and line, where a row cannot be read."""

    name: str
    size: int
    get: Callable[[int], Row]
    where: Callable[[int], str]  # "file:line" of a row, for messages
    fingerprint: str  # of the content


def _strict_object(pairs):
    """A JSON object without duplicate keys: the last one would win silently."""
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return row


def parse_line(line: bytes, where: str) -> Row:
    """One JSON object from one line of bytes.

    Raises: DataError naming `where` and the fault.
    """
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: a line of {len(line):,} bytes; at most {MAX_LINE_BYTES:,} are read")
    try:
        text = line.decode("utf-8-sig" if where.endswith(":1") else "utf-8")
        if "\0" in text:
            raise ValueError("a NUL byte")
        row = json.loads(text, object_pairs_hook=_strict_object)
        if not isinstance(row, dict):
            raise ValueError(f"a JSON {type(row).__name__}, not an object")
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{where}: {error}; repair the line, or set data.on_bad_line=skip") from error
    return row


class _Lines:
    """Random access to the non-blank lines of a bytes-like object; picklable for worker processes."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._load()

    def _load(self):
        try:
            if self.path.suffix == ".gz":
                with gzip.open(self.path, "rb") as file:
                    self.data = np.frombuffer(file.read(), np.uint8)
            else:
                empty = self.path.stat().st_size == 0
                self.data = np.zeros(0, np.uint8) if empty else np.memmap(self.path, np.uint8, mode="r")
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{self.path}: cannot be read: {error}") from error
        ends = np.flatnonzero(self.data == ord("\n"))
        self.ends = ends if self.data.size == 0 or self.data[-1] == ord("\n") else np.append(ends, self.data.size)
        self.starts = np.concatenate([[0], self.ends[:-1] + 1]) if self.ends.size else self.ends
        blank = [i for i in np.flatnonzero(self.ends - self.starts < 16) if not self.line(i).strip()]
        self.numbers = np.delete(np.arange(self.ends.size), blank)

    def line(self, i) -> bytes:
        return self.data[self.starts[i] : self.ends[i]].tobytes()

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        self.path = state["path"]
        self._load()

    def where(self, i: int) -> str:
        return f"{self.path.name}:{self.numbers[i] + 1}"

    def get(self, i: int) -> Row:
        return parse_line(self.line(self.numbers[i]), self.where(i))


class InMemory:
    """Rows that are already in memory."""

    def __init__(self, name: str, rows: Sequence[Row]):
        self.name, self.rows = name, rows

    def get(self, i: int) -> Row:
        return self.rows[i]

    def where(self, i: int) -> str:
        return f"{self.name}:{i + 1}"


class _Columns:
    """Rows of an Arrow table (Parquet, read column-wise)."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._load()

    def _load(self):
        import pyarrow.parquet  # only runs that read Parquet pay for it

        try:
            self.table = pyarrow.parquet.read_table(self.path, memory_map=True)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{self.path}: not a Parquet file: {error}") from error

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        self.path = state["path"]
        self._load()

    def get(self, i: int) -> Row:
        return self.table.slice(i, 1).to_pylist()[0]

    def where(self, i: int) -> str:
        return f"{self.path.name}:{i + 1}"


class _ArrayRecords:
    """Records of an ArrayRecord file, one JSON object each."""

    def __init__(self, path: pathlib.Path):
        import grain

        self.path = path
        try:
            self.source = grain.sources.ArrayRecordDataSource(str(path))
            self.size = len(self.source)
        except Exception as error:  # array_record raises bare exceptions from C++
            raise DataError(f"{path}: not an ArrayRecord file: {error}") from error

    def get(self, i: int) -> Row:
        return parse_line(self.source[i], self.where(i))

    def where(self, i: int) -> str:
        return f"{self.path.name}:{i + 1}"


def _hub(name: str) -> Records:
    """A Hugging Face dataset: hf:NAME[:SPLIT], with the `hf` extra."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(f"hf:{name} needs the extra: pip install 'dpojax[hf]'") from error
    path, _, split = name.partition(":")
    table = datasets.load_dataset(path, split=split or "train")
    source = InMemory(f"hf:{name}", table)
    return Records(f"hf:{name}", len(table), source.get, source.where, str(table._fingerprint))


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A small file of one JSON object. Raises ConfigError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return value


def fingerprint_file(path: pathlib.Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def in_memory(name: str, rows: Sequence[Row]) -> Records:
    """Rows that a program made."""
    source = InMemory(name, rows)
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode())
    return Records(name, len(rows), source.get, source.where, digest.hexdigest())


def open_records(path: str) -> Records:
    """Opens a data file by its ending, or `hf:NAME[:SPLIT]`.

    Raises: ConfigError if it does not exist or has no known ending; DataError if it cannot be read.
    """
    if path.startswith("hf:"):
        return _hub(path[3:])
    file = pathlib.Path(path)
    if "\0" in path or not file.is_file():
        raise ConfigError(f"data file {path!r}: there is no such file")
    name = file.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
        source, size = (lines := _Lines(file)), len(lines.numbers)
    elif name.endswith(".parquet"):
        source, size = (columns := _Columns(file)), columns.table.num_rows
    elif name.endswith((".arrayrecord", ".array_record")):
        source, size = (records := _ArrayRecords(file)), records.size
    elif name.endswith(".json"):
        try:
            rows = json.loads(file.read_text(encoding="utf-8-sig"))
        except (ValueError, UnicodeDecodeError) as error:
            raise DataError(f"{file.name}: {error}") from error
        if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
            raise DataError(f"{file.name}: a .json data file holds a list of objects; .jsonl holds one a line")
        source, size = InMemory(file.name, rows), len(rows)
    else:
        endings = ".jsonl, .jsonl.gz, .json, .parquet or .arrayrecord"
        raise ConfigError(f"data file {path!r}: its ending must be {endings} (or write hf:NAME)")
    if size == 0:
        raise DataError(f"{file.name}: no rows")
    return Records(file.name, size, source.get, source.where, fingerprint_file(file))
