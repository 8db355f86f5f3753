"""What every algorithm's gradients are made of, and the sums over micro-batches of pairs."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.data.packing import PackedBatch
from dpojax.models.decoder import Model
from dpojax.models.lora import join
from dpojax.objectives.loss import Loss
from dpojax.training.metrics import pair_scalars
from dpojax.training.micro_batches import each_micro_batch, stacked
from dpojax.training.pairs import PairResults, pair_results, pairs_of, step_pairs, with_details
from dpojax.training.scores import StepScores, both_scores
from dpojax.training.state import TrainState


class Gradients(NamedTuple):
    """What an algorithm makes of a batch, before the optimizer is asked."""

    loss: Float[Array, ""]  # mean over the step
    grads: dict[str, Any]  # of the mean, by role, float32
    scalars: dict[str, Float[Array, ""]]
    losses: Float[Array, "M A X"]  # of each pair or response; 0 at padding
    row_id: Int[Array, "M A X"]  # of each, -1 at padding
    memory: Mapping[str, Any]  # those entries of the state's memory that the step changes


def full_params(frozen: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Trained parameters -> the policy's: themselves, or adapters on the frozen base."""
    base = frozen.get("base")
    if base is None:
        return lambda params: params
    return functools.partial(join, base)


def reference_of(state: TrainState, frozen: Mapping[str, Any]) -> Any:
    """The reference's parameters: one that moves is remembered, one that does not is frozen."""
    return state.memory.get("reference", frozen.get("reference"))


def preference_sums(  # noqa: PLR0913  # two models and a batch
    model: Model,
    loss: Loss,
    chunk: int,
    params,
    ref_params,
    mb: PackedBatch,
    details=False,
    *,
    key=None,
    balance=None,
):
    """Sum of the per-pair losses of a micro-batch, with the results of its pairs.

    Args:
      balance: routing -> this micro-batch's part of the routers' loss times the step's pairs; None:
        no such loss.
    """
    scores = both_scores(model, loss, params, ref_params, mb, chunk=chunk, details=details, key=key)
    return scored_sums(loss, mb, scores, balance=balance)


def scored_sums(loss: Loss, mb: PackedBatch, scores: StepScores, *, balance=None):
    """As `preference_sums`, from the token scores."""
    policy, ref, info = pairs_of(loss, mb, scores)
    results = pair_results(loss, policy, ref, info, mb.row_id.reshape(-1))
    results = with_details(mb, results, scores.policy)
    total = jnp.sum(jnp.where(info.valid, loss(policy, ref, info).loss, 0.0))
    part = None if balance is None else balance(scores.routing)
    results = jax.tree.map(lambda x: x.reshape(mb.valid.shape), results)
    return total if part is None else total + part, (results, jax.lax.stop_gradient(part))


def step_scores(  # noqa: PLR0913  # two models and a batch
    model: Model,
    loss: Loss,
    params,
    ref_params,
    batch: PackedBatch,
    *,
    chunk: int,
    details,
    keys=lambda i: None,
) -> StepScores:
    """The token scores of all micro-batches, [M, ...], without gradient; `keys`: micro-batch -> key
    of the dropout.
    """

    def one(mb, i):
        return both_scores(
            model, loss, params, ref_params, mb, chunk=chunk, details=details, key=keys(i)
        )

    return jax.lax.stop_gradient(stacked(one, batch))


def step_results(loss: Loss, batch: PackedBatch, scores: StepScores, shift) -> PairResults:
    """The results of all pairs of a step, [M, A, P]."""
    policy, ref, info = step_pairs(loss, batch, scores)
    results = pair_results(loss, policy, ref, info._replace(shift=shift), batch.row_id.reshape(-1))
    results = jax.tree.map(lambda x: x.reshape(batch.valid.shape), results)
    described = each_micro_batch(with_details, batch, results, scores.policy)
    return jax.tree.map(lambda x: x.reshape(batch.valid.shape), described)


def pair_gradients(
    loss: Loss, mean, grads, results: PairResults, batch: PackedBatch, memory: Mapping[str, Any]
) -> Gradients:
    """The gradients of a step with what is reported of its pairs."""
    results = results._replace(row_id=batch.row_id)  # micro-batches out of use hold zeros
    scalars = pair_scalars(results, unpaired=loss.unpaired, mismatched=loss.needs("mismatched"))
    return Gradients(mean, grads, scalars, results.loss, batch.row_id, memory)
