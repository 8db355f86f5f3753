"""A config and a topology -> whether the step fits, what it needs, and what would help."""

import pathlib
import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.algorithms.face import PlannedRollout
from dpojax.config.schema import Config
from dpojax.cost.devices import Topology
from dpojax.cost.roofline import Roofline, roofline
from dpojax.cost.step_work import Prepared, StepWork, placed_bytes, prepare, step_work
from dpojax.cost.traffic import Traffic, collective_traffic
from dpojax.errors import FitError
from dpojax.runtime.devices import GIB
from dpojax.training.rows import describe_rows


class RolloutPlan(NamedTuple):
    """What drawing a step's samples needs on a topology, beside the state that lies there."""

    seconds_to_compile: float
    hbm_gib: float  # peak on a device, the state of training among it
    categories_gib: dict[str, float]
    batches: int  # of a step, one after another
    rows: int  # responses of a batch
    seconds: float  # at the roofline: weights and caches are read once a token


class Plan(NamedTuple):
    """What a step needs on a topology."""

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
    unit: str  # that a step has batch_size of: pairs, or prompts
    rollout: RolloutPlan | None  # of a stage that samples


def make_plan(config: Config, topology: Topology, lengths: str, *, hlo: str = "") -> Plan:
    """Compiles the step for the topology. Raises: FitError where it needs more memory than a device
    has.

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
    analysis: Any = compiled.memory_analysis()
    # Outputs that are written over inputs take no room.
    outputs = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    categories = {
        **program.memory,
        "temporary": float(analysis.temp_size_in_bytes + outputs),
        "program": float(analysis.generated_code_size_in_bytes),
    }
    peak = sum(categories.values())
    # An upper bound: full chunks and the quarters behind them are two loops, which both count so.
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
        host_gib=(program.host + analysis.host_temp_size_in_bytes) / GIB,
        traffic=traffic,
        work=work,
        roofline=times,
        useful_mfu=work.useful / (len(topology.devices) * topology.chip.peak * times.seconds),
        layout=describe_rows(program.shape),
        unit=program.step.unit,
        rollout=None,
    )
    _check_fits("", plan.hbm_gib, plan.available_gib, topology, ADVICE)
    if program.step.rollout is None:
        return plan
    return plan._replace(rollout=plan_rollout(program, program.step.rollout, topology))


def plan_rollout(program: Prepared, rollout: PlannedRollout, topology: Topology) -> RolloutPlan:
    """Compiles the sampler for the topology. Raises: FitError where it does not fit beside the
    state of training.
    """
    start = time.monotonic()
    until = jax.ShapeDtypeStruct((), np.int32)
    compiled = rollout.program.compile(rollout.served, rollout.decoding, until)
    seconds = time.monotonic() - start
    analysis: Any = compiled.memory_analysis()
    served = placed_bytes(rollout.served)
    caches = placed_bytes(rollout.decoding)
    outputs = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    categories = {name: size for name, size in program.memory.items() if name != "batch"}
    categories |= {
        "served weights": served,
        "caches": caches,
        "temporary": float(analysis.temp_size_in_bytes + outputs),
        "program": float(analysis.generated_code_size_in_bytes),
    }
    peak = sum(categories.values()) / GIB
    available = topology.chip.hbm / GIB
    _check_fits(" to draw samples", peak, available, topology, ROLLOUT_ADVICE)
    per_token = (served + caches) / topology.chip.bandwidth
    return RolloutPlan(
        seconds_to_compile=seconds,
        hbm_gib=peak,
        categories_gib={name: size / GIB for name, size in categories.items()},
        batches=rollout.batches,
        rows=rollout.decoding.keys.shape[0],
        seconds=rollout.batches * rollout.tokens * per_token,
    )


def _check_fits(
    what: str, needed: float, available: float, topology: Topology, advice: str
) -> None:
    """Raises: FitError where a device needs more GiB than it has."""
    if needed > available:
        raise FitError(
            f"{topology.name}: a device needs {needed:.2f} GiB{what} and has"
            f" {available:.2f} GiB; {advice}"
        )


ROLLOUT_ADVICE = (
    "lower sample.batch_size or sample.max_new_tokens, share the weights with mesh.tensor, or take"
    " more devices"
)


ADVICE = (
    "lower data.micro_batch_tokens or model.logps_chunk_tokens, set model.remat=full or"
    " full_offload, reference.mode=cached, reference.dtype=int8 or reference.memory=pinned_host, or"
    " take more devices"
)


def _not_fitting(error: Exception, program: Prepared, topology: Topology) -> Exception:
    """A FitError with both figures where the compiler says that memory is full; else `error`."""
    text = str(error)
    if not any(sign in text for sign in ("RESOURCE_EXHAUSTED", "Ran out of memory", "HbmOom")):
        return error
    amount = r"([\d.]+)([GMT])"
    used = re.search(rf"[Uu]sed {amount} of {amount}", text) or re.search(
        rf"\({amount}\) exceeds available HBM \({amount}\)", text
    )
    inputs = sum(program.memory.values()) / GIB
    if used is None:
        return FitError(f"{topology.name}: out of memory ({text.splitlines()[0]:.300}); {ADVICE}")
    scale = {"M": 1 / 1024, "G": 1.0, "T": 1024.0}
    needed = float(used.group(1)) * scale[used.group(2)]
    available = float(used.group(3)) * scale[used.group(4)]
    return FitError(
        f"{topology.name}: a device needs {needed:.2f} GiB and has {available:.2f} GiB"
        f" ({inputs:.2f} GiB of it parameters, optimizer, frozen trees and batch); {ADVICE}"
    )
