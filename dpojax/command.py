"""What every command line shares: its errors and exit codes, signals, output in any encoding, and the way out.

It imports no JAX, so that a signal during the imports finds its handler.
"""

import contextlib
import errno
import io
import math
import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from dpojax.errors import DpojaxError, FitError, Interrupted
from dpojax.launch import hide_absent_tpus, launcher

OUTSIDE_SECONDS = 2.0  # that Python has to answer a signal before the process ends without it
IN_LOOP_SECONDS = 30.0  # in the training loop, to come to the end of a step or an evaluation; Kubernetes waits as long

# How JAX, XLA, CUDA, NumPy and the kernel say that memory is full.
_FULL = re.compile(
    r"resource_?exhausted|out[ _-]?of[ _-]?(?:host |device )?memory|\boom\b|(?:failed|unable|cannot|could not) to allocate|"
    r"cannot allocate memory|can't allocate|bad_alloc|insufficient memory|not enough memory|"
    r"(?:exceed|ran out)\w*\b.{0,80}\b(?:memory|hbm|vmem)|(?:memory|hbm|vmem|allocation)\b.{0,80}\bexceed|array is too big|"
    r"maximum allowed (?:dimension|size)",
    re.IGNORECASE,
)


class StopSignal:
    """SIGTERM and Ctrl-C as a question that the loop asks at each step boundary; outside the loop they end the process at once.

    Python runs a handler between two of its own instructions only. A thread that the kernel wakes ends the process where
    native code (a compiler, a collective) does not come back to them in time, and at the second Ctrl-C.
    Several processes: JAX's preemption service alone hears SIGTERM, and makes all processes stop at the same step.
    """

    def __init__(self):
        self.exit_code, self.processes = 0, 1
        self.in_loop = False
        self._answered = False  # whether the loop knows of the signal: what follows is the save
        self._asked, self._longest = math.nan, 0.0

    @contextlib.contextmanager
    def installed(self) -> "Iterator[StopSignal]":
        """Hears the signals of this process while the context lasts. Threads other than the main one cannot, and do not."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True, name="signals").start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(fd_before)
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            os.close(writer)  # ends the thread

    def _handle(self, number: int, frame: Any) -> None:
        if self.exit_code and number == signal.SIGINT:
            os._exit(130)  # the second Ctrl-C leaves at once; unfinished saves are never committed
        self.exit_code = 128 + number
        name = signal.Signals(number).name
        if self.in_loop and self.processes == 1:
            _say(f"{name}: saving at the next step boundary\n")
            return
        # Nothing is there that is not saved. An exception would be lost where a callback of a library runs.
        _say(f"{name}: stopped; the same command goes on from there\n")
        _end_workers()
        os._exit(self.exit_code)

    def _watch(self, reader: int) -> None:
        heard, code, deadline = 0, 0, math.inf
        while True:
            wait = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
            if select.select([reader], [], [], wait)[0]:
                numbers = [n for n in os.read(reader, 64) if n in (signal.SIGTERM, signal.SIGINT)]
                if not numbers:
                    os.close(reader)
                    return
                heard += len(numbers)
                code = 128 + numbers[-1]
                if heard > 1 and signal.SIGINT in numbers:
                    os._exit(130)
                grace = max(IN_LOOP_SECONDS, 3 * self._longest) if self.in_loop else OUTSIDE_SECONDS
                deadline = min(deadline, time.monotonic() + grace)
            elif self._answered:
                deadline = math.inf
            else:
                _say("stopped in the middle of a step; the same command goes on from the last checkpoint\n")
                os._exit(code)

    def __enter__(self) -> "StopSignal":
        self.in_loop = True
        self._asked = math.nan  # the first step compiles: it says nothing of the others
        return self

    def __exit__(self, kind, *exception) -> None:
        self.in_loop = False
        if kind is None and self.exit_code:  # it came after the last question: during the last evaluation or save
            self._answered = True
            raise Interrupted(self.exit_code)

    def __call__(self, step: int) -> int:
        """The exit code if the run should save and stop after `step`, else 0."""
        now = time.monotonic()
        self._longest = max(self._longest, 0.0 if math.isnan(self._asked) else now - self._asked)
        self._asked = now
        if self.processes > 1:
            from jax.experimental import multihost_utils

            return 143 if multihost_utils.reached_preemption_sync_point(step) else 0
        self._answered = self.exit_code != 0
        return self.exit_code


def _say(message: str) -> None:
    """A line from a signal's handler, which may have stopped `print` in the middle."""
    with contextlib.suppress(OSError):
        os.write(1, message.encode())


