"""A stage that trains the policy with one optimizer: what most algorithms put together alike."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpojax.algorithms.face import Inputs, MakeState, OpenStage, Start
from dpojax.config.load import to_dict
from dpojax.config.schema import Config
from dpojax.data.dataset import Dataset
from dpojax.data.packing import PackShape
from dpojax.data.records import Records
from dpojax.data.shapes import StepSizes
from dpojax.models.decoder import Model
from dpojax.models.placed import Policy, fitted
from dpojax.runtime.compiled import Program
from dpojax.runtime.context import Job
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.findings import Findings
from dpojax.training.gradients import Gradients, full_params
from dpojax.training.guards import Guard
from dpojax.training.optimizer import make_optimizer, make_schedule
from dpojax.training.resume import Layout, fingerprints, rate_settings, state_layout
from dpojax.training.rows import step_flops
from dpojax.training.stage import Batches, Hook, RateSettings, Stage
from dpojax.training.state import POLICY, TrainState, new_state
from dpojax.training.update import Remember, Spikes, make_train_step
from dpojax.weights.open import Weights


class StageParts(NamedTuple):
    """What differs between stages that train the policy."""

    name: str  # as people read it
    prefix: str  # of its keys in metrics.jsonl
    folder: str  # of its checkpoints
    num_steps: int
    steps_setting: str  # the setting that says how many
    keep: int  # checkpoints
    gradients: Callable[..., Gradients]
    batches: Batches
    optimizer: optax.GradientTransformation
    schedule: Callable[[Any], Any]
    rate_settings: Callable[[dict[str, Any]], RateSettings | None]
    fingerprints: dict[str, Any]
    records: Records
    groups: int
    epoch_groups: int
    flops: Callable[[StepSizes], float]
    hooks: tuple[Hook, ...] = ()
    frozen: Mapping[str, Any] | None = None  # trees by role that no step changes


def spikes(config: Config) -> Spikes:
    """What config.optim says of losses that jump."""
    return Spikes(config.optim.spike_factor, config.optim.skip_spikes)


def state_maker(optimizer: optax.GradientTransformation, **memory: Any) -> MakeState:
    """(parameters by role, trees to remember) -> the state at step 0, the policy being trained.

    Args:
      memory: name -> () -> its value at step 0, besides the trees.
    """

    def make_state(params: Mapping[str, Any], trees: Mapping[str, Any]) -> TrainState:
        values = {name: make() for name, make in memory.items()}
        return new_state({POLICY: optimizer}, params, {**values, **trees})

    return make_state


def constrain_to(policies: Mapping[str, Policy]) -> Callable[[Any], Any]:
    """Keeps trees shaped like the parameters by role in the parameters' shardings."""
    shardings = {role: policy.shardings for role, policy in policies.items()}

    def constrain(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, shardings)

    return constrain


def step_program(
    job: Job,
    name: str,
    gradients: Callable[..., Gradients],
    optimizer: optax.GradientTransformation,
    policy: Policy,
    layout: Layout,
    remember: Remember | None = None,
) -> Program:
    """The jitted step of a stage that trains the policy: explicit shardings, the state donated."""
    step = make_train_step(
        gradients,
        {POLICY: optimizer},
        constrain_to({POLICY: policy}),
        spikes=spikes(job.config),
        remember=remember,
    )
    return job.program(
        name, step, donate_argnums=0, out_shardings=(layout.shardings, job.replicated)
    )


def origin(policy: Policy, weights: Weights | None) -> dict[str, Any]:
    """What an export of a checkpoint must know: the architecture, and the fields of the config.json
    that it came from.
    """
    model: dict[str, Any] = {"model": dataclasses.asdict(policy.config)}
    if weights is not None and weights.fields is not None:
        model["fields"] = weights.fields
    return model


def stage_fingerprints(job: Job, data: Dataset, policy: Policy, **more: Any) -> dict[str, Any]:
    """The fingerprints of a stage that trains a policy or its adapters, batch by batch.

    Args:
      more: what else a run that goes on must share with the one that saved.
    """
    c = job.config
    adapters = {"lora": dataclasses.asdict(c.lora)} if c.lora.rank else {}
    batch = {"batch_size": c.batch_size, "batch_groups": c.batch_groups}
    return fingerprints(job, data, policy, **adapters, **more, batch=batch)


