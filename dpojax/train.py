"""(state, reference, batch) -> (state, metrics): one optimizer step, as a pure function.

The mean over pairs, micro-batches and devices is taken here and nowhere else. Sums are accumulated,
and the denominators come from the host's plan of the whole step, before the loop: never means of means.

An objective whose pairs are coupled (AOT, KTO, BCO with shift) is defined on the whole step, however it is cut: the
log-probs of all micro-batches first, then d loss / d log-probs on the whole step, then a second loop that pulls them
back to the parameters.

Legend: M micro-batches, A data shards, P pairs of a shard's micro-batch, T scored tokens, S responses.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dpojax.data.packing import PackedBatch
from dpojax.logps import Reference, TokenScores, response_sums, scores_by_shard
from dpojax.losses import PairInfo, PairLogps, known
from dpojax.models import Model
from dpojax.models.experts import Routing, load_balancing_loss
from dpojax.models.lora import join
from dpojax.objectives import Loss


class TrainState(NamedTuple):
    """What training changes. A fixed reference is not in here: it is an argument of the step."""

    params: Any
    opt_state: Any
    step: Int[Array, ""]  # batches taken, skipped ones included: the position in the data
    skipped: Int[Array, ""]  # steps that changed nothing else
    loss_average: Float[Array, ""]  # exponential average of |loss| over the steps that were not skipped
    reward_mean: Float[Array, ""]  # of the implicit rewards of all responses so far, for bco_pair_shift; else 0
    ref: Any = None  # TR-DPO's moving reference; else None


def new_state(optimizer: optax.GradientTransformation, params: Any, ref: Any = None) -> TrainState:
    """The state at step 0."""
    zero = functools.partial(jnp.zeros, ())  # a buffer each: the state is donated
    counters = zero(jnp.int32), zero(jnp.int32), zero(jnp.float32), zero(jnp.float32)
    return TrainState(params, optimizer.init(params), *counters, ref)


class StepMetrics(NamedTuple):
    """What a step found; every process and device has the same."""

    scalars: dict[str, Float[Array, ""]]  # means over the whole step
    losses: Float[Array, "M A X"]  # of each pair (SFT: of each response), to name the rows of a bad step; 0 at padding
    row_id: Int[Array, "M A X"]  # -1 at padding
    finite: Bool[Array, ""]  # loss, gradient and what the step makes of the state are
    spike: Bool[Array, ""]  # the loss is far above its average
    skipped: Int[Array, ""]  # steps skipped before this one: the optimizer has seen as many less


class PairResults(NamedTuple):
    """What is known of every pair of a batch; the pairs of padding have row_id -1.

    Unpaired data: `chosen` is the labelled response, `label` its label, `rejected` a mismatched response.
    """

    row_id: Int[Array, "*B"]
    label: Float[Array, "*B"]  # probability that the chosen one is the better one
    loss: Float[Array, "*B"]
    margin: Float[Array, "*B"]  # what the objective trains upwards
    pull: Float[Array, "*B"]  # -d loss / d log pi(y_w), over beta: s(-beta h) for DPO
    chosen_rewards: Float[Array, "*B"]
    rejected_rewards: Float[Array, "*B"]
    policy_chosen: Float[Array, "*B"]
    policy_rejected: Float[Array, "*B"]
    ref_chosen: Float[Array, "*B"] | None  # None without reference
    ref_rejected: Float[Array, "*B"] | None
    chosen_lengths: Int[Array, "*B"]
    rejected_lengths: Int[Array, "*B"]
    # sums over response tokens; 0 in steps without details
    chosen_logits: Float[Array, "*B"]  # of the mean logit over the vocabulary
    rejected_logits: Float[Array, "*B"]
    chosen_entropy: Float[Array, "*B"]  # nats
    rejected_entropy: Float[Array, "*B"]
    chosen_correct: Float[Array, "*B"]  # tokens that are the most likely ones


# --- from a micro-batch to its pairs ----------------------------------------------------------------------------------


def micro_batch(batch: PackedBatch, i) -> PackedBatch:
    """Micro-batch i: fields [M, ...] lose their first axis; the plan's scalars stay."""
    return jax.tree.map(lambda x: x if x.ndim == 0 else jax.lax.dynamic_index_in_dim(x, i, 0, False), batch)


def each_micro_batch(function: Callable[..., Any], batch: PackedBatch, *others: Any) -> Any:
    """function(micro-batch, ...) of every micro-batch at once; `others` and the results are [M, ...]."""
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, batch)
    return jax.vmap(function, in_axes=(axes, *[0] * len(others)))(batch, *others)


