"""Results of pairs -> every scalar that a step and an evaluation report."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dpojax.objectives.pairs import known
from dpojax.training.pairs import PairResults


def mean_where(values, where):
    """The mean of the values where `where` holds; nan where it nowhere does."""
    count = jnp.sum(where)
    return jnp.where(
        count > 0, jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(count, 1), jnp.nan
    )


def _quantile(values, where, q: float):
    """The q-quantile of the values where `where` holds, linear between neighbours."""
    ranked = jnp.sort(jnp.where(where, values, jnp.inf).reshape(-1))
    place = q * jnp.maximum(jnp.sum(where) - 1, 0)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(jnp.sum(where) - 1, 0))
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def ranked_right(margin):
    """1 where the margin is positive, and 0.5 at a tie, which is half right; else 0."""
    return (margin > 0) + 0.5 * (margin == 0)


class Side(NamedTuple):
    """The responses that are logged as chosen, or as rejected: values of every pair of a batch."""

    counts: Bool[Array, "*B"]  # False where the pair has no such response, as at padding
    rewards: Float[Array, "*B"]
    logps: Float[Array, "*B"]
    lengths: Int[Array, "*B"]
    logits: Float[Array, "*B"]  # summed over the response's tokens, as is the entropy
    entropy: Float[Array, "*B"]


def as_sides(r: PairResults, *, unpaired: bool) -> tuple[Side, Side]:
    """(chosen, rejected) responses as they are logged.

    Unpaired data have one labelled response each, which is chosen or rejected by its label.
    """
    valid = r.row_id >= 0
    chosen = Side(
        counts=valid,
        rewards=r.chosen_rewards,
        logps=r.policy_chosen,
        lengths=r.chosen_lengths,
        logits=r.tokens.chosen_logits,
        entropy=r.tokens.chosen_entropy,
    )
    if unpaired:
        desirable = r.label > 0.5
        undesirable = r.label <= 0.5
        return chosen._replace(counts=valid & desirable), chosen._replace(
            counts=valid & undesirable
        )
    rejected = Side(
        counts=valid,
        rewards=r.rejected_rewards,
        logps=r.policy_rejected,
        lengths=r.rejected_lengths,
        logits=r.tokens.rejected_logits,
        entropy=r.tokens.rejected_entropy,
    )
    return chosen, rejected


def pair_scalars(
    r: PairResults, *, unpaired: bool, mismatched: bool = False
) -> dict[str, Float[Array, ""]]:
    """Means over the pairs of a batch, under TRL's names where TRL has them.

    Beyond TRL: objective/accuracy and objective/margins (of what the objective trains, e.g.
    length-normalised), displacement (share of chosen responses that became less likely than under
    the reference), quantiles of the gradient weight (s(-beta h) for DPO), and lengths and accuracy
    by which response is longer. A mean over nothing, as over the undesirable responses of a step
    that holds none, is NaN.

    Args:
      r: the results; padding is left out.
      unpaired: chosen and rejected are the responses with label 1 and 0.
      mismatched: the rejected responses are answers to other prompts, from which KTO's reference
        point comes.
    """
    valid = r.row_id >= 0
    chosen, rejected = as_sides(r, unpaired=unpaired)
    reward_w = mean_where(chosen.rewards, chosen.counts)
    reward_l = mean_where(rejected.rewards, rejected.counts)
    margin = r.margin
    if not unpaired:
        margin = r.chosen_rewards - r.rejected_rewards
    scalars = {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margins": reward_w - reward_l,
        "rewards/accuracies": mean_where(ranked_right(margin), valid),
        "logps/chosen": mean_where(chosen.logps, chosen.counts),
        "logps/rejected": mean_where(rejected.logps, rejected.counts),
        "objective/accuracy": mean_where(ranked_right(r.margin), valid),
        "objective/margins": mean_where(r.margin, valid),
        "lengths/chosen": mean_where(chosen.lengths, chosen.counts),
        "lengths/rejected": mean_where(rejected.lengths, rejected.counts),
    }
    for q in (0.1, 0.5, 0.9):
        scalars[f"gradient_weight/q{round(100 * q)}"] = _quantile(jnp.abs(r.pull), valid, q)
    if r.ref_chosen is not None:
        scalars["displacement"] = mean_where(r.policy_chosen < r.ref_chosen, chosen.counts)
    if mismatched:
        # KTO's z0, as TRL calls it
        log_ratio = r.policy_rejected - known(r.ref_rejected)
        scalars["kl"] = jnp.maximum(0.0, mean_where(log_ratio, valid))
    if not unpaired:
        longer = r.chosen_lengths - r.rejected_lengths
        right = ranked_right(margin)
        scalars["rewards/accuracies_chosen_longer"] = mean_where(right, valid & (longer > 0))
        scalars["rewards/accuracies_chosen_shorter"] = mean_where(right, valid & (longer < 0))
    return scalars | _token_means(chosen, rejected, r.tokens.chosen_correct)


def _token_means(chosen: Side, rejected: Side, chosen_correct) -> dict[str, Float[Array, ""]]:
    """Means over tokens, as TRL takes them: not over pairs."""

    def total(values, counts):
        return jnp.sum(jnp.where(counts, values, 0).astype(jnp.float32))

    len_w = total(chosen.lengths, chosen.counts)
    len_l = total(rejected.lengths, rejected.counts)
    entropy = total(chosen.entropy, chosen.counts) + total(rejected.entropy, rejected.counts)
    return {
        "entropy": entropy / jnp.maximum(len_w + len_l, 1),
        "mean_token_accuracy": total(chosen_correct, chosen.counts) / jnp.maximum(len_w, 1),
        "logits/chosen": total(chosen.logits, chosen.counts) / jnp.maximum(len_w, 1),
        "logits/rejected": total(rejected.logits, rejected.counts) / jnp.maximum(len_l, 1),
    }
