"""One run at a time in a workdir: a lock of the kernel's, which ends however its process ends."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import re
import socket
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpojax.errors import ConfigError
from dpojax.runtime.log import say

FILE = ".lock"

_TAKEN = (errno.EACCES, errno.EAGAIN)

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def _holder(path: pathlib.Path) -> str:
    """Who wrote the lock's file last, as text."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:2000]
        run = json.loads(text)
        return f"process {run['process']} on {run['host']}, since {run['since']}: {run['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its lock does not say which"


def _open(path: pathlib.Path) -> int:
    """The lock's file, opened and locked.

    Raises OSError, of _TAKEN where another process holds it.
    """
    # Not through a link, and not at a pipe, where opening waits for a reader.
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        handle = os.open(path, flags, 0o644)
        try:
            # A lock of POSIX's belongs to this process alone: what it forks off does not keep it
            # after a kill.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
        except OSError:
            os.close(handle)
            raise
        os.close(handle)  # the run that held it has just removed the file


def _take(folder: pathlib.Path) -> tuple[int | None, str]:
    """(the lock, "") or (None, who holds it); (None, "") where the file system has no locks."""
    path = folder / FILE
    try:
        handle = _open(path)
    except OSError as error:
        if error.errno in _TAKEN and path.is_file():
            return None, _holder(path)
        if error.errno in _WITHOUT_LOCKS:
            say(
                f"warning: {folder}: its file system has no locks ({error.strerror}); start no"
                " other run there"
            )
            return None, ""
        raise
    run = {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join(sys.argv)[:500],
    }
    # On a full disk the lock holds all the same, and does not say whose it is.
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.write(handle, (json.dumps(run) + "\n").encode())
    return handle, ""


@contextlib.contextmanager
def locked_workdir(folder: pathlib.Path) -> Iterator[None]:
    """Holds the workdir for this run; its processes, on however many hosts, hold it together
    through the first of them.

    Raises: ConfigError in every process, saying who holds it, if another run does.
    """
    handle = None
    trouble = ""
    new = []
    try:
        try:
            new = _missing(folder)
            # Every process makes it: hosts need not share a disk.
            folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                handle, holder = _take(folder)
                if holder:
                    trouble = f"another run is using it ({holder}); wait for it, or name another"
        except OSError as error:
            trouble = f"cannot be written: {error.strerror or error} ({folder / FILE})"
        refused = bool(trouble)
        if jax.process_count() > 1:
            refused = bool(multihost_utils.process_allgather(np.asarray(refused)).any())
        if refused:
            raise ConfigError(
                f"--workdir={str(folder)!r:.300}:"
                f" {trouble or 'another process cannot use it, and says why'}"
            )
        yield
    finally:
        if handle is not None:
            with contextlib.suppress(OSError):
                (folder / FILE).unlink()
            os.close(handle)
        # A run that is refused leaves no folder behind; a folder that holds something stays.
        with contextlib.suppress(OSError):
            for empty in new:
                empty.rmdir()


def _missing(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder and those above it, as far as they do not exist."""
    return list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))


def workdir_path(workdir: str | None, spec: str) -> pathlib.Path:
    """The run's folder: `workdir`, or runs/ and the name of the config.

    Raises ConfigError for what can name none.
    """
    file, _, argument = spec.partition(":")
    name = workdir
    if name is None:
        run_name = "-".join(filter(None, (pathlib.Path(file).stem, argument)))
        if not re.fullmatch(r"[\w.,=+-]{1,200}", run_name):
            raise ConfigError(
                f"--config={spec!r:.120}: its name cannot name a folder; set --workdir"
            )
        name = f"runs/{run_name}"
    if not name or "\0" in name or len(name) > 1000:
        raise ConfigError(f"--workdir={name!r:.80}: not the name of a folder")
    return pathlib.Path(name)
