"""Scores of responses -> what is written of each row, and of all of them together."""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.data.groups import Group
from dpojax.data.rows import response_texts
from dpojax.errors import ConfigError
from dpojax.evaluation import statistics
from dpojax.objectives.exact_policy import best_of_k_mean, best_of_n_kl, best_of_n_kl_bound


class Scores(NamedTuple):
    """What the models say of a row's responses, [K] each."""

    lengths: Sequence[int]  # tokens that count
    rewards: np.ndarray | None = None  # of a reward model, or beta (log pi - log pi_ref)
    logps: np.ndarray | None = None  # log pi(y | x), nats; None: of a reward model
    ref_logps: np.ndarray | None = None  # of the reference

    @property
    def ranked(self) -> np.ndarray:
        """What the responses are ranked by: rewards, or log-probs where there are none."""
        values = self.logps if self.rewards is None else self.rewards
        assert values is not None
        return values


def _item(value: Any) -> Any:
    """A number of numpy's as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    return value


def describe(row: dict[str, Any], group: Group, scores: Scores) -> dict[str, Any]:
    """What is written of a row: of a pair by name, of candidates as lists in the row's order."""
    if "chosen" in row or "chosen_ids" in row:
        return _describe_pair(scores)
    values = {
        "logps": scores.logps,
        "length": scores.lengths,
        "ref_logps": scores.ref_logps,
        "reward": scores.rewards,
    }
    # By a chat template a response is more than the row's text: its message has that.
    spelled = list(group.responses)
    if group.answers is not None:
        spelled = [answer["content"] for answer in group.answers]
    texts = response_texts(row.get("completions", row.get("responses", spelled)))
    places = [spelled.index(text) for text in texts]
    written: dict[str, Any] = {
        name: [float(value[place]) for place in places]
        for name, value in values.items()
        if value is not None
    }
    return written | {"best": int(np.argmax([scores.ranked[place] for place in places]))}


def _describe_pair(scores: Scores) -> dict[str, Any]:
    """A pair's values in columns that are named as TRL names them."""
    ranked = scores.ranked
    # A row whose responses are equal has one of them, which is both.
    sides = {"chosen": 0, "rejected": len(ranked) - 1}
    columns = {
        "{side}_logps": scores.logps,
        "{side}_length": scores.lengths,
        "ref_{side}_logps": scores.ref_logps,
        "{side}_reward": scores.rewards,
    }
    written = {
        column.format(side=side): _item(values[place])
        for column, values in columns.items()
        if values is not None
        for side, place in sides.items()
    }
    return written | {"margin": float(ranked[sides["chosen"]] - ranked[sides["rejected"]])}


AVERAGED = (  # columns of which the summary has the mean
    "chosen_logps",
    "rejected_logps",
    "chosen_length",
    "rejected_length",
    "chosen_reward",
    "rejected_reward",
)


def summarise(
    rows: list[dict[str, Any]], left_out: dict[str, int], args: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy with its interval over the pairs, and means."""
    margins = np.asarray([row["margin"] for row in rows if "margin" in row])
    summary: dict[str, Any] = {"model": args.model, "ref": None, "beta": None}
    if args.reward_model:
        summary |= {"model": args.reward_model}
    if args.ref:
        summary |= {"ref": args.ref, "beta": args.beta}
    summary |= {"rows": len(rows), "pairs": len(margins), "left_out": left_out}
    if args.best_of:
        summary["best_of"] = best_of_curve(rows, best_of_sizes(args.best_of))
    if not len(margins):
        return summary
    won = float(np.sum(margins > 0) + 0.5 * np.sum(margins == 0))
    rate = statistics.wilson(won, len(margins))
    summary |= {
        "accuracy": rate.value,
        "accuracy_low": rate.low,
        "accuracy_high": rate.high,
        "mean_margin": float(margins.mean()),
    }
    for column in AVERAGED:
        values = [row[column] for row in rows if column in row]
        if column in rows[0]:
            summary[f"mean_{column}"] = float(np.mean(values))
    return summary


def best_of_sizes(text: str) -> list[int]:
    """The numbers of --best_of. Raises ConfigError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ConfigError(f"--best_of={text!r}: it must be whole numbers from 1 on, as 1,2,4,8")
    return sorted({int(part) for part in parts})


def best_of_curve(rows: Sequence[dict[str, Any]], sizes: Sequence[int]) -> list[dict[str, Any]]:
    """What the best of k candidates earns, for every k, over the rows with at least k of them.

    mean_reward is unbiased from all N candidates of a row (`best_of_k_mean`). kl_bound is log
    k - (k - 1) / k, which no best-of-k policy passes; kl_estimate is the KL of choosing among a
    row's N candidates, which ties lower, and which cannot pass log N.
    """
    curve = []
    for k in sizes:
        rewards = [
            np.asarray(row["reward"], np.float64)
            for row in rows
            if "reward" in row and len(row["reward"]) >= k
        ]
        point: dict[str, Any] = {"k": k, "prompts": len(rewards)}
        if rewards:
            mean, error = statistics.mean_with_error(
                [float(best_of_k_mean(values, k)) for values in rewards]
            )
            alike = [np.full(len(values), -np.log(len(values))) for values in rewards]
            kls = [
                float(best_of_n_kl(logps, values, k))
                for logps, values in zip(alike, rewards, strict=True)
            ]
            point |= {
                "mean_reward": mean,
                "standard_error": error,
                "kl_bound": best_of_n_kl_bound(k),
                "kl_estimate": float(np.mean(kls)),
            }
        curve.append(point)
    return curve
