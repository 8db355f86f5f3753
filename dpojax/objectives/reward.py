"""Bradley-Terry reward models: losses of scalar rewards, calibration, and normalisation.

B pairs; K responses of each of G prompts. A reward is the head's float32 at the last real token of
a response. A loss is per pair or per prompt and never reduces: the caller takes the mean over the
step. s = sigmoid.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dpojax.errors import ConfigError, DataError


def bradley_terry_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    *,
    margin: Float[Array, " B"] | None = None,
    soft_label: Float[Array, " B"] | None = None,
    centring: float = 0.0,
) -> Float[Array, " B"]:
    """-p log s(d - m) - (1 - p) log s(-d + m), d = r_w - r_l, plus centring (r_w + r_l)^2.

    Bradley and Terry 1952, as Ouyang et al. 2022 (arXiv:2203.02155), Eq. 1; the margin m is
    Llama 2's (arXiv:2307.09288, Eq. 2); centring is Eisenstein et al. 2023 (arXiv:2312.09244). Its
    minimiser over all pairs is d = m + logit p; centring chooses the constant of each prompt that
    the differences leave open.

    Args:
      chosen: r(x, y_w). [B].
      rejected: r(x, y_l). [B].
      margin: m; None: 0. [B].
      soft_label: p, the probability that the chosen one is better; None: 1. [B].
      centring: coefficient, >= 0; TRL's docs recommend .01.
    Returns: per-pair loss, nats. [B].
    """
    gap = chosen - rejected
    if margin is not None:
        gap = gap - margin
    loss = -jax.nn.log_sigmoid(gap)
    if soft_label is not None:
        loss = soft_label * loss - (1 - soft_label) * jax.nn.log_sigmoid(-gap)
    if centring:
        loss = loss + centring * jnp.square(chosen + rejected)
    return loss


def group_loss(
    rewards: Float[Array, "G K"],
    preferences: Float[Array, "G K K"],
    compared: Bool[Array, "G K K"],
    *,
    margins: Float[Array, "G K K"] | None = None,
    centring: float = 0.0,
) -> Float[Array, " G"]:
    """The mean of `bradley_terry_loss` over the compared pairs of each prompt (InstructGPT, Eq. 1:
    all C(K, 2) pairs of a prompt are one element of the batch).

    A pair is the two responses i < j; what stands at j <= i is not read, and neither are the
    rewards of responses that no pair compares.

    Args:
      rewards: r(x, y_k). [G, K].
      preferences: p(y_i beats y_j): a label of 1, 0 or anything between. [G, K, K].
      compared: True: somebody compared y_i with y_j. [G, K, K].
      margins: m of y_i over y_j; None: 0. [G, K, K].
      centring: as `bradley_terry_loss`'s.
    Returns: per-prompt loss, nats; 0 where no pair is compared. [G].
    """
    first, second = np.triu_indices(rewards.shape[-1], 1)
    valid = compared[:, first, second]
    # What no pair compares may be NaN, which a weight of 0 would not stop.
    chosen = jnp.where(valid, rewards[:, first], 0.0)
    rejected = jnp.where(valid, rewards[:, second], 0.0)
    label = jnp.where(valid, preferences[:, first, second], 0.5)
    margin = None
    if margins is not None:
        margin = jnp.where(valid, margins[:, first, second], 0.0)
    losses = bradley_terry_loss(
        chosen, rejected, margin=margin, soft_label=label, centring=centring
    )
    count = jnp.sum(valid, axis=-1, dtype=losses.dtype)
    return jnp.sum(jnp.where(valid, losses, 0.0), axis=-1) / jnp.maximum(count, 1)


def preferences_of_scores(scores: Float[Array, "G K"]) -> Float[Array, "G K K"]:
    """Labels of a ranking by scores: 1 where y_i has the larger one,
    0 where y_j has, .5 for a tie.
    """
    larger = (scores[:, :, None] > scores[:, None, :]).astype(jnp.float32)
    smaller = (scores[:, :, None] < scores[:, None, :]).astype(jnp.float32)
    return (1 + larger - smaller) / 2


def plackett_luce_loss(
    rewards: Float[Array, "G K"], valid: Bool[Array, "G K"]
) -> Float[Array, " G"]:
    """-log P(ranking): the responses stand from best to worst, and each is the best of those that
    are left (Plackett 1975; Rafailov et al. 2023, arXiv:2305.18290, Eq. 18).

    For two responses it is `bradley_terry_loss`.

    Args:
      rewards: of the ranked responses, the best first. [G, K].
      valid: False at padding, which stands last. [G, K].
    Returns: per-prompt loss, nats. [G].
    """
    # Minus infinity would give NaN gradients where padding alone is left.
    known = jnp.where(valid, rewards, -1e30)
    left = jax.lax.cumlogsumexp(known, axis=1, reverse=True)
    return jnp.sum(jnp.where(valid, left - known, 0.0), axis=-1)


# --- on held-out pairs, on the host ---------------------------------------------------------------


def pair_accuracy(margins: np.ndarray) -> float:
    """Share of pairs whose chosen response has the larger reward; a tie counts half.

    Args:
      margins: r_w - r_l. [B].
    """
    d = np.asarray(margins, np.float64)
    return float(np.mean(np.heaviside(d, 0.5)))


class Reliability(NamedTuple):
    """How often the response that a reward model prefers is the chosen one, by its confidence."""

    edges: np.ndarray  # of the bins of confidence, from 0.5 to 1. [bins + 1]
    count: np.ndarray  # pairs. [bins]
    confidence: np.ndarray  # mean s(|d|) of the bin's pairs; NaN where there are none. [bins]
    accuracy: np.ndarray  # their share that is right, ties half; NaN likewise. [bins]
    ece: float  # expected calibration error: mean over pairs of |confidence - accuracy| of its bin


def reliability(margins: np.ndarray, *, bins: int = 10) -> Reliability:
    """Calibration of P(chosen beats rejected) = s(r_w - r_l), Eq. 1 of DPO's paper.

    The confidence of a pair is s(|r_w - r_l|), in [0.5, 1]; bins are equally wide (Guo et al. 2017,
    arXiv:1706.04599, Eq. 3).

    Args:
      margins: r_w - r_l of held-out pairs. [B].
      bins: at least 1.
    Raises: ConfigError for no bins; DataError for no pairs, or margins that are no numbers.
    """
    if bins < 1:
        raise ConfigError(f"bins is {bins}; it must be at least 1")
    d = np.asarray(margins, np.float64)
    if d.size == 0:
        raise DataError("there are no pairs to calibrate on")
    if np.isnan(d).any():
        raise DataError(f"{np.isnan(d).sum()} of {d.size} margins of rewards are NaN")
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    right = np.heaviside(d, 0.5)
    edges = np.linspace(0.5, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # an empty bin is 0 / 0
        mean_confidence = np.bincount(place, weights=confidence, minlength=bins) / count
        mean_accuracy = np.bincount(place, weights=right, minlength=bins) / count
    gaps = np.where(count > 0, np.abs(mean_confidence - mean_accuracy), 0.0)
    return Reliability(
        edges=edges,
        count=count,
        confidence=mean_confidence,
        accuracy=mean_accuracy,
        ece=float(np.sum(gaps * count) / d.size),
    )


class Normalisation(NamedTuple):
    """What makes a model's rewards mean 0 and standard deviation 1 on samples of the reference."""

    mean: float
    std: float

    def apply(self, rewards):
        """(r - mean) / std, of any shape."""
        return (rewards - self.mean) / self.std


def fit_normalisation(rewards: np.ndarray) -> Normalisation:
    """Mean and standard deviation (ddof 0) of rewards of samples of the reference (Ziegler et al.
    2019, arXiv:1909.08593, section 2.1).

    With it beta means the same in every run. Differences between rewards are divided by std alone:
    a normalised model prefers what it preferred before, with other margins.

    Args:
      rewards: of at least 2 samples. [N].
    Raises: DataError where a reward is not finite or all are equal.
    """
    r = np.asarray(rewards, np.float64)
    if not np.isfinite(r).all():
        raise DataError(
            f"{np.sum(~np.isfinite(r))} of {r.size} rewards of the reference's samples are not"
            " finite"
        )
    if r.size < 2 or r.max() == r.min():
        raise DataError(
            f"the rewards of {r.size} samples of the reference do not vary; a normalisation takes"
            " at least 2 different ones"
        )
    return Normalisation(mean=float(r.mean()), std=float(r.std()))
