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
from jaxtyping import Array, Bool, Float, Int

from dpojax.data.packing import PackedBatch
from dpojax.logps import TokenScores, response_sums, token_scores
from dpojax.losses import Loss, PairInfo, PairLogps
from dpojax.models import Model


class TrainState(NamedTuple):
    """What training changes. The reference is not in here: it is an argument of the step."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]  # batches taken, skipped ones included: the position in the data
    skipped: Int[Array, ""]  # steps that changed nothing else
    loss_average: Float[Array, ""]  # exponential average of |loss| over the steps that were not skipped


def new_state(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """The state at step 0."""
    zero = functools.partial(jnp.zeros, ())  # a buffer each: the state is donated
    return TrainState(params, optimizer.init(params), zero(jnp.int32), zero(jnp.int32), zero(jnp.float32))


class StepMetrics(NamedTuple):
    """What a step found; every process and device has the same."""

    scalars: dict[str, Float[Array, ""]]  # means over the whole step
    losses: Float[Array, "M A X"]  # of each pair (SFT: of each response), to name the rows of a bad step; 0 at padding
    row_id: Int[Array, "M A X"]  # -1 at padding
    finite: Bool[Array, ""]  # loss and gradient are
    spike: Bool[Array, ""]  # the loss is far above its average
    skipped: Int[Array, ""]  # steps skipped before this one: the optimizer has seen as many less


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
    # sums over response tokens
    chosen_logits: Float[Array, "M A P"]  # of the mean logit over the vocabulary
    rejected_logits: Float[Array, "M A P"]
    entropy: Float[Array, "M A P"]  # of both responses, nats
    correct: Float[Array, "M A P"]  # chosen tokens that are the most likely ones


def micro_batch(batch: PackedBatch, i) -> PackedBatch:
    """Micro-batch i: fields [M, ...] lose their first axis; the plan's scalars stay."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else jax.lax.dynamic_index_in_dim(x, i, 0, False), batch)


def hidden_by_shard(model: Model, params, mb: PackedBatch) -> Float[Array, "A U D"]:
    """Final hidden states of every packed token, flattened within each data shard."""
    hidden = model.hidden_states(params, mb.tokens, mb.positions, mb.group, mb.branch)
    return hidden.reshape(mb.predictor.shape[0], -1, hidden.shape[-1])


def batch_scores(model: Model, params, mb: PackedBatch, *, chunk: int, details=False) -> TokenScores:
    """log pi(target | prefix) of every scored token of a micro-batch, nats; with `details`, all of TokenScores."""
    hidden, details = hidden_by_shard(model, params, mb), jnp.asarray(details)
    head = model.head(params)
    return token_scores(model.unembed, head, hidden, mb.predictor, mb.target, mb.num_scored, details, chunk)


def gather_pairs(mb: PackedBatch, per_slot) -> tuple[Array, Array]:
    """Per-response values [A, S] -> (chosen, rejected), [A P] each."""
    take = functools.partial(jnp.take_along_axis, axis=1)
    return take(per_slot, mb.chosen).reshape(-1), take(per_slot, mb.rejected).reshape(-1)


