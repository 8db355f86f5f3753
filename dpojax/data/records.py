"""Files -> rows (dict) by number, without any knowledge of what a dataset means.

jsonl · jsonl.gz · json (a list of objects) · parquet · arrayrecord (one JSON object per record) ·
hf:NAME[:SPLIT]
"""

import gzip
import hashlib
import importlib
import json
import os
import pathlib
import weakref
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.errors import ConfigError, DataError
from dpojax.untrusted.plain_data import (
    MAX_LINE_BYTES,
    existing_path,
    memory_bytes,
    parse_json,
    read_bytes,
)

Row = dict[str, Any]

MAX_JSON_BYTES = 2**30  # a larger .json file is better read line by line

# Text packs 3 to 20 times. What unpacks to more than this is a bomb, once it is larger than
# UNPACKED_BYTES.
MAX_PACKING = 200
UNPACKED_BYTES = 64 * 2**20

MARK = b"\xef\xbb\xbf"  # a byte-order mark


class Records(NamedTuple):
    """Rows of one file by number.

    `get` raises DataError, naming file and line, where a row cannot be read.
    """

    name: str
    size: int
    get: Callable[[int], Row]
    where: Callable[[int], str]  # "file:line" of a row, for messages
    fingerprint: str  # of the content


def parse_line(line: bytes, where: str) -> Row:
    """One JSON object from one line of bytes.

    Raises: DataError naming `where` and the fault.
    """
    if line.startswith(MARK) and not where.endswith(":1"):
        raise DataError(
            f"{where}: a byte-order mark in mid-file; repair the line, or set data.on_bad_line=skip"
        )
    try:
        return parse_json(line, max_bytes=MAX_LINE_BYTES)
    except ValueError as error:
        advice = "; a list of objects is a .json file" if line.lstrip(MARK).startswith(b"[") else ""
        raise DataError(
            f"{where}: {error}{advice}; repair the line, or set data.on_bad_line=skip"
        ) from error


def _unpack(path: pathlib.Path) -> np.ndarray:
    """The bytes that a .gz file holds.

    Raises DataError for one that unpacks to more than its size can mean.
    """
    most = memory_bytes() // 3
    data = bytearray()
    with path.open("rb") as packed, gzip.GzipFile(fileobj=packed) as file:
        while part := file.read(2**20):
            data += part
            packing = len(data) / max(1, packed.tell())
            if len(data) > UNPACKED_BYTES and packing > MAX_PACKING:
                raise DataError(
                    f"{path}: its first {packed.tell():,} bytes unpack to {len(data):,}, over"
                    f" {MAX_PACKING} times as many: text does not pack so well; if it is data,"
                    " unpack it by hand"
                )
            if len(data) > most:
                raise DataError(
                    f"{path}: it unpacks to more than {most:,} bytes, a third of the memory; unpack"
                    " it by hand"
                )
    return np.frombuffer(data, np.uint8)


def _line_places(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(where the lines start, where they end, their first bytes).

    The parts hold a file's bytes one after another.
    """
    starts = []
    ends = []
    firsts = []
    place = 0
    begins = True
    for part in parts:
        breaks = np.flatnonzero(part == ord("\n"))
        first = np.concatenate([[0] if begins else [], breaks + 1]).astype(np.int64)
        first = first[first < part.size]
        starts.append(first + place)
        firsts.append(part[first])
        ends.append(breaks + place)
        begins = part.size > 0 and part[-1] == ord("\n")
        place += part.size
    if place and not begins:
        ends.append(np.array([place]))

    def joined(arrays, kind):
        return np.concatenate([np.zeros(0, kind), *arrays]).astype(kind)

    return joined(starts, np.int64), joined(ends, np.int64), joined(firsts, np.uint8)


class _Lines:
    """Random access to the non-blank lines of a file; picklable for worker processes.

    The file is read and not mapped: a mapped one that gets shorter during the run would end the
    process (SIGBUS).
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._load()

    def _load(self):
        self.data: np.ndarray | None = None  # what a .gz file unpacks to
        try:
            if self.path.suffix.lower() == ".gz":
                self.data = _unpack(self.path)
                parts = iter([self.data])
            else:
                self.file = self.path.open("rb")
                # rows are read as long as anyone holds them
                weakref.finalize(self, self.file.close)
                parts = (
                    np.frombuffer(part, np.uint8)
                    for part in iter(lambda: self.file.read(2**24), b"")
                )
            self.starts, self.ends, firsts = _line_places(parts)
        except (OSError, EOFError, zlib.error, MemoryError) as error:
            raise DataError(
                f"{self.path}: cannot be read: {error or 'it does not fit the memory'}"
            ) from error
        # A line that is not blank starts with a brace: the others, few, are looked at.
        blank = [i for i in np.flatnonzero(firsts != ord("{")) if self._is_blank(i)]
        self.numbers = np.delete(np.arange(self.ends.size), blank)

    def _is_blank(self, i: int) -> bool:
        """Whether a line holds white space alone, Unicode's included."""
        if self.ends[i] - self.starts[i] > MAX_LINE_BYTES:
            return False  # it is refused when it is read
        return not self.line(i).removeprefix(MARK).decode("utf-8", errors="replace").strip()

    def line(self, i) -> bytes:
        start = int(self.starts[i])
        end = int(self.ends[i])
        if self.data is not None:
            return self.data[start:end].tobytes()
        # a longer one is refused
        line = os.pread(self.file.fileno(), min(end - start, MAX_LINE_BYTES + 1), start)
        if len(line) < min(end - start, MAX_LINE_BYTES + 1):
            raise DataError(
                f"{self.path.name}:{i + 1}: the file got shorter since it was opened; start again"
                " when it is whole"
            )
        return line

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
        self.name = name
        self.rows = rows

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
            self.table = _read_table(self.path)
        except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path}: not a Parquet file: {error}") from error

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        self.path = state["path"]
        self._load()

    def get(self, i: int) -> Row:
        try:
            return self.table.slice(i, 1).to_pylist()[0]
        # text that is not UTF-8, a date of another age
        except (ValueError, OverflowError) as error:
            raise DataError(
                f"{self.where(i)}: {error}; repair the row, or set data.on_bad_line=skip"
            ) from error

    def where(self, i: int) -> str:
        return f"{self.path.name}:{i + 1}"


