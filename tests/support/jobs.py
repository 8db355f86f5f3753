"""A job with its inputs in this process: what a stage is opened with, without a run around it."""

import pathlib
from contextlib import nullcontext
from typing import Any

import jax

from dpojax.algorithms.face import Inputs
from dpojax.config.load import apply_override, from_config_dict, load_config_file
from dpojax.data.open import open_data
from dpojax.runtime.context import Job
from dpojax.runtime.log import MetricsLog
from dpojax.runtime.mesh import make_mesh
from dpojax.untrusted.plain_data import existing_path
from dpojax.weights.tokenizer import tokenizer_of

# Limits that a run takes from its model.
LIMITS = {"data.max_prompt_tokens": 64, "data.max_response_tokens": 64}


def make_job(workdir: pathlib.Path, name: str = "tldr", **settings: Any) -> Job:
    """A job on one device; settings by their dotted names."""
    values = load_config_file(name)
    for key, value in (LIMITS | settings).items():
        apply_override(values, key, str(value))
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    workdir.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(workdir, enabled=False)
    config = from_config_dict(values, overridden=frozenset(settings))
    return Job(config, workdir, mesh, log, nullcontext())  # pyright: ignore[reportArgumentType]


def open_inputs(job: Job) -> Inputs:
    """The data of a job, and no model."""
    init = job.config.model.init
    beside = tokenizer_of(init) if existing_path(init) else ""
    return Inputs(open_data(job, beside), None, None, 1)  # pyright: ignore[reportArgumentType]
