"""Finished runs side by side: python -m dpojax.compare RUN RUN ... [--out=compare.html].

Prints the settings in which the runs differ, what came out of each, and each run against the first
one on the prompts that both answered: win rate, differences of reward and length with intervals,
and p-values. The page holds the same with curves, and reward against KL.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from dpojax.command_line import Parser, leave, run_tool
from dpojax.errors import ConfigError
from dpojax.evaluation import comparison
from dpojax.evaluation.comparison_page import comparison_page, versus_rows
from dpojax.runtime.log import say
from dpojax.untrusted.plain_data import check_output


def parser() -> Parser:
    """The command line."""
    flags = Parser(
        prog="python -m dpojax.compare",
        description=(
            "Puts finished runs side by side: what differs in their settings, what came out, and"
            " each run against the first on the prompts that both answered."
        ),
    )
    flags.add_argument("runs", nargs="+", metavar="RUN", default=[], help="workdir of a run")
    flags.add_argument("--out", default="compare.html", help="page to write; '' writes none")
    flags.add_argument(
        "--shown", type=int, default=24, help="prompts whose answers the page shows side by side"
    )
    return flags


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", "|---|" + "---|" * (len(head) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def compare(args: argparse.Namespace) -> None:
    """Prints the tables and writes the page. Raises ConfigError for what cannot be read."""
    if len(args.runs) < 2:
        raise ConfigError("name at least two workdirs: python -m dpojax.compare RUN RUN")
    if args.shown < 0:
        raise ConfigError(f"--shown={args.shown}: it must be at least 0")
    runs = comparison.read_runs(args.runs)
    names = [run.name for run in runs]
    settings = comparison.differing_settings(runs)
    say(markdown(["setting", *names], settings))
    say("")
    say(markdown(["", *names], comparison.results(runs)))
    found, reasons = comparison.versus(runs)
    if found:
        head, *rows = versus_rows(found)
        say("")
        say(markdown(head, rows))
    for reason in reasons:
        say(f"not compared: {reason}")
    if args.out:
        path = pathlib.Path(args.out)
        check_output(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(comparison_page(runs, found, reasons, args.shown), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--out={args.out!r}: cannot be written: {error.strerror or error}"
            ) from error
        say(f"\n{path}")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return run_tool(compare, parser(), argv)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
