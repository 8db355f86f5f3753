"""The command line: python -m dpojax.main --config=FILE[:argument] [--workdir=DIR] [--config.KEY=VALUE ...].

Exit codes: 0 ok, 2 config or command line, 3 contents of data, 4 checkpoint, 5 numerics, 130 and 143 signals.
"""

import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from dpojax.errors import ConfigError, DpojaxError

USAGE = """usage: python -m dpojax.main --config=FILE[:argument] [--workdir=DIR] [--config.KEY=VALUE ...]

Trains a policy by Direct Preference Optimization, evaluates it, and writes a report.

  --config=FILE         a config: configs/tldr.py, configs/hh.py:paper, or plain data in a .json file.
                        A .py config is executed: run only files that you trust.
  --workdir=DIR         where everything goes (default: runs/<config name>). The same command goes on
                        from the last checkpoint in it.
  --config.KEY=VALUE    changes one setting, e.g. --config.loss.beta=0.5 --config.data.train=pairs.jsonl
  --help                this text, and with --config=FILE all of its settings

Writes DIR/report.html, metrics.jsonl, summary.json, checkpoints/ and tensorboard/.
Several processes: set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in each.
"""


def parse(argv: Sequence[str]) -> tuple[str, str | None, dict[str, str], bool]:
    """(config spec, workdir, overrides, help) from the command line. Raises ConfigError for anything else."""
    spec, workdir, overrides, wants_help = None, None, {}, False
    queue = list(argv)
    while queue:
        argument = queue.pop(0)
        if argument in ("-h", "--help", "-help"):
            wants_help = True
            continue
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"argument {argument!r} is not understood; flags look like --config.KEY=VALUE")
        if not equals:
            if not queue:
                raise ConfigError(f"{name} needs a value: {name}=VALUE")
            value = queue.pop(0)
        name = name.lstrip("-")
        if name == "config":
            spec = value
        elif name == "workdir":
            workdir = value
        elif name.startswith("config."):
            overrides[name.removeprefix("config.")] = value
        else:
            raise ConfigError(f"flag --{name} is unknown; there are --config, --workdir and --config.KEY")
    if spec is None and not wants_help:
        raise ConfigError("--config=FILE is missing, e.g. --config=configs/tldr.py")
    return spec or "", workdir, overrides, wants_help


def make_workdir(workdir: str | None, spec: str) -> pathlib.Path:
    """The run's folder, made and writable. Raises ConfigError otherwise."""
    file, _, argument = spec.partition(":")
    name = workdir if workdir is not None else "runs/" + "-".join(filter(None, (pathlib.Path(file).stem, argument)))
    if not name or "\0" in name or len(name) > 1000:
        raise ConfigError(f"--workdir={name!r:.80}: not the name of a folder")
    path = pathlib.Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--workdir={name!r}: cannot be written: {error.strerror or error}") from error
    return path


class StopSignal:
    """SIGTERM and Ctrl-C as a question that the loop asks at each step boundary.

    One process: a handler of our own. Several: JAX's preemption service alone (a handler set after
    jax.distributed.initialize steals the signal from it), which makes all processes stop at the same step.
    """

    def __init__(self, processes: int):
        self.exit_code, self.processes = 0, processes
        if processes == 1:
            signal.signal(signal.SIGTERM, self._handle)
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number, frame) -> None:
        if self.exit_code and number == signal.SIGINT:
            os._exit(130)  # the second Ctrl-C leaves at once; unfinished saves are never committed
        self.exit_code = 128 + number
        print(f"{signal.Signals(number).name}: saving at the next step boundary", flush=True)

    def __call__(self, step: int) -> int:
        """The exit code if the run should save and stop after `step`, else 0."""
        if self.processes > 1:
            from jax.experimental import multihost_utils

            return 143 if multihost_utils.reached_preemption_sync_point(step) else 0
        return self.exit_code


def _start_processes() -> None:
    """Joins the other processes, if the environment names a coordinator."""
    import jax

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        try:
            count, number = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise ConfigError("JAX_COORDINATOR_ADDRESS needs JAX_NUM_PROCESSES and JAX_PROCESS_ID, numbers") from error
        jax.distributed.initialize(address, count, number)


def _same_everywhere(values: dict[str, Any]) -> None:
    """Raises ConfigError if the processes were started with different configs or code."""
    import hashlib
    import json

    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    from dpojax import __version__

    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps([__version__, values], sort_keys=True).encode()).digest()[:8]
    found = np.asarray(multihost_utils.process_allgather(np.frombuffer(digest, np.uint8)))
    if (found != found[0]).any():
        raise ConfigError("the processes were started with different configs or versions of dpojax; start all with the same")


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit code."""
    try:
        spec, workdir, overrides, wants_help = parse(argv)
        if wants_help:
            print(USAGE)
            if not spec:
                return 0
        # Imported late, so that --help answers at once.
        from dpojax.config import apply_override, from_config_dict, load_config_file, to_dict

        values = load_config_file(spec)
        if wants_help:
            print(values)
            return 0
        for key, text in overrides.items():
            apply_override(values, key, text)
        config = from_config_dict(values, overridden=frozenset(overrides))
        folder = make_workdir(workdir, spec)
        import jax

        # An external backend must be told before it starts; threefry draws must not depend on the mesh.
        jax.config.update("jax_threefry_partitionable", True)
        _start_processes()
        from dpojax.run import Interrupted, run

        _same_everywhere(to_dict(config))
        try:
            run(config, folder, StopSignal(jax.process_count()))
        except Interrupted as stopped:
            return stopped.exit_code
        return 0
    except DpojaxError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if os.environ.get("DPOJAX_TRACEBACK"):
            traceback.print_exc()
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