def pair_sums(mb: PackedBatch, values: Float[Array, "A T"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Sums per-token values over the responses of every pair: (chosen, rejected); B = A P."""
    return gather_pairs(mb, response_sums(values, mb.weight, mb.slot, mb.lengths.shape[1]))


def pair_logps(mb: PackedBatch, values: Float[Array, "A T"]) -> PairLogps:
    """Token log-probs as log-probs of the responses of every pair."""
    return PairLogps(*pair_sums(mb, values), *gather_pairs(mb, mb.lengths))


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
    return batch_scores(model, ref_params, mb, chunk=chunk).logps


class Ratio(NamedTuple):
    """A logged mean on its way: micro-batches and devices add up both parts."""

    total: Float[Array, ""]
    count: Float[Array, ""]


def _mean_over(values, where) -> Ratio:
    return Ratio(jnp.sum(jnp.where(where, values, 0.0)), jnp.sum(where.astype(jnp.float32)))


def preference_sums(model: Model, loss: Loss, chunk: int, params, ref_params, mb: PackedBatch, details=False):
    """Sum of the per-pair losses of a micro-batch, with what is logged."""
    ref = pair_logps(mb, jax.lax.stop_gradient(reference_logps(model, ref_params, mb, chunk=chunk)))
    scores = batch_scores(model, params, mb, chunk=chunk, details=details)
    policy = pair_logps(mb, scores.logps)
    out = loss(policy, ref, pair_info(mb))
    valid = mb.valid.reshape(-1)
    pair_loss = jnp.where(valid, out.loss, 0.0)
    margin = out.chosen_rewards - out.rejected_rewards
    by_pair = {
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0) + 0.5 * (margin == 0),  # a tie is half right
        "logps/chosen": policy.chosen,
        "logps/rejected": policy.rejected,
    }
    # Means over tokens, as TRL takes them.
    total = lambda x: jnp.sum(jnp.where(valid, x, 0).astype(jnp.float32))
    lengths = total(policy.chosen_lengths), total(policy.rejected_lengths)
    entropy, logits = pair_sums(mb, scores.entropy), pair_sums(mb, scores.mean_logit)
    correct, _ = pair_sums(mb, scores.correct.astype(jnp.float32))
    by_token = {
        "entropy": Ratio(total(entropy[0] + entropy[1]), lengths[0] + lengths[1]),
        "mean_token_accuracy": Ratio(total(correct), lengths[0]),
        "logits/chosen": Ratio(total(logits[0]), lengths[0]),
        "logits/rejected": Ratio(total(logits[1]), lengths[1]),
    }
    logged = {**{k: _mean_over(v, valid) for k, v in by_pair.items()}, **by_token}
    return pair_loss.sum(), (logged, pair_loss.reshape(mb.valid.shape))


def sft_sums(model: Model, chunk: int, params, ref_params, mb: PackedBatch, details=False):
    """Sum of the negative log-likelihoods of all response tokens of a micro-batch, with what is logged."""
    del ref_params
    scores = batch_scores(model, params, mb, chunk=chunk, details=details)
    scored = mb.weight > 0
    nll = -response_sums(scores.logps, mb.weight, mb.slot, mb.lengths.shape[1])
    logged = {"entropy": _mean_over(scores.entropy, scored), "mean_token_accuracy": _mean_over(scores.correct, scored)}
    return nll.sum(), (logged, nll)


DETAILS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")  # known in steps with `details` only
SPIKE_AFTER_STEPS = 10  # an average of fewer losses says little


def make_train_step(
    sums: Callable[..., Any],
    denominator: Callable[[PackedBatch], Array],
    rows: Callable[[PackedBatch], Array],
    optimizer: optax.GradientTransformation,
    constrain_params: Callable[[Any], Any],
    *,
    spike_factor: float,
    skip_spikes: bool,
):
    """The step (state, ref_params, batch, details) -> (state, StepMetrics).

    A step whose loss or gradient is not finite changes nothing but the counters, to the bit.

    Args:
      sums: (params, ref_params, micro-batch, details) -> (loss sum, (logged Ratios, losses [A, X])).
      denominator: what the loss sum is divided by, from the plan of the whole step.
      rows: the source rows that the losses belong to. [M, A, X]
      optimizer: optax transformation.
      constrain_params: keeps a tree shaped like the parameters in the parameters' sharding.
      spike_factor: a loss over this many times the average of |loss| is a spike.
      skip_spikes: whether a spike is skipped like a step that is not finite.
    """

    def gradients(params, ref_params, batch: PackedBatch, details, count):
        """Loss sum, logged Ratios, mean gradient in float32, and the single losses, over all micro-batches."""
        gradient = jax.value_and_grad(sums, has_aux=True)

        def body(i, carry):
            (total, logged), grads, losses = carry
            (loss_sum, (part, own)), g = gradient(params, ref_params, micro_batch(batch, i), details)
            grads = constrain_params(jax.tree.map(lambda a, b: a + b.astype(jnp.float32) / count, grads, g))
            logged = jax.tree.map(jnp.add, logged, part)
            return (total + loss_sum, logged), grads, jax.lax.dynamic_update_index_in_dim(losses, own, i, 0)

        # The first carry has the sums' structure without running them.
        (_, (logged, _)) = jax.eval_shape(sums, params, ref_params, micro_batch(batch, 0), details)
        zero = lambda x: jnp.zeros(x.shape, jnp.float32)
        start = (
            (jnp.zeros((), jnp.float32), jax.tree.map(zero, logged)),
            constrain_params(jax.tree.map(zero, params)),
            jnp.zeros(rows(batch).shape, jnp.float32),
        )
        return jax.lax.fori_loop(0, batch.num_micro, body, start)

    def step(state: TrainState, ref_params, batch: PackedBatch, details) -> tuple[TrainState, StepMetrics]:
        count = denominator(batch).astype(jnp.float32)
        (total, logged), grads, losses = gradients(state.params, ref_params, batch, details, count)
        loss, grad_norm = total / count, optax.tree.norm(grads)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        taken, size = state.step - state.skipped, jnp.abs(loss)
        spike = (taken >= SPIKE_AFTER_STEPS) & (size > spike_factor * state.loss_average)
        good = finite & ~spike if skip_spikes else finite
        average = jnp.where(taken == 0, size, 0.9 * state.loss_average + 0.1 * size)
        keep = lambda new, old: jnp.where(good, new, old)
        new_state = TrainState(
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            step=state.step + 1,
            skipped=state.skipped + (1 - good.astype(jnp.int32)),
            loss_average=keep(average, state.loss_average),
        )
        means = {k: r.total / jnp.maximum(r.count, 1) for k, r in logged.items()}
        scalars = {"loss": loss, "grad_norm": grad_norm, **means}
        return new_state, StepMetrics(scalars, losses, rows(batch), finite, spike, state.skipped)

    return step


def make_eval_step(model: Model, loss: Loss, *, chunk: int):
    """The evaluation (params, ref_params, batch) -> PairResults."""

    def one(params, ref_params, mb: PackedBatch) -> PairResults:
        ref = pair_logps(mb, reference_logps(model, ref_params, mb, chunk=chunk))
        scores = batch_scores(model, params, mb, chunk=chunk, details=True)
        policy = pair_logps(mb, scores.logps)
        out = loss(policy, ref, pair_info(mb))
        entropy, logits = pair_sums(mb, scores.entropy), pair_sums(mb, scores.mean_logit)
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
            entropy=entropy[0] + entropy[1],
            correct=pair_sums(mb, scores.correct.astype(jnp.float32))[0],
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
            part = batch_scores(model, params, micro_batch(batch, i), chunk=chunk).logps
            return jax.lax.dynamic_update_index_in_dim(out, part, i, 0)

        return jax.lax.fori_loop(0, batch.num_micro, body, jnp.zeros(batch.target.shape, jnp.float32))

    return step
