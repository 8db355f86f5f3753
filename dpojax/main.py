"""The command line: python -m dpojax.main --config=FILE[:argument] [--workdir=DIR] [--config.KEY=VALUE ...].

Exit codes: 0 ok, 2 config or command line, 3 contents of data, 4 checkpoint, 5 numerics, 6 does not fit, 130 and 143 signals.
"""

import functools
import hashlib
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpojax.command import StopSignal, leave, run_command
from dpojax.errors import ConfigError
from dpojax.flags import did_you_mean, nearest_setting
from dpojax.launch import join_processes

USAGE = """usage: python -m dpojax.main --config=FILE[:argument] [--workdir=DIR] [--config.KEY=VALUE ...]

Trains a policy by Direct Preference Optimization, evaluates it, and writes a report.

  --config=FILE         a config: configs/tldr.py, configs/hh.py:paper, or plain data in a .json file.
                        A .py config is executed: run only files that you trust.
  --workdir=DIR         where everything goes (default: runs/<config name>). The same command goes on
                        from the last checkpoint in it.
  --allow_code          a .json config may name functions of modules and files (loss.name, sample.reward), which are executed
  --profile[=STEPS]     writes a trace of some steps (3) to DIR/profile, for Perfetto (ui.perfetto.dev) and TensorBoard
  --config.KEY=VALUE    changes one setting, e.g. --config.loss.beta=0.5 --config.data.train=pairs.jsonl
  --help                this text, and with --config=FILE all of its settings, explained

Writes DIR/report.html, metrics.jsonl, summary.json, checkpoints/ and tensorboard/.
Several processes: the same command in each. Slurm, Open MPI, Kubernetes' indexed jobs and TPU slices are recognised; elsewhere
set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. When one dies, the others end after
DPOJAX_HEARTBEAT_SECONDS (100); the same command then goes on from the last checkpoint.
Compiled programs are kept in the user's cache directory: JAX_ENABLE_COMPILATION_CACHE=0 turns that off, and
JAX_COMPILATION_CACHE_DIR names another folder, which several processes must share.
Exit codes: 0 ok, 2 config or command line, 3 contents of data, 4 checkpoint, 5 numerics, 6 does not fit, 130 and 143 signals.
"""


FLAGS = ("config", "workdir", "allow_code", "profile", "help")


def known_flags(name: str, flags: Sequence[str]) -> str:
    """What there is besides an unknown flag, and the nearest of it; a setting's name without `config.` is near it."""
    from dpojax.config import setting_kinds

    settings = [f"config.{key}" for key in setting_kinds()]
    near = nearest_setting(name, settings) if "." in name else ""
    near = near or did_you_mean(name, flags) or nearest_setting(name, settings)
    listed = ", ".join(f"--{flag}" for flag in flags)
    return f"there are {listed} and --config.KEY=VALUE{near.replace('did you mean ', 'did you mean --')}"


class Arguments(NamedTuple):
    """What the command line says."""

    spec: str  # of the config
    workdir: str | None
    overrides: dict[str, str]
    wants_help: bool
    profile_steps: int  # 0: no trace
    allow_code: bool  # of a config that is plain data


def parse(argv: Sequence[str]) -> Arguments:
    """The command line. Raises ConfigError for anything that is not understood."""
    spec, workdir, overrides, wants_help, profile, allow_code = None, None, {}, False, 0, False
    queue = list(argv)
    while queue:
        argument = queue.pop(0)
        if argument in ("-h", "--help", "-help"):
            wants_help = True
            continue
        if argument == "--profile":
            profile = 3
            continue
        if argument == "--allow_code":
            allow_code = True
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
        elif name == "profile":
            if not re.fullmatch("[0-9]{1,9}", value) or int(value) < 1:
                raise ConfigError(f"--profile={value!r:.60}: it must be a number of steps, at least 1")
            profile = int(value)
        elif name.startswith("config."):
            overrides[name.removeprefix("config.")] = value
        else:
            raise ConfigError(f"flag --{name} is unknown; {known_flags(name, FLAGS)}")
    if spec is None and not wants_help:
        raise ConfigError("--config=FILE is missing, e.g. --config=configs/tldr.py")
    return Arguments(spec or "", workdir, overrides, wants_help, profile, allow_code)


def workdir_path(workdir: str | None, spec: str) -> pathlib.Path:
    """The run's folder: `workdir`, or runs/ and the name of the config. Raises ConfigError for what can name none."""
    file, _, argument = spec.partition(":")
    name = workdir
    if name is None:
        run_name = "-".join(filter(None, (pathlib.Path(file).stem, argument)))
        if not re.fullmatch(r"[\w.,=+-]{1,200}", run_name):
            raise ConfigError(f"--config={spec!r:.120}: its name cannot name a folder; set --workdir")
        name = f"runs/{run_name}"
    if not name or "\0" in name or len(name) > 1000:
        raise ConfigError(f"--workdir={name!r:.80}: not the name of a folder")
    return pathlib.Path(name)


def join_run(configs: Sequence[Any]) -> None:
    """Joins the processes of a run, or of the runs of a sweep, before a backend starts.

    Raises: ConfigError if they cannot be joined, or have other code, objectives or settings than the first.
    """
    import jax

    # An external backend must be told before it starts; threefry draws must not depend on the mesh.
    jax.config.update("jax_threefry_partitionable", True)
    from dpojax.config import to_dict
    from dpojax.metrics import say
    from dpojax.programs import open_cache

    # Of several processes the first alone writes, and it would wait for the others at every second start: their homes may
    # be their own. A folder that all share is named by JAX_COMPILATION_CACHE_DIR.
    if not join_processes():
        cached = open_cache()
        if cached:
            say(cached)
    from dpojax.job import same_everywhere

    digest = lambda plain: hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    same_everywhere("version of dpojax", _code_digest())
    same_everywhere("objective of its own", digest([c.loss.make().source for c in configs]))
    same_everywhere("config", digest([to_dict(c) for c in configs]))


def _code_digest() -> str:
    """Changes with any file of this package."""
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()


def train(argv: Sequence[str], stop: StopSignal) -> int:
    """Runs the command line `argv`; returns the exit code. Raises DpojaxError for what a user can mend."""
    spec, workdir, overrides, wants_help, profile_steps, allow_code = parse(argv)
    if wants_help:
        print(USAGE)
        if not spec:
            return 0
    # Imported late, so that --help answers at once.
    from dpojax.config import apply_override, from_config_dict, load_config_file

    values = load_config_file(spec, allow_code=allow_code, overridden=overrides)
    if wants_help:
        from dpojax.explain import settings_help

        print(settings_help(values))
        return 0
    for key, text in overrides.items():
        apply_override(values, key, text)
    config = from_config_dict(values, overridden=frozenset(overrides))
    folder = workdir_path(workdir, spec)
    join_run([config])
    import jax

    from dpojax.lock import locked_workdir
    from dpojax.run import run

    stop.processes = jax.process_count()
    with locked_workdir(folder):
        run(config, folder, stop, profile_steps=profile_steps)
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit code."""
    return run_command(functools.partial(train, argv))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
