"""Policy gradients: REINFORCE, RLOO, GRPO and its kin, and PPO with a value net of its own.

One algorithm, whose presets are rows of `objectives.policy_presets.PRESETS`. A step draws
num_samples responses to batch_size prompts, scores them, and makes one or more updates. What DPO
replaces (Rafailov et al. 2023, arXiv:2305.18290, section 3): E[r] - beta KL(pi || ref), Eq. 3.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dpojax.algorithms.dpo import saved_rate, schedule_of
from dpojax.algorithms.face import Algorithm, Inputs, MakeState, OpenStage, PlannedStep, Start
from dpojax.algorithms.online import OnlineBatches
from dpojax.algorithms.reward_model import reward_config, with_scalar_head
from dpojax.algorithms.rewards import open_rewards
from dpojax.algorithms.sampled import (
    SampledPolicy,
    heldout_hooks,
    open_sampled,
    plan_trees,
    planned_rollout,
    planned_shape,
    sampled_findings,
    sampled_lengths,
)
from dpojax.algorithms.simple import constrain_to, spikes, stage_fingerprints, stage_meta
from dpojax.config.schema import Config
from dpojax.data.open import Data
from dpojax.data.packing import PackShape
from dpojax.data.shapes import Lengths
from dpojax.errors import ConfigError
from dpojax.evaluation.on_policy import on_policy_panels
from dpojax.evaluation.pass_rate import pass_rate_panel
from dpojax.models.placed import Policy, describe, fitted
from dpojax.objectives.policy_loss import PolicyLoss
from dpojax.runtime.compiled import Program
from dpojax.runtime.context import Job
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.checksums import checksums, digest
from dpojax.training.findings import Findings, Line, Panel
from dpojax.training.guards import Guard
from dpojax.training.optimizer import make_optimizer, make_schedule
from dpojax.training.policy_step import BETA, VALUE, Critic, PolicyGradients, make_policy_step
from dpojax.training.resume import Layout, state_layout
from dpojax.training.rows import step_flops
from dpojax.training.stage import Stage
from dpojax.training.state import POLICY, TrainState, new_state
from dpojax.weights.initial import read_params
from dpojax.weights.open import ignored_fields, open_weights

NAME = "policy_gradient"
PREFIX = f"{NAME}_"

PANELS = (
    pass_rate_panel(PREFIX),
    *on_policy_panels(PREFIX),
    Panel("reward of the samples", (Line(f"{PREFIX}objective/scores", "train"),)),
    Panel("KL to the reference, nats", (Line(f"{PREFIX}objective/kl", "train"),)),
    Panel("response length, tokens", (Line(f"{PREFIX}completions/mean_length", "train"),)),
    Panel("entropy of a token, nats", (Line(f"{PREFIX}policy/entropy", "train"),)),
    Panel(
        "prompts whose rewards differ, share of responses",
        (Line(f"{PREFIX}groups/informative", "train"),),
    ),
    Panel("value net: explained variance", (Line(f"{PREFIX}value/explained_variance", "train"),)),
)


def by_update(schedule: Callable[[Any], Any], updates: int) -> Callable[[Any], Any]:
    """A schedule of steps as one of an optimizer that makes so many updates a step."""

    def rate(count):
        return schedule(count // updates)

    return rate


def optimizers_of(
    config: Config, policies: dict[str, Policy], epochs: int
) -> dict[str, optax.GradientTransformation]:
    """The optimizers by role: config.optim's, the value net's at a rate of its own."""
    c = config.optim
    rates = {POLICY: c.learning_rate, VALUE: config.policy_gradient.value_learning_rate}
    found = {}
    for role, policy in policies.items():
        schedule = make_schedule(
            c.schedule,
            learning_rate=rates[role],
            warmup_steps=c.warmup_steps,
            num_steps=config.num_steps,
        )
        found[role] = make_optimizer(c, by_update(schedule, epochs), policy.axes)
    return found


def open_value_net(job: Job, inputs: Inputs, start: Start, shape: PackShape) -> tuple[Policy, Any]:
    """The value net: the reward model of policy_gradient.value_model, else the policy before the
    stage under a new scalar head.

    Raises: ConfigError for a reward model of another architecture.
    """
    folder = job.config.policy_gradient.value_model
    policy = describe(job, reward_config(inputs.policy.config))
    if not folder:
        params = start.params()
        value = with_scalar_head(job, inputs.policy.config, policy, params)
        return fitted(job, policy, shape), value
    setting = "policy_gradient.value_model"
    ignore = ignored_fields(job.config.model.ignore_fields)
    weights = open_weights(folder, ignore=ignore, setting=setting, scalar_head=True)
    if weights.config.vocab_size != policy.config.vocab_size:
        raise ConfigError(
            f"{setting}={folder!r}: its vocabulary has {weights.config.vocab_size} pieces, the"
            f" policy's {policy.config.vocab_size}; the value net reads the policy's tokens"
        )
    policy = describe(job, weights.config)
    return fitted(job, policy, shape), read_params(job, policy, weights)


def state_of(optimizers: dict[str, optax.GradientTransformation], beta: float | None) -> MakeState:
    """(parameters by role, trees to remember) -> the state at step 0.

    Args:
      beta: that an adaptive KL starts from; None: it is fixed.
    """

    def make_state(params, trees) -> TrainState:
        memory = dict(trees)
        if beta is not None:
            memory[BETA] = jnp.full((), beta, jnp.float32)
        return new_state(optimizers, params, memory)

    return make_state


class GradientStep(NamedTuple):
    """The step of the stage, ready to be compiled."""

    program: Program
    make_state: MakeState
    layout: Layout
    loss: PolicyLoss


def gradient_step(job: Job, policy: Policy, policies: dict[str, Policy]) -> GradientStep:
    """The step, whole: scores of the samples, advantages, one or more updates.

    Args:
      policy: all of it, fitted to the rows.
      policies: what is trained, by role; VALUE among them for ppo.
    """
    c = job.config
    section = c.policy_gradient
    loss = section.loss(c.sample.max_new_tokens)
    critic = None
    if VALUE in policies:
        critic = Critic(
            model=policies[VALUE].model,
            clip=section.value_clip,
            gamma=section.gamma,
            lam=section.lam,
            target_kl=section.target_kl,
            horizon=section.horizon,
        )
    gradients = PolicyGradients(
        model=policy.model,
        loss=loss,
        critic=critic,
        width=c.sample.max_new_tokens,
        chunk=c.model.logps_chunk_tokens,
        overlong_tokens=section.overlong_tokens,
    )
    optimizers = optimizers_of(c, policies, loss.settings.epochs)
    make_state = state_of(optimizers, loss.settings.beta if section.target_kl else None)
    layout = state_layout(job, make_state, policies, {})
    step = make_policy_step(gradients, optimizers, constrain_to(policies), spikes=spikes(c))
    program = job.program(
        f"{NAME}_step",
        step,
        donate_argnums=0,
        out_shardings=(layout.shardings, job.replicated),
    )
    return GradientStep(program, make_state, layout, loss)


def open_policy_gradient(job: Job, inputs: Inputs, start: Start) -> OpenStage:
    """The stage, from what the stages before it left."""
    c = job.config
    section = c.policy_gradient
    batches = OnlineBatches(
        job,
        inputs,
        open_rewards(job, inputs),
        num_samples=section.num_samples,
        redraws=section.redraws,
    )
    opened = open_sampled(job, inputs, start, batches.shape, with_reference=needs_reference(c))
    batches.full = opened.full
    policies = {POLICY: opened.trained}
    params = {POLICY: opened.params}
    if section.preset == "ppo":
        policies[VALUE], params[VALUE] = open_value_net(job, inputs, start, batches.shape)
    step = gradient_step(job, opened.policy, policies)
    init = {POLICY: opened.init}
    if VALUE in params:
        init[VALUE] = digest(checksums(params[VALUE]))
    stage = gradient_stage(job, inputs, opened, batches, step.program, init)
    opened = opened._replace(params=None)  # the state takes their memory
    return OpenStage(
        stage=stage,
        policy=opened.trained,
        make_state=step.make_state,
        layout=step.layout,
        params=params,
        memory={},
        full=opened.full,
        findings=functools.partial(findings_of, job, inputs, opened, step.loss),
    )


def needs_reference(config: Config) -> bool:
    """Whether there is a reference: for the KL of the loss, or to compare with at the end."""
    loss = config.policy_gradient.loss(config.sample.max_new_tokens)
    held = loss.settings.beta > 0 and loss.settings.kl != "none"
    return held or config.sample.num_prompts > 0


def scorings_of(config: Config) -> int:
    """Forward passes of a step without a gradient: by the old policy, and by the reference."""
    return 1 + needs_reference(config)


def useful_passes(config: Config) -> int:
    """Useful forward passes' worth of work of a step: see `training.rows.step_flops`."""
    trained = 2 if config.lora.rank else 3
    updates = config.policy_gradient.loss(config.sample.max_new_tokens).settings.epochs
    nets = 1 + (config.policy_gradient.preset == "ppo")
    return nets * trained * updates + scorings_of(config) + nets - 1