def hidden_by_shard(model: Model, params, mb: PackedBatch, key=None) -> tuple[Float[Array, "A U D"], Routing | None]:
    """Final hidden states of every packed token, flattened within each data shard; what the routers decided, if any."""
    rows, routing = (params, mb.tokens, mb.positions, mb.group, mb.branch), None
    if model.routed is None:
        hidden = model.hidden_states(*rows, key=key)
    else:
        hidden, routing = model.routed(*rows, key=key)
    return hidden.reshape(mb.predictor.shape[0], -1, hidden.shape[-1]), routing


def routed_scores(
    model: Model, params, mb: PackedBatch, *, chunk: int, details=False, ref_params=None, squares=False, key=None
) -> tuple[TokenScores, Routing | None]:
    """log pi(target | prefix) of every scored token of a micro-batch, nats; and what the routers decided, if any.

    Args:
      details: with all of TokenScores.
      ref_params: with the KL to this reference.
      squares: with log sum_v pi(v)^2.
      key: of the adapters' dropout; None: without.
    """
    (hidden, routing), details = hidden_by_shard(model, params, mb, key), jnp.asarray(details)
    ref = None
    if ref_params is not None:
        ref = jax.lax.stop_gradient(Reference(model.head(ref_params), hidden_by_shard(model, ref_params, mb)[0]))
    head, where = model.head(params), (mb.predictor, mb.target, mb.num_scored)
    settings = chunk, squares, model.frozen_head
    return scores_by_shard(model.unembed, model.spread, head, hidden, ref, *where, details, settings=settings), routing


def batch_scores(model: Model, params, mb: PackedBatch, **options) -> TokenScores:
    """`routed_scores` without the routers."""
    return routed_scores(model, params, mb, **options)[0]


class StepScores(NamedTuple):
    """The tokens of a micro-batch under both models; [M, ...] for a whole step."""

    policy: TokenScores
    ref_logps: Float[Array, "*M A T"] | None  # None without reference
    routing: Routing | None  # of the policy; None without experts


def both_scores(
    model: Model, loss: Loss, params, ref_params, mb: PackedBatch, *, chunk: int, details=False, key=None
) -> StepScores:
    """The policy's and the reference's token scores, as far as `loss` needs them.

    The reference's come from the batch where it carries a cache, else from `ref_params`, else there are none.
    """
    full = ref_params if loss.needs("kl") else None
    options = dict(chunk=chunk, details=details, ref_params=full, squares=loss.needs("wpo"), key=key)
    policy, routing = routed_scores(model, params, mb, **options)
    ref_logps: Any = policy.ref_logps if mb.ref_logps is None else mb.ref_logps
    if ref_logps is None and ref_params is not None:
        ref_logps = batch_scores(model, ref_params, mb, chunk=chunk).logps
    return StepScores(policy, jax.lax.stop_gradient(ref_logps), routing)


def gather_pairs(mb: PackedBatch, per_slot) -> tuple[Array, Array]:
    """Per-response values [A, S] -> (chosen, rejected), [A P] each."""
    take = functools.partial(jnp.take_along_axis, axis=1)
    return take(per_slot, mb.chosen).reshape(-1), take(per_slot, mb.rejected).reshape(-1)


