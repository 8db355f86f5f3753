"""(state, reference, batch) -> (state, metrics): one optimizer step, as a pure function.

The mean over pairs, micro-batches and devices is taken here and nowhere else. Sums are accumulated,
and the denominators come from the host's plan of the whole step, before the loop: never means of means.

Legend: M micro-batches, A data shards, P pairs of a shard's micro-batch, T scored tokens, S responses.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dpojax.data.packing import PackedBatch
from dpojax.logps import TokenScores, response_sums, token_logps, token_scores
from dpojax.losses import Loss, PairInfo, PairLogps
from dpojax.models import Model


class TrainState(NamedTuple):
    """What training changes. The reference is not in here: it is an argument of the step."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]  # batches taken, skipped ones included: the position in the data
    skipped: Int[Array, ""]  # steps that were not finite and changed nothing else


def new_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """The state at step 0."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


class StepMetrics(NamedTuple):
    """Sums and means over the whole step; every process and device has the same."""

    scalars: dict[str, Float[Array, ""]]
    pair_loss: Float[Array, "M A P"]  # to name the pairs of a non-finite step; 0 at padding
    finite: Array  # bool []


class PairResults(NamedTuple):
    """Per-pair results of an evaluation batch. [M, A, P] each; rows of padding have row_id -1."""

    row_id: Int[Array, "M A P"]
    loss: Float[Array, "M A P"]
    chosen_rewards: Float[Array, "M A P"]
    rejected_rewards: Float[Array, "M A P"]
    policy_chosen: Float[Array, "M A P"]
    policy_rejected: Float[Array, "M A P"]
    ref_chosen: Float[Array, "M A P"]
    ref_rejected: Float[Array, "M A P"]
    chosen_lengths: Int[Array, "M A P"]
    rejected_lengths: Int[Array, "M A P"]
    chosen_logits: Float[Array, "M A P"]  # mean logit over the response's positions and the vocabulary
    rejected_logits: Float[Array, "M A P"]
    entropy: Float[Array, "M A P"]  # mean over the tokens of both responses, nats
    token_accuracy: Float[Array, "M A P"]  # of the chosen response


def micro_batch(batch: PackedBatch, i) -> PackedBatch:
    """Micro-batch i: fields [M, ...] lose their first axis; the plan's scalars stay."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else jax.lax.dynamic_index_in_dim(x, i, 0, False), batch)


def hidden_by_shard(model: Model, params, mb: PackedBatch) -> Float[Array, "A U D"]:
    """Final hidden states of every packed token, flattened within each data shard."""
    hidden = model.hidden_states(params, mb.tokens, mb.positions, mb.group, mb.branch)
    return hidden.reshape(mb.predictor.shape[0], -1, hidden.shape[-1])


def batch_token_logps(model: Model, params, mb: PackedBatch, *, chunk: int) -> Float[Array, "A T"]:
    """log pi(target | prefix) of every scored token of a micro-batch, nats."""
    hidden = hidden_by_shard(model, params, mb)
    return token_logps(model.unembed, model.head(params), hidden, mb.predictor, mb.target, mb.num_scored, chunk)


def gather_pairs(mb: PackedBatch, per_slot) -> tuple[Array, Array]:
    """Per-response values [A, S] -> (chosen, rejected), [A P] each."""
    take = functools.partial(jnp.take_along_axis, axis=1)
    return take(per_slot, mb.chosen).reshape(-1), take(per_slot, mb.rejected).reshape(-1)


def pair_logps(mb: PackedBatch, values: Float[Array, "A T"]) -> PairLogps:
    """Sums token log-probs to responses and gathers the pairs; B = A P."""
    sums = response_sums(values, mb.weight, mb.slot, mb.lengths.shape[1])
    return PairLogps(*gather_pairs(mb, sums), *gather_pairs(mb, mb.lengths))


def pair_info(mb: PackedBatch) -> PairInfo:
    """What the data says of a micro-batch's pairs; padding has weight 0."""
    return PairInfo(
        weight=jnp.where(mb.valid, mb.pair_weight, 0.0).reshape(-1),
        soft_label=mb.soft_label.reshape(-1),
        margin=mb.margin.reshape(-1),
        mean_chosen_length=mb.num_chosen_tokens / jnp.maximum(mb.num_pairs, 1),
    )


def reference_logps(model: Model, ref_params, mb: PackedBatch, *, chunk: int) -> Float[Array, "A T"]:
    """The cached reference log-probs where the batch carries them, else those of the live reference."""
    if mb.ref_logps is not None:
        return mb.ref_logps
    return batch_token_logps(model, ref_params, mb, chunk=chunk)


def preference_sums(model: Model, loss: Loss, chunk: int, params, ref_params, mb: PackedBatch):
    """Sum of the per-pair losses of a micro-batch, with sums of what is logged."""
    ref = pair_logps(mb, jax.lax.stop_gradient(reference_logps(model, ref_params, mb, chunk=chunk)))
    policy = pair_logps(mb, batch_token_logps(model, params, mb, chunk=chunk))
    out = loss(policy, ref, pair_info(mb))
    valid = mb.valid.reshape(-1)
    pair_loss = jnp.where(valid, out.loss, 0.0)
    margin = out.chosen_rewards - out.rejected_rewards
    logged = {
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0) + 0.5 * (margin == 0),  # a tie is half right
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    sums = {k: jnp.sum(jnp.where(valid, v, 0.0)) for k, v in logged.items()}
    return pair_loss.sum(), (sums, pair_loss.reshape(mb.valid.shape))


