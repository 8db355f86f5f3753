"""A step that is compiled for devices that are not here: what it is given, and the work that it
does.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.algorithms.face import PlannedStep
from dpojax.algorithms.table import stage_algorithms
from dpojax.config.schema import Config, with_limits, with_steps
from dpojax.cost.devices import Topology
from dpojax.cost.lengths import draw_lengths
from dpojax.data.packing import PackShape, abstract_batch
from dpojax.data.shapes import Lengths, Steps
from dpojax.errors import ConfigError
from dpojax.models.config import ModelConfig
from dpojax.models.placed import describe
from dpojax.runtime import sharding
from dpojax.runtime.context import Job
from dpojax.runtime.log import MetricsLog
from dpojax.runtime.mesh import config_mesh
from dpojax.training.flops import forward_flops, layer_work
from dpojax.training.resume import Layout
from dpojax.training.state import POLICY
from dpojax.weights.open import ignored_fields, open_weights, read_shape


class NeverStop:
    """The question when to stop, of a plan: it runs no step."""

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
    raise ConfigError(
        "model.init and model.shape are ''; a plan needs one of them: a folder with a config.json,"
        " or the file"
    )


class Prepared(NamedTuple):
    """A step, ready to be compiled, and what it is made of."""

    config: Config
    model: ModelConfig
    shape: PackShape
    lengths: Lengths
    mesh: Any
    lower: Callable[[], Any]  # compiles it
    memory: dict[str, float]  # bytes on a device of the step's inputs, by category
    host: float  # bytes of its inputs in the host's memory, for each device
    step: PlannedStep


def device_bytes(abstract: Any, shardings: Any, kind: str = "device") -> float:
    """Bytes on each device of a tree in its shardings, in one kind of memory."""
    total = 0
    for x, s in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True):
        if (s.memory_kind or "device") == kind:
            total += math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return float(total)


def placed_bytes(placed: Any) -> float:
    """Bytes on each device of a tree of ShapeDtypeStructs with shardings."""
    return device_bytes(placed, jax.tree.map(lambda x: x.sharding, placed))


def prepare(config: Config, topology: Topology, lengths: str) -> Prepared:
    """The step of the last stage of `config` on the topology's devices, as a run makes it, from
    shapes alone.
    """
    mesh = config_mesh(
        dataclasses.replace(config.mesh, num_slices=topology.num_slices), topology.devices
    )
    job = Job(config, pathlib.Path(), mesh, MetricsLog(pathlib.Path(), enabled=False), NeverStop())
    model = planned_model(config)
    # A plan knows no data: its step is the same whatever the number of steps.
    job.config = config = with_steps(with_limits(config, model.max_positions), 1.0)
    drawn = draw_lengths(
        lengths,
        max_prompt=config.data.max_prompt_tokens,
        max_response=config.data.max_response_tokens,
    )
    algorithm = stage_algorithms(config)[-1]
    if algorithm.plan is None:
        raise ConfigError(f"stages is {config.stages!r}: there is no plan for {algorithm.name}")
    step = algorithm.plan(job, describe(job, model), drawn)
    batch = abstract_batch(step.shape, with_ref=step.with_ref)
    batch_shardings = sharding.batch_shardings(batch, mesh)
    frozen: dict[str, Any] = {"reference": None, "base": None}
    for role, (abstract, shardings) in step.frozen.items():
        frozen[role] = sharding.placed_shapes(abstract, shardings)
    frozen |= {role: frozen[same] for role, same in step.shared.items()}
    details = jax.ShapeDtypeStruct((), np.bool_, sharding=job.replicated)
    state = sharding.placed_shapes(step.layout.abstract, step.layout.shardings)
    arguments = (state, frozen, sharding.placed_shapes(batch, batch_shardings), details)
    memory = _state_memory(step.layout)
    host = 0.0
    for role, (abstract, shardings) in step.frozen.items():
        memory[FROZEN_NAMES.get(role, role)] = device_bytes(abstract, shardings)
        host += device_bytes(abstract, shardings, kind="pinned_host")
    memory["batch"] = device_bytes(batch, batch_shardings)
    return Prepared(
        config=config,
        model=model,
        shape=step.shape,
        lengths=step.lengths,
        mesh=mesh,
        lower=lambda: step.program.compile(*arguments),
        memory=memory,
        host=host,
        step=step,
    )


# What a plan calls trees that no step changes, where that is not their role.
FROZEN_NAMES = {"base": "frozen base"}


def _state_memory(layout: Layout) -> dict[str, float]:
    """Bytes on each device of what a step changes, by category."""
    abstract = layout.abstract
    shardings = layout.shardings
    memory = {
        "parameters": device_bytes(abstract.params[POLICY], shardings.params[POLICY]),
        "optimizer": device_bytes(abstract.opt_state, shardings.opt_state),
    }
    for role in abstract.params:
        if role != POLICY:
            net = device_bytes(abstract.params[role], shardings.params[role])
            memory[f"{role} net"] = net
    if "reference" in abstract.memory:
        memory["reference"] = device_bytes(
            abstract.memory["reference"], shardings.memory["reference"]
        )
    return memory


# --- what it costs --------------------------------------------------------------------------------

# Forward passes that the backward pass does again, by model.remat. The scores of attention are not
# among them: its kernels compute them again with every policy.
RECOMPUTED = {
    "none": 0.0,
    "dots": 0.0,
    "dots_offload": 0.0,
    "attention": 1.0,
    "full": 1.0,
    "full_offload": 1.0,
}


class StepWork(NamedTuple):
    """What a step needs, on average over sampled steps."""

    micro: float  # micro-batches
    scored: float  # response tokens of a micro-batch on a device
    useful: float  # FLOPs of all devices
    packing: float  # computed tokens over those of the groups, 1 at best
    rounding: float  # rows of the micro-batches over those that are filled, 1 at best
    tokens: float  # of the groups, a shared prompt once
    smallest_batch: int  # pairs from which rounding costs less than 10 %


def _smallest_batch(lengths: Lengths, rows_of_pair: float, rows_of_micro: int) -> int:
    """Pairs a step from which rounding to whole micro-batches costs less than 10 %.

    The rows of a step are drawn from a normal distribution with the mean and the spread of the
    pairs' lengths.
    """
    rng = np.random.default_rng(0)
    totals = lengths.totals()
    spread = rows_of_pair * float(np.std(totals) / np.mean(totals))

    def rounding(batch: int) -> float:
        mean = batch * rows_of_pair
        rows = np.maximum(1, rng.normal(mean, spread * math.sqrt(batch), 256))
        return float(np.mean(np.ceil(np.ceil(rows) / rows_of_micro) * rows_of_micro / rows))

    unit = max(8, rows_of_micro // 16)
    batches = range(unit, 400 * unit, unit)
    return next((batch for batch in batches if rounding(batch) < 1.1), 400 * unit)


def step_work(program: Prepared) -> StepWork:
    """The step's work from the lengths that it was planned for."""
    c = program.config
    shape = program.shape
    longest = int(program.lengths.sequences().max())
    steps = Steps(
        program.lengths,
        num_groups=c.batch_size,
        num_shards=shape.num_shards,
        work=layer_work(program.model),
        longest=longest,
        count=4,
    )
    rows_of_micro = shape.num_shards * shape.shard_rows
    if shape.layout == "separate":
        used = [2 * len(prompts) for prompts, _ in steps.steps]
    else:
        used = [len(plan) for plan in steps.plans(shape.row_tokens, shape.slots)]
    micro = float(np.mean([-(-rows // rows_of_micro) for rows in used]))
    response_tokens = [sum(map(sum, responses)) for _, responses in steps.steps]
    prompt_tokens = [sum(prompts) for prompts, _ in steps.steps]
    tokens = float(np.mean(np.add(prompt_tokens, response_tokens)))
    scored = float(np.mean(response_tokens)) / micro / shape.num_shards
    forward = float(
        np.mean([forward_flops(program.model, prompts, ys) for prompts, ys in steps.steps])
    )
    mean_used = float(np.mean(used))
    rows_of_pair = mean_used / c.batch_size
    smallest = _smallest_batch(program.lengths, rows_of_pair, rows_of_micro)
    return StepWork(
        micro=micro,
        scored=scored,
        useful=program.step.passes * forward,
        packing=mean_used * shape.row_tokens / tokens,
        rounding=micro * rows_of_micro / mean_used,
        tokens=tokens,
        smallest_batch=smallest,
    )