def pair_sums(mb: PackedBatch, values: Float[Array, "A T"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Sums per-token values over the responses of every pair: (chosen, rejected); B = A P."""
    return gather_pairs(mb, response_sums(values, mb.weight, mb.slot, mb.lengths.shape[1]))


def pair_heads(mb: PackedBatch, values: Float[Array, "A T"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """As `pair_sums`, of the first min(|y_w|, |y_l|) tokens of both responses only."""

    def shard(values, weight, slot, lengths, chosen, rejected):
        live = weight > 0
        before = jnp.cumsum(live) - live  # scored tokens of the shard before this one
        first = jax.ops.segment_min(before, slot, lengths.shape[0])
        rank = before - first[slot]
        limit = jnp.minimum(lengths[chosen], lengths[rejected])
        head = lambda own: live & (slot == own[:, None]) & (rank < limit[:, None])  # [P, T]
        return tuple(jnp.sum(jnp.where(head(own), values, 0.0), axis=1) for own in (chosen, rejected))

    w, l = jax.vmap(shard)(values, mb.weight, mb.slot, mb.lengths, mb.chosen, mb.rejected)
    return w.reshape(-1), l.reshape(-1)


def pair_logps(mb: PackedBatch, logps: Float[Array, "A T"], *, heads: bool = False) -> PairLogps:
    """Token log-probs as log-probs of the responses of every pair."""
    both = PairLogps(*pair_sums(mb, logps), *gather_pairs(mb, mb.lengths))
    if not heads:
        return both
    chosen, rejected = pair_heads(mb, logps)
    return both._replace(chosen_head=chosen, rejected_head=rejected)


def pair_info(mb: PackedBatch) -> PairInfo:
    """What the data says of a micro-batch's pairs; padding has weight 0."""
    return PairInfo(
        weight=jnp.where(mb.valid, mb.pair_weight, 0.0).reshape(-1),
        soft_label=mb.soft_label.reshape(-1),
        margin=mb.margin.reshape(-1),
        mean_chosen_length=mb.num_chosen_tokens / jnp.maximum(mb.num_pairs, 1),
        valid=mb.valid.reshape(-1),
    )


def pairs_of(loss: Loss, mb: PackedBatch, scores: StepScores) -> tuple[PairLogps, PairLogps | None, PairInfo]:
    """What `loss` takes, of a micro-batch: (policy, ref, info)."""
    heads, policy_scores = loss.needs("head"), scores.policy
    policy = pair_logps(mb, policy_scores.logps, heads=heads)
    if policy_scores.kl is not None:
        chosen, rejected = pair_sums(mb, policy_scores.kl)
        policy = policy._replace(chosen_kl=chosen, rejected_kl=rejected)
    if policy_scores.log_sum_sq is not None:
        sums = pair_sums(mb, jax.lax.stop_gradient(policy_scores.logps - policy_scores.log_sum_sq))
        chosen, rejected = (jnp.exp(s / jnp.maximum(n, 1)) for s, n in zip(sums, policy[2:4], strict=True))
        policy = policy._replace(chosen_weight=chosen, rejected_weight=rejected)
    ref = None if scores.ref_logps is None else pair_logps(mb, scores.ref_logps, heads=heads)
    return policy, ref, pair_info(mb)


def step_pairs(loss: Loss, batch: PackedBatch, scores: StepScores) -> tuple[PairLogps, PairLogps | None, PairInfo]:
    """As `pairs_of`, of a whole step: fields [M, ...], the pairs of all micro-batches and shards in one axis."""
    policy, ref, info = each_micro_batch(functools.partial(pairs_of, loss), batch, scores)
    (mean_length,) = known(info.mean_chosen_length)
    mean_length = mean_length[0]
    policy, ref, info = jax.tree.map(lambda x: x.reshape(-1), (policy, ref, info))
    return policy, ref, info._replace(mean_chosen_length=mean_length)


def pair_results(loss: Loss, policy: PairLogps, ref: PairLogps | None, info: PairInfo, row_id) -> PairResults:
    """What is logged of B pairs, without the token details."""
    policy = jax.lax.stop_gradient(policy)

    def total(shift):
        head = None if policy.chosen_head is None else policy.chosen_head + shift
        out = loss(policy._replace(chosen=policy.chosen + shift, chosen_head=head), ref, info)
        return jnp.sum(jnp.where(info.valid, out.loss, 0.0)), out

    (_, out), gradient = jax.value_and_grad(total, has_aux=True)(jnp.zeros_like(policy.chosen))
    zero = jnp.zeros_like(out.loss)
    return PairResults(
        row_id=row_id,
        label=info.soft_label,
        loss=jnp.where(info.valid, out.loss, 0.0),
        margin=out.margin,
        pull=-gradient / loss.reward_scale,
        chosen_rewards=out.chosen_rewards,
        rejected_rewards=out.rejected_rewards,
        policy_chosen=policy.chosen,
        policy_rejected=policy.rejected,
        ref_chosen=None if ref is None else ref.chosen,
        ref_rejected=None if ref is None else ref.rejected,
        chosen_lengths=policy.chosen_lengths,
        rejected_lengths=policy.rejected_lengths,
        **dict.fromkeys(PairResults._fields[-5:], zero),
    )


def with_details(mb: PackedBatch, results: PairResults, scores: TokenScores) -> PairResults:
    """The results of a micro-batch with the sums over its tokens."""
    logits, entropy = pair_sums(mb, scores.mean_logit), pair_sums(mb, scores.entropy)
    correct = pair_sums(mb, scores.correct.astype(jnp.float32))
    sums = (*logits, *entropy, correct[0])
    return results._replace(**dict(zip(PairResults._fields[-5:], jax.lax.stop_gradient(sums), strict=True)))


# --- what is logged of pairs ------------------------------------------------------------------------------------------


def _mean(values, where):
    """The mean of the values where `where` holds; nan where it nowhere does."""
    count = jnp.sum(where)
    return jnp.where(count > 0, jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(count, 1), jnp.nan)


def _quantile(values, where, q: float):
    """The q-quantile of the values where `where` holds, linear between neighbours."""
    ranked = jnp.sort(jnp.where(where, values, jnp.inf).reshape(-1))
    place = q * jnp.maximum(jnp.sum(where) - 1, 0)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(jnp.sum(where) - 1, 0))
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def _right(margin):
    return (margin > 0) + 0.5 * (margin == 0)  # a tie is half right


def pair_scalars(r: PairResults, *, unpaired: bool, mismatched: bool = False) -> dict[str, Float[Array, ""]]:
    """Means over the pairs of a batch, under TRL's names where TRL has them.

    Beyond TRL: objective/accuracy and objective/margins (of what the objective trains, e.g. length-normalised), displacement
    (share of chosen responses that became less likely than under the reference), quantiles of the gradient weight (s(-beta h)
    for DPO), and lengths and accuracy by which response is longer. A mean over nothing, as over the undesirable responses of a
    step that holds none, is NaN.

    Args:
      r: its padding is left out.
      unpaired: chosen and rejected are the responses with label 1 and 0.
      mismatched: r.rejected_* are those of mismatched responses, from which KTO's reference point comes.
    """
    valid = r.row_id >= 0
    chosen, rejected = (valid & (r.label > 0.5), valid & (r.label <= 0.5)) if unpaired else (valid, valid)
    other = {k: getattr(r, f"chosen_{k}" if unpaired else f"rejected_{k}") for k in ("rewards", "lengths", "logits")}
    other["logps"] = r.policy_chosen if unpaired else r.policy_rejected
    reward_w, reward_l = _mean(r.chosen_rewards, chosen), _mean(other["rewards"], rejected)
    margin = r.margin if unpaired else r.chosen_rewards - r.rejected_rewards
    longer = r.chosen_lengths - r.rejected_lengths
    found = {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margins": reward_w - reward_l,
        "rewards/accuracies": _mean(_right(margin), valid),
        "logps/chosen": _mean(r.policy_chosen, chosen),
        "logps/rejected": _mean(other["logps"], rejected),
        "objective/accuracy": _mean(_right(r.margin), valid),
        "objective/margins": _mean(r.margin, valid),
        "lengths/chosen": _mean(r.chosen_lengths, chosen),
        "lengths/rejected": _mean(other["lengths"], rejected),
        **{f"gradient_weight/q{round(100 * q)}": _quantile(jnp.abs(r.pull), valid, q) for q in (0.1, 0.5, 0.9)},
    }
    if r.ref_chosen is not None:
        found["displacement"] = _mean(r.policy_chosen < r.ref_chosen, chosen)
    if mismatched:
        assert r.ref_rejected is not None
        found["kl"] = jnp.maximum(0.0, _mean(r.policy_rejected - r.ref_rejected, valid))  # KTO's z0, as TRL calls it
    if not unpaired:
        found["rewards/accuracies_chosen_longer"] = _mean(_right(margin), valid & (longer > 0))
        found["rewards/accuracies_chosen_shorter"] = _mean(_right(margin), valid & (longer < 0))
    # Means over tokens, as TRL takes them.
    total = lambda values, where: jnp.sum(jnp.where(where, values, 0).astype(jnp.float32))
    len_w, len_l = total(r.chosen_lengths, chosen), total(other["lengths"], rejected)
    entropy_w = total(r.chosen_entropy, valid)
    entropy_l = 0.0 if unpaired else total(r.rejected_entropy, valid)
    return found | {
        "entropy": (entropy_w + entropy_l) / jnp.maximum(len_w + len_l, 1),
        "mean_token_accuracy": total(r.chosen_correct, chosen) / jnp.maximum(len_w, 1),
        "logits/chosen": total(r.chosen_logits, chosen) / jnp.maximum(len_w, 1),
        "logits/rejected": total(other["logits"], rejected) / jnp.maximum(len_l, 1),
    }


# --- gradients of a whole step ----------------------------------------------------------------------------------------


def _empty(shapes: Any, batch: PackedBatch) -> Any:
    """Zeros for what every micro-batch returns, stacked."""
    return jax.tree.map(lambda x: jnp.zeros((batch.tokens.shape[0], *x.shape), x.dtype), shapes)


def _put(stack: Any, part: Any, i) -> Any:
    return jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, i, 0), stack, part)


