"""A setting's text -> the user's own function: module:name or file.py:name.

The file is executed, once.
"""

import functools
import hashlib
import importlib.util
import pathlib
from typing import Any

from dpojax.errors import ConfigError


def names_code(text: str) -> bool:
    """Whether the text of a setting names a function of a module or a file."""
    return ":" in text or ".py" in text


@functools.lru_cache
def run_file(place: str, modified_ns: int, name: str = "") -> Any:
    """The module of a Python file. This is the only place where a user's file is executed.

    Args:
      place: of the file.
      modified_ns: when it was written: a file that has changed since is executed again.
      name: of the module; "": the file's.
    """
    del modified_ns  # a part of the cache's key
    spec = importlib.util.spec_from_file_location(name or pathlib.Path(place).stem, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_function(spec: str, setting: str, *, kind: type | None = None) -> Any:
    """The function that `spec` names, or an instance of `kind`.

    Args:
      spec: module:function or file.py:function.
      setting: where the name comes from, for messages.
    Raises: ConfigError if it cannot be found, or is no function.
    """
    place, _, name = spec.rpartition(":")
    try:
        if place.endswith(".py"):
            module = run_file(place, pathlib.Path(place).stat().st_mtime_ns)
        else:
            module = importlib.import_module(place)
        function = getattr(module, name)
        if not callable(function) and not (kind and isinstance(function, kind)):
            raise AttributeError(f"{name} is a {type(function).__name__}, not a function")
        return function
    except Exception as error:  # whatever a user's file raises is theirs to read
        raise ConfigError(
            f"{setting}={spec!r}: module:function expected ({type(error).__name__}: {error})"
        ) from error


def file_digest(spec: str) -> str:
    """Changes with the file that `spec` names; "" for a module without one."""
    place = spec.rpartition(":")[0]
    if not place.endswith(".py"):
        module = importlib.util.find_spec(place)
        if module is None or not module.origin:
            return ""
        place = module.origin
    path = pathlib.Path(place)
    if not path.is_file():  # a module that is built in
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
