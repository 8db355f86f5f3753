"""Samples and scores -> win rate, length-controlled win rate, KL, and whether the policy collapsed."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.errors import ConfigError
from dpojax.functions import load_function

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


class Rate(NamedTuple):
    """A rate with its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(successes: float, trials: int) -> Rate:
    """Wilson's score interval (Wilson 1927) at 95 %; half successes (ties) are allowed."""
    if trials == 0:
        return Rate(math.nan, 0.0, 1.0)
    p, z2 = successes / trials, Z95**2
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2))
    return Rate(p, max(0.0, centre - half), min(1.0, centre + half))


def win_rate(policy_scores: Sequence[float], ref_scores: Sequence[float]) -> Rate:
    """Share of prompts on which the policy's response scores higher; a tie is half a win."""
    difference = np.asarray(policy_scores) - np.asarray(ref_scores)
    return wilson(float(np.sum(difference > 0) + 0.5 * np.sum(difference == 0)), len(difference))


def length_controlled_win_rate(
    policy_scores: Sequence[float], ref_scores: Sequence[float], length_difference: Sequence[float]
) -> float:
    """The win rate that a logistic model predicts for responses of equal length (AlpacaEval 2, arXiv:2404.04475).

    logit P(win) = a + b * tanh(d / std(d)), d = policy's length minus reference's; the answer is s(a).
    Fitted by Newton's method on wins with ties at 1/2, with a ridge of 1e-3 on b.
    """
    difference = np.asarray(policy_scores, float) - np.asarray(ref_scores, float)
    wins = (difference > 0) + 0.5 * (difference == 0)
    length = np.asarray(length_difference, float)
    x = np.stack([np.ones_like(length), np.tanh(length / (length.std() or 1.0))], axis=1)
    ridge, weights = np.diag([1e-9, 1e-3 * len(wins)]), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
        gradient = x.T @ (wins - p) - ridge @ weights
        step = np.linalg.solve((x * (p * (1 - p) + 1e-9)[:, None]).T @ x + ridge, gradient)
        weights = np.clip(weights + step, -30, 30)
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def mean_with_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    x = np.asarray(values, float)
    return float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the responses (Li et al. 2016, arXiv:1510.03055)."""
    grams = [tuple(r[i : i + n]) for r in responses for i in range(len(r) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def check_scores(spec: str, scores: object, count: int) -> list[float]:
    """A reward function's scores of `count` responses as numbers. Raises: ConfigError for anything else."""
    try:
        values = [float(score) for score in scores]  # pyright: ignore[reportGeneralTypeIssues]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sample.reward={spec!r} gave {scores!r:.80}; it must give a number for every response") from error
    if len(values) != count:
        raise ConfigError(f"sample.reward={spec!r} gave {len(values)} scores for {count} responses")
    bad = next((value for value in values if not math.isfinite(value)), None)
    if bad is not None:
        raise ConfigError(f"sample.reward={spec!r} gave the score {bad}; it must be a finite number")
    return values


def try_reward(spec: str, prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Calls a reward function on a few samples, so that its mistakes show before the training. Raises: ConfigError."""
    reward = load_reward(spec)
    try:
        scores = reward(list(prompts), list(responses))
    except Exception as error:  # whatever a user's function raises is theirs to read
        raise ConfigError(
            f"sample.reward={spec!r} fails on {len(prompts)} samples: {type(error).__name__}: {error}; it is called with a list "
            "of prompts and a list of responses, texts, and gives a number for each"
        ) from error
    check_scores(spec, scores, len(prompts))


def load_reward(spec: str) -> Callable[[Sequence[str], Sequence[str]], Sequence[float]]:
    """The function that `sample.reward` names: module:function or file.py:function, (prompts, responses) -> scores.

    Raises: ConfigError if it cannot be found.
    """
    return load_function(spec, "sample.reward")
