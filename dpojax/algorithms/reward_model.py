"""Reward models: a scalar head on the policy's decoder, trained on preferences.

The loss is Bradley and Terry's (1952) as Ouyang et al. 2022 (arXiv:2203.02155), Eq. 1, have it. The
policy itself is left as it was: the next stage starts from what this one started from.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dpojax.algorithms.face import Algorithm, Inputs, OpenStage, Start
from dpojax.algorithms.simple import StageParts, open_stage
from dpojax.config.schema import Config
from dpojax.data.open import Data
from dpojax.data.packing import PackedBatch
from dpojax.evaluation.heldout_rewards import PANELS, PREFIX, HeldOutRewards, reward_findings
from dpojax.evaluation.reward_scale import normalise_on_reference
from dpojax.models.config import ModelConfig
from dpojax.models.decoder import Model
from dpojax.models.logits import head_params
from dpojax.models.params import SCALAR_HEAD
from dpojax.models.placed import Policy, describe, fitted
from dpojax.objectives.reward import bradley_terry_loss
from dpojax.runtime.context import Job
from dpojax.training.checksums import checksums, digest
from dpojax.training.findings import Findings
from dpojax.training.gradients import Gradients
from dpojax.training.micro_batches import accumulate
from dpojax.training.optimizer import make_optimizer, make_schedule
from dpojax.training.resume import fingerprints, rate_settings
from dpojax.training.rewards import pair_rewards, shares_of_groups
from dpojax.training.rows import OfflineBatches, batch_shape, packer, step_flops
from dpojax.training.state import TrainState
from dpojax.weights.open import REWARD_MODEL_FOLDER

NAME = "reward_model"


def reward_gradients(model: Model, *, centring: float):
    """The function (state, frozen, batch, details, constrain_params) -> Gradients of the mean over
    the step's prompts of the mean over a prompt's pairs.
    """

    def gradients(
        state: TrainState, frozen: Mapping[str, Any], batch: PackedBatch, details, constrain_params
    ) -> Gradients:
        del frozen, details
        groups = jnp.sum(shares_of_groups(batch))

        def sums(params, mb, i):
            chosen, rejected = pair_rewards(model, params["policy"], mb)
            losses = bradley_terry_loss(
                chosen,
                rejected,
                margin=mb.margin,
                soft_label=mb.soft_label,
                centring=centring,
            )
            losses = jnp.where(mb.valid, mb.pair_weight * losses, 0.0)
            shares = shares_of_groups(mb)
            return jnp.sum(shares * losses), jax.lax.stop_gradient((losses, chosen, rejected))

        total, grads, (losses, chosen, rejected) = accumulate(
            sums, state.params, batch, groups, constrain_params
        )
        scalars = step_scalars(batch, chosen, rejected)
        return Gradients(total / groups, grads, scalars, losses, batch.row_id, {})

    return gradients


def step_scalars(batch: PackedBatch, chosen, rejected) -> dict[str, Any]:
    """What is reported of a step's pairs, under the names of TRL's RewardTrainer."""
    pairs = jnp.maximum(jnp.sum(batch.valid), 1)

    def mean(values):
        return jnp.sum(jnp.where(batch.valid, values, 0.0)) / pairs

    margin = chosen - rejected
    right = (margin > 0) + 0.5 * (margin == 0)
    largest = jnp.where(batch.valid, jnp.maximum(chosen, rejected), -jnp.inf).max()
    least = jnp.where(batch.valid, jnp.minimum(chosen, rejected), jnp.inf).min()
    return {
        "accuracy": mean(right),
        "margin": mean(margin),
        "mean_reward": mean((chosen + rejected) / 2),
        "min_reward": least,
        "max_reward": largest,
    }


def reward_config(config: ModelConfig) -> ModelConfig:
    """The decoder with a scalar head in place of its map to the vocabulary."""
    return dataclasses.replace(config, scalar_head=True)


def with_scalar_head(job: Job, language: ModelConfig, policy: Policy, params: Any) -> Any:
    """A language model's parameters under a new head, whose weights are normal with the standard
    deviation 1 / sqrt(D + 1) (Stiennon et al. 2020, arXiv:2009.01325, appendix B.1).

    Args:
      policy: with the scalar head.
      params: of the language model.
    """
    dropped = set() if language.tie_embeddings else set(head_params(language))

    def make(params, key):
        kept = {name: tree for name, tree in params.items() if name not in dropped}
        width = policy.config.hidden_size
        shape = policy.abstract[SCALAR_HEAD]
        head = jax.random.normal(key, shape.shape, jnp.float32) * (width + 1) ** -0.5
        return {**kept, SCALAR_HEAD: head.astype(shape.dtype)}

    # not the key of random weights, nor that of adapters
    key = jax.random.fold_in(jax.random.key(job.config.seed), 2)
    return jax.jit(make, out_shardings=policy.shardings)(params, key)


def is_wanted(config: Config, data: Data) -> bool:
    """Whether there are preferences and steps for them."""
    return data.has_preferences and config.reward_model.num_steps != 0


def num_steps(config: Config, epoch_steps: float | None = None) -> int:
    """The stage's last step; -1 where it is an epoch of data that is not known."""
    steps = config.reward_model.num_steps
    if steps < 0 and epoch_steps is not None:
        return max(1, round(epoch_steps))
    return steps


