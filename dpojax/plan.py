"""What would this run need on a TPU slice? Compiles its whole train step for one, on a machine
without one.

    python -m dpojax.plan --config=configs/llama3_8b.py --topology=v5e:16x16 [--table]
    [--config.KEY=VALUE ...]

The step is lowered from shapes alone and compiled by the real TPU compiler (libtpu; the `tpu`
extra), so that memory, layouts and collectives are those of the run. Nothing is executed: times are
a roofline's, not measured.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dpojax.command_line import Parser, leave, run_command
from dpojax.config.load import apply_override, from_config_dict, load_config_file
from dpojax.config.schema import Config
from dpojax.cost.devices import Topology, open_topology
from dpojax.cost.lengths import QUANTILES
from dpojax.cost.planning import ADVICE, Plan, RolloutPlan, make_plan
from dpojax.cost.roofline import RESOURCES
from dpojax.cost.step_work import planned_model
from dpojax.cost.traffic import BETWEEN
from dpojax.errors import ConfigError, FitError, did_you_mean
from dpojax.models.params import num_params
from dpojax.runtime.devices import GIB, TPUS
from dpojax.runtime.log import Progress, duration, say

# They count where they are set before JAX starts: it then looks for no TPU, and another process may
# use the compiler at the same time.
for variable, setting in {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "JAX_PLATFORMS": "cpu",
}.items():
    os.environ.setdefault(variable, setting)

SMALLEST_SHOWN_GIB = 0.0005  # a category of memory with less is 0.000 in the list


def _bar(share: float, width: int = 24) -> str:
    return "█" * round(share * width)


def _show_memory(peak: float, available: float, categories: dict[str, float]) -> None:
    say(f"\nmemory of a device: {peak:.2f} of {available:.2f} GiB ({peak / available:.0%})")
    for name, gib in sorted(categories.items(), key=lambda entry: -entry[1]):
        if gib >= SMALLEST_SHOWN_GIB:
            say(f"  {name:14s} {gib:8.3f} GiB  {_bar(gib / available)}")


def _show_traffic(plan: Plan) -> None:
    sent = sum(traffic.sent for traffic in plan.traffic)
    say(f"\ncollectives of a step, on each device ({sent / 1e9:,.1f} GB)")
    for traffic in plan.traffic:
        say(f"  {traffic.kind:19s} {traffic.runs:9,.0f} times {traffic.sent / 1e9:10,.2f} GB")


def _show_roofline(plan: Plan, config: Config) -> None:
    times = plan.roofline
    work = plan.work
    say(
        f"\nstep at the roofline: {duration(times.seconds)}, bound by {times.bound} (nothing was"
        " run)"
    )
    for name, seconds in zip(RESOURCES, times, strict=True):
        if name == BETWEEN and plan.num_slices == 1:
            continue
        say(f"  {name:14s} {seconds:8.3f} s    {_bar(seconds / times.seconds)}")
    say(
        f"  {config.batch_size:,} {plan.unit}, {work.tokens:,.0f} tokens a step; useful"
        f" {work.useful / 1e15:.2f} PFLOP = {plan.useful_mfu:.1%} of the peak (MFU);"
        f" {config.batch_size / times.seconds:,.1f} {plan.unit}/s"
    )
    say(
        f"\npacking {work.packing:.3f}, rounding to whole micro-batches {work.rounding:.3f} of the"
        f" ideal tokens, {work.micro:.1f} micro-batches; rounding is under 10 % from about"
        f" {work.smallest_batch:,} {plan.unit} a step"
    )


def show(plan: Plan, config: Config) -> None:
    """Prints the plan for people."""
    slices = ""
    if plan.num_slices > 1:
        slices = f" x {plan.num_slices} slices"
    say(
        f"\n{plan.topology}{slices}, {plan.devices} devices: compiled in"
        f" {duration(plan.seconds_to_compile)}; {plan.layout}"
    )
    _show_memory(plan.hbm_gib, plan.available_gib, plan.categories_gib)
    if plan.host_gib:
        say(f"  host's memory  {plan.host_gib:8.3f} GiB for each device")
    _show_traffic(plan)
    _show_roofline(plan, config)
    if plan.rollout is not None:
        _show_rollout(plan, plan.rollout)


def _show_rollout(plan: Plan, rollout: RolloutPlan) -> None:
    """What draws the samples of a step, before it."""
    say(
        f"\nsamples: {rollout.batches} batches of {rollout.rows:,} responses, compiled in"
        f" {duration(rollout.seconds_to_compile)}; {duration(rollout.seconds)} at the roofline if"
        " all of them are as long as may be (weights and caches are read once a token)"
    )
    _show_memory(rollout.hbm_gib, plan.available_gib, rollout.categories_gib)


class Cell(NamedTuple):
    """One entry of the grid."""

    mode: str  # of the reference
    remat: str
    batch: int  # pairs a step
    overrides: dict[str, str]  # of the config


def table_settings(
    config: Config, modes: Sequence[str], remats: Sequence[str], batches: Sequence[int]
) -> Iterator[Cell]:
    """Every cell of the grid. Raises: ConfigError for an unknown mode."""
    plain = {"lora.rank": "0", "lora.base_dtype": ""}
    rank = str(config.lora.rank or 16)
    kinds = {
        "live": {"reference.mode": "live", "reference.dtype": "", **plain},
        "live int8": {"reference.mode": "live", "reference.dtype": "int8", **plain},
        "cached": {"reference.mode": "cached", **plain},
        "adapter": {"reference.mode": "adapter", "reference.dtype": "", "lora.rank": rank},
    }
    for mode in modes:
        if mode not in kinds:
            raise ConfigError(f"--modes={mode!r}: they are {', '.join(kinds)}")
        for remat in remats:
            for batch in batches:
                overrides = {**kinds[mode], "model.remat": remat, "batch_size": str(batch)}
                yield Cell(mode, remat, batch, overrides)


def _table_row(
    values: Any, topology: Topology, lengths: str, cell: Cell
) -> tuple[dict[str, Any], str]:
    """One cell as plain data, and the end of its line; what does not fit is a row too."""
    settings = values.copy_and_resolve_references()
    for key, text in cell.overrides.items():
        apply_override(settings, key, text)
    row: dict[str, Any] = {
        "reference": cell.mode,
        "remat": cell.remat,
        "batch_size": cell.batch,
        "fits": False,
    }
    try:
        plan = make_plan(from_config_dict(settings), topology, lengths)
    except FitError as error:
        needed = re.search(r"needs ([\d.]+) GiB", str(error))
        gib = "?"
        if needed:
            gib = needed.group(1)
        return row | {"error": str(error)}, f"{gib}, does not fit | | | |"
    except ConfigError as error:  # this mode does not take the settings, and other cells may
        return row | {"error": str(error)}, f"{error} | | | |"
    seconds = plan.roofline.seconds
    row |= {
        "fits": True,
        "hbm_gib": plan.hbm_gib,
        "step_s": seconds,
        "bound": plan.roofline.bound,
        "useful_mfu": plan.useful_mfu,
        "pairs_per_second": cell.batch / seconds,
    }
    return row, (
        f"{plan.hbm_gib:.2f} | {seconds:.2f} | {plan.roofline.bound} |"
        f" {plan.useful_mfu:.1%} | {cell.batch / seconds:,.0f}"
    )


def make_table(
    values: Any, topology: Topology, lengths: str, cells: Iterable[Cell]
) -> list[dict[str, Any]]:
    """Compiles every cell, with progress, and prints them as a table."""
    rows = []
    cells = list(cells)
    say(
        f"| reference | remat | pairs a step | GiB of {topology.chip.hbm / GIB:.2f} | step s |"
        " bound | useful MFU | pairs/s |"
    )
    say("|---|---|---|---|---|---|---|---|")
    progress = Progress("compiling", len(cells), "programs", enabled=True, every_s=60)
    for i, cell in enumerate(cells):
        row, shown = _table_row(values, topology, lengths, cell)
        progress.clear()
        say(f"| {cell.mode} | {cell.remat} | {cell.batch:,} | {shown} |")
        rows.append(row)
        progress(i + 1)
    progress.clear()
    return rows


def parser() -> Parser:
    """The flags."""
    flags = Parser(
        prog="python -m dpojax.plan",
        sections=("config",),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            f"Exit codes: 0 it fits, {ConfigError.exit_code} {ConfigError.about},"
            f" {FitError.exit_code} it does not fit (the message says what is needed and what there"
            " is)."
        ),
    )
    flags.add_argument(
        "--config",
        required=True,
        help="NAME or FILE[:argument], as for dpojax.main; --config.KEY=VALUE changes it",
    )
    flags.add_argument(
        "--allow_code",
        action="store_true",
        help=(
            "a .json config may name functions (stages, loss.name, sample.reward), which are"
            " executed"
        ),
    )
    flags.add_argument(
        "--topology",
        required=True,
        help=f"{', '.join(TPUS)} and a shape: v5e:16x16, v6e:8x8, v5p:4x4x4",
    )
    flags.add_argument(
        "--num_slices",
        type=int,
        default=1,
        help="slices of this topology; the data axis alone crosses them",
    )
    flags.add_argument(
        "--lengths",
        default="ultrafeedback",
        help=f"lengths of the data: {', '.join(QUANTILES)}, or full: all as long as may be",
    )
    flags.add_argument(
        "--table",
        action="store_true",
        help="compiles a grid over reference modes, remat policies and batch sizes",
    )
    flags.add_argument("--modes", default="live,live int8,cached,adapter", help="of the grid")
    flags.add_argument("--remats", default="full,dots", help="of the grid")
    flags.add_argument(
        "--batches", default="", help="of the grid (default: batch_size and twice as many)"
    )
    flags.add_argument("--hlo", default="", help="file to write the compiled program's text to")
    flags.add_argument("--json", default="", help="file to write the plan to")
    return flags


def _plan_table(args: argparse.Namespace, values: Any, config: Config, topology: Topology) -> Any:
    """Compiles the grid that the flags ask for, and says which cell is the largest that fits."""
    batches = [config.batch_size, 2 * config.batch_size]
    if args.batches:
        batches = [int(batch) for batch in args.batches.split(",")]
    cells = table_settings(config, args.modes.split(","), args.remats.split(","), batches)
    rows = make_table(values, topology, args.lengths, cells)
    fitting = [row for row in rows if row["fits"]]
    if not fitting:
        raise FitError(f"{args.topology}: nothing of the grid fits; {ADVICE}")
    best = max(fitting, key=lambda row: (row["batch_size"], row["pairs_per_second"]))
    say(
        f"\nthe largest that fits: {best['batch_size']:,} pairs, reference {best['reference']},"
        f" remat {best['remat']} ({best['hbm_gib']:.2f} GiB, {best['pairs_per_second']:,.0f}"
        " pairs/s at the roofline)"
    )
    return rows


def plan_command(argv: Sequence[str], stop: Any = None) -> int:
    """Runs the command line; returns the exit code. Raises DpojaxError for what a user can mend."""
    del stop  # nothing is saved: a signal ends the process
    args, texts = parser().parse_command_line(argv)
    overrides = texts["config"]
    values = load_config_file(args.config, allow_code=args.allow_code, overridden=overrides)
    for key, text in overrides.items():
        apply_override(values, key, text)
    config = from_config_dict(values, overridden=frozenset(overrides))
    if args.lengths not in (*QUANTILES, "full"):
        near = did_you_mean(args.lengths, (*QUANTILES, "full"))
        raise ConfigError(
            f"--lengths={args.lengths!r}: they are {', '.join(QUANTILES)}, full{near}"
        )
    topology = open_topology(args.topology, args.num_slices)
    if args.table:
        result = _plan_table(args, values, config, topology)
    else:
        say(
            f"{args.config}: {num_params(planned_model(config)) / 1e9:.2f}B parameters, lengths of"
            f" {args.lengths}; compiling ..."
        )
        plan = make_plan(config, topology, args.lengths, hlo=args.hlo)
        show(plan, config)
        result = plan_json(plan)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(functools.partial(plan_command, argv))


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    return {
        **plan._asdict(),
        "work": plan.work._asdict(),
        "roofline": plan.roofline._asdict() | {"bound": plan.roofline.bound},
        "traffic": [traffic._asdict() for traffic in plan.traffic],
        "rollout": plan.rollout and plan.rollout._asdict(),
    }


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
