"""Outcomes of prompts -> rates and differences with intervals, tests between two policies, and how
many prompts a gap needs.

Two policies are compared on the same prompts: everything here that takes both is paired.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Interval(NamedTuple):
    """An estimate with its interval, at 95 % where nothing else is said."""

    value: float
    low: float
    high: float


def wilson(successes: float, trials: int) -> Interval:
    """Wilson's score interval of a rate (Wilson 1927) at 95 %;
    half successes (ties) are allowed.
    """
    if trials == 0:
        return Interval(math.nan, 0.0, 1.0)
    rate = successes / trials
    z2 = Z95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    half = Z95 / (1 + z2 / trials) * spread
    return Interval(rate, max(0.0, centre - half), min(1.0, centre + half))


def win_rate(policy_scores: ArrayLike, ref_scores: ArrayLike) -> Interval:
    """Share of prompts on which the policy's response scores higher; a tie is half a win."""
    difference = np.asarray(policy_scores) - np.asarray(ref_scores)
    wins = np.sum(difference > 0) + 0.5 * np.sum(difference == 0)
    return wilson(float(wins), len(difference))


def length_controlled_win_rate(
    policy_scores: ArrayLike,
    ref_scores: ArrayLike,
    length_difference: ArrayLike,
) -> float:
    """The win rate that a logistic model predicts for responses of equal length (AlpacaEval 2,
    arXiv:2404.04475).

    logit P(win) = a + b * tanh(d / std(d)), d = policy's length minus reference's; the answer is
    s(a). Fitted by Newton's method on wins with ties at 1/2, with a ridge of 1e-3 on b.
    """
    difference = np.asarray(policy_scores, float) - np.asarray(ref_scores, float)
    wins = (difference > 0) + 0.5 * (difference == 0)
    length = np.asarray(length_difference, float)
    x = np.stack([np.ones_like(length), np.tanh(length / (length.std() or 1.0))], axis=1)
    ridge = np.diag([1e-9, 1e-3 * len(wins)])
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (wins - p) - ridge @ weights
        curvature = (x * (p * (1 - p) + 1e-9)[:, None]).T @ x + ridge
        step = np.linalg.solve(curvature, gradient)
        weights = np.clip(weights + step, -30, 30)
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def mean_with_error(values: ArrayLike) -> tuple[float, float]:
    """Mean and its standard error; the error of a single value is nan."""
    x = np.asarray(values, float)
    error = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return float(x.mean()), error


def _paired(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """first - second, prompt by prompt.

    Raises: ValueError unless both have the same prompts, at least one.
    """
    a = np.asarray(first, float)
    b = np.asarray(second, float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(
            f"{a.shape} and {b.shape} outcomes: both policies need one for each of the same prompts"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("an outcome is not finite; leave its prompt out of both")
    return a - b


def paired_difference(
    first: ArrayLike, second: ArrayLike, *, resamples: int = 9999, seed: int = 0
) -> Interval:
    """Mean of first - second over the same prompts, with its BCa bootstrap interval at 95 % (Efron
    1987).

    Args:
      first, second: an outcome of each prompt under either policy. [N] each; the unit is theirs.
      resamples: of the prompts; the pair of a prompt stays together.
    """
    difference = _paired(first, second)
    value = float(difference.mean())
    if np.ptp(difference) == 0:  # every resample has the same mean
        return Interval(value, value, value)
    generator = np.random.default_rng(seed)
    bootstrap = scipy.stats.bootstrap(
        (difference,), np.mean, n_resamples=resamples, method="BCa", rng=generator, batch=256
    )
    low, high = bootstrap.confidence_interval
    return Interval(value, float(low), float(high))


def mcnemar(first_wins: ArrayLike, second_wins: ArrayLike) -> float:
    """The two-sided exact p-value that two policies win alike often on the same prompts (McNemar
    1947).

    Prompts on which both win or both lose say nothing; of the others, either side is as likely.
    """
    difference = _paired(np.asarray(first_wins, bool), np.asarray(second_wins, bool))
    gained = int((difference > 0).sum())
    lost = int((difference < 0).sum())
    return float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flip_test(
    first: ArrayLike, second: ArrayLike, *, resamples: int = 9999, seed: int = 0
) -> float:
    """The two-sided p-value that which policy gave which outcome of a prompt does not matter to
    their mean.

    A permutation test within prompts: exact where 2^N is at most `resamples`, else by random
    exchanges.
    """
    difference = _paired(first, second)
    if not difference.any():
        return 1.0
    test = scipy.stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", vectorized=True, axis=0,
        n_resamples=resamples, rng=np.random.default_rng(seed), batch=256,
    )  # fmt: skip
    return float(test.pvalue)


def prompts_for_gap(
    first_rate: float, second_rate: float, *, power: float = 0.8, correlation: float = 0.0
) -> int:
    """How many prompts show that two rates differ, at a level of 5 %, with this power.

    n = (z_{.975} + z_power)^2 Var(a - b) / gap^2 by the normal approximation (Cohen 1988, section
    6.2).

    Args:
      first_rate, second_rate: in (0, 1).
      power: probability to see the gap; in (0, 1).
      correlation: of both policies' outcomes on a prompt; 0 also where they have prompts of their
        own, and n is then the number of each.
    """
    if not (0 < first_rate < 1 and 0 < second_rate < 1 and first_rate != second_rate):
        raise ValueError(f"rates {first_rate} and {second_rate}: they must be in (0, 1) and differ")
    if not (0 < power < 1 and -1 < correlation < 1):
        raise ValueError(f"power {power} must be in (0, 1), correlation {correlation} in (-1, 1)")
    quantiles = Z95 + scipy.stats.norm.ppf(power)
    first = first_rate * (1 - first_rate)
    second = second_rate * (1 - second_rate)
    variance = first + second - 2 * correlation * math.sqrt(first * second)
    return math.ceil(quantiles**2 * variance / (first_rate - second_rate) ** 2)


def holm(p_values: ArrayLike) -> np.ndarray:
    """p-values of several comparisons, adjusted so that the chance of any false one is bounded
    (Holm 1979). [M].

    For the share of false ones among those that are called, see
    `scipy.stats.false_discovery_control`.
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    stepped = (len(p) - np.arange(len(p))) * p[order]
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return adjusted