def _end_workers() -> None:
    """Ends the worker processes of this one, which os._exit would leave behind."""
    for process in multiprocessing.active_children():
        process.kill()


# --- errors -----------------------------------------------------------------------------------------------------------


def memory_error(error: BaseException) -> FitError | None:
    """`error` as what it is, where some memory is full; else None."""
    kinds = (MemoryError, RuntimeError, ValueError, OSError)
    full = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if isinstance(error, DpojaxError) or not isinstance(error, kinds) or not (full or _FULL.search(str(error))):
        return None
    first = next(iter(str(error).splitlines()), "") or "no more memory"
    return FitError(
        f"the memory is full: {first:.400}; lower data.micro_batch_tokens (--batch_size or --micro_batch_tokens of a tool) or "
        "model.logps_chunk_tokens, set model.remat=full, or spread the parameters (mesh.fsdp, mesh.tensor)"
    )


def _complain(message: object) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"error: {message}", file=sys.stderr, flush=True)


def _thread_failed(failure: Any, shown=threading.excepthook) -> None:
    """A thread of a library's that could not write: a line, and the run goes on."""
    if isinstance(failure.exc_value, OSError):
        name = getattr(failure.exc_value, "filename", None) or "a file"
        print(f"warning: {name} cannot be written ({failure.exc_value.strerror}); the run goes on", flush=True)
        return
    shown(failure)


def _hide_stopped_reads(hooked: Any, shown=sys.unraisablehook) -> None:
    """Orbax stops at the first read that fails; the reads beside it end later and find its event loop closed."""
    if not (isinstance(hooked.exc_value, RuntimeError) and str(hooked.exc_value) == "Event loop is closed"):
        shown(hooked)


def run_command(function: Callable[[StopSignal], int | None]) -> int:
    """function(the question when to stop) as a command line: returns its exit code.

    What a user can mend becomes one line on standard error and its exit code; so do full memory (6), and files and
    folders that cannot be read or written (2). Anything else is a fault of ours, and passes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or file that is not UTF-8 shows an escape
            stream.reconfigure(errors="backslashreplace")
    threading.excepthook, sys.unraisablehook = _thread_failed, _hide_stopped_reads
    hide_absent_tpus()
    stop = StopSignal()
    with stop.installed():
        try:
            return function(stop) or 0
        except Interrupted as stopped:
            return stopped.exit_code
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:  # the reader of our output has left, e.g. `| head`
            sys.stdout = None
            return 1
        except DpojaxError as error:
            return _end(error, error.exit_code)
        except Exception as error:
            full = memory_error(error)
            if full is not None:
                return _end(full, full.exit_code)
            if isinstance(error, OSError) and error.strerror:
                name = error.filename or "a file"
                misplaced = isinstance(error, FileExistsError | NotADirectoryError)
                reason = "a file lies where a folder belongs" if misplaced else error.strerror
                return _end(f"{name}: {reason}; the disk or folder must be writable, and its files plain files", 2)
            raise


def _end(error: object, code: int) -> int:
    _complain(error)
    if os.environ.get("DPOJAX_TRACEBACK"):
        traceback.print_exc()
    return code


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code; after an error nothing that still runs adds to the last line."""
    if code and not launcher(os.environ):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        _end_workers()
        os._exit(code)
    sys.exit(code)