def stage_meta(
    job: Job, inputs: Inputs, policy: Policy, prints: Mapping[str, Any]
) -> dict[str, Any]:
    """What every checkpoint of a stage says of it.

    Args:
      policy: that is trained.
      prints: fingerprints, which a run that goes on compares.
    """
    meta = {"config": to_dict(job.config), "fingerprints": dict(prints)}
    return {**meta, **adapter_meta(job), **origin(policy, inputs.weights)}


def adapter_meta(job: Job) -> dict[str, Any]:
    """What a checkpoint of adapters says of them; empty without adapters."""
    c = job.config.lora
    if not c.rank:
        return {}
    return {
        "adapter": {
            "rank": c.rank,
            "targets": c.targets,
            "scale": c.alpha / c.rank,
            "base_dtype": c.base_dtype,
        }
    }


def open_stage(
    job: Job,
    inputs: Inputs,
    parts: StageParts,
    *,
    policy: Policy,
    params: Any,
    findings: Callable[[TrainState], Findings],
) -> OpenStage:
    """The stage, ready for the loop; all of the policy's parameters are trained.

    Args:
      policy: fitted to the stage's rows.
      params: of the policy before the first step, which the state takes.
      findings: after the last step.
    """
    make_state = state_maker(parts.optimizer)
    layout = state_layout(job, make_state, {POLICY: policy}, {})
    program_name = f"{parts.name.lower().replace(' ', '_')}_step"
    stage = Stage(
        name=parts.name,
        prefix=parts.prefix,
        num_steps=parts.num_steps,
        steps_setting=parts.steps_setting,
        program=step_program(job, program_name, parts.gradients, parts.optimizer, policy, layout),
        batches=parts.batches,
        frozen=dict(parts.frozen or {}),
        schedule=parts.schedule,
        rate_settings=parts.rate_settings,
        checkpoints=Checkpoints(job.workdir / parts.folder, keep=parts.keep),
        meta={
            "config": to_dict(job.config),
            "fingerprints": parts.fingerprints,
            **origin(policy, inputs.weights),
        },
        records=parts.records,
        groups=parts.groups,
        epoch_groups=parts.epoch_groups,
        flops=parts.flops,
        hooks=list(parts.hooks),
        guard=Guard(),
    )
    return OpenStage(
        stage=stage,
        policy=policy,
        make_state=make_state,
        layout=layout,
        params={POLICY: params},
        memory={},
        full=full_params({}),
        findings=findings,
    )


def open_by_config(
    job: Job,
    inputs: Inputs,
    start: Start,
    *,
    name: str,
    batches: Batches,
    shape: PackShape,
    gradients: Callable[[Model], Callable[..., Gradients]],
) -> OpenStage:
    """A stage that trains the policy as config.optim and config.num_steps say.

    Args:
      name: of the stage, of its folder of checkpoints, and with "_" the prefix of its metrics.
      batches: of rows of `shape`.
      gradients: the policy's model for such rows -> (state, frozen, batch, details,
        constrain_params) -> Gradients.
    """
    c = job.config
    data = inputs.data.train
    policy = fitted(job, inputs.policy, shape)
    schedule = make_schedule(
        c.optim.schedule,
        learning_rate=c.optim.learning_rate,
        warmup_steps=c.optim.warmup_steps,
        num_steps=c.num_steps,
    )
    parts = StageParts(
        name=name,
        prefix=f"{name}_",
        folder=name,
        num_steps=c.num_steps,
        steps_setting="num_steps",
        keep=c.checkpoint.keep,
        gradients=gradients(policy.model),
        batches=batches,
        optimizer=make_optimizer(c.optim, schedule, policy.axes),
        schedule=schedule,
        rate_settings=lambda saved: rate_settings(saved["optim"], saved["num_steps"]),
        fingerprints=fingerprints(job, data, policy),
        records=data.records,
        groups=inputs.groups,
        epoch_groups=len(inputs.data.train_index.rows),
        flops=step_flops(policy.config, 3),
    )

    def findings(state: TrainState) -> Findings:
        return Findings(
            title=name,
            settings=(f"{c.optim.name} at {c.optim.learning_rate:g}",),
            unit="responses",
            scalars={"skipped_steps": int(state.skipped)},
            policy_params=lambda: state.policy,
        )

    return open_stage(job, inputs, parts, policy=policy, params=start.params(), findings=findings)


def zero_memory(name: str) -> dict[str, Callable[[], Any]]:
    """A number that is remembered under `name`, 0 at step 0."""
    return {name: functools.partial(jnp.zeros, (), jnp.float32)}
