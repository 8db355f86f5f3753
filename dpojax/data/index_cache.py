"""The index of a dataset on disk, under a key made from everything that it depends on."""

import functools
import json
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable

import numpy as np

from dpojax.data.dataset import Dataset
from dpojax.data.index import STORED_ARRAYS, Index, build_index, check_bad_lines
from dpojax.untrusted.plain_data import check_output, parse_json

# What numpy and zipfile raise for a stored index that is damaged.
DAMAGED = (
    # NotImplementedError too
    *(OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


def load_or_build_index(
    data: Dataset,
    folder: pathlib.Path,
    *,
    on_bad_line: str,
    max_bad_share: float,
    write: Callable[[Callable[[], None]], None],
    progress,
) -> Index:
    """The index from `folder`, or a new one that is stored there.

    The tolerance for bad lines is applied to both.

    Args:
      write: called with the function that stores a new index: when and whether it runs is the
        caller's to say.
      progress: called with the number of rows read so far.
    """
    path = folder / f"index-{data.fingerprint()}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                counts, bad, dropped = parse_json(str(file["texts"]), shape=list)
                index = Index(
                    **{name: file[name] for name in STORED_ARRAYS},
                    counts=dict(counts),
                    bad=tuple(bad),
                    dropped=tuple(dropped),
                )
        except DAMAGED:
            pass  # a damaged cache is made anew
        else:
            check_bad_lines(
                data.records.name,
                index.bad,
                data.records.size,
                on_bad_line=on_bad_line,
                max_bad_share=max_bad_share,
            )
            return index
    index = build_index(
        data, on_bad_line=on_bad_line, max_bad_share=max_bad_share, progress=progress
    )
    write(functools.partial(_store, index, path))
    return index


def _store(index: Index, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    texts = json.dumps([index.counts, index.bad, index.dropped])
    np.savez(temporary, **{name: getattr(index, name) for name in STORED_ARRAYS}, texts=texts)
    temporary.replace(path)
