"""Runs what strangers wrote in a child process that the kernel bounds: chat templates, tokenizers,
regular expressions.

They run in C and Rust, where no clock and no exception of Python's reaches. The child has a limit
on the processor time of every item and on its memory; the parent kills it when nothing comes for a
long time. The child is no fork but a new process without JAX (sandbox_child.py), and many items are
under way at a time.

    for result in each(function, shared, items): ...   # function(shared, item), in order
"""

import contextlib
import fcntl
import io
import itertools
import os
import pathlib
import pickle
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from dpojax.untrusted.sandbox_messages import (
    INSIDE,
    ITEM,
    MAX_BYTES,
    MAX_ITEM_SECONDS,
    MAX_SILENT_SECONDS,
    TASK,
    SandboxError,
    framed,
    result_of,
    take_messages,
)

# Items and bytes that are under way to a child: it works on while the parent is with another.
MAX_AHEAD = 512
MAX_AHEAD_BYTES = 2**20

BLOCK = 64  # items that a child takes in its turn, where several share the work

PIPE_BYTES = 2**20  # of a pipe's buffer, where the system has a choice


class _DeathError(Exception):
    """The child is gone; the message says of what."""


def _package_path() -> str:
    """PYTHONPATH of the child: it finds dpojax where this process found it."""
    folder = str(pathlib.Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))


class _Results(pickle.Unpickler):
    """Reads results alone: a child that something broke out of can name no function for this
    process to call.
    """

    ARRAYS = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self.ARRAYS:
            return super().find_class(module, name)
        if module.partition(".")[0] in ("dpojax", "builtins"):
            value = super().find_class(module, name)
            is_type = isinstance(value, type)
            if is_type and (issubclass(value, Exception) or hasattr(value, "_fields")):
                return value
        raise pickle.UnpicklingError(f"a result of the sandbox names {module}.{name}")


