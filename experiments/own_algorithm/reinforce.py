"""REINFORCE (Williams 1992) with a given reward: an algorithm of one's own, outside dpojax.

python -m dpojax.main --config=experiments/own_algorithm/config.py --workdir=runs/reinforce
"""

import functools

import jax
import jax.numpy as jnp

from dpojax.algorithms.face import Algorithm
from dpojax.algorithms.online import OnlineBatches
from dpojax.algorithms.simple import open_by_config
from dpojax.data.world import true_reward
from dpojax.training.findings import Line, Panel
from dpojax.training.gradients import Gradients
from dpojax.training.micro_batches import accumulate
from dpojax.training.pairs import pair_sums
from dpojax.training.scores import batch_scores

NAME = "reinforce"


def gradients(model, state, frozen, batch, details, constrain_params):
    """Of -mean(advantage x log pi(y | x)): a response's advantage is its weight in the batch."""

    def sums(params, mb, i):
        logps, _ = pair_sums(mb, batch_scores(model, params["policy"], mb, chunk=128).logps)
        losses = jnp.where(mb.valid, -mb.pair_weight * logps.reshape(mb.valid.shape), 0.0)
        return losses.sum(), jax.lax.stop_gradient(losses)

    count = batch.num_pairs.astype(jnp.float32)
    total, grads, losses = accumulate(sums, state.params, batch, count, constrain_params)
    scalars = {"objective/scores": jnp.where(batch.valid, batch.margin, 0.0).sum() / count}
    return Gradients(total / count, grads, scalars, losses, batch.row_id, {})


def open_reinforce(job, inputs, start):
    """Four samples of each prompt; the baseline is the mean of their rewards."""

    def advantages(rewards):
        return rewards - rewards.mean(axis=1, keepdims=True)

    batches = OnlineBatches(job, inputs, true_reward, advantages, num_samples=4)
    parts = {"name": NAME, "batches": batches, "shape": batches.shape}
    make = functools.partial(functools.partial, gradients)
    return open_by_config(job, inputs, start, gradients=make, **parts)


REINFORCE = Algorithm(
    name=NAME,
    prefix=f"{NAME}_",
    folder=NAME,
    num_steps=lambda config: config.num_steps,
    wanted=lambda config, data: config.num_steps > 0,
    check=lambda job, inputs: None,
    open=open_reinforce,
    panels=(Panel("true reward of samples", (Line(f"{NAME}_objective/scores", "train"),)),),
)
