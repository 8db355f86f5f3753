"""Log-probs of pairs -> per-pair loss: pure functions, one per paper, that never reduce.

Notation, as in the papers: a = log pi(y_w|x) - log ref(y_w|x), b the same for y_l, h = a - b; all
in nats. B pairs. s = sigmoid, ls = log s. A loss is minimised; the caller takes the mean over the
pairs of the whole step. `loss.py` turns a name with its settings into a function of two models'
log-probs.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpojax.objectives.pairs import PairLogps, Pairs, known

ls = jax.nn.log_sigmoid

# --- differences of log-ratios --------------------------------------------------------------------


def _smoothed(z: Array, e: float) -> Array:
    return -(1 - e) * ls(z) - e * ls(-z)


def sigmoid_loss(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, " B"]:
    """DPO, Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290): -ls(beta h).

    Its optimum is beta h = logit p.

    With label_smoothing e > 0 it is conservative DPO (Mitchell's cDPO note, Eq. 3), for labels that
    are wrong with probability e: -(1 - e) ls(beta h) - e ls(-beta h); its optimum at p = 1 is beta
    h = logit(1 - e).

    Args:
      x: the pairs; log-ratios in nats.
      beta: strength of the pull to the reference, > 0.
      label_smoothing: e, in [0, 0.5).
    Returns: per-pair loss, nats. [B]. The caller averages.
    """
    return _smoothed(beta * x.h, label_smoothing)


def robust_loss(x: Pairs, *, beta: float, label_smoothing: float) -> Float[Array, " B"]:
    """rDPO, Chowdhury et al. 2024 (arXiv:2403.00409): DPO under noisy labels.

    The loss is unbiased where labels are flipped with probability e.

    [-(1 - e) ls(beta h) + e ls(-beta h)] / (1 - 2e); its optimum is that of the clean labels, beta
    h = logit p.
    """
    z = beta * x.h
    e = label_smoothing
    return (-(1 - e) * ls(z) + e * ls(-z)) / (1 - 2 * e)


def hinge_loss(x: Pairs, *, beta: float) -> Float[Array, " B"]:
    """SLiC (Zhao et al. 2023, arXiv:2305.10425) on log-ratios: relu(1 - beta h).

    RSO (arXiv:2309.06657) uses it so.

    beta is RSO's gamma: the margin is 1 / beta nats.
    """
    return jax.nn.relu(1 - beta * x.h)


def _square(x: Array) -> Array:
    # An f-divergence may be as large as exp(80), whose square is no float32, nor the sum of many.
    return jnp.square(jnp.clip(x, -1e17, 1e17))


def ipo_loss(x: Pairs, *, beta: float, average: bool = True) -> Float[Array, " B"]:
    """IPO, Eq. 17 of Azar et al. 2023 (arXiv:2310.12036): (h - 1 / (2 beta))^2.

    Args:
      beta: the paper's tau, > 0; larger keeps the policy nearer the reference.
      average: divide each log-ratio by its response's length first (the authors' advice for
        language models).
    Returns: per-pair loss, nats^2. [B].
    """
    len_w, len_l = x.lengths if average else (1, 1)
    return _square(x.a / len_w - x.b / len_l - 1 / (2 * beta))


def sigmoid_norm_loss(x: Pairs, *, beta: float) -> Float[Array, " B"]:
    """Length-normalised DPO, Tulu 3 (Lambert et al. 2024, arXiv:2411.15124).

    -ls(beta (a / |y_w| - b / |y_l|)).
    """
    len_w, len_l = x.lengths
    return -ls(beta * (x.a / len_w - x.b / len_l))


def exo_pair_loss(x: Pairs, *, beta: float, label_smoothing: float) -> Float[Array, " B"]:
    """EXO, Eq. 16 of Ji et al. 2024 (arXiv:2402.00856).

    KL from the policy's preference to the smoothed label (1 - e, e).

    s(z)[ls(z) - log(1 - e)] + s(-z)[ls(-z) - log e], z = beta h; e > 0.
    """
    z = beta * x.h
    e = label_smoothing
    return jax.nn.sigmoid(z) * (ls(z) - math.log1p(-e)) + jax.nn.sigmoid(-z) * (
        ls(-z) - math.log(e)
    )


def discopop_loss(x: Pairs, *, beta: float, tau: float) -> Float[Array, " B"]:
    """DiscoPOP, Eq. 5 of Lu et al. 2024 (arXiv:2406.08414).

    -ls(z)(1 - m) + exp(-z) m, with z = beta h and m = s(z / tau).

    Not convex: at p = 1 there is a local minimum of the wrong sign near z = -0.119 (tau 0.05).
    """
    z = beta * x.h
    # exp(-z) alone overflows where m vanishes: the product is taken in the exponent.
    return -ls(z) * jax.nn.sigmoid(-z / tau) + jnp.exp(-z + ls(z / tau))


def dpop_loss(x: Pairs, *, beta: float, dpop_lambda: float) -> Float[Array, " B"]:
    """DPO-Positive, Pal et al. 2024 (arXiv:2402.13228): -ls(beta (h - lambda max(0, -a))).

    The penalty keeps the chosen response from becoming less likely than under the reference.
    """
    return -ls(beta * (x.h - dpop_lambda * jax.nn.relu(-x.a)))


def r_dpo_loss(x: Pairs, *, beta: float, alpha: float) -> Float[Array, " B"]:
    """R-DPO, Park et al. 2024 (arXiv:2403.19159): -ls(beta h + alpha (|y_w| - |y_l|)).

    It follows from r - alpha |y| in the KL-regularised objective; its optimum is beta h = logit p -
    alpha (|y_w| - |y_l|).
    """
    longer = x.policy.chosen.lengths - x.policy.rejected.lengths
    return -ls(beta * x.h + alpha * longer)


def odpo_loss(x: Pairs, *, beta: float, alpha: float) -> Float[Array, " B"]:
    """ODPO, Amini et al. 2024 (arXiv:2402.10571).

    -ls(beta h - alpha log(score_w - score_l)); the data brings the scores.
    """
    margin = known(x.info.margin)
    offset = alpha * jnp.log(jnp.where(margin > 0, margin, 1.0))  # padding has no margin
    return -ls(beta * x.h - offset)


def head_ratios(x: Pairs) -> tuple[Array, Array]:
    """Log-ratios of the first min(|y_w|, |y_l|) tokens of both responses."""
    ref = known(x.ref)
    chosen = known(x.policy.chosen.head) - known(ref.chosen.head)
    rejected = known(x.policy.rejected.head) - known(ref.rejected.head)
    return chosen, rejected


def ld_dpo_loss(x: Pairs, *, beta: float, alpha: float) -> Float[Array, " B"]:
    """LD-DPO, Liu et al. 2024 (arXiv:2409.06411).

    DPO on log-probs whose tail past min(|y_w|, |y_l|) counts alpha times.
    """
    a_head, b_head = head_ratios(x)
    return -ls(beta * (a_head + alpha * (x.a - a_head) - b_head - alpha * (x.b - b_head)))


def tdpo1_loss(x: Pairs, *, beta: float) -> Float[Array, " B"]:
    """TDPO-1, Zeng et al. 2024 (arXiv:2404.11999): -ls(beta h - beta (K_l - K_w)).

    K = sum over a response's tokens of KL(ref(.|prefix) || pi(.|prefix)), over the full vocabulary.
    """
    k_w = known(x.policy.chosen.kl)
    k_l = known(x.policy.rejected.kl)
    return -ls(beta * x.h - beta * (k_l - k_w))


def tdpo2_loss(x: Pairs, *, beta: float, alpha: float) -> Float[Array, " B"]:
    """TDPO-2, Zeng et al. 2024 (arXiv:2404.11999).

    -ls(beta h - alpha beta (K_l - sg K_w)), where sg stops the gradient.
    """
    k_w = known(x.policy.chosen.kl)
    k_l = known(x.policy.rejected.kl)
    return -ls(beta * x.h - alpha * beta * (k_l - jax.lax.stop_gradient(k_w)))


# --- each response for itself ---------------------------------------------------------------------


def nca_pair_loss(x: Pairs, *, beta: float) -> Float[Array, " B"]:
    """NCA, Chen et al. 2024 (arXiv:2402.05369): -ls(beta a) - ls(-beta a) / 2 - ls(-beta b) / 2."""
    return -ls(beta * x.a) - 0.5 * ls(-beta * x.a) - 0.5 * ls(-beta * x.b)


def bco_pair_loss(x: Pairs, *, beta: float) -> Float[Array, " B"]:
    """BCO, Jung et al. 2024 (arXiv:2404.04656): -ls(beta a) - ls(-beta b).

    Without the shift, as TRL has it.
    """
    return -ls(beta * x.a) - ls(-beta * x.b)


def bco_pair_shift_loss(x: Pairs, *, beta: float) -> Float[Array, " B"]:
    """BCO, Jung et al. 2024 (arXiv:2404.04656): -ls(beta a - d) - ls(-(beta b - d)).

    The shift d is the mean implicit reward of all responses so far, this whole step's included; no
    gradient.
    """
    d = 0.0 if x.info.shift is None else jax.lax.stop_gradient(x.info.shift)
    return -ls(beta * x.a - d) - ls(d - beta * x.b)


def sppo_hard_loss(x: Pairs, *, beta: float) -> Float[Array, " B"]:
    """SPPO with hard labels, Eq. 4.7 of Wu et al. 2024 (arXiv:2405.00675).

    (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2.
    """
    return _square(x.a - 0.5 / beta) + _square(x.b + 0.5 / beta)


def apo_zero_loss(x: Pairs, *, beta: float) -> Float[Array, " B"]:
    """APO-zero, Eq. 7 of D'Oosterlinck et al. 2024 (arXiv:2408.06266).

    1 - s(beta a) + s(beta b).
    """
    return jax.nn.sigmoid(-beta * x.a) + jax.nn.sigmoid(beta * x.b)


def apo_down_loss(x: Pairs, *, beta: float) -> Float[Array, " B"]:
    """APO-down, Eq. 8 of D'Oosterlinck et al. 2024 (arXiv:2408.06266).

    s(beta a) + 1 - s(beta h).
    """
    return jax.nn.sigmoid(beta * x.a) + jax.nn.sigmoid(-beta * x.h)


# --- coupled over the whole step ------------------------------------------------------------------


def _sort(values: Float[Array, " B"], valid: Bool[Array, " B"]) -> tuple[Array, Array]:
    """(sorted values, rank of each value), padding last."""
    order = jnp.argsort(jnp.where(valid, values, jnp.inf), stable=True)
    return values[order], jnp.argsort(order, stable=True)


def aot_loss(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, " B"]:
    """AOT, Melnyk et al. 2024 (arXiv:2406.05882).

    DPO between equal quantiles of the policy's and the reference's gaps.

    Smoothed -ls of beta (sort(pi_w - pi_l) - sort(ref_w - ref_l)), sorted over the pairs of the
    whole step; a pair's loss is that of its rank.
    """
    ref = known(x.ref)
    gap = x.policy.chosen.logps - x.policy.rejected.logps
    ref_sorted, _ = _sort(ref.chosen.logps - ref.rejected.logps, x.valid)
    _, rank = _sort(gap, x.valid)
    return _smoothed(beta * (gap - ref_sorted[rank]), label_smoothing)


def aot_unpaired_loss(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, " B"]:
    """Unpaired AOT, Melnyk et al. 2024 (arXiv:2406.05882).

    Smoothed -ls of beta (sort(a) - sort(b)), sorted over the whole step.

    The loss stands at the pair whose chosen response has the rank.
    """
    b_sorted, _ = _sort(x.b, x.valid)
    _, rank = _sort(x.a, x.valid)
    return _smoothed(beta * (x.a - b_sorted[rank]), label_smoothing)


def kto_point(x: Pairs) -> Float[Array, ""]:
    """KTO's reference point z0, nats; no gradient.

    max(0, mean log-ratio of the mismatched responses of the whole step).
    """
    total = jnp.sum(jnp.where(x.valid, x.b, 0.0))
    return jax.lax.stop_gradient(jnp.maximum(0.0, total / jnp.maximum(jnp.sum(x.valid), 1)))


def kto_loss(
    x: Pairs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Float[Array, " B"]:
    """KTO, Eq. 8 of Ethayarajh et al. 2024 (arXiv:2402.01306), on unpaired data.

    x.a belongs to the labelled response.

    lambda_D (1 - s(beta (r - z0))) on desirable responses, lambda_U (1 - s(beta (z0 - r))) on
    undesirable ones, r = a.
    """
    return _by_label(x, beta * (x.a - kto_point(x)), desirable_weight, undesirable_weight)


def apo_zero_unpaired_loss(
    x: Pairs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Float[Array, " B"]:
    """APO-zero (arXiv:2408.06266, Eq. 7) on unpaired data.

    1 - s(beta r) on desirable responses, s(beta r) on others.
    """
    return _by_label(x, beta * x.a, desirable_weight, undesirable_weight)


def _by_label(x: Pairs, z: Array, desirable_weight: float, undesirable_weight: float) -> Array:
    """1 - s(z) on desirable responses and s(z) on others, weighted."""
    return jnp.where(
        desirable(x), desirable_weight * jax.nn.sigmoid(-z), undesirable_weight * jax.nn.sigmoid(z)
    )


def desirable(x: Pairs) -> Bool[Array, " B"]:
    """Which responses of unpaired data are labelled as desirable."""
    return known(x.info.soft_label) > 0.5


# --- without a reference --------------------------------------------------------------------------


def gap_per_token(x: Pairs) -> Array:
    """Log pi(y_w) / |y_w| - log pi(y_l) / |y_l|, nats per token. [B]."""
    len_w, len_l = x.lengths
    return x.policy.chosen.logps / len_w - x.policy.rejected.logps / len_l


def simpo_loss(x: Pairs, *, beta: float, gamma: float) -> Float[Array, " B"]:
    """SimPO, Eq. 6 of Meng et al. 2024 (arXiv:2405.14734).

    -ls(beta (log pi_w / |y_w| - log pi_l / |y_l|) - gamma).
    """
    return -ls(beta * gap_per_token(x) - gamma)


def log_odds(x: Pairs) -> Float[Array, " B"]:
    """log(odds(y_w) / odds(y_l)) with P = exp(mean log-prob)."""
    len_w, len_l = x.lengths
    return _log_odds(x.policy.chosen.logps / len_w) - _log_odds(x.policy.rejected.logps / len_l)


def _log_odds(logp: Array) -> Array:
    """log(P / (1 - P)) of P = exp(logp)."""
    largest = -jnp.finfo(logp.dtype).eps  # P = 1 has infinite odds
    logp = jnp.minimum(logp, largest)
    return logp - jnp.log(-jnp.expm1(logp))


def orpo_loss(x: Pairs, *, orpo_lambda: float) -> Float[Array, " B"]:
    """ORPO, Eq. 3-7 of Hong et al. 2024 (arXiv:2403.07691).

    NLL(y_w) per token - lambda ls(log odds_w - log odds_l).
    """
    return sft_loss(x, sft_normalize="pair") - orpo_lambda * ls(log_odds(x))


def cpo_loss(
    x: Pairs, *, beta: float, alpha: float, sft_normalize: str = "token"
) -> Float[Array, " B"]:
    """CPO, Xu et al. 2024 (arXiv:2401.08417): -ls(beta (log pi_w - log pi_l)) + alpha NLL(y_w)."""
    nll = sft_loss(x, sft_normalize=sft_normalize)
    return -ls(beta * (x.policy.chosen.logps - x.policy.rejected.logps)) + alpha * nll


def sft_loss(x: Pairs, *, sft_normalize: str = "token") -> Float[Array, " B"]:
    """Negative log-likelihood of the chosen response, alone or as an addition to a preference loss.

    "token" (Llama 3, arXiv:2407.21783): -log pi(y_w) / mean |y_w|, whose mean over the pairs is the
    mean over the chosen tokens of the whole step. "pair" (RPO, arXiv:2404.19733): -log pi(y_w) /
    |y_w|.

    Returns: nats per token. [B].
    """
    chosen = x.policy.chosen
    if sft_normalize == "pair":
        len_w, _ = x.lengths
        return -chosen.logps / len_w
    mean_length = x.info.mean_chosen_length
    if mean_length is None:
        mean_length = jnp.mean(chosen.lengths.astype(chosen.logps.dtype))
    return -chosen.logps / mean_length


# --- the gradient ---------------------------------------------------------------------------------


def dpo_gradient(
    policy: PairLogps, ref: PairLogps, *, beta: float
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Eq. 8 of Rafailov et al. 2023, by hand.

    d loss / d log pi(y_w|x) and d loss / d log pi(y_l|x).

    -beta s(r_l - r_w) [grad log pi(y_w) - grad log pi(y_l)], with the implicit rewards r = beta log
    pi/ref: pairs that the policy's own reward ranks wrongly weigh most.

    Returns: (-w, +w) with w = beta s(r_l - r_w). [B] each.
    """
    a = policy.chosen.logps - ref.chosen.logps
    b = policy.rejected.logps - ref.rejected.logps
    weight = beta * jax.nn.sigmoid(beta * b - beta * a)
    return -weight, weight