def accumulate(function: Callable[..., Any], params, batch: PackedBatch, count, constrain_params) -> tuple[Any, Any, Any]:
    """(sum, its gradient / count in float32, what else was returned, stacked) over the micro-batches in use.

    Args:
      function: (params, micro-batch, i) -> (its sum, anything).
      constrain_params: keeps a tree shaped like the parameters in the parameters' sharding.
    """
    return _accumulate(jax.value_and_grad(function, has_aux=True), params, batch, count, constrain_params)


def _accumulate(gradient: Callable[..., Any], params, batch: PackedBatch, count, constrain_params) -> tuple[Any, Any, Any]:
    """As `accumulate`, of a function (params, micro-batch, i) -> ((its sum, anything), its gradient)."""

    def body(i, carry):
        total, grads, stack = carry
        (part, own), g = gradient(params, micro_batch(batch, i), i)
        grads = constrain_params(jax.tree.map(lambda a, b: a + b.astype(jnp.float32) / count, grads, g))
        return total + part, grads, _put(stack, own, i)

    # The first carry has the results' structure without running them.
    (total, own), _ = jax.eval_shape(gradient, params, micro_batch(batch, 0), 0)
    zeros = constrain_params(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))
    return jax.lax.fori_loop(0, batch.num_micro, body, (jnp.zeros(total.shape, jnp.float32), zeros, _empty(own, batch)))


