"""data.train and data.eval -> Records.

Files, folders, globs and hub datasets become one list of rows.

A path that exists is taken as it is. Otherwise commas separate several sources, `*`, `?` and
`[...]` are a glob, a folder stands for the data files in it, and NAME=SOURCE names a part of the
rows.
"""

import bisect
import glob
import hashlib
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from dpojax.data.records import Records, Row, open_records
from dpojax.errors import ConfigError

ENDINGS = (".jsonl", ".jsonl.gz", ".ndjson", ".json", ".parquet", ".arrayrecord", ".array_record")


class Part(NamedTuple):
    """Named rows of a dataset: [start, stop)."""

    name: str
    start: int
    stop: int


class _Joined:
    """The rows of several files, one file after another. Picklable, as its files are."""

    def __init__(self, files: Sequence[Records]):
        self.files = files
        self.starts = [0, *itertools.accumulate(file.size for file in files)]

    def _place(self, row: int) -> tuple[Records, int]:
        number = bisect.bisect_right(self.starts, row) - 1
        return self.files[number], row - self.starts[number]

    def get(self, row: int) -> Row:
        file, own_row = self._place(row)
        return file.get(own_row)

    def where(self, row: int) -> str:
        file, own_row = self._place(row)
        return file.where(own_row)


def _exists(path: str) -> bool:
    try:
        return pathlib.Path(path).exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _matches(pattern: str) -> list[str]:
    return glob.glob(pattern)  # noqa: PTH207  # a pattern may be absolute, which pathlib's globs refuse


def expand(source: str, setting: str) -> list[str]:
    """The files that one source stands for.

    Raises: ConfigError naming `setting` if there are none.
    """
    if source.startswith("hf:"):
        return [source]
    if not _exists(source) and any(mark in source for mark in "*?["):
        sources = sorted(place for place in _matches(source) if pathlib.Path(place).is_file())
        if not sources:
            raise ConfigError(f"{setting}={source!r}: no file matches")
        return sources
    if _exists(source) and pathlib.Path(source).is_dir():
        visible = (
            place for place in pathlib.Path(source).iterdir() if not place.name.startswith(".")
        )
        sources = sorted(
            str(place)
            for place in visible
            if place.name.lower().endswith(ENDINGS) and place.is_file()
        )
        if not sources:
            raise ConfigError(
                f"{setting}={source!r}: the folder holds no data file ({', '.join(ENDINGS)})"
            )
        return sources
    return [source]


def _named_sources(spec: str, setting: str) -> list[tuple[str, str]]:
    """(name, source) of every source of a setting; the name is "" where none is given."""
    if _exists(spec):
        return [("", spec)]
    sources: list[tuple[str, str]] = []
    for text in filter(None, (part.strip() for part in spec.split(","))):
        name, equals, source = text.partition("=")
        named = bool(equals) and not _exists(text) and re.fullmatch(r"[A-Za-z0-9_.-]+", name)
        sources.append((name, source) if named else ("", text))
    if not sources:
        raise ConfigError(f"{setting}={spec!r}: it names no file")
    return sources


def join(files: Sequence[Records]) -> Records:
    """Several files as one list of rows."""
    if len(files) == 1:
        return files[0]
    joined = _Joined(files)
    digest = hashlib.sha256(repr([file.fingerprint for file in files]).encode()).hexdigest()
    name = f"{files[0].name} and {len(files) - 1} more"
    return Records(name, joined.starts[-1], joined.get, joined.where, digest)


def open_sources(spec: str, setting: str = "data file") -> Records:
    """All rows of a setting's sources.

    Raises: ConfigError and DataError as `records.open_records`.
    """
    records, _ = open_named(spec, setting)
    return records


def open_named(spec: str, setting: str = "data file") -> tuple[Records, tuple[Part, ...]]:
    """All rows of a setting's sources, and its named parts; none where no source has a name.

    Raises: ConfigError also where a name stands there twice, or some sources have one and others
      none.
    """
    sources = _named_sources(spec, setting)
    names = [name for name, _ in sources]
    if any(names) and not all(names):
        raise ConfigError(
            f"{setting}={spec!r}: give every source a name, NAME=FILE, or none of them"
        )
    if any(names) and len(set(names)) < len(names):
        raise ConfigError(f"{setting}={spec!r}: a name stands there twice")
    files: list[Records] = []
    parts: list[Part] = []
    for name, source in sources:
        start = sum(file.size for file in files)
        files += [open_records(place) for place in expand(source, setting)]
        parts.append(Part(name, start, sum(file.size for file in files)))
    return join(files), tuple(parts) if any(names) else ()
