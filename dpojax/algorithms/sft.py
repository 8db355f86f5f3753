"""Supervised fine-tuning on demonstrations: the mean negative log-likelihood of response tokens."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dpojax.algorithms.face import Algorithm, Inputs, OpenStage, Start
from dpojax.algorithms.simple import StageParts, open_stage
from dpojax.config.schema import Config
from dpojax.config.training import OPTIMIZERS
from dpojax.data.open import Data
from dpojax.data.packing import PackedBatch
from dpojax.evaluation.pass_rate import pass_rate_hooks, pass_rate_panel
from dpojax.models.decoder import Model
from dpojax.models.placed import fitted
from dpojax.runtime.context import Job
from dpojax.training.checksums import checksums, digest
from dpojax.training.findings import Card, Findings, Line, Panel
from dpojax.training.gradients import Gradients
from dpojax.training.logps import response_sums
from dpojax.training.micro_batches import accumulate
from dpojax.training.optimizer import make_optimizer, make_schedule
from dpojax.training.resume import fingerprints, rate_settings
from dpojax.training.rows import OfflineBatches, batch_shape, packer, step_flops
from dpojax.training.scores import batch_scores
from dpojax.training.state import TrainState

PREFIX = "sft_"
FOLDER = "sft"
PANELS = (
    Panel("SFT loss (nats per token)", (Line("sft_loss", "train"),)),
    pass_rate_panel(PREFIX),
)


def sft_gradients(model: Model, *, chunk: int):
    """The function (state, frozen, batch, details, constrain_params) -> Gradients of the mean
    negative log-likelihood of all response tokens of a step.
    """

    def sums(params, mb: PackedBatch, details):
        scores = batch_scores(model, params, mb, chunk=chunk, details=details)

        def per_response(values):
            return response_sums(values, mb.weight, mb.response, mb.lengths.shape[1])

        nll = -per_response(scores.logps)
        entropy = per_response(jax.lax.stop_gradient(scores.entropy))
        correct = per_response(scores.correct.astype(jnp.float32))
        return nll.sum(), (nll, entropy, correct)

    def gradients(
        state: TrainState, frozen, batch: PackedBatch, details, constrain_params
    ) -> Gradients:
        del frozen
        count = batch.num_response_tokens.astype(jnp.float32)

        def policy_sums(params, mb, i):
            return sums(params["policy"], mb, details)

        total, grads, (nll, entropy, correct) = accumulate(
            policy_sums, state.params, batch, count, constrain_params
        )
        scalars = {"entropy": entropy.sum() / count, "mean_token_accuracy": correct.sum() / count}
        return Gradients(total / count, grads, scalars, nll, batch.response_row, {})

    return gradients


def is_wanted(config: Config, data: Data) -> bool:
    """Whether there are demonstrations to train on: sft.num_steps says so when data is opened."""
    return data.sft is not None


def open_sft(job: Job, inputs: Inputs, start: Start) -> OpenStage:
    """The supervised stage, from what the stages before it left."""
    c = job.config
    data = inputs.data.sft
    index = inputs.data.sft_index
    assert data is not None and index is not None  # `is_wanted` asked
    groups = min(c.sft.batch_size, len(index.rows))
    shape = batch_shape(job, inputs.policy, [index], groups)
    policy = fitted(job, inputs.policy, shape)
    schedule = make_schedule(
        c.sft.schedule,
        learning_rate=c.sft.learning_rate,
        warmup_steps=c.sft.warmup_steps,
        num_steps=c.sft.num_steps,
    )
    optim = c.optim
    if c.sft.b2 is not None and "b2" in OPTIMIZERS[optim.name]:
        optim = dataclasses.replace(optim, b2=c.sft.b2)
    params = start.params()
    prints = fingerprints(
        job,
        data,
        policy,
        sft=dataclasses.asdict(c.sft),
        init=digest(checksums(params)),
    )
    parts = StageParts(
        name="SFT",
        prefix=PREFIX,
        folder=FOLDER,
        num_steps=c.sft.num_steps,
        steps_setting="sft.num_steps",
        keep=1,
        gradients=sft_gradients(policy.model, chunk=c.model.logps_chunk_tokens),
        batches=OfflineBatches(job, packer(job, data, index, shape), groups, c.sft.num_steps),
        optimizer=make_optimizer(optim, schedule, policy.axes),
        schedule=schedule,
        rate_settings=saved_rate,
        fingerprints=prints,
        records=data.records,
        groups=groups,
        epoch_groups=len(index.rows),
        flops=step_flops(policy.config, 3),
        hooks=pass_rate_hooks(job, inputs.data, policy, prefix=PREFIX, num_steps=c.sft.num_steps),
    )
    return open_stage(
        job,
        inputs,
        parts,
        policy=policy,
        params=params,
        findings=functools.partial(sft_findings, job, inputs),
    )


def saved_rate(config: dict[str, Any]):
    """The learning rate's settings in a saved config."""
    section = config.get("sft", {})
    return rate_settings(section, section.get("num_steps"))


def sft_findings(job: Job, inputs: Inputs, state: TrainState) -> Findings:
    """What the stage says where no other one follows it."""
    c = job.config
    losses = [row["sft_loss"] for row in job.log.rows() if row.get("sft_loss") is not None]
    loss = losses[-1] if losses else None
    cards = ()
    if loss is not None:
        note = f"{c.sft.num_steps} steps"
        cards = (Card(f"{loss:.3f}", "SFT loss (nats per token)", note),)
    return Findings(
        title="Supervised fine-tuning",
        settings=(
            f"{c.sft.batch_size} prompts a step",
            f"{c.optim.name} at {c.sft.learning_rate:g}",
        ),
        unit="prompts",
        scalars={"sft_steps": c.sft.num_steps, "sft_loss": loss, "pairs_per_second": None},
        cards=cards,
        policy_params=lambda: state.policy,
    )


ALGORITHM = Algorithm(
    name="sft",
    prefix=PREFIX,
    folder=FOLDER,
    num_steps=lambda config: config.sft.num_steps,
    wanted=is_wanted,
    check=lambda job, inputs: None,  # its open stage compares, before anything is written
    open=open_sft,
    panels=PANELS,
)
