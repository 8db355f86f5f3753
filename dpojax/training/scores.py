"""A micro-batch -> the scores of its tokens under a policy and its reference."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.data.packing import PackedBatch
from dpojax.models.decoder import Model
from dpojax.models.experts import Routing
from dpojax.objectives.loss import Loss
from dpojax.training.logps import HeadInputs, ScoreOptions, Targets, TokenScores, scores_by_shard
from dpojax.training.micro_batches import stacked


def hidden_by_shard(
    model: Model, params, mb: PackedBatch, key=None
) -> tuple[Float[Array, "A U D"], Routing | None]:
    """Final hidden states of every packed token, flattened within each data shard.

    Second, what the routers decided; None without experts.
    """
    rows = (params, mb.tokens, mb.positions, mb.group, mb.branch)
    routing = None
    if model.routed is None:
        hidden = model.hidden_states(*rows, key=key)
    else:
        hidden, routing = model.routed(*rows, key=key)
    return hidden.reshape(mb.predictor.shape[0], -1, hidden.shape[-1]), routing


def routed_scores(  # noqa: PLR0913  # two models and a batch
    model: Model,
    params,
    mb: PackedBatch,
    *,
    chunk: int,
    details=False,
    ref_params=None,
    squares=False,
    key=None,
) -> tuple[TokenScores, Routing | None]:
    """log pi(target | prefix) of every scored token of a micro-batch, nats.

    Second, what the routers decided; None without experts.

    Args:
      details: with all of TokenScores.
      ref_params: with the KL to this reference.
      squares: with log sum_v pi(v)^2.
      key: of the adapters' dropout; None: without.
    """
    hidden, routing = hidden_by_shard(model, params, mb, key)
    ref = None
    if ref_params is not None:
        ref_hidden, _ = hidden_by_shard(model, ref_params, mb)
        ref = jax.lax.stop_gradient(HeadInputs(head=model.head(ref_params), hidden=ref_hidden))
    scores = scores_by_shard(
        model.unembed,
        model.head_sharding,
        HeadInputs(head=model.head(params), hidden=hidden),
        ref,
        Targets(predictor=mb.predictor, target=mb.target, count=mb.num_scored),
        jnp.asarray(details),
        ScoreOptions(chunk=chunk, squares=squares, frozen=model.frozen_head),
    )
    return scores, routing


def batch_scores(model: Model, params, mb: PackedBatch, **options) -> TokenScores:
    """`routed_scores` without the routers."""
    return routed_scores(model, params, mb, **options)[0]


class StepScores(NamedTuple):
    """The tokens of a micro-batch under both models; [M, ...] for a whole step."""

    policy: TokenScores
    ref_logps: Float[Array, "*M A T"] | None  # None without reference
    routing: Routing | None  # of the policy; None without experts


def both_scores(  # noqa: PLR0913  # two models and a batch
    model: Model,
    loss: Loss,
    params,
    ref_params,
    mb: PackedBatch,
    *,
    chunk: int,
    details=False,
    key=None,
) -> StepScores:
    """The policy's and the reference's token scores, as far as `loss` needs them.

    The reference's come from the batch where it carries a cache, else from `ref_params`, else there
    are none.
    """
    kl_params = None
    if loss.needs("kl"):
        kl_params = ref_params
    policy, routing = routed_scores(
        model,
        params,
        mb,
        chunk=chunk,
        details=details,
        ref_params=kl_params,
        squares=loss.needs("wpo"),
        key=key,
    )
    ref_logps: Any = mb.ref_logps
    if ref_logps is None:
        ref_logps = policy.ref_logps
    if ref_logps is None and ref_params is not None:
        ref_logps = batch_scores(model, ref_params, mb, chunk=chunk).logps
    return StepScores(policy, jax.lax.stop_gradient(ref_logps), routing)


def make_token_logps_step(model: Model, *, chunk: int):
    """The reference pass: a function (params, batch) -> token log-probs [M, A, T], nats."""

    def step(params, batch: PackedBatch) -> Float[Array, "M A T"]:
        def logps(mb: PackedBatch, i) -> Float[Array, "A T"]:
            return batch_scores(model, params, mb, chunk=chunk).logps

        return stacked(logps, batch)

    return step


def reference_logps(
    model: Model, ref_params, batch: PackedBatch, chunk: int
) -> Float[Array, "M A T"] | None:
    """The reference's token log-probs of a step, from the batch's cache or from `ref_params`.

    None where there is neither.
    """
    if batch.ref_logps is not None or ref_params is None:
        return batch.ref_logps
    return make_token_logps_step(model, chunk=chunk)(ref_params, batch)