@dataclasses.dataclass(frozen=True)
class Balance:
    """The routers' load-balancing loss of a whole step, with a gradient that is the same for every cut (models/experts.py).

    X sum_e f_e P_e with the shares f and the mean probabilities P over the step's real tokens, a shared prompt once, and all
    layers. f has no gradient, so that a first pass that counts makes the second one a sum over micro-batches.
    """

    weight: float
    num_layers: int

    def counts(self, model: Model, params, batch: PackedBatch, keys) -> Float[Array, "X"]:
        """How often each expert was chosen in the step; zeros for a step of one micro-batch, which counts for itself."""

        def own(i):
            routing = hidden_by_shard(model, params, micro_batch(batch, i), keys(i))[1]
            assert routing is not None  # the model has experts
            return routing.counts

        body = lambda i, total: total + own(i)
        zero = jnp.zeros(jax.eval_shape(own, 0).shape, jnp.float32)
        several = jnp.where(batch.num_micro > 1, batch.num_micro, 0)
        return jax.lax.stop_gradient(jax.lax.fori_loop(0, several, body, zero))

    def part(self, routing: Routing, counts, batch: PackedBatch) -> Float[Array, ""]:
        """The part of a micro-batch; the parts sum to weight x loss."""
        tokens = self.num_layers * batch.num_tokens.astype(jnp.float32)
        counts = jnp.where(batch.num_micro > 1, counts, routing.counts)
        return self.weight * load_balancing_loss(Routing(routing.probabilities, counts), tokens)


