"""Scores of tokens -> pairs as a loss sees them, and what is known of each afterwards."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.data.packing import PackedBatch
from dpojax.objectives.loss import Loss
from dpojax.objectives.pairs import PairInfo, PairLogps, ResponseLogps, known
from dpojax.training.logps import TokenScores, response_sums
from dpojax.training.micro_batches import each_micro_batch
from dpojax.training.scores import StepScores


class TokenSums(NamedTuple):
    """Sums over the tokens of every pair's responses; 0 in steps without details."""

    chosen_logits: Float[Array, "*B"]  # of the mean logit over the vocabulary
    rejected_logits: Float[Array, "*B"]
    chosen_entropy: Float[Array, "*B"]  # nats
    rejected_entropy: Float[Array, "*B"]
    chosen_correct: Float[Array, "*B"]  # tokens that are the most likely ones


class PairResults(NamedTuple):
    """What is known of every pair of a batch; the pairs of padding have row_id -1.

    Of unpaired data `chosen` is the labelled response and `rejected` a mismatched one.
    """

    row_id: Int[Array, "*B"]
    # probability that `chosen` is the better response; of unpaired data its label, 1 or 0
    label: Float[Array, "*B"]
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
    tokens: TokenSums


def gather_pairs(mb: PackedBatch, per_response) -> tuple[Array, Array]:
    """Per-response values [A, S] -> (chosen, rejected), [A P] each."""
    take = functools.partial(jnp.take_along_axis, axis=1)
    return take(per_response, mb.chosen).reshape(-1), take(per_response, mb.rejected).reshape(-1)


