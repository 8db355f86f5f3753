"""What every part of a run shares: config, folder, mesh, logs, counted programs, and the question
when to stop.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpojax.config.schema import Config
from dpojax.errors import ConfigError
from dpojax.runtime import sharding
from dpojax.runtime.compiled import Program, news
from dpojax.runtime.log import MetricsLog, Progress, say
from dpojax.untrusted.plain_data import check_output


class Stop(AbstractContextManager, Protocol):
    """The question when to stop. As a context it holds signals back until the question is asked."""

    def __call__(self, step: int) -> int:
        """The exit code if the run should save and stop after `step`, else 0."""
        ...


@dataclasses.dataclass
class Job:
    """What every part of a run shares."""

    config: Config
    workdir: pathlib.Path
    mesh: Mesh
    log: MetricsLog
    stop: Stop
    programs: dict[str, Program] = dataclasses.field(default_factory=dict)
    # whether nothing can be refused any more, so that the workdir may change
    committed: bool = False
    _deferred: list[Callable[[], None]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        # `config` changes once data and weights tell its steps and limits; this stays.
        self.asked = self.config

    @property
    def main_process(self) -> bool:
        """Whether this process talks and writes."""
        return jax.process_index() == 0

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that every device holds completely."""
        return NamedSharding(self.mesh, P())

    def say(self, message: str) -> None:
        """Prints a line from process 0, after a line on what was compiled since the last call."""
        if not self.main_process:
            return
        compiled = news(self.programs)
        if compiled:
            say(compiled)
        say(message)

    def program(self, name: str, function, **options) -> Program:
        """A program of the run; its compilations are counted under `name`."""
        program = Program(name, function, enabled=self.main_process, **options)
        before = self.programs.get(name)
        if before is not None:
            program.compiled = before.compiled
            program.loaded = before.loaded
            program.seconds = before.seconds
            program.said = before.said
        self.programs[name] = program
        return program

    def progress(self, name: str, total: int, unit: str) -> Progress:
        """A progress line from process 0."""
        return Progress(name, total, unit, enabled=self.main_process)

    def write(self, change: Callable[[], None]) -> None:
        """Makes a change of the workdir from process 0: now, or, before the run is known to be
        sound, at `commit`.

        A run that is refused must leave the workdir as it was: what lies there belongs to another
        run.
        """
        if not self.main_process:
            return
        if self.committed:
            self._make(change)
        else:
            self._deferred.append(change)

    def commit(self) -> None:
        """Makes the changes that waited, and lets later ones happen at once: from here on the run
        cannot be refused.
        """
        self.committed = True
        waiting = self._deferred
        self._deferred = []
        for change in waiting:
            self._make(change)

    def _make(self, change: Callable[[], None]) -> None:
        """Makes a change; the run goes on where the disk has no room for it."""
        try:
            change()
        except OSError as error:
            self.say(
                f"warning: {error.filename or self.workdir} cannot be written"
                f" ({error.strerror or error}); the run goes on"
            )

    def write_file(self, name: str, text: str, *, append: bool = False) -> None:
        """Writes a file of the workdir from process 0, completely or not at all; the run goes on
        where it cannot be written.

        It waits for `commit`, as every change of the workdir does.
        """
        self.write(functools.partial(self._write_file, name, text, append=append))

    def _write_file(self, name: str, text: str, *, append: bool) -> None:
        path = self.workdir / name
        temporary = path.with_name(path.name + ".tmp")
        try:
            for place in (path, temporary):
                check_output(place)
            if append:
                with path.open("a", encoding="utf-8") as file:
                    file.write(text)
            else:
                temporary.write_text(text, encoding="utf-8")
                temporary.replace(path)
        except OSError as error:
            self.say(f"warning: {path} cannot be written ({error}); the run goes on")

    def put(self, batch: Any) -> Any:
        """A PackedBatch of this process's shards, as global arrays on the devices."""
        return sharding.put_batch(batch, self.mesh)


def everywhere(flag: bool) -> bool:
    """Whether `flag` holds in every process."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(flag))))


def same_everywhere(what: str, digest: str) -> None:
    """Raises ConfigError in every process if the processes hold different digests of `what`."""
    if jax.process_count() == 1:
        return
    here = np.frombuffer(digest.encode()[:64].ljust(64), np.uint8)
    digests = np.asarray(multihost_utils.process_allgather(here))
    differ = [i for i, there in enumerate(digests) if (there != digests[0]).any()]
    if differ:
        raise ConfigError(
            f"process(es) {', '.join(map(str, differ))} started with another {what} than process 0;"
            " start all with the same"
        )
