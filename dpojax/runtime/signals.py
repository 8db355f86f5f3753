"""Signals -> the question when to stop: held back while a step runs, answered between two steps."""

import contextlib
import math
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from dpojax.errors import Interrupted

# How long Python has to answer a signal before the process ends without its answer: outside the
# training loop, and in it, to come to the end of a step or an evaluation. Kubernetes waits 30 s.
OUTSIDE_SECONDS = 2.0
IN_LOOP_SECONDS = 30.0


class StopSignal:
    """SIGTERM and Ctrl-C as a question that the loop asks at each step boundary; outside the loop
    they end the process at once.

    Python runs a handler between two of its own instructions only. A thread that the kernel wakes
    ends the process where native code (a compiler, a collective) does not come back to them in
    time, and at the second Ctrl-C. Several processes: JAX's preemption service alone hears SIGTERM,
    and makes all processes stop at the same step.
    """

    def __init__(self):
        self.exit_code = 0
        self.processes = 1
        self.in_loop = False
        self._answered = False  # whether the loop knows of the signal: what follows is the save
        self._asked = math.nan
        self._longest = 0.0

    @contextlib.contextmanager
    def installed(self) -> "Iterator[StopSignal]":
        """Hears the signals of this process while the context lasts.

        Python lets the main thread alone set handlers: in another thread it does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        fd_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), daemon=True, name="signals").start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(fd_before)
            for number, handler in before.items():
                if handler is None:  # C code had set it, which Python cannot set again
                    handler = signal.SIG_DFL
                signal.signal(number, handler)
            os.close(writer)  # ends the thread

    def _handle(self, number: int, frame: Any) -> None:
        if self.exit_code and number == signal.SIGINT:
            os._exit(130)  # the second Ctrl-C leaves at once; unfinished saves are never committed
        self.exit_code = 128 + number
        name = signal.Signals(number).name
        if self.in_loop and self.processes == 1:
            _say(f"{name}: saving at the next step boundary\n")
            return
        # Everything is saved. An exception would be lost where a library's callback runs, and the
        # process would go on.
        _say(f"{name}: stopped; the same command goes on from there\n")
        end_workers()
        os._exit(self.exit_code)

    def _watch(self, reader: int) -> None:
        heard = 0
        code = 0
        deadline = math.inf
        while True:
            wait = None
            if math.isfinite(deadline):
                wait = max(0.0, deadline - time.monotonic())
            if select.select([reader], [], [], wait)[0]:
                numbers = [n for n in os.read(reader, 64) if n in (signal.SIGTERM, signal.SIGINT)]
                if not numbers:
                    os.close(reader)
                    return
                heard += len(numbers)
                code = 128 + numbers[-1]
                if heard > 1 and signal.SIGINT in numbers:
                    os._exit(130)
                deadline = min(deadline, time.monotonic() + self._grace())
            elif self._answered:
                deadline = math.inf
            else:
                _say(
                    "stopped in the middle of a step; the same command goes on from the last"
                    " checkpoint\n"
                )
                os._exit(code)

    def _grace(self) -> float:
        """Seconds that Python has to answer a signal."""
        if self.in_loop:
            return max(IN_LOOP_SECONDS, 3 * self._longest)
        return OUTSIDE_SECONDS

    def __enter__(self) -> "StopSignal":
        self.in_loop = True
        self._asked = math.nan  # the first step compiles, and is no measure of the others
        return self

    def __exit__(self, kind, *exception) -> None:
        self.in_loop = False
        # The signal came after the last question, during the last evaluation or save.
        if kind is None and self.exit_code:
            self._answered = True
            raise Interrupted(self.exit_code)

    def __call__(self, step: int) -> int:
        """The exit code if the run should save and stop after `step`, else 0."""
        now = time.monotonic()
        if not math.isnan(self._asked):
            self._longest = max(self._longest, now - self._asked)
        self._asked = now
        if self.processes > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                return 128 + signal.SIGTERM
            return 0
        self._answered = self.exit_code != 0
        return self.exit_code


def _say(message: str) -> None:
    """A line from a signal's handler, which may have stopped `print` in the middle."""
    with contextlib.suppress(OSError):
        os.write(1, message.encode())


def end_workers() -> None:
    """Ends the worker processes of this one, which os._exit would leave behind."""
    for process in multiprocessing.active_children():
        process.kill()
