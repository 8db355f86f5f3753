"""Jitted programs that are compiled once, by name, with the time that it took; and their cache.

JAX's persistent compilation cache keeps them on disk, so that a run's second start takes seconds.
"""

import hashlib
import os
import pathlib
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import filelock
import jax
import numpy as np

from dpojax.errors import ConfigError

# What the folder may hold: the programs that nobody used for longest leave it first.
CACHE_GIB = 1

_LOCK_S = 10.0  # how long JAX itself waits for another process

_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"

_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(.*?)': (\w+)")

_last_event = ""  # _REQUEST or _HIT, whichever JAX's cache reported last


def _on_event(event: str, **kwargs) -> None:
    """Remembers how the cache answered: JAX tells it nowhere else."""
    global _last_event
    if event in (_REQUEST, _HIT):
        _last_event = event


jax.monitoring.register_event_listener(_on_event)


class Counts(NamedTuple):
    """How a program was opened so far."""

    compiled: int
    loaded: int
    seconds: float


def _shapes(args: Any) -> Any:
    """What tells apart the programs for these arguments."""
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple((np.shape(x), getattr(x, "dtype", type(x))) for x in leaves)


class Program:
    """A jitted function, compiled ahead of its first call; a call with new shapes compiles again
    and is counted. What was compiled is kept.

    Attributes:
      compiled: how often it was compiled.
      loaded: how often the cache had it instead.
      seconds: that compiling and loading took together.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], *, enabled: bool = True, **jit_options
    ):
        self.name = name
        self.enabled = enabled
        self.compiled = 0
        self.loaded = 0
        self.seconds = 0.0
        self.said = Counts(0, 0, 0.0)  # what of these three a person has read
        self._jitted = jax.jit(function, **jit_options)
        self._executable: Any = None  # the latest
        self._executables: dict[Any, Any] = {}  # by shapes and dtypes

    def __call__(self, *args):
        if self._executable is not None:
            try:
                return self._executable(*args)
            except TypeError:  # the arguments' shapes or dtypes changed
                pass
        kind = _shapes(args)
        if kind in self._executables:
            self._executable = self._executables[kind]
            try:
                return self._executable(*args)
            except TypeError:  # they lie elsewhere
                pass
        start = time.monotonic()
        is_shown = self.enabled and sys.stdout.isatty()
        if is_shown:
            print(f"\r\x1b[Kcompiling {self.name}", end="", flush=True)
        self._executable, loaded = self._open(*args)
        self._executables[kind] = self._executable
        if is_shown:
            print("\r\x1b[K", end="", flush=True)
        self.loaded += loaded
        self.compiled += not loaded
        self.seconds += time.monotonic() - start
        return self._executable(*args)

    def _open(self, *args) -> tuple[Any, bool]:
        """The executable, and whether the cache had it."""
        global _last_event
        _last_event = ""
        executable = self.compile(*args)
        return executable, _last_event == _HIT

    def compile(self, *args) -> Any:
        """The executable for these arguments, arrays or ShapeDtypeStructs."""
        try:
            return self._jitted.lower(*args).compile()
        except jax.errors.JaxRuntimeError as error:
            if "spmd_partitioner" not in str(error):
                raise
            raise ConfigError(
                f"mesh.tensor: XLA cannot partition {self.name} over this mesh"
                f" ({str(error).splitlines()[0]:.160}); take a size that divides the model's heads"
                " and key-value heads, or leave the vocabulary whole (--config.mesh.rules.vocab=)"
            ) from error

    def memory(self) -> str:
        """What the executable takes of a device; "" below one GiB."""
        if self._executable is None:
            return ""
        analysis = self._executable.memory_analysis()
        if analysis is None:
            return ""
        arguments = analysis.argument_size_in_bytes / 2**30
        temporary = analysis.temp_size_in_bytes / 2**30
        if arguments + temporary < 1:
            return ""
        return f" ({arguments:.2f} GiB arguments, {temporary:.2f} GiB temporary)"


def news(programs: Mapping[str, Program]) -> str:
    """One line on what was compiled and loaded since the last such line; "" for nothing."""
    compiled = []
    loaded = []
    for program in programs.values():
        said = program.said
        took = f"{program.name} {program.seconds - said.seconds:.1f}s{program.memory()}"
        if program.compiled > said.compiled:
            compiled.append(took)
        elif program.loaded > said.loaded:
            loaded.append(took)
        program.said = Counts(program.compiled, program.loaded, program.seconds)
    parts = []
    if compiled:
        parts.append(f"compiled {', '.join(compiled)}")
    if loaded:
        parts.append(f"loaded from the compilation cache {', '.join(loaded)}")
    return "; ".join(parts)


def totals(programs: Mapping[str, Program]) -> str:
    """One line on how often each program was compiled in the whole run."""
    by_count: dict[str, list[str]] = {}
    for program in programs.values():
        counts = []
        if program.compiled:
            counts.append(f"compiled {program.compiled} time(s)")
        if program.loaded:
            counts.append("loaded from the compilation cache")
        by_count.setdefault(" and ".join(counts), []).append(program.name)
    by_count.pop("", None)  # never called
    return "programs " + "; ".join(
        f"{count}: {', '.join(names)}" for count, names in by_count.items()
    )


# --- the cache on disk ----------------------------------------------------------------------------


def open_cache(environ: Mapping[str, str] = os.environ) -> str:
    """Keeps compiled programs on disk; returns one line on it, or "" where nothing is to be said.

    It must run before the first program is compiled. JAX's own variables rule:
    JAX_ENABLE_COMPILATION_CACHE=0 turns the cache off, JAX_COMPILATION_CACHE_DIR names another
    folder. Without them it is a folder of the user's cache directory. A folder that cannot be used
    stops nothing.
    """
    settings: Any = jax.config  # has what JAX's own variables say
    if "JAX_COMPILATION_CACHE_DIR" in environ or settings.jax_compilation_cache_dir:
        return ""
    if not settings.jax_enable_compilation_cache:
        return ""
    folder = _user_cache(environ)
    if folder is None:
        return ""
    folder = folder / "dpojax" / f"programs-{_machine()}"
    try:
        _tidy(folder)
    # filelock's Timeout is an OSError
    except (OSError, RuntimeError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"compiled programs are not kept: {folder}: {reason}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_GIB * 2**30)
    # Many small programs make a slow start as one large one does.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    _drop_unreadable(folder)
    return (
        f"compiled programs are kept in {folder}, up to {CACHE_GIB} GiB"
        " (JAX_ENABLE_COMPILATION_CACHE=0: not)"
    )


def _user_cache(environ: Mapping[str, str]) -> pathlib.Path | None:
    """The user's cache directory, by the XDG base directory specification; None where there is no
    home.
    """
    named = environ.get("XDG_CACHE_HOME", "")
    if pathlib.Path(named).is_absolute():  # the specification has relative ones ignored
        return pathlib.Path(named)
    home = pathlib.Path(environ.get("HOME") or environ.get("USERPROFILE") or "")
    if home.is_absolute():
        return home / ".cache"
    return None


def _machine() -> str:
    """Changes with the kind of CPU: machines may share a home, and a program for one kind may crash
    on another.
    """
    info = pathlib.Path("/proc/cpuinfo")
    lines = []
    if info.is_file():
        lines = info.read_text(errors="replace").splitlines()
    kind = sorted(
        {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
    )
    return hashlib.sha256("\n".join([platform.machine(), *kind]).encode()).hexdigest()[:12]


def _tidy(folder: pathlib.Path) -> None:
    """Makes the folder, and removes programs that a kill left unfinished.

    Raises: OSError where it cannot be used: whoever can write a compiled program can have code run.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise PermissionError(None, "others may write it")
    with filelock.FileLock(folder / ".lockfile", timeout=_LOCK_S):  # JAX's own lock
        for entry in folder.glob("*-cache"):
            # JAX writes the time of use last: an entry without it is cut off, and would stop every
            # later write.
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").is_file():
                entry.unlink(missing_ok=True)


def _drop_unreadable(folder: pathlib.Path, shown=warnings.showwarning) -> None:
    """Removes a program that JAX cannot read, so that the one it compiles instead is written.

    JAX tells of it by a warning alone, which a person need not read.
    """

    def show(message, category, filename, lineno, file=None, line=None):
        text = str(message)
        unreadable = _UNREADABLE.match(text)
        if unreadable and unreadable[2] != "Timeout":
            for entry in folder.glob(f"{unreadable[1]}-*-cache"):
                entry.unlink(missing_ok=True)
        # Nobody needs to read of a full disk either, which stops nothing.
        elif not text.startswith("Error writing persistent compilation cache entry"):
            shown(message, category, filename, lineno, file, line)

    warnings.filterwarnings(
        "always", message="Error (reading|writing) persistent compilation cache entry"
    )
    warnings.showwarning = show