def sft_sums(model: Model, chunk: int, params, ref_params, mb: PackedBatch):
    """Sum of the negative log-likelihoods of all response tokens of a micro-batch."""
    del ref_params
    logps = batch_token_logps(model, params, mb, chunk=chunk)
    nll = -jnp.sum(jnp.where(mb.weight > 0, logps * mb.weight, 0.0))
    return nll, ({}, jnp.zeros(mb.valid.shape, jnp.float32))


def make_train_step(
    sums: Callable[..., Any],
    denominator: Callable[[PackedBatch], Array],
    optimizer: optax.GradientTransformation,
    constrain_params: Callable[[Any], Any],
):
    """The step (state, ref_params, batch) -> (state, StepMetrics).

    Args:
      sums: (params, ref_params, micro-batch) -> (loss sum, (sums of logged values, per-pair losses)).
      denominator: what the sums are divided by, from the plan of the whole step.
      optimizer: optax transformation.
      constrain_params: keeps a tree shaped like the parameters in the parameters' sharding.
    """

    def step(state: TrainState, ref_params, batch: PackedBatch) -> tuple[TrainState, StepMetrics]:
        count = denominator(batch).astype(jnp.float32)
        gradient = jax.value_and_grad(lambda p, mb: sums(p, ref_params, mb), has_aux=True)

        def body(i, carry):
            (total, logged), grads, pair_loss = carry
            (loss_sum, (part, losses)), g = gradient(state.params, micro_batch(batch, i))
            grads = constrain_params(jax.tree.map(lambda a, b: a + b.astype(jnp.float32) / count, grads, g))
            logged = jax.tree.map(jnp.add, logged, part)
            return (total + loss_sum, logged), grads, jax.lax.dynamic_update_index_in_dim(pair_loss, losses, i, 0)

        # The first carry has the sums' structure without running them.
        (_, (logged, _)) = jax.eval_shape(sums, state.params, ref_params, micro_batch(batch, 0))
        zero = lambda x: jnp.zeros(x.shape, jnp.float32)
        start = (
            (jnp.zeros((), jnp.float32), jax.tree.map(zero, logged)),
            constrain_params(jax.tree.map(zero, state.params)),
            jnp.zeros(batch.valid.shape, jnp.float32),
        )
        (total, logged), grads, pair_loss = jax.lax.fori_loop(0, batch.num_micro, body, start)
        grad_norm = optax.global_norm(grads)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)
        keep = lambda new, old: jnp.where(finite, new, old)
        new_state = TrainState(
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            step=state.step + 1,
            skipped=state.skipped + (1 - finite.astype(jnp.int32)),
        )
        scalars = {"loss": total / count, "grad_norm": grad_norm, **{k: v / count for k, v in logged.items()}}
        return new_state, StepMetrics(scalars, pair_loss, finite)

    return step


def make_eval_step(model: Model, loss: Loss, *, chunk: int):
    """The evaluation (params, ref_params, batch) -> PairResults."""

    def mean_of(mb, values):
        return response_sums(values, mb.weight, mb.slot, mb.lengths.shape[1]) / jnp.maximum(mb.lengths, 1)

    def one(params, ref_params, mb: PackedBatch) -> PairResults:
        ref = pair_logps(mb, reference_logps(model, ref_params, mb, chunk=chunk))
        hidden = hidden_by_shard(model, params, mb)
        scores: TokenScores = token_scores(
            model.unembed, model.head(params), hidden, mb.predictor, mb.target, mb.num_scored, chunk
        )
        policy = pair_logps(mb, scores.logps)
        out = loss(policy, ref, pair_info(mb))
        entropy = gather_pairs(mb, mean_of(mb, scores.entropy))
        logits = gather_pairs(mb, mean_of(mb, scores.mean_logit))
        flat = PairResults(
            row_id=mb.row_id.reshape(-1),
            loss=out.loss,
            chosen_rewards=out.chosen_rewards,
            rejected_rewards=out.rejected_rewards,
            policy_chosen=policy.chosen,
            policy_rejected=policy.rejected,
            ref_chosen=ref.chosen,
            ref_rejected=ref.rejected,
            chosen_lengths=policy.chosen_lengths,
            rejected_lengths=policy.rejected_lengths,
            chosen_logits=logits[0],
            rejected_logits=logits[1],
            entropy=(entropy[0] + entropy[1]) / 2,
            token_accuracy=gather_pairs(mb, mean_of(mb, scores.correct.astype(jnp.float32)))[0],
        )
        return jax.tree.map(lambda x: x.reshape(mb.valid.shape), flat)

    def step(params, ref_params, batch: PackedBatch) -> PairResults:
        shapes = jax.eval_shape(one, params, ref_params, micro_batch(batch, 0))
        start = jax.tree.map(lambda x: jnp.zeros((batch.tokens.shape[0], *x.shape), x.dtype), shapes)
        start = start._replace(row_id=start.row_id - 1)

        def body(i, results):
            part = one(params, ref_params, micro_batch(batch, i))
            return jax.tree.map(lambda r, x: jax.lax.dynamic_update_index_in_dim(r, x, i, 0), results, part)

        return jax.lax.fori_loop(0, batch.num_micro, body, start)

    return step


def make_token_logps_step(model: Model, *, chunk: int):
    """The reference pass (params, batch) -> token log-probs [M, A, T], for the cache and for tests."""

    def step(params, batch: PackedBatch) -> Float[Array, "M A T"]:
        def body(i, out):
            part = batch_token_logps(model, params, micro_batch(batch, i), chunk=chunk)
            return jax.lax.dynamic_update_index_in_dim(out, part, i, 0)

        return jax.lax.fori_loop(0, batch.num_micro, body, jnp.zeros(batch.target.shape, jnp.float32))

    return step