def _read_table(path: pathlib.Path):
    """A Parquet file as a table, a batch of rows at a time.

    Raises DataError where it unpacks to more than memory holds.
    """
    import pyarrow.parquet

    # not mapped: a file that gets shorter would end the process
    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: it has two columns {twice!r}")
    batches = []
    size = 0
    most = memory_bytes() // 3
    for batch in file.iter_batches(batch_size=1024):
        batches.append(batch)
        size += batch.nbytes
        if size > most:
            raise DataError(
                f"{path}: it unpacks to more than {most:,} bytes, a third of the memory; split it"
            )
    return pyarrow.Table.from_batches(batches, file.schema_arrow)


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
        try:
            record = self.source[i]
        except Exception as error:  # from C++ too: a checksum that does not fit
            raise DataError(f"{self.where(i)}: the record is damaged: {error!s:.200}") from error
        return parse_line(record, self.where(i))

    def where(self, i: int) -> str:
        return f"{self.path.name}:{i + 1}"


def _read_list(path: pathlib.Path) -> list[Row]:
    """The rows of a .json file, a list of objects.

    Raises DataError for anything else, with what to do.
    """
    data = read_bytes(path, error=DataError, max_bytes=MAX_JSON_BYTES)
    must = "a .json data file holds a list of objects; .jsonl holds one a line"
    try:
        rows = parse_json(data, shape=list, max_bytes=MAX_JSON_BYTES)
    except ValueError as error:
        lines = data.removeprefix(MARK).lstrip()
        advice = f"{must}: name it .jsonl" if lines.startswith(b"{") else must
        raise DataError(f"{path.name}: it cannot be read: {error}; {advice}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path.name}:{number}: the row is {row!r:.60}; {must}")
    return rows


def _hub(name: str) -> Records:
    """A Hugging Face dataset: hf:NAME[:SPLIT], with the `hf` extra."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(f"hf:{name} needs the extra: pip install 'dpojax[hf]'") from error
    path, _, split = name.partition(":")
    try:
        table = datasets.load_dataset(path, split=split or "train")
    # no network, no such name, no such split: the library raises anything
    except Exception as error:
        lines = str(error).splitlines()
        cause = f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
        raise ConfigError(
            f"hf:{name} cannot be opened ({cause}); without a network, fetch it elsewhere (hf"
            f" download {path} --repo-type dataset --local-dir DIR) and name its files"
        ) from error
    source = InMemory(f"hf:{name}", table)
    return Records(f"hf:{name}", len(table), source.get, source.where, str(table._fingerprint))


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
    file = existing_path(path)
    if file is None:
        raise ConfigError(f"data file {path!r:.300}: there is no such file")
    if not file.is_file():
        raise ConfigError(
            f"data file {path!r:.300}: it is a folder, a pipe or a device, and not a file"
        )
    name = file.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".ndjson")):
        source, size = (lines := _Lines(file)), len(lines.numbers)
    elif name.endswith(".parquet"):
        source, size = (columns := _Columns(file)), columns.table.num_rows
    elif name.endswith((".arrayrecord", ".array_record")):
        source, size = (records := _ArrayRecords(file)), records.size
    elif name.endswith(".json"):
        rows = _read_list(file)
        source = InMemory(file.name, rows)
        size = len(rows)
    else:
        endings = ".jsonl, .jsonl.gz, .json, .parquet or .arrayrecord"
        raise ConfigError(f"data file {path!r}: its ending must be {endings} (or write hf:NAME)")
    if size == 0:
        raise DataError(f"{file.name}: no rows")
    return Records(file.name, size, source.get, source.where, fingerprint_file(file))
