"""Runs what strangers wrote in a child process that the kernel bounds: chat templates, tokenizers, regular expressions.

They run in C and Rust, where no clock and no exception of Python's reaches. The child has a limit on the processor time
of every item and on its memory; the parent kills it when nothing comes for a long time. The child is no fork: it
starts by itself, without JAX, and many items are under way at a time.

    for result in each(function, shared, items): ...   # function(shared, item), in order
"""

import contextlib
import fcntl
import io
import itertools
import math
import os
import pathlib
import pickle
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

MAX_ITEM_SECONDS = 2.0  # of processor time; a real dialogue takes less than a millisecond
MAX_LOAD_SECONDS = 30.0  # of processor time, to unpack `shared`; the largest tokenizers take some seconds
MAX_SILENT_SECONDS = 120.0  # of the clock: a child that waits for something uses no processor
MAX_BYTES = 4 * 2**30  # of the child's address space
MAX_AHEAD, MAX_AHEAD_BYTES = 512, 2**20  # items and bytes that are under way
BLOCK = 64  # items that a child takes in its turn, where several share the work
PIPE_BYTES = 2**20  # of a pipe's buffer, where the system has a choice: a child works on while the parent is with another
MAX_TOGETHER = 64  # results that are sent at once
FLUSH_SECONDS = 0.1  # results wait for others at most so long
_HEADER = 8  # bytes that hold the length of a message
_TASK, _ITEM = b"T", b"I"  # the first byte of a message to the child
_INSIDE = "DPOJAX_SANDBOX"  # set in the child's environment: what runs there needs no other child


class SandboxError(Exception):
    """The child did not survive an item: its message is a predicate, "takes more than 2 s"."""


class _DeathError(Exception):
    """The child is gone; the message says of what."""


# --- the parent's side ------------------------------------------------------------------------------------------------


def _package_path() -> str:
    """PYTHONPATH of the child: it finds dpojax where this process found it."""
    folder = str(pathlib.Path(__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH", ""))))


class _Results(pickle.Unpickler):
    """Reads results alone: a child that something broke out of can name no function for this process to call."""

    ARRAYS = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in self.ARRAYS:
            return super().find_class(module, name)
        value = super().find_class(module, name) if module.partition(".")[0] in ("dpojax", "builtins") else None
        if isinstance(value, type) and (issubclass(value, Exception) or hasattr(value, "_fields")):
            return value
        raise pickle.UnpicklingError(f"a result of the sandbox names {module}.{name}")


class _Child:
    """A process that works on items, and the bytes under way to and from it."""

    def __init__(self):
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
        alone = {_INSIDE: "1", "TOKENIZERS_PARALLELISM": "false"}
        environ = os.environ | threads | alone | {"PYTHONPATH": _package_path()}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dpojax.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Rust prints its panics there
            env=environ,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        for pipe in (self.stdin, self.stdout):
            with contextlib.suppress(OSError, AttributeError):  # AttributeError: not Linux
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.stdout, selectors.EVENT_READ)
        self.outgoing, self.incoming = bytearray(), bytearray()

    def send(self, message: bytes) -> None:
        self.outgoing += len(message).to_bytes(_HEADER, "little") + message

    def receive(self) -> list[Any]:
        """Sends what waits and returns the results that have come, at least one. Raises _DeathError."""
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
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # of a child that died: reading says of what
            written = os.write(self.stdin, memoryview(self.outgoing)[:PIPE_BYTES])
            del self.outgoing[:written]
            return
        if self.process.poll() is not None:
            self.outgoing.clear()

    def _parse(self) -> list[Any]:
        results = []
        for message in _messages(self.incoming):
            results += _Results(io.BytesIO(message)).load()
        return results

    def close(self) -> None:
        self.selector.close()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


def _messages(buffer: bytearray) -> Iterator[bytes]:
    """Takes the complete messages out of a buffer."""
    place = 0
    while len(buffer) - place >= _HEADER:
        end = place + _HEADER + int.from_bytes(buffer[place : place + _HEADER], "little")
        if len(buffer) < end:
            break
        yield bytes(buffer[place + _HEADER : end])
        place = end
    del buffer[:place]


def _cause_of_death(code: int) -> str:
    if code == -signal.SIGXCPU:
        return f"takes more than {MAX_ITEM_SECONDS:g} s"
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"takes more than {MAX_BYTES / 2**30:g} GiB of memory, or crashes ({name})"


_idle: list[_Child] = []
_idle_owner = 0  # a process that was forked off has the list of its parent, whose children are not its own


def _own_idle() -> list[_Child]:
    """The idle children of this process."""
    global _idle_owner
    if _idle_owner != os.getpid():
        _idle_owner = os.getpid()
        _idle.clear()
    return _idle


def _take() -> _Child:
    idle = _own_idle()
    return idle.pop() if idle else _Child()


def _working_folder() -> str:
    """The folder that relative paths start from; "" where it was removed."""
    try:
        return str(pathlib.Path.cwd())
    except OSError:
        return ""


class _Work:
    """Items on their way through a child, in order; a new child takes over where one dies."""

    def __init__(self, function: Callable[[Any, Any], Any], shared: Any):
        self.task = _TASK + pickle.dumps((_working_folder(), pickle.dumps((function, shared))))
        self.sent: deque[bytes] = deque()  # without a result yet
        self.again: deque[bytes] = deque()  # to be sent once more
        self.alone = 0  # items that are sent by themselves, to find the one that a child died of
        self.child = _take()
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
        most = 1 if self.alone else MAX_AHEAD
        while len(self.sent) < most and len(self.child.outgoing) < MAX_AHEAD_BYTES:
            if self.again:
                message = self.again.popleft()
            else:
                item = next(items, self)
                if item is self:
                    return
                message = _ITEM + pickle.dumps(item)
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
    return bool(os.environ.get(_INSIDE))


def each(function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any]) -> Generator[Any, None, None]:
    """function(shared, item) of every item, in order; where it raised, or the child died of it, the exception in its place.

    Args:
      function: of a module that does not import JAX, as the child would wait for it.
      shared: is unpacked in the child once.
    Raises: SandboxError if the child does not survive unpacking `shared`, and what unpacking raised.
    """
    if inside():
        yield from (_result(function, shared, item) for item in items)
        return
    work, source = _Work(function, shared), iter(items)
    try:
        work.fill(source)
        while work.sent or work.again:
            results = work.receive()
            work.fill(source)
            yield from results
    finally:
        work.close()


