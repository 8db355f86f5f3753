"""Jitted programs that are compiled once, by name, with the time that it took; and what is kept of them on disk.

Compiled programs are kept between runs in JAX's persistent compilation cache, so that a run's second start takes seconds.
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
from typing import Any

import filelock
import jax

from dpojax.errors import ConfigError

CACHE_GIB = 1  # what the folder may hold; the programs that were not used for longest leave it first
_LOCK_S = 10.0  # how long JAX itself waits for another process
_REQUEST, _HIT = "/jax/compilation_cache/compile_requests_use_cache", "/jax/compilation_cache/cache_hits"
_UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(.*?)': (\w+)")
_last_event = ""  # of JAX's cache: which of the two came last


def _on_event(event: str, **kwargs) -> None:
    """Remembers how the cache answered: JAX reports it as events alone."""
    global _last_event
    if event in (_REQUEST, _HIT):
        _last_event = event


jax.monitoring.register_event_listener(_on_event)


class Program:
    """A jitted function, compiled ahead of its first call; a call with other shapes compiles again and is counted.

    Attributes:
      compiled: how often it was compiled.
      loaded: how often it was taken from the cache instead.
      seconds: that both took together.
    """

    def __init__(self, name: str, function: Callable[..., Any], *, enabled: bool = True, **jit_options):
        self.name, self.enabled = name, enabled
        self.compiled, self.loaded, self.seconds = 0, 0, 0.0
        self.said: tuple[int, int, float] = (0, 0, 0.0)  # what of these three a person has read
        self._jitted = jax.jit(function, **jit_options)
        self._executable: Any = None

    def __call__(self, *args):
        if self._executable is not None:
            try:
                return self._executable(*args)
            except TypeError:  # the arguments' shapes or dtypes changed
                pass
        start = time.monotonic()
        shown = self.enabled and sys.stdout.isatty()
        if shown:
            print(f"\r\x1b[Kcompiling {self.name}", end="", flush=True)
        self._executable, loaded = self._open(*args)
        if shown:
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
                f"mesh.tensor: XLA cannot partition {self.name} over this mesh ({str(error).splitlines()[0]:.160}); take a size that "
                "divides the model's heads and key-value heads, or leave the vocabulary whole (--config.mesh.rules.vocab=)"
            ) from error

    def memory(self) -> str:
        """What the executable takes of a device, where that is worth a word."""
        analysis = None if self._executable is None else self._executable.memory_analysis()
        if analysis is None:
            return ""
        arguments = analysis.argument_size_in_bytes / 2**30
        temporary = analysis.temp_size_in_bytes / 2**30
        if arguments + temporary < 1:
            return ""
        return f" ({arguments:.2f} GiB arguments, {temporary:.2f} GiB temporary)"


def news(programs: Mapping[str, Program]) -> str:
    """One line on what was compiled and loaded since the last such line; "" for nothing."""
    compiled, loaded = [], []
    for program in programs.values():
        count, from_cache, seconds = program.said
        took = f"{program.name} {program.seconds - seconds:.1f}s{program.memory()}"
        if program.compiled > count:
            compiled.append(took)
        elif program.loaded > from_cache:
            loaded.append(took)
        program.said = (program.compiled, program.loaded, program.seconds)
    parts = [f"compiled {', '.join(compiled)}"] if compiled else []
    parts += [f"loaded from the compilation cache {', '.join(loaded)}"] if loaded else []
    return "; ".join(parts)


def totals(programs: Mapping[str, Program]) -> str:
    """One line on how often each program was compiled in the whole run."""
    by_count: dict[str, list[str]] = {}
    for program in programs.values():
        counts = [f"compiled {program.compiled} time(s)"] if program.compiled else []
        counts += ["loaded from the compilation cache"] if program.loaded else []
        by_count.setdefault(" and ".join(counts), []).append(program.name)
    by_count.pop("", None)  # never called
    return "programs " + "; ".join(f"{count}: {', '.join(names)}" for count, names in by_count.items())


# --- the cache on disk ------------------------------------------------------------------------------------------------


def open_cache(environ: Mapping[str, str] = os.environ) -> str:
    """Keeps compiled programs on disk, before the first one is compiled; returns one line on it, "" for nothing to say.

    JAX's own variables rule: JAX_ENABLE_COMPILATION_CACHE=0 turns it off, JAX_COMPILATION_CACHE_DIR names another folder.
    Without them it is a folder of the user's cache directory. What is wrong with that folder stops nothing.
    """
    settings: Any = jax.config  # which has what JAX's own variables say
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
    except (OSError, RuntimeError, NotImplementedError) as error:  # filelock's Timeout is an OSError
        return f"compiled programs are not kept: {folder}: {getattr(error, 'strerror', None) or error}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_GIB * 2**30)
    # Many small programs make a slow start as one large one does.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    _drop_unreadable(folder)
    return f"compiled programs are kept in {folder}, up to {CACHE_GIB} GiB (JAX_ENABLE_COMPILATION_CACHE=0: not)"


def _user_cache(environ: Mapping[str, str]) -> pathlib.Path | None:
    """The user's cache directory, by the XDG base directory specification; None where there is no home."""
    named = environ.get("XDG_CACHE_HOME", "")
    if pathlib.Path(named).is_absolute():  # the specification has relative ones ignored
        return pathlib.Path(named)
    home = environ.get("HOME") or environ.get("USERPROFILE") or ""
    return pathlib.Path(home) / ".cache" if pathlib.Path(home).is_absolute() else None


def _machine() -> str:
    """Changes with the kind of CPU: homes are shared by machines, and code for one kind may not run on another."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
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
            # JAX writes the time of use last: an entry without it is cut off, and would stop every later write.
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").is_file():
                entry.unlink(missing_ok=True)


def _drop_unreadable(folder: pathlib.Path, shown=warnings.showwarning) -> None:
    """A program that cannot be read is compiled, which JAX says as a warning; then it is removed, to be written anew."""

    def show(message, category, filename, lineno, file=None, line=None):
        text = str(message)
        found = _UNREADABLE.match(text)
        if found and found[2] != "Timeout":
            for entry in folder.glob(f"{found[1]}-*-cache"):
                entry.unlink(missing_ok=True)
        elif not text.startswith("Error writing persistent compilation cache entry"):  # a full disk stops nothing
            shown(message, category, filename, lineno, file, line)

    warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation cache entry")
    warnings.showwarning = show