def gradient_stage(
    job: Job,
    inputs: Inputs,
    opened: SampledPolicy,
    batches: OnlineBatches,
    program: Program,
    init: Mapping[str, str],
) -> Stage:
    """What the loop is given.

    Args:
      init: digests of what the stage starts from, by role.
    """
    c = job.config
    data = inputs.data
    section = c.policy_gradient
    prints = stage_fingerprints(
        job,
        data.train,
        opened.trained,
        policy_gradient=dataclasses.asdict(section),
        init=init,
    )
    return Stage(
        name="Policy gradient",
        prefix=PREFIX,
        num_steps=c.num_steps,
        steps_setting="num_steps",
        program=program,
        batches=batches,
        frozen=opened.frozen,
        schedule=schedule_of(c),
        rate_settings=saved_rate,
        checkpoints=Checkpoints(job.workdir / NAME, keep=c.checkpoint.keep),
        meta=stage_meta(job, inputs, opened.trained, prints),
        records=data.train.records,
        groups=inputs.groups,
        epoch_groups=len(data.train_index.rows),
        flops=step_flops(opened.trained.config, useful_passes(c)),
        unit="responses",
        guard=Guard(),
        hooks=heldout_hooks(job, inputs, opened, prefix=PREFIX),
    )


def findings_of(
    job: Job, inputs: Inputs, opened: SampledPolicy, loss: PolicyLoss, state: TrainState
) -> Findings:
    """What the stage found out."""
    c = job.config
    s = loss.settings
    scalars = {}
    if BETA in state.memory:
        scalars["beta"] = float(jax.device_get(state.memory[BETA]))
    held = "no KL"
    if s.beta and s.kl != "none":
        held = f"beta {s.beta:g}, KL in the {'reward' if s.kl == 'reward' else s.kl}"
    clip = ""
    if math.isfinite(s.clip_high):
        clip = f", clip {s.clip_low:g}/{s.clip_high:g}"
    return sampled_findings(
        opened,
        title=f"Policy gradient: {c.policy_gradient.preset}",
        settings=(
            f"{inputs.groups} prompts x {c.policy_gradient.num_samples} samples a step",
            f"{held}{clip}",
            f"{c.optim.name} at {c.optim.learning_rate:g}",
        ),
        scalars=scalars,
        state=state,
    )