def spread(function: Callable[[Any, Any], Any], shared: Any, items: Iterable[Any], *, children: int) -> Iterator[Any]:
    """As `each`, by several children, which take the items block by block in turn."""
    if inside() or children == 1:
        yield from each(function, shared, items)
        return
    started = [_take() for _ in range(children)]  # all at once: each takes its time to import what it needs
    _idle.extend(started)
    source = iter(items)
    waiting: list[deque[Any]] = [deque() for _ in range(children)]
    turns = itertools.cycle(waiting)

    def blocks_of(own: deque[Any]) -> Iterator[Any]:
        while True:
            while not own:
                block = list(itertools.islice(source, BLOCK))
                if not block:
                    return
                next(turns).extend(block)
            yield own.popleft()

    streams = [each(function, shared, blocks_of(own)) for own in waiting]
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


# --- the child's side -------------------------------------------------------------------------------------------------


def _result(function: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
    try:
        return function(shared, item)
    except MemoryError:
        return SandboxError("takes too much memory")
    except RecursionError:
        return SandboxError("is nested too deep")
    except Exception as error:
        return error
    except BaseException as error:  # a panic of Rust's
        return SandboxError(f"crashes: {str(error).splitlines()[0]:.200}" if str(error) else "crashes")


def _plain(result: Any) -> Any:
    """A result that the parent can unpack."""
    if isinstance(result, Exception):
        result.__traceback__ = result.__cause__ = result.__context__ = None
        if type(result).__module__.partition(".")[0] not in ("dpojax", "builtins"):
            return SandboxError(f"fails: {type(result).__name__}: {result!s:.300}")
    return result


class _Clock:
    """Renews the kernel's limit on processor time, seldom: it counts whole seconds of the whole process."""

    def __init__(self):
        self.end = 0

    def renew(self, seconds: float) -> None:
        """What starts now has at least `seconds`, and two more at most."""
        used = time.process_time()
        if used + seconds < self.end <= used + seconds + 2:
            return
        self.end = math.ceil(used + seconds) + 1
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        soft = self.end if most == resource.RLIM_INFINITY else min(self.end, most)
        resource.setrlimit(resource.RLIMIT_CPU, (soft, most))


def _limit(kind: int, value: int) -> None:
    _, most = resource.getrlimit(kind)
    with contextlib.suppress(ValueError, OSError):  # macOS has no limit on the address space
        resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most),) * 2)


def _unpack(_: Any, message: bytes) -> Any:
    return pickle.loads(message)


def _unpack_task(_: Any, message: bytes) -> tuple[Callable[[Any, Any], Any], Any]:
    """The function and what its items share. Relative paths mean what they mean to the parent now."""
    folder, packed = pickle.loads(message)
    with contextlib.suppress(OSError):
        os.chdir(folder)
    return pickle.loads(packed)


class _Worker:
    """What the child does: it unpacks a task, then works on items, and answers every message."""

    def __init__(self, reader: int, writer: int):
        self.reader, self.writer, self.clock = reader, writer, _Clock()
        self.task: tuple[Callable[[Any, Any], Any], Any] | None = None
        self.answers: list[Any] = []
        self.flushed = time.monotonic()

    def serve(self) -> None:
        """Until the parent closes the pipe."""
        incoming = bytearray()
        while data := os.read(self.reader, 2**20):
            incoming += data
            for message in _messages(incoming):
                self._answer(message)
            self._flush()

    def _answer(self, message: bytes) -> None:
        kind, body = message[:1], message[1:]
        if kind == _TASK:
            self.clock.renew(MAX_LOAD_SECONDS)
            self.task = None
            loaded = _result(_unpack_task, None, body)
            if isinstance(loaded, Exception):
                result = loaded
            else:
                result, self.task = None, loaded
        else:
            self.clock.renew(MAX_ITEM_SECONDS)
            assert self.task is not None
            result = _result(*self.task, _unpack(None, body))
        self.answers.append(_plain(result))
        if len(self.answers) >= MAX_TOGETHER or time.monotonic() - self.flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        try:
            packed = pickle.dumps(self.answers)
        except Exception as error:  # a result that is no plain data
            packed = pickle.dumps([SandboxError(f"fails: {type(error).__name__}: {error!s:.300}")] * len(self.answers))
        view = memoryview(len(packed).to_bytes(_HEADER, "little") + packed)
        while view:
            view = view[os.write(self.writer, view) :]
        self.answers.clear()
        self.flushed = time.monotonic()


def _main() -> None:
    reader, writer = os.dup(0), os.dup(1)
    with pathlib.Path(os.devnull).open("r+b") as null:  # what libraries print is no answer
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MAX_BYTES)
    with contextlib.suppress(BrokenPipeError):
        _Worker(reader, writer).serve()


if __name__ == "__main__":
    from dpojax.sandbox import _main as main  # one module, by its name: what is pickled names it so

    main()
