"""Files, JSON and numbers that somebody else wrote -> plain values, checked in one way everywhere.

`parse_json` reads every JSON file and every line of JSON: it bounds size, depth, numbers, keys and
characters before anyone uses a value. Every number of a setting, a flag or a column passes
`number_fault`.
"""

import errno
import json
import math
import os
import pathlib
import re
import resource
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dpojax.errors import ConfigError, DpojaxError

MAX_LINE_BYTES = 8 * 2**20  # a longer line is damage, not a preference

MAX_FILE_BYTES = 256 * 2**20  # the largest tokenizer.json of a published model has 34 MB

# A tool's schema has about ten levels; Python's own parser gives up at about a thousand.
MAX_DEPTH = 100

MAX_INT32 = 2**31 - 1  # what counts and indexes arrays on a device

MAX_FLOAT32 = float(np.finfo(np.float32).max)

SMALLEST_FLOAT32 = float(np.finfo(np.float32).smallest_subnormal)

_NUL_OR_SURROGATE = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")

_TWO_DIGITS = re.compile(r"\d\d")
_MANY_DIGITS = re.compile(r"\d{300}")


class _Flags:
    """What the JSON parser has met."""

    def __init__(self):
        self.not_finite = False

    def number(self, text: str) -> float:
        """A float; notes one that is too large for 64 bits."""
        value = float(text)
        self.not_finite |= math.isinf(value)
        return value

    def constant(self, text: str) -> float:
        """NaN, Infinity and -Infinity, which JSON does not have and Python's parser takes."""
        self.not_finite = True
        return float(text)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys: the last one would win silently."""
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [k for k, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r:.80}")
    return values


def _text_fault(text: str) -> str | None:
    """What is wrong with the characters of a string, or None."""
    if "\0" in text:
        return "it holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{text[error.start]!r} is half a character (a lone surrogate)"
    return None


def _leaf_fault(value: Any, infinite: bool) -> str | None:
    """What is wrong with a string or a number, or None."""
    if isinstance(value, str):
        return _text_fault(value)
    if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not infinite)):
        return f"{value} is no finite number"
    if isinstance(value, int) and abs(value) > 10**308:
        return "the number is larger than 64 bits of floating point hold"
    return None


def _is_suspicious(text: str) -> bool:
    """Whether the values must be walked, which takes Python's time and nearly no text needs.

    This test itself runs at the speed of C.
    """
    if "\\u" in text and _NUL_OR_SURROGATE.search(text):
        return True
    # A run of 300 digits holds two neighbours of every 150th character.
    return bool(_TWO_DIGITS.search(text[::150]) and _MANY_DIGITS.search(text))


def _place(within: str, key: str | int) -> str:
    """Where a value stands: tools[0].name. It escapes characters that cannot be printed."""
    if isinstance(key, int):
        return f"{within}[{key}]"
    name = repr(key)[1:-1][:60]
    if not within:
        return name
    return f"{within}.{name}"


def _entries(node: Any) -> Iterable[tuple[str | int, Any]]:
    """What a node holds, by key or place."""
    if isinstance(node, dict):
        return node.items()
    if isinstance(node, list):
        return enumerate(node)
    return ()


def _check_values(value: Any, infinite: bool) -> None:
    """Raises ValueError for the first value that is nested too deeply, or is no sound number or
    text; names its place.
    """
    fault = _leaf_fault(value, infinite)
    if fault is not None:
        raise ValueError(fault)
    stack: list[tuple[Any, str, int]] = [(value, "", 1)]
    while stack:
        node, place, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        for key, child in _entries(node):
            fault = _leaf_fault(key, infinite) or _leaf_fault(child, infinite)
            if fault is not None:
                raise ValueError(f"{_place(place, key)!r}: {fault}")
            if isinstance(child, dict | list):
                stack.append((child, _place(place, key), depth + 1))


def _check_depth(value: Any) -> None:
    """Raises ValueError for what is nested too deeply."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [node for node in level if isinstance(node, dict | list)]
        if not containers:
            return
        level = [child for node in containers for _, child in _entries(node)]
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def parse_json(
    data: bytes | str,
    *,
    shape: type | None = dict,
    infinite: bool = False,
    max_bytes: int = MAX_FILE_BYTES,
) -> Any:
    """The value of a JSON text.

    Args:
      data: UTF-8, with or without a byte-order mark.
      shape: dict or list, the type that the value must have; None: any.
      infinite: Infinity is a number (settings write it for "none").
    Raises: ValueError, whose message says what is wrong and where: too long, not UTF-8, no JSON,
      nested too deeply, a duplicate key, a number that is not finite, half a character or NUL, or
      of another shape.
    """
    if len(data) > max_bytes:
        raise ValueError(f"it has {len(data):,} bytes; at most {max_bytes:,} are read")
    text = data
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    if "\0" in text:
        raise ValueError("it holds a NUL byte")
    flags = _Flags()
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_float=flags.number,
            parse_constant=flags.constant,
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep") from None
    except MemoryError:
        raise ValueError("it does not fit the memory") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        reason = str(error)
        if "set_int_max_str_digits" in reason:
            # Python's message tells how to make it read such integers, which is no fix here.
            reason = "a number has thousands of digits"
        raise ValueError(reason) from None
    if flags.not_finite or _is_suspicious(text):
        _check_values(value, infinite)
    elif text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if shape is not None and not isinstance(value, shape):
        expected = {dict: "an object", list: "a list"}
        raise ValueError(f"it holds a JSON {json_type(value)}, not {expected[shape]}")
    return value


