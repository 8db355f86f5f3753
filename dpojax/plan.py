"""What would this run need on a TPU slice? Compiles its whole train step for one, on a machine without one.

    python -m dpojax.plan --config=configs/llama3_8b.py --topology=v5e:16x16 [--table] [--config.KEY=VALUE ...]

The step is lowered from shapes alone and compiled by the real TPU compiler (libtpu; the `tpu` extra), so that memory, layouts
and collectives are those of the run. Nothing is executed: times are a roofline's, not measured.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# Before jax starts: no TPU is looked for, and the compiler may be shared.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from dpojax import sharding
from dpojax.collectives import BETWEEN, Traffic, collective_traffic
from dpojax.command import leave, run_command
from dpojax.config import Config, apply_override, from_config_dict, load_config_file, resolved_mode, with_limits, with_steps
from dpojax.data.lengths import QUANTILES, draw_lengths
from dpojax.data.packing import PackShape, abstract_batch
from dpojax.data.pipeline import Lengths, Steps
from dpojax.errors import ConfigError, FitError
from dpojax.flags import Parser, did_you_mean
from dpojax.flops import forward_flops, layer_work
from dpojax.job import Job
from dpojax.metrics import MetricsLog, Progress, duration, say
from dpojax.models import ModelConfig
from dpojax.models.table import layer_rows, num_params
from dpojax.policy import adapted, describe, fitted, frozen_layout
from dpojax.stages import batch_shape, describe_rows, preference_passes, preference_program, state_layout
from dpojax.train import new_state
from dpojax.weights import ignored_fields, open_weights, read_shape

GIB = 2**30


class Chip(NamedTuple):
    """One device of a TPU generation, from Google's published figures; what the compiler lets a program use of its memory."""

    hbm: float  # usable, bytes
    peak: float  # dense bf16 FLOP/s
    bandwidth: float  # of HBM, bytes/s
    links: float  # of the interconnect, all together, bytes/s each way
    options: dict[str, str] = {}  # noqa: RUF012  # of the topology's description


CHIPS = {
    "v4": Chip(30.75 * GIB, 275e12, 1228e9, 6 * 45e9, {"chip_config_name": "megacore"}),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 4 * 50e9),
    "v5p": Chip(95.73 * GIB, 459e12, 2765e9, 6 * 100e9),
    "v6e": Chip(31.24 * GIB, 918e12, 1638e9, 4 * 100e9),
    "tpu7x": Chip(94.74 * GIB, 1153.5e12, 3690e9, 600e9),  # a device is half a chip
}
DCN = 25e9 / 4  # bytes/s between slices for each chip: about 200 Gbit/s of a host of four; gradients alone travel there


class Topology(NamedTuple):
    """Devices that are not here."""

    name: str
    chip: Chip
    devices: list[Any]
    num_slices: int


def open_topology(name: str, num_slices: int = 1) -> Topology:
    """The devices of `v5e:16x16` and the like. Raises: ConfigError without libtpu, or for a name that it does not know."""
    from jax.experimental import topologies

    generation = name.partition(":")[0]
    if generation not in CHIPS or not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
        raise ConfigError(f"--topology={name!r}: it is one of {', '.join(CHIPS)} with a shape, e.g. v5e:16x16 or v5p:4x4x4")
    chip = CHIPS[generation]
    options: dict[str, Any] = {**chip.options, **({"num_slices": num_slices} if num_slices > 1 else {})}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # jax raises RuntimeError, XLA its own, by version
        if "libtpu" in str(error).lower() or "not found" in str(error).lower() or isinstance(error, ImportError):
            raise ConfigError(
                f"--topology={name}: the TPU compiler is not here ({error}); pip install 'dpojax[tpu]'"
            ) from error
        raise ConfigError(
            f"--topology={name!r}: the TPU compiler does not know it: {str(error).splitlines()[0]:.200}"
        ) from error
    return Topology(name, chip, list(found.devices), num_slices)


