"""A setting's text -> the user's own function: module:name or file.py:name. The file is executed."""

import importlib
import importlib.util
import pathlib
from typing import Any

from dpojax.errors import ConfigError


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
            module_spec = importlib.util.spec_from_file_location(pathlib.Path(place).stem, place)
            if module_spec is None or module_spec.loader is None:
                raise ImportError(f"{place} is not a Python file")
            module = importlib.util.module_from_spec(module_spec)
            module_spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, name)
        if not callable(function) and not (kind and isinstance(function, kind)):
            raise AttributeError(f"{name} is a {type(function).__name__}, not a function")
        return function
    except Exception as error:  # whatever a user's file raises is theirs to read
        raise ConfigError(f"{setting}={spec!r}: module:function expected ({type(error).__name__}: {error})") from error
