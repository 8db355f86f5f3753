"""The best of the samples of a prompt, by a reward: best-of-n, and rejection sampling for SFT."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.objectives.exact_policy import best_of_k_mean, best_of_n_kl_bound


def best_places(rewards: Sequence[float | None], count: int) -> list[int]:
    """Which samples of a prompt are kept: those of the largest rewards, the best first.

    Ties go to the sample that was drawn first; a sample without a reward comes last.
    """
    values = [-np.inf if reward is None else reward for reward in rewards]
    return [int(k) for k in np.argsort(-np.asarray(values), kind="stable")[:count]]


class BestOf(NamedTuple):
    """What choosing among the samples of every prompt was worth."""

    prompts: int  # whose samples all have a reward
    of_one: float  # mean reward of a sample
    of_all: float  # mean reward of the best one
    kl_bound: float  # nats from the policy that best-of-n is at most away


def describe_choice(rewards: Sequence[Sequence[float | None]]) -> BestOf:
    """Means over the prompts whose samples all have a reward; each has as many samples."""
    whole = [row for row in rewards if all(reward is not None for reward in row)]
    samples = len(rewards[0])
    known = np.asarray(whole, np.float64).reshape(-1, samples)
    if not len(known):
        return BestOf(0, float("nan"), float("nan"), best_of_n_kl_bound(samples))
    return BestOf(
        prompts=len(known),
        of_one=float(known.mean()),
        of_all=float(np.mean(best_of_k_mean(known, samples))),
        kl_bound=best_of_n_kl_bound(samples),
    )


def sft_row(row: dict[str, Any], text: str) -> dict[str, Any]:
    """A row of prompts as a demonstration: its dialogue goes on, or it has a completion."""
    rest = {name: value for name, value in row.items() if name not in ("responses", "completions")}
    if "messages" in row:
        return {**rest, "messages": [*row["messages"], {"role": "assistant", "content": text}]}
    return {**rest, "completion": text}