def preference_sums(
    model: Model, loss: Loss, chunk: int, params, ref_params, mb: PackedBatch, details=False, *, key=None, balance=None
):
    """Sum of the per-pair losses of a micro-batch, with the results of its pairs.

    Args:
      balance: routing -> this micro-batch's part of the routers' loss times the step's pairs; None: no such loss.
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


def step_scores(
    model: Model, loss: Loss, params, ref_params, batch: PackedBatch, *, chunk: int, details, keys=lambda i: None
) -> StepScores:
    """The token scores of all micro-batches, [M, ...], without gradient; `keys`: micro-batch -> key of the dropout."""
    one = lambda mb, i: both_scores(model, loss, params, ref_params, mb, chunk=chunk, details=details, key=keys(i))
    body = lambda i, stack: _put(stack, one(micro_batch(batch, i), i), i)
    start = _empty(jax.eval_shape(one, micro_batch(batch, 0), 0), batch)
    return jax.lax.stop_gradient(jax.lax.fori_loop(0, batch.num_micro, body, start))


def step_results(loss: Loss, batch: PackedBatch, scores: StepScores, shift) -> PairResults:
    """The results of all pairs of a step, [M, A, P]."""
    policy, ref, info = step_pairs(loss, batch, scores)
    results = pair_results(loss, policy, ref, info._replace(shift=shift), batch.row_id.reshape(-1))
    results = jax.tree.map(lambda x: x.reshape(batch.valid.shape), results)
    described = each_micro_batch(with_details, batch, results, scores.policy)
    return jax.tree.map(lambda x: x.reshape(batch.valid.shape), described)


class Gradients(NamedTuple):
    """What a step found before the optimizer is asked."""

    loss: Float[Array, ""]  # mean over the step
    grads: Any  # of the mean, float32
    scalars: dict[str, Float[Array, ""]]
    losses: Float[Array, "M A X"]
    row_id: Int[Array, "M A X"]
    reward_mean: Float[Array, ""]


def preference_gradients(
    model: Model,
    loss: Loss,
    *,
    chunk: int,
    two_passes: bool | None = None,
    balance: Balance | None = None,
    dropout_seed: int | None = None,
):
    """The function (state, ref_params, batch, details, constrain_params[, base]) -> Gradients of the preference stage.

    base: the frozen parameters under the state's adapters; None where the state's parameters are all there is.

    Args:
      two_passes: None: where the objective couples the pairs of a step.
      balance: the routers' loss, or None.
      dropout_seed: of the adapters' dropout, or None: no dropout. The draw depends on step and micro-batch.
    """

    def setting(state: TrainState, base, batch: PackedBatch):
        """(trained parameters -> the policy's, micro-batch -> key, routing -> its part of the routers' loss)."""
        policy = (lambda params: params) if base is None else functools.partial(join, base)
        if dropout_seed is None:
            keys = lambda i: None
        else:
            keys = lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(dropout_seed), state.step), i)
        if balance is None:
            return policy, keys, None
        chosen = balance
        counts = chosen.counts(model, policy(state.params), batch, keys)
        pairs = batch.num_pairs.astype(jnp.float32)
        return policy, keys, lambda routing: pairs * chosen.part(routing, counts, batch)

    def separate(state: TrainState, ref_params, batch: PackedBatch, details, constrain_params, base=None) -> Gradients:
        count = batch.num_pairs.astype(jnp.float32)
        policy, keys, part = setting(state, base, batch)

        def sums(params, mb, i):
            own = dict(key=keys(i), balance=part)
            return preference_sums(model, loss, chunk, policy(params), ref_params, mb, details, **own)

        total, grads, (results, parts) = accumulate(sums, state.params, batch, count, constrain_params)
        return _finish(total / count, grads, results, batch, state.reward_mean, parts)

    def coupled(state: TrainState, ref_params, batch: PackedBatch, details, constrain_params, base=None) -> Gradients:
        count = batch.num_pairs.astype(jnp.float32)
        policy, keys, part = setting(state, base, batch)
        scores = step_scores(model, loss, policy(state.params), ref_params, batch, chunk=chunk, details=details, keys=keys)
        reward_mean = state.reward_mean
        if loss.needs("shift"):
            reward_mean = _running_mean(state, step_pairs(loss, batch, scores), loss.reward_scale)

        def whole(logps, kl):
            moved = scores._replace(policy=scores.policy._replace(logps=logps, kl=kl))
            policy, ref, info = step_pairs(loss, batch, moved)
            return jnp.sum(jnp.where(info.valid, loss(policy, ref, info._replace(shift=reward_mean)).loss, 0.0))

        total, pulls = jax.value_and_grad(whole, argnums=(0, 1))(scores.policy.logps, scores.policy.kl)

        def pulled(params, mb, i):
            full = ref_params if loss.needs("kl") else None
            own, routing = routed_scores(model, policy(params), mb, chunk=chunk, ref_params=full, key=keys(i))
            pairs = zip(pulls, (own.logps, own.kl), strict=True)
            total = sum(jnp.sum(p[i] * x) for p, x in pairs if x is not None)
            own_part = None if part is None else part(routing)
            return total if own_part is None else total + own_part, jax.lax.stop_gradient(own_part)

        _, grads, parts = accumulate(pulled, state.params, batch, count, constrain_params)
        if parts is not None:
            total = total + parts.sum()
        return _finish(total / count, grads, step_results(loss, batch, scores, reward_mean), batch, reward_mean, parts)

    def _finish(mean, grads, results: PairResults, batch: PackedBatch, reward_mean, parts) -> Gradients:
        found = found_gradients(loss, mean, grads, results, batch, reward_mean)
        if parts is not None:
            assert balance is not None
            found.scalars["aux_loss"] = parts.sum() / batch.num_pairs / balance.weight  # TRL's name, without the weight
        return found

    return coupled if (loss.coupled if two_passes is None else two_passes) else separate


def found_gradients(loss: Loss, mean, grads, results: PairResults, batch: PackedBatch, reward_mean) -> Gradients:
    """What a step found, from the results of its pairs."""
    results = results._replace(row_id=batch.row_id)  # micro-batches out of use hold zeros
    scalars = pair_scalars(results, unpaired=loss.unpaired, mismatched=loss.needs("mismatched"))
    return Gradients(mean, grads, scalars, results.loss, batch.row_id, reward_mean)


def sweep_gradients(model: Model, losses: Sequence[Loss], *, chunk: int, each: Callable[..., Any], dropout_seeds=None):
    """As `preference_gradients`, of N runs that share batch, base and reference: every leaf of the state is [N, ...].

    The reference scores a micro-batch once for all runs. Neither coupled objectives nor those that need the reference's
    full distributions are taken.

    Args:
      losses: of every run.
      each: maps a function of one run over the leading axes of its arguments: `jax.vmap`, or a loop.
      dropout_seeds: of every run's adapters' dropout, [N], or None.
    """
    first = losses[0]
    squares, count = any(loss.needs("wpo") for loss in losses), len(losses)

    def gradients(state: TrainState, ref_params, batch: PackedBatch, details, constrain_params, base=None) -> Gradients:
        policy = (lambda params: params) if base is None else functools.partial(join, base)

        def own(params, n, seed, mb: PackedBatch, ref_logps, i):
            key = None
            if dropout_seeds is not None:
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), state.step), i)
            options = dict(chunk=chunk, details=details, squares=squares, key=key)
            scores = StepScores(batch_scores(model, policy(params), mb, **options), ref_logps, None)
            # The branches are a few operations on [B] arrays each.
            branches = [lambda scores, loss=loss: scored_sums(loss, mb, scores) for loss in losses]
            return jax.lax.switch(n, branches, scores) if count > 1 else branches[0](scores)

        def gradient(params, mb: PackedBatch, i):
            ref_logps = mb.ref_logps
            if ref_logps is None and ref_params is not None:
                ref_logps = jax.lax.stop_gradient(batch_scores(model, ref_params, mb, chunk=chunk).logps)
            seeds = jnp.zeros(count, jnp.int32) if dropout_seeds is None else jnp.asarray(dropout_seeds)
            one = lambda params, n, seed: jax.value_and_grad(own, has_aux=True)(params, n, seed, mb, ref_logps, i)
            return each(one)(params, jnp.arange(count), seeds)

        pairs = batch.num_pairs.astype(jnp.float32)
        total, grads, (results, _) = _accumulate(gradient, state.params, batch, pairs, constrain_params)
        results = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), results)  # [N, M, A, P]
        finish = lambda mean, grads, results, shift: found_gradients(first, mean, grads, results, batch, shift)
        return jax.vmap(finish)(total / pairs, grads, results, state.reward_mean)

    return gradients


def _running_mean(state: TrainState, pairs: tuple[PairLogps, PairLogps | None, PairInfo], scale: float):
    """The mean implicit reward of all responses so far, this step's included; steps count alike."""
    policy, ref, info = pairs
    assert ref is not None
    rewards = 0.5 * scale * (policy.chosen - ref.chosen + policy.rejected - ref.rejected)
    return state.reward_mean + (_mean(rewards, info.valid) - state.reward_mean) / (state.step - state.skipped + 1)