def pair_sums(
    mb: PackedBatch, values: Float[Array, "A T"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Sums per-token values over the responses of every pair: (chosen, rejected); B = A P."""
    return gather_pairs(mb, response_sums(values, mb.weight, mb.response, mb.lengths.shape[1]))


def pair_heads(
    mb: PackedBatch, values: Float[Array, "A T"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """As `pair_sums`, of the first min(|y_w|, |y_l|) tokens of both responses alone."""

    def shard(values, weight, response, lengths, chosen, rejected):
        live = weight > 0
        before = jnp.cumsum(live) - live  # scored tokens of the shard before this one
        first = jax.ops.segment_min(before, response, lengths.shape[0])
        rank = before - first[response]
        limit = jnp.minimum(lengths[chosen], lengths[rejected])

        def head_sum(number):
            in_head = live & (response == number[:, None]) & (rank < limit[:, None])  # [P, T]
            return jnp.sum(jnp.where(in_head, values, 0.0), axis=1)

        return head_sum(chosen), head_sum(rejected)

    sums = jax.vmap(shard)(values, mb.weight, mb.response, mb.lengths, mb.chosen, mb.rejected)
    chosen, rejected = sums
    return chosen.reshape(-1), rejected.reshape(-1)


def logps_of_pairs(
    mb: PackedBatch, logps: Float[Array, "A T"], *, heads: bool = False
) -> PairLogps:
    """Token log-probs as log-probs of the responses of every pair."""
    chosen, rejected = pair_sums(mb, logps)
    chosen_lengths, rejected_lengths = gather_pairs(mb, mb.lengths)
    pairs = PairLogps(
        chosen=ResponseLogps(chosen, chosen_lengths),
        rejected=ResponseLogps(rejected, rejected_lengths),
    )
    if not heads:
        return pairs
    return with_field(pairs, "head", pair_heads(mb, logps))


def with_field(
    pairs: PairLogps, field: str, values: tuple[Float[Array, " B"], Float[Array, " B"]]
) -> PairLogps:
    """The pairs with a field of `ResponseLogps` that their objective asks for.

    Args:
      field: its name.
      values: of the chosen responses, and of the rejected ones.
    """
    chosen, rejected = values
    return PairLogps(
        chosen=pairs.chosen._replace(**{field: chosen}),
        rejected=pairs.rejected._replace(**{field: rejected}),
    )


def pair_info(mb: PackedBatch) -> PairInfo:
    """What the data says of a micro-batch's pairs; padding has weight 0."""
    return PairInfo(
        weight=jnp.where(mb.valid, mb.pair_weight, 0.0).reshape(-1),
        soft_label=mb.soft_label.reshape(-1),
        margin=mb.margin.reshape(-1),
        mean_chosen_length=mb.num_chosen_tokens / jnp.maximum(mb.num_pairs, 1),
        valid=mb.valid.reshape(-1),
    )


def pairs_of(
    loss: Loss, mb: PackedBatch, scores: StepScores
) -> tuple[PairLogps, PairLogps | None, PairInfo]:
    """What `loss` takes, of a micro-batch: (policy, ref, info)."""
    heads = loss.needs("head")
    tokens = scores.policy
    policy = logps_of_pairs(mb, tokens.logps, heads=heads)
    if tokens.kl is not None:
        policy = with_field(policy, "kl", pair_sums(mb, tokens.kl))
    if tokens.log_sum_sq is not None:
        policy = with_field(policy, "weight", _wpo_weights(mb, policy, tokens))
    ref = None
    if scores.ref_logps is not None:
        ref = logps_of_pairs(mb, scores.ref_logps, heads=heads)
    return policy, ref, pair_info(mb)


def _wpo_weights(
    mb: PackedBatch, policy: PairLogps, tokens: TokenScores
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """WPO's w(y) of both responses, Zhou et al. 2024 (arXiv:2406.11827).

    The geometric mean over the tokens of pi(y_t) / sum_v pi(v)^2; no gradient.
    """
    log_weight = jax.lax.stop_gradient(tokens.logps - known(tokens.log_sum_sq))
    chosen, rejected = pair_sums(mb, log_weight)
    return (
        jnp.exp(chosen / jnp.maximum(policy.chosen.lengths, 1)),
        jnp.exp(rejected / jnp.maximum(policy.rejected.lengths, 1)),
    )


def step_pairs(
    loss: Loss, batch: PackedBatch, scores: StepScores
) -> tuple[PairLogps, PairLogps | None, PairInfo]:
    """As `pairs_of`, of a whole step: fields [M, ...].

    The pairs of all micro-batches and shards are one axis.
    """
    policy, ref, info = each_micro_batch(functools.partial(pairs_of, loss), batch, scores)
    # it is that of the step, the same in every micro-batch
    mean_length = known(info.mean_chosen_length)[0]
    policy, ref, info = jax.tree.map(lambda x: x.reshape(-1), (policy, ref, info))
    return policy, ref, info._replace(mean_chosen_length=mean_length)


def pair_results(
    loss: Loss, policy: PairLogps, ref: PairLogps | None, info: PairInfo, row_id
) -> PairResults:
    """What is logged of B pairs, without the token details."""
    policy = jax.lax.stop_gradient(policy)

    def total(shift):
        out = loss(policy._replace(chosen=policy.chosen.shifted(shift)), ref, info)
        return jnp.sum(jnp.where(info.valid, out.loss, 0.0)), out

    no_shift = jnp.zeros_like(policy.chosen.logps)
    (_, out), gradient = jax.value_and_grad(total, has_aux=True)(no_shift)
    zero = jnp.zeros_like(out.loss)
    return PairResults(
        row_id=row_id,
        label=info.soft_label,
        loss=jnp.where(info.valid, out.loss, 0.0),
        margin=out.margin,
        pull=-gradient / loss.reward_scale,
        chosen_rewards=out.chosen_rewards,
        rejected_rewards=out.rejected_rewards,
        policy_chosen=policy.chosen.logps,
        policy_rejected=policy.rejected.logps,
        ref_chosen=None if ref is None else ref.chosen.logps,
        ref_rejected=None if ref is None else ref.rejected.logps,
        chosen_lengths=policy.chosen.lengths,
        rejected_lengths=policy.rejected.lengths,
        tokens=TokenSums(
            chosen_logits=zero,
            rejected_logits=zero,
            chosen_entropy=zero,
            rejected_entropy=zero,
            chosen_correct=zero,
        ),
    )


def with_details(mb: PackedBatch, results: PairResults, scores: TokenScores) -> PairResults:
    """The results of a micro-batch with the sums over its tokens."""
    chosen_logits, rejected_logits = pair_sums(mb, scores.mean_logit)
    chosen_entropy, rejected_entropy = pair_sums(mb, scores.entropy)
    chosen_correct, _ = pair_sums(mb, scores.correct.astype(jnp.float32))
    sums = TokenSums(
        chosen_logits=chosen_logits,
        rejected_logits=rejected_logits,
        chosen_entropy=chosen_entropy,
        rejected_entropy=rejected_entropy,
        chosen_correct=chosen_correct,
    )
    return results._replace(tokens=jax.lax.stop_gradient(sums))