def json_type(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {
        dict: "object",
        list: "list",
        str: "string",
        bool: "boolean",
        int: "number",
        float: "number",
    }
    return names.get(type(value), "null")


def read_bytes(
    path: pathlib.Path, *, error: type[DpojaxError] = ConfigError, max_bytes: int = MAX_FILE_BYTES
) -> bytes:
    """The bytes of a plain file.

    Raises `error` for a pipe, a device, a folder, a file that is too large or cannot be read.
    """
    try:
        if not path.is_file():  # open() would wait for ever at a pipe
            raise error(f"{path}: it is no plain file, or does not exist")
        size = path.stat().st_size
        if size > max_bytes:
            raise error(f"{path}: it has {size:,} bytes; at most {max_bytes:,} are read")
        return path.read_bytes()
    except DpojaxError:
        raise  # some are ValueErrors too
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror or cause}") from cause
    except ValueError as cause:  # a NUL in the path
        raise error(f"{path}: cannot be read: {cause}") from cause


def read_whole_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that a run appends to; [] where there is none.

    A line that a kill cut off is left out. Lines end where bytes say so: text may hold U+2028 and
    the like, at which `str.splitlines` would cut it.
    """
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(parse_json(line.decode("utf-8", errors="replace")))
        except ValueError:
            continue
    return found


def read_json(
    path: pathlib.Path,
    *,
    error: type[DpojaxError] = ConfigError,
    shape: type | None = dict,
    infinite: bool = False,
) -> Any:
    """The value of a JSON file; see `parse_json`.

    Raises `error`, naming the file and what is wrong with it.
    """
    data = read_bytes(path, error=error)
    try:
        return parse_json(data, shape=shape, infinite=infinite)
    except ValueError as cause:
        raise error(f"{path}: not JSON as it should be: {cause}") from cause


def read_text(path: pathlib.Path, *, error: type[DpojaxError] = ConfigError) -> str:
    """The text of a UTF-8 file. Raises `error` for a file that is none."""
    try:
        return read_bytes(path, error=error).decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{path}: not UTF-8 text: {cause}") from cause


def first_match(patterns_and_name: tuple[Sequence[str], str]) -> str | None:
    """The first of the regular expressions that a dotted name ends with, or None.

    Args:
      patterns_and_name: as one argument, which is what `sandbox.call` passes on.
    """
    patterns, name = patterns_and_name
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)


def check_output(path: pathlib.Path) -> None:
    """Raises OSError where no plain file can be put: a pipe would wait for a reader, a device would
    be replaced.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "a folder, a pipe or a device lies there", str(path))


def memory_bytes() -> int:
    """The memory that this process may take: the machine's, or less where a limit is set."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return machine
    return min(machine, limit)


def existing_path(text: str) -> pathlib.Path | None:
    """The path that `text` names, if something is there; None also for text that names nothing."""
    if not text:
        return None
    path = pathlib.Path(text)
    try:
        if path.exists():
            return path
    except (OSError, ValueError):  # longer than names may be, or a NUL
        pass
    return None


def _int32_fault(value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int):
        return "it must be a whole number"
    if abs(value) > MAX_INT32:
        return f"it must be within 32 bits: at most {MAX_INT32:,}"
    return None


def _float32_fault(value: Any, infinite: bool) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "it must be a number"
    if value in (math.inf, -math.inf) and infinite:
        return None
    if value != value or value in (math.inf, -math.inf):  # NaN differs from itself
        return "it must be a finite number"
    if abs(value) > MAX_FLOAT32:
        return f"it must be a number that float32 holds: at most {MAX_FLOAT32:.4g}"
    if value and abs(value) < SMALLEST_FLOAT32 / 2:
        return "it must be a number that float32 holds: this one is 0 there"
    return None


def number_fault(value: Any, kind: type, *, infinite: bool = False) -> str | None:
    """Why `value` is no number that arrays can hold; None if it is one.

    Args:
      kind: int, which arrays hold as int32, or float, as float32.
      infinite: whether an infinite number has a meaning here.
    """
    if kind is int:
        return _int32_fault(value)
    return _float32_fault(value, infinite)