def sft_gradients(model: Model, *, chunk: int):
    """As `preference_gradients`, of the supervised stage: the mean negative log-likelihood of all response tokens."""

    def sums(params, mb: PackedBatch, details):
        scores = batch_scores(model, params, mb, chunk=chunk, details=details)
        per_slot = lambda values: response_sums(values, mb.weight, mb.slot, mb.lengths.shape[1])
        nll = -per_slot(scores.logps)
        details = per_slot(jax.lax.stop_gradient(scores.entropy)), per_slot(scores.correct.astype(jnp.float32))
        return nll.sum(), (nll, *details)

    def gradients(state: TrainState, ref_params, batch: PackedBatch, details, constrain_params, base=None) -> Gradients:
        del ref_params, base
        count = batch.num_response_tokens.astype(jnp.float32)
        one = lambda params, mb, i: sums(params, mb, details)
        total, grads, (nll, entropy, correct) = accumulate(one, state.params, batch, count, constrain_params)
        scalars = {"entropy": entropy.sum() / count, "mean_token_accuracy": correct.sum() / count}
        return Gradients(total / count, grads, scalars, nll, batch.slot_row, state.reward_mean)

    return gradients


# --- the programs -----------------------------------------------------------------------------------------------------

DETAILS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")  # known in steps with `details` only
SPIKE_AFTER_STEPS = 10  # an average of fewer losses says little


def make_train_step(
    gradients: Callable[..., Gradients],
    optimizer: optax.GradientTransformation,
    constrain_params: Callable[[Any], Any],
    *,
    spike_factor: float,
    skip_spikes: bool,
    moving: tuple[float, int] | None = None,
):
    """The step (state, ref_params, batch, details[, base]) -> (state, StepMetrics).

    base: the frozen parameters under the state's adapters (LoRA); None where the state's parameters are all there is.

    A step whose loss, gradient or update is not finite changes nothing but the counters, to the bit.

    Args:
      gradients: from `preference_gradients` or `sft_gradients`.
      optimizer: optax transformation.
      constrain_params: keeps a tree shaped like the parameters in the parameters' sharding.
      spike_factor: a loss over this many times the average of |loss| is a spike.
      skip_spikes: whether a spike is skipped like a step that is not finite.
      moving: (alpha, tau): the reference is the state's, and every tau steps that were not skipped it becomes
        alpha params + (1 - alpha) ref (TR-DPO, arXiv:2404.09656).
    """
    update = make_update(optimizer, spike_factor=spike_factor, skip_spikes=skip_spikes, moving=moving)

    def step(state: TrainState, ref_params, batch: PackedBatch, details, base=None) -> tuple[TrainState, StepMetrics]:
        ref_params = state.ref if moving else ref_params
        return update(state, gradients(state, ref_params, batch, details, constrain_params, base))

    return step


