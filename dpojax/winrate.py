"""Samples -> scores by a reward function of the user's, and whether the policy collapsed."""

import math
from collections.abc import Callable, Sequence

from dpojax.errors import ConfigError
from dpojax.functions import load_function


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
