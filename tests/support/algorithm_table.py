"""Every algorithm that trains on its own samples, in one printed table:
python tests/support/algorithm_table.py [--only=NAME;...] [--no-transformer] [--resume].

share, degrees: the expected gradient of a step against that of E[r] - beta KL(pi || ref): the
  relative error of the share of it that theory promises, and the angle between the two.
slope at pi*: the expected gradient at the optimum, relative to that at the reference.
table, transformer: total variation to pi* after training, a table of logits on 4,096 samples a step
  and a small decoder through the trainer's own step.
devices, cuts: the update on 8 simulated devices, and in a micro-batch per row, against one device
  and one micro-batch; relative.
resume: a run of the command line that was stopped and went on, against one that was not.
Exit code 1 if anything is out of its bound.
"""

import argparse
import os
import pathlib
import sys
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import policy_cases as cases
import runs

EXACT = 1e-12
BOUNDS = {
    "share": EXACT,
    "slope at pi*": 1e-9,
    "table": 0.05,
    "transformer": 0.05,
    "devices": 1e-5,
    "cuts": 1e-5,
}
COLUMNS = ("share", "degrees", "slope at pi*", "table", "transformer", "devices", "cuts", "resume")


def resumed(case: cases.Case, folder: pathlib.Path) -> str:
    """What is told of a run that was stopped after two of its four steps."""
    files = runs.small_world(folder)
    settings = runs.sampled_settings(case.preset, case.labels)
    runs.run(files, folder / "whole", **settings)
    runs.stop_at(runs.start(files, folder / "stopped", **settings), " 2/")
    runs.run(files, folder / "stopped", **settings)
    same = runs.numbers(folder / "stopped") == runs.numbers(folder / "whole")
    stage = settings["stages"].split(",")[-1]
    whole, stopped = (runs.checksums(folder / name / stage, 4) for name in ("whole", "stopped"))
    return "bit-equal" if same and whole == stopped else "DIFFERS"


def measure(case: cases.Case, args: argparse.Namespace) -> dict[str, float | str]:
    """One row: column -> number, or why there is none."""
    error = cases.gradient_error(case)
    row: dict[str, float | str] = {"share": error.relative, "degrees": error.degrees}
    if case.exact_share is None:
        row["share"] = "another direction"
    row["slope at pi*"] = cases.slope_at_optimum(case)
    row["table"] = cases.variation(cases.train_table(case))
    if not args.no_transformer:
        row["transformer"] = cases.train_transformer(case)[1]
        row["devices"], row["cuts"] = cases.split_differences(case)
    if args.resume:
        with tempfile.TemporaryDirectory() as folder:
            row["resume"] = resumed(case, pathlib.Path(folder))
    return row


def is_wrong(case: cases.Case, column: str, value: float | str) -> bool:
    """Whether a number is out of what theory or dpojax promises."""
    if isinstance(value, str):
        return value == "DIFFERS"
    promised = case.reaches or column in ("share", "devices", "cuts")
    return promised and column in BOUNDS and not value <= BOUNDS[column]


def shown(column: str, value: float | str, wrong: bool) -> str:
    """A cell of the table."""
    text = value
    if not isinstance(value, str):
        text = f"{value:.0e}"
        if column == "degrees":
            text = f"{value:.1f}"
        elif column in ("table", "transformer"):
            text = f"{value:.3f}"
    return f"**{text}**" if wrong else str(text)


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="rows, separated by semicolons")
    parser.add_argument("--no-transformer", action="store_true", help="leave out the slow columns")
    parser.add_argument("--resume", action="store_true", help="stop and resume runs as well")
    args = parser.parse_args()
    names = list(cases.CASES)
    if args.only:
        names = [name.strip() for name in args.only.split(";")]
    columns = [c for c in COLUMNS if c != "resume" or args.resume]
    if args.no_transformer:
        columns = [c for c in columns if c not in ("transformer", "devices", "cuts")]
    print("| algorithm | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns), flush=True)
    wrong = []
    for name in names:
        case = cases.CASES[name]
        row = measure(case, args)
        cells = []
        for column in columns:
            bad = is_wrong(case, column, row[column])
            wrong += [f"{name}: {column} {row[column]}"] * bad
            cells.append(shown(column, row[column], bad))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    bounds = ", ".join(f"{column} {bound:g}" for column, bound in BOUNDS.items())
    print("\n" + ("\n".join(wrong) or f"all that is promised is within {bounds}"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