def plan_policy_gradient(job: Job, policy: Policy, lengths: Lengths) -> PlannedStep:
    """The stage's step from shapes alone, for samples as long as the responses of the data."""
    c = job.config
    samples = c.policy_gradient.num_samples
    shape = planned_shape(job, lengths, num_samples=samples, num_pairs=samples)
    policy = fitted(job, policy, shape)
    trees = plan_trees(job, policy, with_reference=needs_reference(c))
    policies = {POLICY: trees.trained}
    if c.policy_gradient.preset == "ppo":
        policies[VALUE] = fitted(job, describe(job, reward_config(policy.config)), shape)
    step = gradient_step(job, policy, policies)
    return PlannedStep(
        program=step.program,
        layout=step.layout,
        frozen=trees.frozen,
        shared=trees.shared,
        with_ref=False,
        passes=useful_passes(c),
        shape=shape,
        lengths=sampled_lengths(lengths, c, num_samples=samples),
        scorings=scorings_of(c),
        updates=step.loss.settings.epochs,
        has_value_net=VALUE in policies,
        unit="prompts",
        rollout=planned_rollout(job, policy, lengths, num_samples=samples),
    )


def is_wanted(config: Config, data: Data) -> bool:
    """Whether there are prompts and steps for them."""
    return data.has_prompts and config.num_steps != 0


ALGORITHM = Algorithm(
    name=NAME,
    prefix=PREFIX,
    folder=NAME,
    num_steps=lambda config: config.num_steps,
    wanted=is_wanted,
    check=lambda job, inputs: None,  # its open stage compares, before anything is written
    open=open_policy_gradient,
    panels=PANELS,
    plan=plan_policy_gradient,
)
