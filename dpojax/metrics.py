"""Scalars -> metrics.jsonl (the truth), TensorBoard, and a progress line. Process 0 only."""

import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from dpojax.plain_data import check_output, parse_json


def _summary_writer(folder: pathlib.Path) -> Any:
    """TensorBoard's writer; tensorboardX imports torch where it is installed, which dpojax never wants."""
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
    """`value` as JSON, on one line or indented; numbers that JSON does not have (NaN, Infinity) become null."""
    return json.dumps(_with_nulls(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _with_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nulls(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def accuracy_and_margin(scalars: Mapping[str, float], prefix: str = "") -> str:
    """For a line of progress: the accuracy of what the objective trains, and its rewards' margin where there is one."""
    accuracy, margin = scalars[f"{prefix}objective/accuracy"], scalars[f"{prefix}rewards/margins"]
    shown = f"  accuracy {accuracy:.3f}" if math.isfinite(accuracy) else ""
    return shown + (f"  margin {margin:+.3f}" if math.isfinite(margin) else "")


class MetricsLog:
    """One JSON object per logged step; a resumed run replaces what it repeats.

    A file that cannot be written stops nothing: it is said once, and training goes on.
    """

    def __init__(self, workdir: pathlib.Path, *, enabled: bool):
        self.path, self.enabled, self.broken = workdir / "metrics.jsonl", enabled, False
        self._board: Any = None  # opened with the first row: a run that is refused leaves no file behind

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far; a last line that was cut off by a kill is left out."""
        rows = []
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = parse_json(line)
                except ValueError:
                    continue
                if isinstance(row.get("step"), int):
                    rows.append(row)
        return rows

    def rewind(self, *, sft_step: int, step: int) -> None:
        """Forgets the rows of steps after these, which a resumed run writes anew."""
        if not self.enabled or not self.path.is_file():
            return
        kept = [r for r in self.rows() if r["step"] <= (sft_step if "sft_loss" in r else step)]
        temporary = self.path.with_suffix(".tmp")
        try:
            check_output(temporary)
            temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
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
                if math.isfinite(value):  # TensorBoard draws nothing for the others, and warns of each
                    self._board.add_scalar(key, value, step)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self.broken:
            say(f"metrics: {error.filename or self.path} cannot be written ({error.strerror}); training goes on")
        self.broken = True

    def close(self) -> None:
        """Flushes TensorBoard."""
        if self._board is not None:
            self._board.close()


def peak_memory() -> dict[str, float]:
    """The most memory that the fullest local device, where it says so, and this process have held so far, GiB."""
    stats = [d.memory_stats() or {} for d in jax.local_devices()]
    held = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {**({"peak_device_memory_gib": max(held) / 2**30} if held else {}), "peak_process_memory_gib": process / 2**30}


class Progress:
    """A line that redraws itself on a terminal, and a plain line every `every_s` seconds elsewhere."""

    def __init__(self, name: str, total: int, unit: str, *, enabled: bool, every_s: float = 10.0):
        self.name, self.total, self.unit, self.enabled, self.every_s = name, total, unit, enabled, every_s
        self.start = self.last = time.monotonic()
        self.first: int | None = None

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = done
        if not self.enabled or now - self.last < (0.2 if sys.stdout.isatty() else self.every_s):
            return
        self.last = now
        parts = [f"{self.name}: {done:,} of {self.total:,} {self.unit}"]
        rate = (done - self.first) / (now - self.start)
        if rate > 0:
            shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
            parts += [f"{shown}/s", f"ETA {duration((self.total - done) / rate)}"]
        text = ", ".join(parts)
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="" if done < self.total else "\n", flush=True)
        else:
            say(text)

    def clear(self) -> None:
        """Takes the line off the terminal."""
        if self.enabled and sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)

    def close(self, message: str) -> None:
        """Ends the line with what came out, and how long it took."""
        self.clear()
        if self.enabled:
            say(f"{self.name}: {message} ({duration(time.monotonic() - self.start)})")


def duration(seconds: float) -> str:
    """12.3s, 4m05s or 2h03m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