def make_sweep_step(
    gradients: Callable[..., Gradients],
    optimizer: optax.GradientTransformation,
    constrain_params: Callable[[Any], Any],
    rates: Float[Array, "N"],
    *,
    spike_factor: float,
    skip_spikes: bool,
):
    """As `make_train_step`, of N runs whose state is [N, ...] but for `step`.

    Args:
      gradients: from `sweep_gradients`.
      optimizer: of a run with learning rate 1.
      rates: learning rate of every run.
    """
    update = make_update(optimizer, spike_factor=spike_factor, skip_spikes=skip_spikes)
    axes = TrainState(0, 0, None, 0, 0, 0, None)

    def step(state: TrainState, ref_params, batch: PackedBatch, details, base=None) -> tuple[TrainState, StepMetrics]:
        found = gradients(state, ref_params, batch, details, constrain_params, base)
        own = jax.vmap(lambda state, found, rate: update(state, found, rate=rate), in_axes=(axes, 0, 0))
        new_state, metrics = own(state, found, jnp.asarray(rates))
        return new_state._replace(step=state.step + 1), metrics

    return step


def make_update(
    optimizer: optax.GradientTransformation,
    *,
    spike_factor: float,
    skip_spikes: bool,
    moving: tuple[float, int] | None = None,
):
    """(state, gradients, rate=) -> (state, StepMetrics): the half of a step that follows the gradients.

    The arguments are `make_train_step`'s; `rate` multiplies the optimizer's updates, and is None where it holds its own.
    """

    def update(state: TrainState, found: Gradients, *, rate=None) -> tuple[TrainState, StepMetrics]:
        loss, grads, scalars, losses, row_id, reward_mean = found
        grad_norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        if rate is not None:
            updates = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
        params = optax.apply_updates(state.params, updates)

        # A finite gradient can still leave the numbers: a rate that is too large, a moment that overflows.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & _all_finite((params, opt_state, reward_mean))
        taken, size = state.step - state.skipped, jnp.abs(loss)
        spike = (taken >= SPIKE_AFTER_STEPS) & (size > spike_factor * state.loss_average)
        good = finite & ~spike if skip_spikes else finite
        average = jnp.where(taken == 0, size, 0.9 * state.loss_average + 0.1 * size)
        keep = lambda new, old: jnp.where(good, new, old)
        params = jax.tree.map(keep, params, state.params)
        ref = state.ref
        if moving:
            alpha, tau = moving
            ref = _move(ref, params, alpha, good & ((taken + 1) % tau == 0))
        new_state = TrainState(
            params=params,
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            step=state.step + 1,
            skipped=state.skipped + (1 - good.astype(jnp.int32)),
            loss_average=keep(average, state.loss_average),
            reward_mean=keep(reward_mean, state.reward_mean),
            ref=ref,
        )
        scalars = {"loss": loss, "grad_norm": grad_norm, **scalars}
        return new_state, StepMetrics(scalars, losses, row_id, finite, spike, state.skipped)

    return update


def _all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every floating-point number of a tree is finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def _move(ref: Any, params: Any, alpha: float, due) -> Any:
    """Alpha params + (1 - alpha) ref where `due`, in the reference's dtype."""
    mixed = lambda r, p: (alpha * p.astype(jnp.float32) + (1 - alpha) * r.astype(jnp.float32)).astype(r.dtype)
    return jax.lax.cond(due, lambda: jax.tree.map(mixed, ref, params), lambda: ref)


def make_eval_step(model: Model, loss: Loss, *, chunk: int, ref_logps: bool = False):
    """The evaluation (params, ref_params, batch, shift) -> PairResults, [M, A, P]; shift is the state's reward_mean.

    Args:
      ref_logps: the second argument is the reference's token log-probs [M, A, T], or None, and not its parameters.
    """

    def step(params, ref_params, batch: PackedBatch, shift) -> PairResults:
        if ref_logps:
            ref_params, batch = None, batch._replace(ref_logps=ref_params)
        scores = step_scores(model, loss, params, ref_params, batch, chunk=chunk, details=True)
        return step_results(loss, batch, scores, shift)

    return step


def make_token_logps_step(model: Model, *, chunk: int):
    """The reference pass (params, batch) -> token log-probs [M, A, T], for the cache and for tests."""

    def step(params, batch: PackedBatch) -> Float[Array, "M A T"]:
        def body(i, out):
            part = batch_scores(model, params, micro_batch(batch, i), chunk=chunk).logps
            return jax.lax.dynamic_update_index_in_dim(out, part, i, 0)

        return jax.lax.fori_loop(0, batch.num_micro, body, jnp.zeros(batch.target.shape, jnp.float32))

    return step


def reference_logps(model: Model, ref_params, batch: PackedBatch, chunk: int) -> Float[Array, "M A T"] | None:
    """The reference's token log-probs of a step: the batch's cache, those of `ref_params`, or None where there is neither."""
    if batch.ref_logps is not None or ref_params is None:
        return batch.ref_logps
    return make_token_logps_step(model, chunk=chunk)(ref_params, batch)
