"""The command line: python -m dpojax.main --config=NAME[:argument] [--workdir=DIR]
[--config.KEY=VALUE ...].

Exit codes: 0 ok, 2 config or command line, 3 contents of data, 4 checkpoint, 5 numerics, 6 does not
fit, 130 and 143 signals.
"""

import functools
import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpojax.command_line import Parser, leave, run_command
from dpojax.config.shipped import shipped_headlines
from dpojax.errors import ConfigError
from dpojax.runtime.processes import join_processes
from dpojax.runtime.signals import StopSignal
from dpojax.runtime.workdir import workdir_path

USAGE = """usage: python -m dpojax.main --config=NAME[:argument] [--workdir=DIR]
                             [--config.KEY=VALUE ...]

Trains a policy by Direct Preference Optimization, or what config.stages names; evaluates it, and
writes a report.

  --config=NAME         a config that comes with dpojax (they are listed below): tldr, hh:paper;
                        or a file: configs/tldr.py, mine.py:argument, or plain data in a .json
                        file. A .py config is executed: run only files that you trust.
  --workdir=DIR         where everything goes (default: runs/<config name>). The same command goes
                        on from the last checkpoint in it.
  --allow_code          a .json config may name functions of modules and files, which are executed
                        (stages, loss.name, sample.reward)
  --profile[=STEPS]     writes a trace of some steps (3) to DIR/profile, for Perfetto
                        (ui.perfetto.dev) and TensorBoard
  --config.KEY=VALUE    changes one setting, e.g. --config.loss.beta=0.5
  --help                this text, and with --config=NAME all of its settings, explained
                        (--config=base --help: the defaults)

Writes DIR/report.html, metrics.jsonl, summary.json, checkpoints/ and tensorboard/.
Several processes: the same command in each. Slurm, Open MPI, Kubernetes' indexed jobs and TPU
slices are recognised; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
When one dies, the others end after DPOJAX_HEARTBEAT_SECONDS (100); the same command then goes on
from the last checkpoint.
Compiled programs are kept in the user's cache directory: JAX_ENABLE_COMPILATION_CACHE=0 turns that
off, and JAX_COMPILATION_CACHE_DIR names another folder, which several processes must share.
Exit codes: 0 ok, 2 config or command line, 3 contents of data, 4 checkpoint, 5 numerics, 6 does not
fit, 130 and 143 signals.
"""

PROFILED_STEPS = 3  # of --profile without a number


class Arguments(NamedTuple):
    """What the command line says."""

    spec: str  # of the config
    workdir: str | None
    overrides: dict[str, str]
    wants_help: bool
    profile_steps: int  # 0: no trace
    allow_code: bool  # of a config that is plain data


def parser() -> Parser:
    """The flags; what --help prints is USAGE."""
    flags = Parser(
        prog="python -m dpojax.main", sections=("config",), add_help=False, allow_abbrev=False
    )
    flags.add_argument("-h", "--help", "-help", action="store_true")
    flags.add_argument("--config", default="")
    flags.add_argument("--workdir")
    flags.add_argument("--allow_code", action="store_true")
    flags.add_argument("--profile", nargs="?", type=int, const=PROFILED_STEPS)
    return flags


def parse(argv: Sequence[str]) -> Arguments:
    """The command line. Raises ConfigError for anything that is not understood."""
    flags, texts = parser().parse_command_line(argv)
    if not flags.config and not flags.help:
        raise ConfigError("--config=NAME is missing, e.g. --config=tldr")
    if flags.profile is not None and flags.profile < 1:
        raise ConfigError(f"--profile={flags.profile}: it must be a number of steps, at least 1")
    return Arguments(
        spec=flags.config,
        workdir=flags.workdir,
        overrides=texts["config"],
        wants_help=flags.help,
        profile_steps=flags.profile or 0,
        allow_code=flags.allow_code,
    )


def join_run(configs: Sequence[Any]) -> None:
    """Joins the processes of a run, or of the runs of a sweep, before a backend starts.

    Raises: ConfigError if they cannot be joined, or have other code, objectives or settings than
      the first.
    """
    import jax

    # An external backend must be told before it starts; threefry draws must not depend on the mesh.
    jax.config.update("jax_threefry_partitionable", True)
    from dpojax.config.load import to_dict
    from dpojax.runtime.compiled import open_cache
    from dpojax.runtime.log import say

    # Of several processes the first alone writes, and it would wait for the others at every second
    # start: their homes may
    # be their own. A folder that all share is named by JAX_COMPILATION_CACHE_DIR.
    if not join_processes():
        cached = open_cache()
        if cached:
            say(cached)
    from dpojax.runtime.context import same_everywhere

    def digest(plain):
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    same_everywhere("version of dpojax", _code_digest())
    same_everywhere("objective of its own", digest([c.loss.objective.source for c in configs]))
    same_everywhere("config", digest([to_dict(c) for c in configs]))


def _code_digest() -> str:
    """Changes with any file of this package."""
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()


def _shipped_help() -> str:
    """The configs that --config takes by name, one a line."""
    lines = [f"  {name:14s} {about}" for name, about in shipped_headlines().items()]
    return "\n".join(["Configs that come with dpojax:", *lines])


def train(argv: Sequence[str], stop: StopSignal) -> int:
    """Runs the command line `argv`; returns the exit code.

    Raises DpojaxError for what a user can mend.
    """
    arguments = parse(argv)
    spec = arguments.spec
    overrides = arguments.overrides
    if arguments.wants_help:
        print(USAGE)
        if not spec:
            print(_shipped_help())
            return 0
    # Imported late, so that --help answers at once.
    from dpojax.config.load import apply_override, from_config_dict, load_config_file

    values = load_config_file(spec, allow_code=arguments.allow_code, overridden=overrides)
    if arguments.wants_help:
        from dpojax.config.explain import settings_help

        print(settings_help(values))
        return 0
    for key, text in overrides.items():
        apply_override(values, key, text)
    config = from_config_dict(values, overridden=frozenset(overrides))
    folder = workdir_path(arguments.workdir, spec)
    join_run([config])
    import jax

    from dpojax.runtime.workdir import locked_workdir
    from dpojax.whole_run import run

    stop.processes = jax.process_count()
    with locked_workdir(folder):
        run(config, folder, stop, profile_steps=arguments.profile_steps)
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit code."""
    return run_command(functools.partial(train, argv))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