class NeverStop:
    """A plan has no loop."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def __call__(self, step: int) -> int:
        return 0


def planned_model(config: Config) -> ModelConfig:
    """The architecture, from config.json alone. Raises: ConfigError if the config names none."""
    section = config.model
    ignore = ignored_fields(section.ignore_fields)
    if section.init:
        return open_weights(section.init, ignore=ignore).config
    if section.shape:
        return read_shape(section.shape, ignore=ignore)
    raise ConfigError("model.init and model.shape are ''; a plan needs one of them: a folder with a config.json, or the file")


class Prepared(NamedTuple):
    """A step, ready to be compiled, and what it is made of."""

    config: Config
    model: ModelConfig
    shape: PackShape
    lengths: Lengths
    mesh: Any
    lower: Any  # () -> compiled
    memory: dict[str, float]  # bytes a device, by category, of what the step is given
    host: float  # bytes a device of what it is given in the host's memory


def device_bytes(abstract: Any, shardings: Any, kind: str = "device") -> float:
    """Bytes on each device of a tree in its shardings, in one kind of memory."""
    found = 0
    for x, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True):
        if (s.memory_kind or "device") == kind:
            found += math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return float(found)


def _placed(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)


def prepare(config: Config, topology: Topology, lengths: str) -> Prepared:
    """The preference step of `config` on the topology's devices, as run.py makes it, from shapes alone."""
    mesh = sharding.config_mesh(dataclasses.replace(config.mesh, num_slices=topology.num_slices), topology.devices)
    job = Job(config, pathlib.Path(), mesh, MetricsLog(pathlib.Path(), enabled=False), NeverStop())
    model = planned_model(config)
    # A plan knows no data: its step is the same whatever the number of steps.
    job.config = config = with_steps(with_limits(config, model.max_positions), 1.0)
    drawn = draw_lengths(lengths, max_prompt=config.data.max_prompt_tokens, max_response=config.data.max_response_tokens)
    policy = describe(job, model)
    shape = batch_shape(job, policy, [drawn], config.batch_size)
    policy = fitted(job, policy, shape)
    mode, c = resolved_mode(config), config.reference
    ref = base = None
    memory: dict[str, float] = {}
    host = 0.0

    def frozen(name: str, dtype: str, rules: dict[str, str], kind: str = "device"):
        nonlocal host
        abstract, shardings = frozen_layout(job, policy, dtype, rules, kind)
        memory[name] = device_bytes(abstract, shardings)
        host += device_bytes(abstract, shardings, "pinned_host")
        return _placed(abstract, shardings)

    trained = policy
    if config.lora.rank:
        base = frozen("frozen base", config.lora.base_dtype, {})
        trained = adapted(job, policy)
    moving = config.loss.make().moving is not None
    if mode == "adapter":
        ref = base
    elif mode == "live" and not moving:
        ref = frozen("reference", c.dtype, c.rules, c.memory)
    program, optimizer = preference_program(job, trained)
    state, shardings = state_layout(job, trained, functools.partial(new_state, optimizer), moving=moving)
    parts = {"parameters": (state.params, shardings.params), "optimizer": (state.opt_state, shardings.opt_state)}
    if moving:
        parts["reference"] = (state.ref, shardings.ref)
    memory = {name: device_bytes(*own) for name, own in parts.items()} | memory
    batch = abstract_batch(shape, with_ref=mode == "cached")
    batch_shardings = sharding.batch_shardings(batch, mesh)
    memory["batch"] = device_bytes(batch, batch_shardings)
    details = jax.ShapeDtypeStruct((), np.bool_, sharding=job.replicated)
    arguments = (_placed(state, shardings), ref, _placed(batch, batch_shardings), details, base)
    return Prepared(config, model, shape, drawn, mesh, lambda: program.compile(*arguments), memory, host)


# --- what it costs ----------------------------------------------------------------------------------------------------

# Forward passes that the backward pass does again, by model.remat; attention's kernels compute their scores again anyway.
RECOMPUTED = {"none": 0.0, "dots": 0.0, "dots_offload": 0.0, "attention": 1.0, "full": 1.0, "full_offload": 1.0}


class StepWork(NamedTuple):
    """What a step needs, on average over sampled steps."""

    micro: float  # micro-batches
    scored: float  # response tokens of a micro-batch on a device
    useful: float  # FLOPs of all devices
    packing: float
    rounding: float
    tokens: float  # of the groups, a shared prompt once
    smallest_batch: int  # pairs from which rounding costs less than 10 %


