"""Several runs that differ in a few settings, trained together in one program.

    python -m dpojax.sweep --config=configs/tldr.py --workdir=DIR --sweep.loss.beta=0.03,0.1,0.3
    [--sweep.KEY=A,B ...]

Every combination is a run: DIR/NAME holds what `dpojax.main` writes for it, checkpoint included.
All share the data's order, the SFT stage, the frozen base and the reference, whose pass over a
micro-batch is made once; each equals its solo run up to rounding. What may differ: loss.* (not
objectives that couple a batch's pairs), optim.learning_rate, and the seed of adapters and their
dropout (--config.data.seed fixes the data's). The same command goes on from the last checkpoint.
"""

import contextlib
import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dpojax.command_line import Parser, leave, run_command
from dpojax.config.grid import combinations
from dpojax.config.load import apply_override, load_config_file
from dpojax.errors import ConfigError
from dpojax.main import join_run
from dpojax.runtime.log import say
from dpojax.runtime.signals import StopSignal
from dpojax.runtime.workdir import locked_workdir, workdir_path
from dpojax.whole_run import run_sweep


def results_table(summaries: Mapping[str, dict[str, Any]]) -> str:
    """The runs of a sweep as a Markdown table: name -> what summary.json holds."""
    keys = ("eval_loss", "eval_objective/accuracy", "win_rate", "kl")
    lines = [f"| run | {' | '.join(keys)} |", "|---|" + "---|" * len(keys)]
    for name, summary in summaries.items():
        cells = [f"{summary[k]:.4f}" if summary.get(k) is not None else "" for k in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(path: pathlib.Path, table: str) -> None:
    """Writes the table whole or not at all, and says where; a folder that cannot be written stops
    nothing.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(table + "\n", encoding="utf-8")
        temporary.replace(path)
        say(f"\n{path}")
    except OSError as error:
        say(f"warning: {path} cannot be written ({error.strerror or error})")


def parser() -> Parser:
    """The flags."""
    flags = Parser(
        prog="python -m dpojax.sweep",
        sections=("config", "sweep"),
        add_help=False,
        allow_abbrev=False,
    )
    flags.add_argument("-h", "--help", action="store_true")
    flags.add_argument("--config", default="")
    flags.add_argument("--workdir")
    flags.add_argument("--allow_code", action="store_true")
    flags.add_argument("--together", choices=("auto", "vmap", "loop"), default="auto")
    return flags


def sweep(argv: Sequence[str], stop: StopSignal) -> int:
    """Runs the command line; returns the exit code. Raises DpojaxError for what a user can mend."""
    flags, texts = parser().parse_command_line(argv)
    if flags.help or not argv:
        print(
            f"{__doc__}\n--together=auto|vmap|loop says whether the runs of a step are computed"
            " side by side."
        )
        return 0
    spec = flags.config
    overrides = texts["config"]
    grid = {key: text.split(",") for key, text in texts["sweep"].items()}
    if not spec or not grid:
        raise ConfigError("--config=FILE and at least one --sweep.KEY=A,B are needed")
    values = load_config_file(spec, allow_code=flags.allow_code, overridden={**overrides, **grid})
    for key, text in overrides.items():
        apply_override(values, key, text)
    runs = combinations(values, grid, frozenset(overrides))
    folder = workdir_path(
        flags.workdir or f"runs/{pathlib.Path(spec.partition(':')[0]).stem}-sweep", spec
    )
    join_run(list(runs.values()))
    stop.processes = jax.process_count()
    with contextlib.ExitStack() as locks:
        for place in (folder, *(folder / name for name in runs)):
            locks.enter_context(locked_workdir(place))
        found = run_sweep(runs, folder, stop, together=flags.together)
    table = results_table(found)
    if jax.process_index() == 0:
        say(f"\n{table}")
        write_table(folder / "sweep.md", table)
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(functools.partial(sweep, argv))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