def open_reward_model(job: Job, inputs: Inputs, start: Start) -> OpenStage:
    """The reward model's stage, from what the stages before it left."""
    c = job.config
    data = inputs.data
    section = c.reward_model
    groups = inputs.groups
    steps = num_steps(c, len(data.train_index.rows) / groups)
    policy = describe(job, reward_config(inputs.policy.config))
    indexes = [i for i in (data.train_index, data.eval_index) if i is not None]
    shape = batch_shape(job, policy, indexes, groups)
    policy = fitted(job, policy, shape)
    schedule = make_schedule(
        section.schedule,
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_steps,
        num_steps=steps,
    )
    params = start.params()
    init = digest(checksums(params))
    if not inputs.policy.config.scalar_head:
        params = with_scalar_head(job, inputs.policy.config, policy, params)
    prints = fingerprints(
        job,
        data.train,
        policy,
        reward_model=dataclasses.asdict(section),
        init=init,
        batch={"batch_size": c.batch_size, "batch_groups": c.batch_groups},
    )
    heldout = HeldOutRewards(job, policy.model, steps, centring=section.centring)
    if data.eval is not None and data.eval_index is not None:
        heldout.open(packer(job, data.eval, data.eval_index, shape), data.eval_parts, groups)
    pack = packer(job, data.train, data.train_index, shape)
    parts = StageParts(
        name="Reward model",
        prefix=PREFIX,
        folder=REWARD_MODEL_FOLDER,
        num_steps=steps,
        steps_setting="reward_model.num_steps",
        keep=c.checkpoint.keep,
        gradients=reward_gradients(policy.model, centring=section.centring),
        batches=OfflineBatches(job, pack, groups, steps),
        optimizer=make_optimizer(c.optim, schedule, policy.axes),
        schedule=schedule,
        rate_settings=saved_rate,
        fingerprints=prints,
        records=data.train.records,
        groups=groups,
        epoch_groups=len(data.train_index.rows),
        flops=step_flops(policy.config, 3),
        hooks=(heldout,),
    )
    opened = open_stage(
        job,
        inputs,
        parts,
        policy=policy,
        params=params,
        findings=functools.partial(findings_of, job, inputs, start, policy, heldout),
    )
    return opened._replace(passed_on=start.params)


def saved_rate(config: dict[str, Any]):
    """The learning rate's settings in a saved config."""
    section = config.get(NAME, {})
    if section.get("num_steps", -1) < 0:  # an epoch, whose length the config does not say
        return None
    return rate_settings(section, section["num_steps"])


def findings_of(
    job: Job,
    inputs: Inputs,
    start: Start,
    policy: Policy,
    heldout: HeldOutRewards,
    state: TrainState,
) -> Findings:
    """What the stage found out: held-out pairs, and how rewards of the reference's samples lie."""
    if heldout.results is None:  # resumed after the last step, whose evaluation is in the log
        heldout.evaluate(int(state.step), state, log=False)
    scale = None
    if inputs.policy.config.scalar_head:
        job.say("rewards are not normalised: model.init is a reward model, and samples nothing")
    else:
        scale = normalise_on_reference(
            job, inputs.data, inputs.policy, start.params(), policy, state.policy
        )
    scalars = {
        "skipped_steps": int(state.skipped),
        "reward_mean": None if scale is None else scale.mean,
        "reward_std": None if scale is None else scale.std,
    }
    return reward_findings(job.config, heldout, scalars=scalars, params=state.policy)


ALGORITHM = Algorithm(
    name=NAME,
    prefix=PREFIX,
    folder=REWARD_MODEL_FOLDER,
    num_steps=num_steps,
    wanted=is_wanted,
    check=lambda job, inputs: None,  # its open stage compares, before anything is written
    open=open_reward_model,
    panels=PANELS,
)