def step_work(program: Prepared) -> StepWork:
    """The step's work from the lengths that it was planned for."""
    c, shape = program.config, program.shape
    longest = int(program.lengths.sequences().max())
    options = dict(num_shards=shape.num_shards, work=layer_work(program.model), longest=longest)
    steps = Steps(program.lengths, num_groups=c.batch_size, count=4, **options)
    per_micro = shape.num_shards * shape.shard_rows
    if shape.layout == "separate":
        used = [2 * len(prompts) for prompts, _ in steps.steps]
    else:
        used = [len(plan) for plan in steps.plans(shape.row_tokens, shape.slots)]
    micro = float(np.mean([-(-n // per_micro) for n in used]))
    tokens = float(np.mean([sum(p) + sum(map(sum, r)) for p, r in steps.steps]))
    scored = float(np.mean([sum(map(sum, r)) for _, r in steps.steps])) / micro / shape.num_shards
    forward = float(np.mean([forward_flops(program.model, *own) for own in steps.steps]))
    rows, rng = float(np.mean(used)) / c.batch_size, np.random.default_rng(0)
    totals = program.lengths.totals()
    spread = rows * float(np.std(totals) / np.mean(totals))

    def rounding(batch: int) -> float:
        drawn = np.maximum(1, rng.normal(batch * rows, spread * math.sqrt(batch), 256))
        return float(np.mean(np.ceil(np.ceil(drawn) / per_micro) * per_micro / drawn))

    unit = max(8, per_micro // 16)
    smallest = next((b for b in range(unit, 400 * unit, unit) if rounding(b) < 1.1), 400 * unit)
    mean_used = float(np.mean(used))
    return StepWork(
        micro=micro,
        scored=scored,
        useful=preference_passes(c) * forward,
        packing=mean_used * shape.row_tokens / tokens,
        rounding=micro * per_micro / mean_used,
        tokens=tokens,
        smallest_batch=smallest,
    )


RESOURCES = ("compute", "HBM", "interconnect", BETWEEN)


class Roofline(NamedTuple):
    """Seconds of a step if one thing alone took time. They overlap: the largest is the least that a step can take."""

    compute: float
    hbm: float
    ici: float
    dcn: float  # from slice to slice

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return RESOURCES[int(np.argmax(self))]


def roofline(program: Prepared, work: StepWork, traffic: Sequence[Traffic], chip: Chip) -> Roofline:
    """The step's time on the chip's published figures: what is executed, not only what is useful.

    Compute: every token of every computed row through the layers (with what remat computes again), attention as its kernel
    computes it, and the vocabulary five times (forward, again in the backward pass, twice for gradients, and the reference).
    HBM: weights once a pass, inputs and outputs of every matrix product, logits in float32, gradients and the optimizer.
    Interconnect: the collectives of the compiled program over all links of a chip. Between slices: what of them leaves one.
    """
    c, m, shape = program.config, program.model, program.shape
    own, ref = layer_work(m), resolved_mode(c) in ("live", "adapter")
    back = 1.0 if c.lora.rank else 2.0
    passes = 1 + RECOMPUTED[c.model.remat] + back + ref
    split = program.mesh.shape["tensor"] * program.mesh.shape["sequence"]
    tokens = shape.shard_rows * shape.row_tokens
    longest = min(shape.longest or shape.row_tokens, shape.row_tokens)
    if shape.slots is not None:
        x, y = shape.slots
        pairs = x * x / 2 + shape.num_lanes * (y * y / 2 + x * y)
    else:
        pairs = shape.num_lanes * (shape.row_tokens * longest - longest * longest / 2)
    attention = shape.shard_rows * pairs * own.pair * (1 + (c.model.remat.startswith("full")) + 2.5 + ref)
    layers = m.num_layers * (tokens * own.token * passes + attention)
    head_passes = 2 + back + ref
    head = 2.0 * m.hidden_size * m.vocab_size * work.scored * head_passes
    compute = work.micro * (layers + head) / split / chip.peak

    weights = 2.0 * num_params(m) / split * passes
    width = sum(a + b for a, b in _map_sizes(m))
    activations = 2.0 * tokens * m.num_layers * width * passes / split
    logits = 4.0 * work.scored * m.vocab_size * 2 * head_passes / split
    trained = program.memory["parameters"]
    hbm = work.micro * (weights * 2 + activations + logits + 3 * trained) + 2 * (trained + program.memory["optimizer"])
    inside, between = (sum(t.sent for t in traffic if (t.kind == BETWEEN) == crosses) for crosses in (False, True))
    return Roofline(compute, hbm / chip.bandwidth, inside / chip.links, between / DCN)


def _map_sizes(model: ModelConfig) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of every linear map that a token meets in a layer."""
    for row in layer_rows(model):
        if row.in_dims:
            ins, outs = row.map_shape
            times = model.experts_per_token if row.experts else 1
            yield times * math.prod(ins), times * math.prod(outs)


class Plan(NamedTuple):
    """What was found."""

    topology: str
    num_slices: int
    devices: int
    seconds_to_compile: float
    hbm_gib: float  # peak on a device
    available_gib: float
    categories_gib: dict[str, float]
    host_gib: float  # per device
    traffic: list[Traffic]
    work: StepWork
    roofline: Roofline
    useful_mfu: float  # at the roofline
    layout: str


def make_plan(config: Config, topology: Topology, lengths: str, *, hlo: str = "") -> Plan:
    """Compiles the step for the topology. Raises: FitError where it needs more memory than a device has.

    Args:
      hlo: a file for the compiled program's text; "": none.
    """
    program = prepare(config, topology, lengths)
    work = step_work(program)
    start = time.monotonic()
    try:
        compiled = program.lower()
    except jax.errors.JaxRuntimeError as error:
        raise _not_fitting(error, program, topology) from error
    seconds = time.monotonic() - start
    found: Any = compiled.memory_analysis()
    temporary = found.temp_size_in_bytes + max(0, found.output_size_in_bytes - found.alias_size_in_bytes)
    given = sum(program.memory.values())
    categories = {**program.memory, "temporary": float(temporary), "program": float(found.generated_code_size_in_bytes)}
    peak = given + temporary + found.generated_code_size_in_bytes
    # At most: whole chunks and the quarters behind them are two loops, and each is counted so.
    chunks = max(1.0, work.scored / config.model.logps_chunk_tokens)
    text = compiled.as_text()
    if hlo:
        pathlib.Path(hlo).write_text(text)
    traffic = collective_traffic(text, trips=(work.micro, chunks), num_slices=topology.num_slices)
    times = roofline(program, work, traffic, topology.chip)
    plan = Plan(
        topology=topology.name,
        num_slices=topology.num_slices,
        devices=len(topology.devices),
        seconds_to_compile=seconds,
        hbm_gib=peak / GIB,
        available_gib=topology.chip.hbm / GIB,
        categories_gib={k: v / GIB for k, v in categories.items()},
        host_gib=(program.host + found.host_temp_size_in_bytes) / GIB,
        traffic=traffic,
        work=work,
        roofline=times,
        useful_mfu=work.useful / (len(topology.devices) * topology.chip.peak * times.seconds),
        layout=describe_rows(program.shape),
    )
    if peak > topology.chip.hbm:
        raise FitError(f"{topology.name}: a device needs {plan.hbm_gib:.2f} GiB and has {plan.available_gib:.2f} GiB; {ADVICE}")
    return plan


ADVICE = (
    "lower data.micro_batch_tokens or model.logps_chunk_tokens, set model.remat=full or full_offload, reference.mode=cached, "
    "reference.dtype=int8 or reference.memory=pinned_host, or take more devices"
)


def _not_fitting(error: Exception, program: Prepared, topology: Topology) -> Exception:
    """The compiler's refusal as a FitError with both figures; another error as it is."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text and "HbmOom" not in text:
        return error
    amount = r"([\d.]+)([GMT])"
    used = re.search(rf"[Uu]sed {amount} of {amount}", text) or re.search(
        rf"\({amount}\) exceeds available HBM \({amount}\)", text
    )
    given = sum(program.memory.values()) / GIB
    if used is None:
        return FitError(f"{topology.name}: out of memory ({text.splitlines()[0]:.300}); {ADVICE}")
    scale = {"M": 1 / 1024, "G": 1.0, "T": 1024.0}
    needed, there = float(used.group(1)) * scale[used.group(2)], float(used.group(3)) * scale[used.group(4)]
    return FitError(
        f"{topology.name}: a device needs {needed:.2f} GiB and has {there:.2f} GiB ({given:.2f} GiB of it parameters, optimizer, "
        f"reference and batch); {ADVICE}"
    )


# --- the command line -------------------------------------------------------------------------------------------------


def _bar(share: float, width: int = 24) -> str:
    return "█" * round(share * width)


def show(plan: Plan, config: Config) -> None:
    """The plan for people."""
    w, r = plan.work, plan.roofline
    say(
        f"\n{plan.topology}{f' x {plan.num_slices} slices' if plan.num_slices > 1 else ''}, {plan.devices} devices: compiled in {duration(plan.seconds_to_compile)}; {plan.layout}"
    )
    say(f"\nmemory of a device: {plan.hbm_gib:.2f} of {plan.available_gib:.2f} GiB ({plan.hbm_gib / plan.available_gib:.0%})")
    for name, gib in sorted(plan.categories_gib.items(), key=lambda kv: -kv[1]):
        if gib >= 0.0005:
            say(f"  {name:14s} {gib:8.3f} GiB  {_bar(gib / plan.available_gib)}")
    if plan.host_gib:
        say(f"  host's memory  {plan.host_gib:8.3f} GiB for each device")
    say(f"\ncollectives of a step, on each device ({sum(t.sent for t in plan.traffic) / 1e9:,.1f} GB)")
    for t in plan.traffic:
        say(f"  {t.kind:19s} {t.runs:9,.0f} times {t.sent / 1e9:10,.2f} GB")
    say(f"\nstep at the roofline: {duration(r.seconds)}, bound by {r.bound} (nothing was run)")
    for name, seconds in zip(RESOURCES, r, strict=True):
        if name == BETWEEN and plan.num_slices == 1:
            continue
        say(f"  {name:14s} {seconds:8.3f} s    {_bar(seconds / r.seconds)}")
    say(
        f"  {config.batch_size:,} pairs, {w.tokens:,.0f} tokens a step; useful {w.useful / 1e15:.2f} PFLOP = {plan.useful_mfu:.1%} of the peak "
        f"(MFU); {config.batch_size / r.seconds:,.1f} pairs/s"
    )
    say(
        f"\npacking {w.packing:.3f}, rounding to whole micro-batches {w.rounding:.3f} of the ideal tokens, {w.micro:.1f} micro-batches; "
        f"rounding is under 10 % from about {w.smallest_batch:,} pairs a step"
    )


def table_settings(config: Config, modes: Sequence[str], remats: Sequence[str], batches: Sequence[int]):
    """(names, overrides) of every cell of the grid."""
    kinds = {
        "live": {"reference.mode": "live", "reference.dtype": "", "lora.rank": "0", "lora.base_dtype": ""},
        "live int8": {"reference.mode": "live", "reference.dtype": "int8", "lora.rank": "0", "lora.base_dtype": ""},
        "cached": {"reference.mode": "cached", "lora.rank": "0", "lora.base_dtype": ""},
        "adapter": {"reference.mode": "adapter", "reference.dtype": "", "lora.rank": str(config.lora.rank or 16)},
    }
    for mode in modes:
        if mode not in kinds:
            raise ConfigError(f"--modes={mode!r}: they are {', '.join(kinds)}")
        for remat in remats:
            for batch in batches:
                yield (mode, remat, batch), {**kinds[mode], "model.remat": remat, "batch_size": str(batch)}


def make_table(values, topology: Topology, lengths: str, cells) -> list[dict[str, Any]]:
    """Compiles every cell, with progress; what does not fit is a row too."""
    rows, cells = [], list(cells)
    say(f"| reference | remat | pairs a step | GiB of {topology.chip.hbm / GIB:.2f} | step s | bound | useful MFU | pairs/s |")
    say("|---|---|---|---|---|---|---|---|")
    progress = Progress("compiling", len(cells), "programs", enabled=True, every_s=60)
    for i, ((mode, remat, batch), overrides) in enumerate(cells):
        own = values.copy_and_resolve_references()
        for key, text in overrides.items():
            apply_override(own, key, text)
        row: dict[str, Any] = {"reference": mode, "remat": remat, "batch_size": batch}
        try:
            plan = make_plan(from_config_dict(own), topology, lengths)
            row |= {"fits": True, "hbm_gib": plan.hbm_gib, "step_s": plan.roofline.seconds, "bound": plan.roofline.bound}
            row |= {"useful_mfu": plan.useful_mfu, "pairs_per_second": batch / plan.roofline.seconds}
            cell = f"{plan.hbm_gib:.2f} | {row['step_s']:.2f} | {row['bound']} | {row['useful_mfu']:.1%} | {row['pairs_per_second']:,.0f}"
        except FitError as error:
            row |= {"fits": False, "error": str(error)}
            needed = re.search(r"needs ([\d.]+) GiB", str(error))
            cell = f"{needed.group(1) if needed else '?'}, does not fit | | | |"
        except ConfigError as error:  # settings that this mode does not take; the other cells are worth having
            row |= {"fits": False, "error": str(error)}
            cell = f"{error} | | | |"
        progress.clear()
        say(f"| {mode} | {remat} | {batch:,} | {cell} |")
        rows.append(row)
        progress(i + 1)
    progress.clear()
    return rows


def parser() -> Parser:
    """The flags."""
    made = Parser(
        prog="python -m dpojax.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 it fits, 2 config or command line, 6 it does not fit (what is needed and what there is is said).",
    )  # fmt: skip
    made.add_argument("--config", required=True, help="FILE[:argument], as for dpojax.main; --config.KEY=VALUE changes it")
    made.add_argument("--allow_code", action="store_true", help="a .json config may name functions, which are executed")
    made.add_argument("--topology", required=True, help=f"{', '.join(CHIPS)} and a shape: v5e:16x16, v6e:8x8, v5p:4x4x4")
    made.add_argument("--num_slices", type=int, default=1, help="slices of this topology; the data axis alone crosses them")
    made.add_argument(
        "--lengths",
        default="ultrafeedback",
        help=f"lengths of the data: {', '.join(QUANTILES)}, or full: all as long as may be",
    )
    made.add_argument("--table", action="store_true", help="a grid over reference modes, remat policies and batch sizes")
    made.add_argument("--modes", default="live,live int8,cached,adapter", help="of the grid")
    made.add_argument("--remats", default="full,dots", help="of the grid")
    made.add_argument("--batches", default="", help="of the grid (default: batch_size and twice as many)")
    made.add_argument("--hlo", default="", help="file to write the compiled program's text to")
    made.add_argument("--json", default="", help="file to write the plan to")
    return made


def plan_command(argv: Sequence[str], stop: Any = None) -> int:
    """Runs the command line; returns the exit code. Raises DpojaxError for what a user can mend."""
    args, rest = parser().parse_known_args(argv)
    overrides = {}
    for flag in rest:
        name, equals, text = flag.partition("=")
        if not name.startswith("--config.") or not equals:
            near = parser().nearest(name)
            raise ConfigError(f"{flag!r} is not understood; settings are changed by --config.KEY=VALUE{near}")
        overrides[name.removeprefix("--config.")] = text
    values = load_config_file(args.config, allow_code=args.allow_code, overridden=overrides)
    for key, text in overrides.items():
        apply_override(values, key, text)
    config = from_config_dict(values, overridden=frozenset(overrides))
    if args.lengths not in (*QUANTILES, "full"):
        near = did_you_mean(args.lengths, (*QUANTILES, "full"))
        raise ConfigError(f"--lengths={args.lengths!r}: they are {', '.join(QUANTILES)}, full{near}")
    topology = open_topology(args.topology, args.num_slices)
    if args.table:
        batches = [int(b) for b in args.batches.split(",")] if args.batches else [config.batch_size, 2 * config.batch_size]
        cells = table_settings(config, args.modes.split(","), args.remats.split(","), batches)
        found: Any = make_table(values, topology, args.lengths, cells)
        fitting = [r for r in found if r["fits"]]
        if not fitting:
            raise FitError(f"{args.topology}: nothing of the grid fits; {ADVICE}")
        best = max(fitting, key=lambda r: (r["batch_size"], r["pairs_per_second"]))
        say(
            f"\nthe largest that fits: {best['batch_size']:,} pairs, reference {best['reference']}, remat {best['remat']} "
            f"({best['hbm_gib']:.2f} GiB, {best['pairs_per_second']:,.0f} pairs/s at the roofline)"
        )
    else:
        say(
            f"{args.config}: {num_params(planned_model(config)) / 1e9:.2f}B parameters, lengths of {args.lengths}; compiling ..."
        )
        plan = make_plan(config, topology, args.lengths, hlo=args.hlo)
        show(plan, config)
        found = plan_json(plan)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(functools.partial(plan_command, argv))


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data."""
    plain = plan._asdict()
    nested = {"work": plan.work._asdict(), "roofline": plan.roofline._asdict() | {"bound": plan.roofline.bound}}
    return {**plain, **nested, "traffic": [t._asdict() for t in plan.traffic]}


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
