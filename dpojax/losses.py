"""Log-probs of pairs -> per-pair loss: pure functions, one per paper, that never reduce; and the table that names them.

Notation, as in the papers: a = log pi(y_w|x) - log ref(y_w|x), b the same for y_l, h = a - b; all in
nats. B pairs. s = sigmoid, ls = log s. A loss is minimised; the caller takes the mean over the pairs of
the whole step. `objectives.py` turns a name with its settings into a function of two models' log-probs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class PairLogps(NamedTuple):
    """What one model says of both responses of every pair. Fields that no objective asked for are None."""

    chosen: Float[Array, "B"]  # log pi(y_w | x), nats
    rejected: Float[Array, "B"]  # log pi(y_l | x), nats
    chosen_lengths: Int[Array, "B"]  # response tokens, EOS included, formatting tokens left out
    rejected_lengths: Int[Array, "B"]
    chosen_head: Float[Array, "B"] | None = None  # the part of `chosen` up to token min(|y_w|, |y_l|)
    rejected_head: Float[Array, "B"] | None = None
    chosen_kl: Float[Array, "B"] | None = None  # sum over y_w's tokens of KL(ref(.|prefix) || pi(.|prefix)), nats
    rejected_kl: Float[Array, "B"] | None = None
    chosen_weight: Float[Array, "B"] | None = None  # WPO's w(y_w); no gradient
    rejected_weight: Float[Array, "B"] | None = None

    def swapped(self) -> "PairLogps":
        """The same pairs with the labels reversed."""
        return PairLogps._make(x for i in range(0, len(self), 2) for x in (self[i + 1], self[i]))


class PairInfo(NamedTuple):
    """What is known of a pair besides its log-probs; None where the data does not say.

    Unpaired data (KTO) are pairs too: the labelled response stands as chosen, a mismatched one (another prompt's answer)
    as rejected, and `soft_label` is the label, 1 or 0.
    """

    weight: Float[Array, "B"] | None = None  # multiplies the pair's loss; 0 at padding
    soft_label: Float[Array, "B"] | None = None  # probability that the chosen one is the better one
    margin: Float[Array, "B"] | None = None  # score of chosen minus score of rejected
    mean_chosen_length: Float[Array, ""] | None = None  # of the whole step: sum of |y_w| / number of pairs
    valid: Bool[Array, "B"] | None = None  # False at padding
    shift: Float[Array, ""] | None = None  # running mean of the implicit rewards, for bco_pair_shift


class Pairs(NamedTuple):
    """B pairs as a loss sees them."""

    a: Float[Array, "B"]  # log pi/ref of the chosen response, nats; f'(pi/ref) under an f-divergence; log pi without reference
    b: Float[Array, "B"]  # of the rejected one
    policy: PairLogps
    ref: PairLogps | None  # without gradient
    info: PairInfo

    @property
    def h(self) -> Float[Array, "B"]:
        """The difference that DPO trains."""
        return self.a - self.b

    @property
    def lengths(self) -> tuple[Array, Array]:
        """|y_w| and |y_l|, at least 1."""
        return jnp.maximum(self.policy.chosen_lengths, 1), jnp.maximum(self.policy.rejected_lengths, 1)

    @property
    def valid(self) -> Bool[Array, "B"]:
        """False at padding."""
        return jnp.ones(self.a.shape, bool) if self.info.valid is None else self.info.valid


ls = jax.nn.log_sigmoid


def known(*values: Array | None) -> tuple[Array, ...]:
    """The values, of which none may be missing: what a row of OBJECTIVES says that it needs, the trainer computes."""
    assert all(v is not None for v in values), "the objective reads what its row of OBJECTIVES does not ask for"
    return values  # pyright: ignore[reportReturnType]


# --- differences of log-ratios ----------------------------------------------------------------------------------------


def _smoothed(z: Array, e: float) -> Array:
    return -(1 - e) * ls(z) - e * ls(-z)


def sigmoid_loss(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, "B"]:
    """DPO, Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290): -ls(beta h); its optimum is beta h = logit p.

    With label_smoothing e > 0 it is conservative DPO (Mitchell's cDPO note, Eq. 3), for labels that are
    wrong with probability e: -(1 - e) ls(beta h) - e ls(-beta h); its optimum at p = 1 is beta h = logit(1 - e).

    Args:
      x: the pairs; log-ratios in nats.
      beta: strength of the pull to the reference, > 0.
      label_smoothing: e, in [0, 0.5).
    Returns: per-pair loss, nats. [B]. The caller averages.
    """
    return _smoothed(beta * x.h, label_smoothing)


def robust_loss(x: Pairs, *, beta: float, label_smoothing: float) -> Float[Array, "B"]:
    """rDPO, Chowdhury et al. 2024 (arXiv:2403.00409): DPO's loss, unbiased under labels flipped with probability e.

    [-(1 - e) ls(beta h) + e ls(-beta h)] / (1 - 2e); its optimum is that of the clean labels, beta h = logit p.
    """
    z, e = beta * x.h, label_smoothing
    return (-(1 - e) * ls(z) + e * ls(-z)) / (1 - 2 * e)


def hinge_loss(x: Pairs, *, beta: float) -> Float[Array, "B"]:
    """Hinge: SLiC (Zhao et al. 2023, arXiv:2305.10425) on log-ratios, as in RSO (arXiv:2309.06657): relu(1 - beta h).

    beta is RSO's gamma: the margin is 1 / beta nats.
    """
    return jax.nn.relu(1 - beta * x.h)


def _square(x: Array) -> Array:
    # An f-divergence may be as large as exp(80), whose square is no float32, nor the sum of many.
    return jnp.square(jnp.clip(x, -1e17, 1e17))


def ipo_loss(x: Pairs, *, beta: float, average: bool = True) -> Float[Array, "B"]:
    """IPO, Eq. 17 of Azar et al. 2023 (arXiv:2310.12036): (h - 1 / (2 beta))^2.

    Args:
      beta: the paper's tau, > 0; larger keeps the policy nearer the reference.
      average: divide each log-ratio by its response's length first (the authors' advice for language models).
    Returns: per-pair loss, nats^2. [B].
    """
    (len_w, len_l) = x.lengths if average else (1, 1)
    return _square(x.a / len_w - x.b / len_l - 1 / (2 * beta))


def sigmoid_norm_loss(x: Pairs, *, beta: float) -> Float[Array, "B"]:
    """Length-normalised DPO, Tulu 3 (Lambert et al. 2024, arXiv:2411.15124): -ls(beta (a / |y_w| - b / |y_l|))."""
    len_w, len_l = x.lengths
    return -ls(beta * (x.a / len_w - x.b / len_l))


def exo_pair_loss(x: Pairs, *, beta: float, label_smoothing: float) -> Float[Array, "B"]:
    """EXO, Eq. 16 of Ji et al. 2024 (arXiv:2402.00856): KL from the policy's preference to the smoothed label (1 - e, e).

    s(z)[ls(z) - log(1 - e)] + s(-z)[ls(-z) - log e], z = beta h; e > 0.
    """
    z, e = beta * x.h, label_smoothing
    return jax.nn.sigmoid(z) * (ls(z) - math.log1p(-e)) + jax.nn.sigmoid(-z) * (ls(-z) - math.log(e))


def discopop_loss(x: Pairs, *, beta: float, tau: float) -> Float[Array, "B"]:
    """DiscoPOP, Lu et al. 2024 (arXiv:2406.08414), Eq. 5: -ls(z)(1 - m) + exp(-z) m, z = beta h, m = s(z / tau).

    Not convex: at p = 1 there is a local minimum of the wrong sign near z = -0.119 (tau 0.05).
    """
    z = beta * x.h
    # exp(-z) alone overflows where m vanishes: the product is taken in the exponent.
    return -ls(z) * jax.nn.sigmoid(-z / tau) + jnp.exp(-z + ls(z / tau))


def dpop_loss(x: Pairs, *, beta: float, dpop_lambda: float) -> Float[Array, "B"]:
    """DPO-Positive, Pal et al. 2024 (arXiv:2402.13228): -ls(beta (h - lambda max(0, -a))).

    The penalty keeps the chosen response from becoming less likely than under the reference.
    """
    return -ls(beta * (x.h - dpop_lambda * jax.nn.relu(-x.a)))


def r_dpo_loss(x: Pairs, *, beta: float, alpha: float) -> Float[Array, "B"]:
    """R-DPO, Park et al. 2024 (arXiv:2403.19159): -ls(beta h + alpha (|y_w| - |y_l|)).

    It follows from r - alpha |y| in the KL-regularised objective; its optimum is beta h = logit p - alpha (|y_w| - |y_l|).
    """
    longer = x.policy.chosen_lengths - x.policy.rejected_lengths
    return -ls(beta * x.h + alpha * longer)


def odpo_loss(x: Pairs, *, beta: float, alpha: float) -> Float[Array, "B"]:
    """ODPO, Amini et al. 2024 (arXiv:2402.10571): -ls(beta h - alpha log(score_w - score_l)); the data brings the scores."""
    (margin,) = known(x.info.margin)
    offset = alpha * jnp.log(jnp.where(margin > 0, margin, 1.0))  # padding has no margin
    return -ls(beta * x.h - offset)


def _head_ratios(x: Pairs) -> tuple[Array, Array]:
    """Log-ratios of the first min(|y_w|, |y_l|) tokens of both responses."""
    assert x.ref is not None
    both = known(x.policy.chosen_head, x.policy.rejected_head, x.ref.chosen_head, x.ref.rejected_head)
    return both[0] - both[2], both[1] - both[3]


def ld_dpo_loss(x: Pairs, *, beta: float, alpha: float) -> Float[Array, "B"]:
    """LD-DPO, Liu et al. 2024 (arXiv:2409.06411): DPO on log-probs whose tail past min(|y_w|, |y_l|) counts alpha times."""
    a_head, b_head = _head_ratios(x)
    return -ls(beta * (a_head + alpha * (x.a - a_head) - b_head - alpha * (x.b - b_head)))


def tdpo1_loss(x: Pairs, *, beta: float) -> Float[Array, "B"]:
    """TDPO-1, Zeng et al. 2024 (arXiv:2404.11999): -ls(beta h - beta (K_l - K_w)).

    K = sum over a response's tokens of KL(ref(.|prefix) || pi(.|prefix)), over the full vocabulary.
    """
    k_w, k_l = known(x.policy.chosen_kl, x.policy.rejected_kl)
    return -ls(beta * x.h - beta * (k_l - k_w))


def tdpo2_loss(x: Pairs, *, beta: float, alpha: float) -> Float[Array, "B"]:
    """TDPO-2, Zeng et al. 2024 (arXiv:2404.11999): -ls(beta h - alpha beta (K_l - sg K_w)); sg = no gradient."""
    k_w, k_l = known(x.policy.chosen_kl, x.policy.rejected_kl)
    return -ls(beta * x.h - alpha * beta * (k_l - jax.lax.stop_gradient(k_w)))


# --- each response for itself -----------------------------------------------------------------------------------------


def nca_pair_loss(x: Pairs, *, beta: float) -> Float[Array, "B"]:
    """NCA, Chen et al. 2024 (arXiv:2402.05369): -ls(beta a) - ls(-beta a) / 2 - ls(-beta b) / 2."""
    return -ls(beta * x.a) - 0.5 * ls(-beta * x.a) - 0.5 * ls(-beta * x.b)


def bco_pair_loss(x: Pairs, *, beta: float) -> Float[Array, "B"]:
    """BCO, Jung et al. 2024 (arXiv:2404.04656), without shift (as TRL): -ls(beta a) - ls(-beta b)."""
    return -ls(beta * x.a) - ls(-beta * x.b)


def bco_pair_shift_loss(x: Pairs, *, beta: float) -> Float[Array, "B"]:
    """BCO, Jung et al. 2024 (arXiv:2404.04656): -ls(beta a - d) - ls(-(beta b - d)).

    The shift d is the mean implicit reward of all responses so far, this whole step's included; no gradient.
    """
    d = 0.0 if x.info.shift is None else jax.lax.stop_gradient(x.info.shift)
    return -ls(beta * x.a - d) - ls(d - beta * x.b)


def sppo_hard_loss(x: Pairs, *, beta: float) -> Float[Array, "B"]:
    """SPPO with hard labels, Wu et al. 2024 (arXiv:2405.00675), Eq. 4.7: (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2."""
    return _square(x.a - 0.5 / beta) + _square(x.b + 0.5 / beta)


def apo_zero_loss(x: Pairs, *, beta: float) -> Float[Array, "B"]:
    """APO-zero, Eq. 7 of D'Oosterlinck et al. 2024 (arXiv:2408.06266): 1 - s(beta a) + s(beta b)."""
    return jax.nn.sigmoid(-beta * x.a) + jax.nn.sigmoid(beta * x.b)


def apo_down_loss(x: Pairs, *, beta: float) -> Float[Array, "B"]:
    """APO-down, Eq. 8 of D'Oosterlinck et al. 2024 (arXiv:2408.06266): s(beta a) + 1 - s(beta h)."""
    return jax.nn.sigmoid(beta * x.a) + jax.nn.sigmoid(-beta * x.h)


# --- coupled over the whole step --------------------------------------------------------------------------------------


def _sort(values: Float[Array, "B"], valid: Bool[Array, "B"]) -> tuple[Array, Array]:
    """(sorted values, rank of each value), padding last."""
    order = jnp.argsort(jnp.where(valid, values, jnp.inf), stable=True)
    return values[order], jnp.argsort(order, stable=True)


def aot_loss(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, "B"]:
    """AOT, Melnyk et al. 2024 (arXiv:2406.05882): DPO between equal quantiles of the policy's and the reference's gaps.

    Smoothed -ls of beta (sort(pi_w - pi_l) - sort(ref_w - ref_l)), sorted over the pairs of the whole step; a pair's loss
    is that of its rank.
    """
    assert x.ref is not None
    gap = x.policy.chosen - x.policy.rejected
    ref_sorted, _ = _sort(x.ref.chosen - x.ref.rejected, x.valid)
    _, rank = _sort(gap, x.valid)
    return _smoothed(beta * (gap - ref_sorted[rank]), label_smoothing)


def aot_unpaired_loss(x: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Float[Array, "B"]:
    """Unpaired AOT, Melnyk et al. 2024 (arXiv:2406.05882): smoothed -ls of beta (sort(a) - sort(b)) over the whole step.

    The loss stands at the pair whose chosen response has the rank.
    """
    b_sorted, _ = _sort(x.b, x.valid)
    _, rank = _sort(x.a, x.valid)
    return _smoothed(beta * (x.a - b_sorted[rank]), label_smoothing)


def kto_point(x: Pairs) -> Float[Array, ""]:
    """KTO's reference point z0: max(0, mean log-ratio of the mismatched responses of the whole step), nats; no gradient."""
    total = jnp.sum(jnp.where(x.valid, x.b, 0.0))
    return jax.lax.stop_gradient(jnp.maximum(0.0, total / jnp.maximum(jnp.sum(x.valid), 1)))


def kto_loss(x: Pairs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Float[Array, "B"]:
    """KTO, Eq. 8 of Ethayarajh et al. 2024 (arXiv:2402.01306), on unpaired data; x.a belongs to the labelled response.

    lambda_D (1 - s(beta (r - z0))) on desirable responses, lambda_U (1 - s(beta (z0 - r))) on undesirable ones, r = a.
    """
    return _by_label(x, beta * (x.a - kto_point(x)), desirable_weight, undesirable_weight)


def apo_zero_unpaired_loss(
    x: Pairs, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Float[Array, "B"]:
    """APO-zero (arXiv:2408.06266, Eq. 7) on unpaired data: 1 - s(beta r) on desirable responses, s(beta r) on others."""
    return _by_label(x, beta * x.a, desirable_weight, undesirable_weight)


def _by_label(x: Pairs, z: Array, desirable_weight: float, undesirable_weight: float) -> Array:
    """1 - s(z) on desirable responses and s(z) on others, weighted."""
    return jnp.where(_desirable(x), desirable_weight * jax.nn.sigmoid(-z), undesirable_weight * jax.nn.sigmoid(z))


def _desirable(x: Pairs) -> Bool[Array, "B"]:
    (label,) = known(x.info.soft_label)
    return label > 0.5


# --- without a reference ----------------------------------------------------------------------------------------------


def _gap_per_token(x: Pairs) -> Array:
    len_w, len_l = x.lengths
    return x.policy.chosen / len_w - x.policy.rejected / len_l


def simpo_loss(x: Pairs, *, beta: float, gamma: float) -> Float[Array, "B"]:
    """SimPO, Eq. 6 of Meng et al. 2024 (arXiv:2405.14734): -ls(beta (log pi_w / |y_w| - log pi_l / |y_l|) - gamma)."""
    return -ls(beta * _gap_per_token(x) - gamma)


def _log_odds(x: Pairs) -> Float[Array, "B"]:
    """log(odds(y_w) / odds(y_l)) with P = exp(mean log-prob)."""
    largest = -jnp.finfo(x.policy.chosen.dtype).eps  # a response of probability 1 has infinite odds
    means = [jnp.minimum(v / n, largest) for v, n in zip(x.policy[:2], x.lengths, strict=True)]
    w, l = (m - jnp.log(-jnp.expm1(m)) for m in means)
    return w - l


def orpo_loss(x: Pairs, *, orpo_lambda: float) -> Float[Array, "B"]:
    """ORPO, Hong et al. 2024 (arXiv:2403.07691), Eq. 3-7: NLL(y_w) per token - lambda ls(log odds_w - log odds_l)."""
    return sft_loss(x, sft_normalize="pair") - orpo_lambda * ls(_log_odds(x))


def cpo_loss(x: Pairs, *, beta: float, alpha: float, sft_normalize: str = "token") -> Float[Array, "B"]:
    """CPO, Xu et al. 2024 (arXiv:2401.08417): -ls(beta (log pi_w - log pi_l)) + alpha NLL(y_w)."""
    nll = sft_loss(x, sft_normalize=sft_normalize)
    return -ls(beta * (x.policy.chosen - x.policy.rejected)) + alpha * nll


def sft_loss(x: Pairs, *, sft_normalize: str = "token") -> Float[Array, "B"]:
    """Negative log-likelihood of the chosen response, alone or as an addition to a preference loss.

    "token" (Llama 3, arXiv:2407.21783): -log pi(y_w) / mean |y_w|, whose mean over the pairs is the mean over
    the chosen tokens of the whole step. "pair" (RPO, arXiv:2404.19733): -log pi(y_w) / |y_w|.

    Returns: nats per token. [B].
    """
    if sft_normalize == "pair":
        return -x.policy.chosen / x.lengths[0]
    mean_length = x.info.mean_chosen_length
    if mean_length is None:
        mean_length = jnp.mean(x.policy.chosen_lengths.astype(x.policy.chosen.dtype))
    return -x.policy.chosen / mean_length


# --- f-divergences ----------------------------------------------------------------------------------------------------

LARGEST_EXPONENT = 80.0  # exp of it is a float32; TRL clamps the alpha divergence there


def _exp(x: Array) -> Array:
    return jnp.exp(jnp.minimum(x, LARGEST_EXPONENT))


# f'(u) as a function of log u, u = pi/ref, minus its value at u = 1 (Wang et al. 2023, arXiv:2309.16240).
F_DIVERGENCES: dict[str, Callable[[Array, float], Array]] = {
    "reverse_kl": lambda x, c: x,
    "forward_kl": lambda x, c: 1 - _exp(-x),
    "js": lambda x, c: math.log(2) + ls(x),
    "alpha": lambda x, c: x if abs(c - 1) < 1e-6 else (_exp((c - 1) * x) - 1) / (c - 1),
}


def dpo_gradient(policy: PairLogps, ref: PairLogps, *, beta: float) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Eq. 8 of Rafailov et al. 2023, by hand: d loss / d log pi(y_w|x) and d loss / d log pi(y_l|x).

    -beta s(r_l - r_w) [grad log pi(y_w) - grad log pi(y_l)], with the implicit rewards r = beta log pi/ref: pairs
    that the policy's own reward ranks wrongly weigh most.

    Returns: (-w, +w) with w = beta s(r_l - r_w). [B] each.
    """
    a, b = policy.chosen - ref.chosen, policy.rejected - ref.rejected
    weight = beta * jax.nn.sigmoid(beta * b - beta * a)
    return -weight, weight


# --- the table --------------------------------------------------------------------------------------------------------

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table below: a loss function, whose keyword arguments are its settings, and what it needs."""

    function: Callable[..., Float[Array, "B"]]
    # (pairs in numpy, settings) -> its value where policy == reference, [B] or a number; None: not known in closed form
    at_reference: Callable[[Any, Settings], Any] | None = None
    margin: Callable[[Pairs, Settings], Array] = lambda x, s: x.h  # what it trains upwards; its sign is its accuracy
    per_token: bool = False  # its implicit rewards are those of a token, as TRL logs them
    data: str = "pairs"  # or "unpaired"
    reference: str = "any"  # "none": not used; "live": its full distributions; "moving": ref <- alpha pi + (1 - alpha) ref
    needs: tuple[str, ...] = ()  # of "head", "kl", "mismatched", "shift", "scores"
    coupled: bool = False  # over the pairs of the whole step
    f_divergence: bool = False  # a function of a and b alone, in which f'(u) may stand for log u
    # name of a setting -> (test, what it must be), where that is more than objectives.RANGES asks
    ranges: Mapping[str, tuple[Callable[[Any], bool], str]] = dataclasses.field(default_factory=dict)


LOG2 = math.log(2)


def _softplus(x):
    return np.logaddexp(0.0, x)


def _gap(x, normalised: bool):
    """log pi_w - log pi_l of pairs in numpy; per token if `normalised`."""
    len_w, len_l = (np.maximum(x.policy[i], 1) if normalised else 1 for i in (2, 3))
    return x.policy.chosen / len_w - x.policy.rejected / len_l


def _nll(x, normalize: str):
    lengths = np.maximum(x.policy.chosen_lengths, 1)
    if normalize == "token":
        lengths = x.info.mean_chosen_length
    return -x.policy.chosen / lengths


def _orpo_at(x, s: Settings):
    odds = []
    for logps, lengths in zip(x.policy[:2], x.policy[2:4], strict=True):
        p = np.exp(logps / np.maximum(lengths, 1))
        odds.append(p / (1 - p))
    return _nll(x, "pair") + s["orpo_lambda"] * np.log1p(odds[1] / odds[0])


def _unpaired_at(x, s: Settings):
    return 0.5 * np.where(x.info.soft_label > 0.5, s["desirable_weight"], s["undesirable_weight"])


def _normalised(x: Pairs, s: Settings) -> Array:
    len_w, len_l = x.lengths if s.get("average", True) else (1, 1)
    return x.a / len_w - x.b / len_l


def _ld_margin(x: Pairs, s: Settings) -> Array:
    a_head, b_head = _head_ratios(x)
    head = a_head - b_head
    return head + s["alpha"] * (x.h - head)


def _tdpo_margin(x: Pairs, s: Settings) -> Array:
    k_w, k_l = known(x.policy.chosen_kl, x.policy.rejected_kl)
    return x.h - s.get("alpha", 1.0) * (k_l - k_w)


def _r_dpo_margin(x: Pairs, s: Settings) -> Array:
    return s["beta"] * x.h + s["alpha"] * (x.policy.chosen_lengths - x.policy.rejected_lengths)


def _sides(point: Callable[[Pairs], Any]) -> Callable[[Pairs, Settings], Array]:
    return lambda x, s: jnp.where(_desirable(x), x.a - point(x), point(x) - x.a)


_HALF_OPEN = (lambda v: 0 < v < 0.5, "in (0, 0.5)")
_SHARE = (lambda v: 0 < v <= 1, "in (0, 1]")
_MOVING = {"alpha": _SHARE, "tau": (lambda v: v >= 1 and float(v).is_integer(), "a whole number of steps, at least 1")}


def moving(function: Callable[..., Any], at_reference, **row: Any) -> Objective:
    """The row of TR-DPO's variant of `function` (Gorbatovski et al. 2024, arXiv:2404.09656).

    Every tau steps ref <- alpha pi + (1 - alpha) ref; alpha = 1 replaces it ("hard"). The step does that, not the loss.
    """
    return Objective(function, at_reference, reference="moving", ranges=_MOVING, **row)


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(sigmoid_loss, lambda x, s: LOG2, f_divergence=True),
    "robust": Objective(robust_loss, lambda x, s: LOG2, f_divergence=True),
    "hinge": Objective(hinge_loss, lambda x, s: 1.0, f_divergence=True),
    "ipo": Objective(ipo_loss, lambda x, s: 1 / (4 * s["beta"] ** 2), _normalised, f_divergence=True),
    "sigmoid_norm": Objective(sigmoid_norm_loss, lambda x, s: LOG2, _normalised, f_divergence=True),
    "exo_pair": Objective(
        exo_pair_loss,
        lambda x, s: -LOG2 - 0.5 * math.log(s["label_smoothing"] * (1 - s["label_smoothing"])),
        f_divergence=True,
        ranges={"label_smoothing": _HALF_OPEN},
    ),
    "nca_pair": Objective(nca_pair_loss, lambda x, s: 2 * LOG2),
    "bco_pair": Objective(bco_pair_loss, lambda x, s: 2 * LOG2),
    "bco_pair_shift": Objective(bco_pair_shift_loss, lambda x, s: 2 * LOG2, needs=("shift",), coupled=True),
    "sppo_hard": Objective(sppo_hard_loss, lambda x, s: 1 / (2 * s["beta"] ** 2)),
    "aot": Objective(aot_loss, lambda x, s: LOG2, coupled=True),
    "aot_unpaired": Objective(aot_unpaired_loss, lambda x, s: LOG2, coupled=True),
    "apo_zero": Objective(apo_zero_loss, lambda x, s: 1.0),
    "apo_down": Objective(apo_down_loss, lambda x, s: 1.0),
    "discopop": Objective(discopop_loss, lambda x, s: 0.5 * LOG2 + 0.5, f_divergence=True, ranges={"tau": _SHARE}),
    "dpop": Objective(
        dpop_loss, lambda x, s: LOG2, lambda x, s: x.h - s["dpop_lambda"] * jax.nn.relu(-x.a), f_divergence=True
    ),
    "r_dpo": Objective(
        r_dpo_loss,
        lambda x, s: _softplus(-s["alpha"] * (x.policy.chosen_lengths - x.policy.rejected_lengths)),
        _r_dpo_margin,
        f_divergence=True,
    ),
    "odpo": Objective(
        odpo_loss, lambda x, s: _softplus(s["alpha"] * np.log(x.info.margin)), needs=("scores",), f_divergence=True
    ),
    "ld_dpo": Objective(ld_dpo_loss, lambda x, s: LOG2, _ld_margin, needs=("head",), ranges={"alpha": _SHARE}),
    "tdpo1": Objective(tdpo1_loss, lambda x, s: LOG2, _tdpo_margin, reference="live", needs=("kl",)),
    "tdpo2": Objective(tdpo2_loss, lambda x, s: LOG2, _tdpo_margin, reference="live", needs=("kl",)),
    "simpo": Objective(
        simpo_loss, lambda x, s: _softplus(s["gamma"] - s["beta"] * _gap(x, True)), lambda x, s: _gap_per_token(x), reference="none",
        per_token=True,
    ),
    "orpo": Objective(orpo_loss, _orpo_at, lambda x, s: _log_odds(x), reference="none", per_token=True),
    "cpo": Objective(
        cpo_loss,
        lambda x, s: _softplus(-s["beta"] * _gap(x, False)) + s["alpha"] * _nll(x, s["sft_normalize"]),
        lambda x, s: x.policy.chosen - x.policy.rejected,
        reference="none",
    ),
    "sft": Objective(
        sft_loss,
        lambda x, s: _nll(x, s["sft_normalize"]),
        lambda x, s: x.policy.chosen - x.policy.rejected,
        reference="none",
    ),
    "kto": Objective(
        kto_loss, _unpaired_at, _sides(kto_point), data="unpaired", needs=("mismatched",), coupled=True
    ),
    "apo_zero_unpaired": Objective(apo_zero_unpaired_loss, _unpaired_at, _sides(lambda x: 0.0), data="unpaired"),
    "tr_dpo": moving(sigmoid_loss, lambda x, s: LOG2, f_divergence=True),
    "tr_ipo": moving(ipo_loss, lambda x, s: 1 / (4 * s["beta"] ** 2), margin=_normalised, f_divergence=True),
    "tr_kto": moving(
        kto_loss, _unpaired_at, margin=_sides(kto_point), data="unpaired", needs=("mismatched",), coupled=True
    ),
}  # fmt: skip
