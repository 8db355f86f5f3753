"""The child's side of the sandbox: a process that the kernel bounds, and its work on items.

The parent starts it as python -m dpojax.untrusted.sandbox_child. It imports no JAX: every child
would wait seconds for it.
"""

import contextlib
import math
import os
import pathlib
import pickle
import resource
import time
from collections.abc import Callable
from typing import Any

from dpojax.untrusted.sandbox_messages import (
    FLUSH_SECONDS,
    MAX_BYTES,
    MAX_ITEM_SECONDS,
    MAX_LOAD_SECONDS,
    MAX_TOGETHER,
    TASK,
    SandboxError,
    framed,
    result_of,
    take_messages,
)

Task = tuple[Callable[[Any, Any], Any], Any]  # a function, and what its items share


def _within_hard_limit(kind: int, value: int) -> int:
    """`value`, or the process's hard limit where that is lower: no process may raise it."""
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY:
        return value
    return min(value, hard)


def _set_limit(kind: int, value: int) -> None:
    limit = _within_hard_limit(kind, value)
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit on the address space
        resource.setrlimit(kind, (limit, limit))


class _Clock:
    """The kernel's limit on processor time, which is renewed for every item.

    The kernel counts whole seconds of the process, so that the limit is moved seldom.
    """

    def __init__(self):
        self.end = 0

    def renew(self, seconds: float) -> None:
        """Gives what starts now at least `seconds`, and at most two more."""
        used = time.process_time()
        if used + seconds < self.end <= used + seconds + 2:
            return
        self.end = math.ceil(used + seconds) + 1
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        soft = _within_hard_limit(resource.RLIMIT_CPU, self.end)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _plain(result: Any) -> Any:
    """A result that the parent can unpack: exceptions of other packages become SandboxErrors."""
    if isinstance(result, Exception):
        # The chain of an exception may hold anything, also what cannot be pickled.
        result.__traceback__ = None
        result.__cause__ = None
        result.__context__ = None
        if type(result).__module__.partition(".")[0] not in ("dpojax", "builtins"):
            return SandboxError(f"fails: {type(result).__name__}: {result!s:.300}")
    return result


def _unpack_task(_: Any, message: bytes) -> Task:
    """The function and what its items share.

    The working folder becomes the parent's, so that relative paths mean what they mean there.
    """
    folder, packed = pickle.loads(message)
    with contextlib.suppress(OSError):
        os.chdir(folder)
    return pickle.loads(packed)


class _Worker:
    """Unpacks a task, then works on items, and answers every message."""

    def __init__(self, reader: int, writer: int):
        self.reader = reader
        self.writer = writer
        self.clock = _Clock()
        self.task: Task | None = None
        self.answers: list[Any] = []
        self.flushed = time.monotonic()

    def serve(self) -> None:
        """Works until the parent closes the pipe."""
        incoming = bytearray()
        while data := os.read(self.reader, 2**20):
            incoming += data
            for message in take_messages(incoming):
                self._answer(message)
            self._flush()

    def _answer(self, message: bytes) -> None:
        body = message[1:]
        if message[:1] == TASK:
            result = self._load(body)
        else:
            self.clock.renew(MAX_ITEM_SECONDS)
            assert self.task is not None
            function, shared = self.task
            result = result_of(function, shared, pickle.loads(body))
        self.answers.append(_plain(result))
        is_late = time.monotonic() - self.flushed > FLUSH_SECONDS
        if is_late or len(self.answers) >= MAX_TOGETHER:
            self._flush()

    def _load(self, body: bytes) -> Exception | None:
        """Unpacks a task; returns what that raised."""
        self.clock.renew(MAX_LOAD_SECONDS)
        self.task = None
        loaded = result_of(_unpack_task, None, body)
        if isinstance(loaded, Exception):
            return loaded
        self.task = loaded
        return None

    def _flush(self) -> None:
        try:
            packed = pickle.dumps(self.answers)
        except Exception as error:  # a result that is no plain data
            fault = SandboxError(f"fails: {type(error).__name__}: {error!s:.300}")
            packed = pickle.dumps([fault] * len(self.answers))
        view = memoryview(framed(packed))
        while view:
            view = view[os.write(self.writer, view) :]
        self.answers.clear()
        self.flushed = time.monotonic()


def main() -> None:
    """Answers the parent's messages on the pipes that it opened."""
    reader = os.dup(0)
    writer = os.dup(1)
    # What libraries print must not come between the answers.
    with pathlib.Path(os.devnull).open("r+b") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_AS, MAX_BYTES)
    with contextlib.suppress(BrokenPipeError):
        _Worker(reader, writer).serve()


if __name__ == "__main__":
    main()
