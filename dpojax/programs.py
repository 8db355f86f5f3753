"""Jitted programs that are compiled once, by name, with the time and memory that it took."""

import time
from collections.abc import Callable
from typing import Any

import jax

from dpojax.metrics import duration, say


class Program:
    """A jitted function, compiled ahead of its first call; a call with other shapes compiles again and is counted."""

    def __init__(self, name: str, function: Callable[..., Any], *, enabled: bool = True, **jit_options):
        self.name, self.enabled = name, enabled
        self.compiled, self.seconds, self._jitted = 0, 0.0, jax.jit(function, **jit_options)
        self._executable: Any = None

    def __call__(self, *args):
        if self._executable is not None:
            try:
                return self._executable(*args)
            except TypeError:  # the arguments' shapes or dtypes changed
                pass
        start = time.monotonic()
        self._executable = self.compile(*args)
        self.compiled += 1
        self.seconds += time.monotonic() - start
        if self.enabled:
            say(f"compiled {self.name} in {duration(time.monotonic() - start)}{self._memory()}")
        return self._executable(*args)

    def compile(self, *args) -> Any:
        """The executable for these arguments, arrays or ShapeDtypeStructs."""
        return self._jitted.lower(*args).compile()

    def _memory(self) -> str:
        analysis = self._executable.memory_analysis()
        if analysis is None:
            return ""
        gib = 2**30
        arguments, temporary = analysis.argument_size_in_bytes / gib, analysis.temp_size_in_bytes / gib
        return f", {arguments:.2f} GiB arguments, {temporary:.2f} GiB temporary"