class _Child:
    """A process that works on items, and the bytes under way to and from it."""

    def __init__(self):
        threads = dict.fromkeys(
            ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
        )
        alone = {INSIDE: "1", "TOKENIZERS_PARALLELISM": "false"}
        environ = os.environ | threads | alone | {"PYTHONPATH": _package_path()}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dpojax.untrusted.sandbox_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Rust prints its panics there
            env=environ,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin = self.process.stdin.fileno()
        self.stdout = self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError, AttributeError):  # AttributeError: not Linux
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.stdout, selectors.EVENT_READ)
        self.outgoing = bytearray()
        self.incoming = bytearray()

    def send(self, message: bytes) -> None:
        self.outgoing += framed(message)

    def receive(self) -> list[Any]:
        """Sends what waits and returns the results that have come, at least one.

        Raises _DeathError.
        """
        end = time.monotonic() + MAX_SILENT_SECONDS
        while not (results := self._parse()):
            if self.outgoing:
                self.selector.register(self.stdin, selectors.EVENT_WRITE)
            events = self.selector.select(timeout=max(0.0, end - time.monotonic()))
            if self.outgoing:
                self.selector.unregister(self.stdin)
            if not events:
                self.process.kill()
                raise _DeathError(f"does not end within {MAX_SILENT_SECONDS:g} s")
            for key, _ in events:
                if key.fd == self.stdin:
                    self._write()
                elif data := os.read(self.stdout, 2**20):
                    self.incoming += data
                    end = time.monotonic() + MAX_SILENT_SECONDS
                else:
                    raise _DeathError(_cause_of_death(self.process.wait()))
        return results

    def _write(self) -> None:
        # of a child that died: reading says of what
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            written = os.write(self.stdin, memoryview(self.outgoing)[:PIPE_BYTES])
            del self.outgoing[:written]
            return
        if self.process.poll() is not None:
            self.outgoing.clear()

    def _parse(self) -> list[Any]:
        results = []
        for message in take_messages(self.incoming):
            results += _Results(io.BytesIO(message)).load()
        return results

    def close(self) -> None:
        self.selector.close()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _cause_of_death(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"takes more than {MAX_ITEM_SECONDS:g} s"
    name = f"exit code {code}"
    if code < 0:
        name = signal.Signals(-code).name
    return f"takes more than {MAX_BYTES / 2**30:g} GiB of memory, or crashes ({name})"


_idle: list[_Child] = []

# The process that started them: one that was forked off inherits the list, and may not use them.
_idle_owner = 0


def _idle_children() -> list[_Child]:
    """The idle children of this process."""
    global _idle_owner
    if _idle_owner != os.getpid():
        _idle_owner = os.getpid()
        _idle.clear()
    return _idle


def _take_child() -> _Child:
    idle = _idle_children()
    if idle:
        return idle.pop()
    return _Child()


def _working_folder() -> str:
    """The folder that relative paths start from; "" where it was removed."""
    try:
        return str(pathlib.Path.cwd())
    except OSError:
        return ""


class _Work:
    """Items on their way through a child, in order; a new child takes over where one dies."""

    def __init__(self, function: Callable[[Any, Any], Any], shared: Any):
        self.task = TASK + pickle.dumps((_working_folder(), pickle.dumps((function, shared))))
        self.sent: deque[bytes] = deque()  # without a result yet
        self.again: deque[bytes] = deque()  # to be sent once more
        self.alone = 0  # items that are sent by themselves, to find the one that a child died of
        self.child = _take_child()
        self._load()

    def _load(self) -> None:
        """Sends the task. Raises what unpacking it raised, or SandboxError."""
        self.child.send(self.task)
        try:
            (loaded,) = self.child.receive()
        except _DeathError as death:
            self._restart()
            raise SandboxError(str(death)) from death
        if isinstance(loaded, Exception):
            raise loaded

    def _restart(self) -> None:
        self.child.close()
        self.child = _Child()

    def fill(self, items: Iterator[Any]) -> None:
        """Sends as many items as may be under way."""
        most = MAX_AHEAD
        if self.alone:
            most = 1
        while len(self.sent) < most and len(self.child.outgoing) < MAX_AHEAD_BYTES:
            if self.again:
                message = self.again.popleft()
            else:
                item = next(items, self)
                if item is self:
                    return
                message = ITEM + pickle.dumps(item)
            self.child.send(message)
            self.sent.append(message)

    def receive(self) -> list[Any]:
        """The next results, an exception in the place of a result that there is not."""
        try:
            results = self.child.receive()
        except _DeathError as death:
            self._restart()
            self._load()
            if len(self.sent) == 1:
                results = [SandboxError(str(death))]
            else:
                self.alone = len(self.sent)
                self.again.extendleft(reversed(self.sent))
                self.sent.clear()
                return []
        for _ in results:
            self.sent.popleft()
        self.alone = max(0, self.alone - len(results))
        return results

    def close(self) -> None:
        if self.sent or self.child.process.poll() is not None:
            self.child.close()  # answers to what nobody waits for would be taken for others
        else:
            _idle.append(self.child)


def inside() -> bool:
    """Whether this process is a child of `each`: its limits hold already."""
    return bool(os.environ.get(INSIDE))


def each(
    function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any]
) -> Generator[Any, None, None]:
    """function(shared, item) of every item, in order; where it raised, or the child died of it, the
    exception in its place.

    Args:
      function: of a module that does not import JAX, as the child would wait for it.
      shared: is unpacked in the child once.
    Raises: SandboxError if the child does not survive unpacking `shared`, and what unpacking
      raised.
    """
    if inside():
        yield from (result_of(function, shared, item) for item in items)
        return
    work = _Work(function, shared)
    source = iter(items)
    try:
        work.fill(source)
        while work.sent or work.again:
            results = work.receive()
            work.fill(source)
            yield from results
    finally:
        work.close()


def spread(
    function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any], *, children: int
) -> Iterator[Any]:
    """As `each`, by several children, which take the items block by block in turn."""
    if inside() or children == 1:
        yield from each(function, shared, items)
        return
    # All start at once: each takes its time to import what it needs.
    started = [_take_child() for _ in range(children)]
    _idle.extend(started)
    source = iter(items)
    waiting: list[deque[Any]] = [deque() for _ in range(children)]
    turns = itertools.cycle(waiting)

    def items_of(child_items: deque[Any]) -> Iterator[Any]:
        while True:
            while not child_items:
                block = list(itertools.islice(source, BLOCK))
                if not block:
                    return
                next(turns).extend(block)
            yield child_items.popleft()

    streams = [each(function, shared, items_of(child_items)) for child_items in waiting]
    try:
        for stream in itertools.cycle(streams):
            count = 0
            for result in itertools.islice(stream, BLOCK):
                count += 1
                yield result
            if count < BLOCK:
                return
    finally:
        for stream in streams:
            stream.close()


def call(function: Callable[[Any], Any], argument: Any) -> Any:
    """function(argument) in the child. Raises what it raised, or SandboxError."""
    (result,) = each(_apply, function, [argument])
    if isinstance(result, Exception):
        raise result
    return result


def _apply(function: Callable[[Any], Any], argument: Any) -> Any:
    return function(argument)
