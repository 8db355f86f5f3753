"""Scalars -> metrics.jsonl (the truth), TensorBoard, and a progress line. Process 0 only."""

import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from dpojax.runtime.devices import GIB
from dpojax.untrusted.plain_data import check_output, read_whole_lines

REDRAW_S = 0.2  # how often a terminal's line changes: a person reads no faster


def _summary_writer(folder: pathlib.Path) -> Any:
    """TensorBoard's writer.

    tensorboardX imports torch where it is installed, which takes seconds and memory: it is hidden.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]  # the documented way to make an import fail
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter(str(folder), flush_secs=10)


def say(message: str) -> None:
    """One line for the person at the terminal; where it goes to a full disk, it is lost."""
    try:
        print(message, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


def finite_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON, on one line or indented; numbers that JSON does not have (NaN, Infinity)
    become null.
    """
    return json.dumps(_with_nulls(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def accuracy_and_margin(scalars: Mapping[str, float], prefix: str = "") -> str:
    """The end of a line of progress: the accuracy of what the objective trains, and its rewards'
    margin. It leaves out what is not finite, which the objective does not have.
    """
    accuracy = scalars[f"{prefix}objective/accuracy"]
    margin = scalars[f"{prefix}rewards/margins"]
    text = ""
    if math.isfinite(accuracy):
        text += f"  accuracy {accuracy:.3f}"
    if math.isfinite(margin):
        text += f"  margin {margin:+.3f}"
    return text


class MetricsLog:
    """One JSON object per logged step; a resumed run replaces what it repeats.

    A file that cannot be written stops nothing: it is said once, and training goes on.
    """

    def __init__(self, workdir: pathlib.Path, *, enabled: bool):
        self.path = workdir / "metrics.jsonl"
        self.enabled = enabled
        self.broken = False
        # opened with the first row: a run that is refused leaves no file behind
        self._board: Any = None

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far; a last line that was cut off by a kill is left out."""
        return [row for row in read_whole_lines(self.path) if isinstance(row.get("step"), int)]

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Forgets the rows that a resumed run writes anew.

        Args:
          keep: whether a row stays.
        """
        if not self.enabled or not self.path.is_file():
            return
        kept = [row for row in self.rows() if keep(row)]
        temporary = self.path.with_suffix(".tmp")
        try:
            check_output(temporary)
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            self._complain(error)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Appends {"step": step, **scalars}; non-finite values become null in JSON."""
        if not self.enabled:
            return
        row = {"step": step, **{k: float(v) for k, v in scalars.items()}}
        try:
            check_output(self.path)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(finite_json(row) + "\n")
            if self._board is None:
                self._board = _summary_writer(self.path.parent / "tensorboard")
            for key, value in scalars.items():
                # TensorBoard draws nothing for the others, and warns of each
                if math.isfinite(value):
                    self._board.add_scalar(key, value, step)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self.broken:
            say(
                f"metrics: {error.filename or self.path} cannot be written ({error.strerror});"
                " training goes on"
            )
        self.broken = True

    def close(self) -> None:
        """Flushes TensorBoard."""
        if self._board is not None:
            self._board.close()


def peak_memory() -> dict[str, float]:
    """The most memory that the fullest local device and this process have held so far, GiB.

    A device that does not say what it holds (a CPU) has no entry.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    held = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    unit = 1024  # bytes, in which Linux counts
    if sys.platform == "darwin":
        unit = 1
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    peaks = {"peak_process_memory_gib": process / GIB}
    if held:
        peaks["peak_device_memory_gib"] = max(held) / GIB
    return peaks


class Progress:
    """A line that redraws itself on a terminal; elsewhere a plain line every `every_s` seconds."""

    def __init__(self, name: str, total: int, unit: str, *, enabled: bool, every_s: float = 10.0):
        self.name = name
        self.total = total
        self.unit = unit
        self.enabled = enabled
        self.every_s = every_s
        self.start = self.last = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done
        every_s = self.every_s
        if sys.stdout.isatty():
            every_s = REDRAW_S
        if not self.enabled or now - self.last < every_s:
            return
        self.last = now
        parts = [f"{self.name}: {done:,} of {self.total:,} {self.unit}"]
        rate = (done - self.first) / (now - self.start)
        if rate > 0:
            parts += [f"{_rate(rate)}/s", f"ETA {duration((self.total - done) / rate)}"]
        text = ", ".join(parts)
        if not sys.stdout.isatty():
            say(text)
            return
        print(f"\r\x1b[K{text}", end="", flush=True)
        if done >= self.total:
            print(flush=True)

    def clear(self) -> None:
        """Takes the line off the terminal."""
        if self.enabled and sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)

    def close(self, message: str) -> None:
        """Ends the line with what came out, and how long it took."""
        self.clear()
        if self.enabled:
            say(f"{self.name}: {message} ({duration(time.monotonic() - self.start)})")


def _rate(per_second: float) -> str:
    if per_second >= 10:
        return f"{per_second:,.0f}"
    return f"{per_second:.2g}"


def duration(seconds: float) -> str:
    """12.3s, 4m05s or 2h03m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes}m{int(seconds) % 60:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"
