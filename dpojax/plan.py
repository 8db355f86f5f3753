"""What would this run need on a TPU slice? Compiles its whole train step for one, on a machine without one.

    python -m dpojax.plan --config=configs/llama3_8b.py --topology=v5e:16x16 [--table] [--config.KEY=VALUE ...]

The step is lowered from shapes alone and compiled by the real TPU compiler (libtpu; the `tpu` extra), so that memory, layouts
and collectives are those of the run. Nothing is executed: times are a roofline's, not measured.
"""

import argparse
import dataclasses
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
from dpojax.collectives import Traffic, collective_traffic
from dpojax.config import Config, apply_override, from_config_dict, load_config_file, resolved_mode
from dpojax.data.lengths import QUANTILES, draw_lengths
from dpojax.data.packing import PackShape, abstract_batch
from dpojax.data.pipeline import Lengths, Steps
from dpojax.errors import ConfigError, DpojaxError, FitError
from dpojax.flops import forward_flops, layer_work
from dpojax.job import Job
from dpojax.metrics import MetricsLog, Progress, duration, say
from dpojax.models import ModelConfig
from dpojax.models.table import num_params
from dpojax.policy import Policy, adapted, describe, fitted, frozen_layout
from dpojax.stages import batch_shape, preference_passes, preference_program, state_layout
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
DCN = 25e9  # bytes/s between slices for each host of four chips, about; gradients alone travel there


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
            raise ConfigError(f"--topology={name}: the TPU compiler is not here ({error}); pip install 'dpojax[tpu]'") from error
        raise ConfigError(f"--topology={name!r}: the TPU compiler does not know it: {str(error).splitlines()[0]:.200}") from error
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


class Program(NamedTuple):
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


def prepare(config: Config, topology: Topology, lengths: str) -> Program:
    """The preference step of `config` on the topology's devices, as run.py makes it, from shapes alone."""
    mesh = sharding.config_mesh(
        dataclasses.replace(config.mesh, num_slices=topology.num_slices), topology.devices
    )
    job = Job(config, pathlib.Path(), mesh, MetricsLog(pathlib.Path(), enabled=False), NeverStop())
    model = planned_model(config)
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
    state, shardings = state_layout(job, trained, optimizer, moving=moving)
    parts = {"parameters": (state.params, shardings.params), "optimizer": (state.opt_state, shardings.opt_state)}
    if moving:
        parts["reference"] = (state.ref, shardings.ref)
    memory = {name: device_bytes(*own) for name, own in parts.items()} | memory
    batch = abstract_batch(shape, with_ref=mode == "cached")
    batch_shardings = sharding.batch_shardings(batch, mesh)
    memory["batch"] = device_bytes(batch, batch_shardings)
    details = jax.ShapeDtypeStruct((), np.bool_, sharding=job.replicated)
    arguments = (_placed(state, shardings), ref, _placed(batch, batch_shardings), details, base)
    return Program(config, model, shape, drawn, mesh, lambda: program.compile(*arguments), memory, host)
