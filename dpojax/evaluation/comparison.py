"""Finished runs side by side: what they were told, what came out, and tests on the same prompts."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.config.load import flat_settings
from dpojax.errors import ConfigError
from dpojax.evaluation.on_policy import KL, REWARD, read_on_policy
from dpojax.evaluation.statistics import (
    Interval,
    holm,
    paired_difference,
    sign_flip_test,
    win_rate,
)
from dpojax.untrusted.plain_data import read_json, read_whole_lines


class Column(NamedTuple):
    """One number of a run's summary.json."""

    label: str
    key: str
    form: str
    low: str = ""  # keys of its interval's ends
    high: str = ""


COLUMNS = (
    Column("held-out accuracy", "eval_objective/accuracy", "{:.1%}"),
    Column(
        "accuracy of the reward model",
        "eval_accuracy",
        "{:.1%}",
        "eval_accuracy_low",
        "eval_accuracy_high",
    ),
    Column("held-out loss", "eval_loss", "{:.4f}"),
    Column("win rate over its reference", "win_rate", "{:.1%}", "win_rate_low", "win_rate_high"),
    Column("the same, length-controlled", "win_rate_length_controlled", "{:.1%}"),
    Column("reward", "mean_reward", "{:+.3f}"),
    Column("KL, nats", "kl", "{:.2f}"),
    Column("length, tokens", "mean_length", "{:.1f}"),
    Column("distinct pairs", "distinct_2", "{:.3f}"),
    Column("pairs/s", "pairs_per_second", "{:.1f}"),
    Column("seconds", "seconds", "{:.0f}"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, as its workdir tells it."""

    name: str
    settings: dict[str, Any]  # dotted name -> value
    summary: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    samples: list[dict[str, Any]]  # of samples.jsonl
    on_policy: list[dict[str, Any]]  # of on_policy.jsonl


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs, each with the shortest name that tells it from the others.

    Raises: ConfigError for a folder that holds no finished run, or is named twice.
    """
    places = [pathlib.Path(folder) for folder in folders]
    resolved = [place.resolve() for place in places]
    for i, place in enumerate(resolved):
        if place in resolved[:i]:
            raise ConfigError(f"{folders[i]!r} is named twice; name each run once")
    runs = []
    for place, name in zip(places, short_names(resolved), strict=True):
        for file in ("summary.json", "run.json"):
            if not (place / file).is_file():
                raise ConfigError(
                    f"{place}: there is no {file}; name the workdirs of finished runs (those of a"
                    " sweep are its subfolders)"
                )
        runs.append(
            Run(
                name=name,
                settings=flat_settings(read_json(place / "run.json", infinite=True)),
                summary=read_json(place / "summary.json"),
                rows=read_whole_lines(place / "metrics.jsonl"),
                samples=read_whole_lines(place / "samples.jsonl"),
                on_policy=read_on_policy(place),
            )
        )
    return runs


def short_names(places: Sequence[pathlib.Path]) -> list[str]:
    """The last parts of each path, as many as tell them all apart."""
    for count in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-count:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def differing_settings(runs: Sequence[Run]) -> list[list[str]]:
    """The settings in which the runs differ, a row each: name, value in each run."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    found = []
    for key in keys:
        values = [run.settings.get(key) for run in runs]
        if any(value != values[0] for value in values):
            found.append([key, *("unset" if value is None else str(value) for value in values)])
    return found


def results(runs: Sequence[Run]) -> list[list[str]]:
    """What came out, a row each: name, value in each run. No row where no run has one."""
    found = []
    for column in COLUMNS:
        cells = [_cell(column, run.summary) for run in runs]
        if any(cells):
            found.append([column.label, *cells])
    return found


def _cell(column: Column, summary: dict[str, Any]) -> str:
    value = summary.get(column.key)
    if value is None:
        return ""
    text = column.form.format(value)
    if column.low and summary.get(column.low) is not None:
        low = column.form.format(summary[column.low])
        high = column.form.format(summary[column.high])
        text += f" [{low}, {high}]"
    return text


class Versus(NamedTuple):
    """One run against another on the prompts that both answered."""

    name: str  # of the run
    baseline: str
    prompts: int
    wins: Interval  # share of prompts on which the run's answer has the higher reward, ties half
    reward: Interval  # mean difference of the rewards
    tokens: Interval  # mean difference of the lengths
    p_value: float  # that the rewards do not differ, by exchanges within prompts
    adjusted: float  # the same for all comparisons together (Holm)


def judged_by(run: Run) -> str:
    """What gave the scores of a run's samples."""
    return run.settings.get("sample.reward") or f"the world of {run.settings.get('data.train')!r}"


def versus(runs: Sequence[Run]) -> tuple[list[Versus], list[str]]:
    """Every run against the first one, on the same prompts.

    Returns: the comparisons, and why others could not be made.
    """
    first = runs[0]
    found = []
    reasons = []
    for run in runs[1:]:
        reason = _incomparable(first, run)
        if reason:
            reasons.append(f"{run.name} against {first.name}: {reason}")
            continue
        pairs = _same_prompts(run, first)
        scores = [np.array([row["policy_score"] for row in side]) for side in pairs]
        lengths = [np.array([row["policy_tokens"] for row in side]) for side in pairs]
        found.append(
            Versus(
                name=run.name,
                baseline=first.name,
                prompts=len(scores[0]),
                wins=win_rate(*scores),
                reward=paired_difference(*scores),
                tokens=paired_difference(*lengths),
                p_value=sign_flip_test(*scores),
                adjusted=math.nan,
            )
        )
    adjusted = holm([comparison.p_value for comparison in found])
    return [c._replace(adjusted=float(p)) for c, p in zip(found, adjusted, strict=True)], reasons


def _incomparable(first: Run, run: Run) -> str:
    """Why two runs' samples cannot be compared; "" if they can."""
    for side in (first, run):
        if not side.samples:
            return f"{side.name} has no samples.jsonl (sample.num_prompts asks for samples)"
        if "policy_score" not in side.samples[0]:
            return f"the samples of {side.name} have no reward (sample.reward names one)"
    if judged_by(first) != judged_by(run):
        return f"their samples are judged by {judged_by(first)} and {judged_by(run)}"
    if len(_same_prompts(first, run)[0]) < 2:
        return "they answered no two prompts that are the same"
    return ""


def _same_prompts(first: Run, second: Run) -> tuple[list[Any], list[Any]]:
    """The rows of both samples that answer the same prompts, in one order."""
    other = {row["prompt"]: row for row in second.samples}
    own = {row["prompt"]: row for row in first.samples}
    both = [prompt for prompt in own if prompt in other]
    return [own[prompt] for prompt in both], [other[prompt] for prompt in both]


def frontier(run: Run) -> list[tuple[float, float]]:
    """The evaluations of a run as (KL, reward), by step: means over its held-out prompts."""
    return [
        (float(np.mean(row["log_ratio"])), float(np.mean(row["reward"])))
        for row in run.on_policy
        if row.get("reward")
    ]


def curve_keys(runs: Sequence[Run]) -> list[str]:
    """The metrics that are worth drawing over the steps, where two runs have them."""
    wanted = (
        *("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"),
        *(KL, REWARD, "objective/scores", "objective/kl", "completions/mean_length", "loss"),
    )
    counts = dict.fromkeys(wanted, 0)
    for run in runs:
        names = {
            unprefixed(key) for row in run.rows for key, value in row.items() if value is not None
        }
        for key in wanted:
            counts[key] += key in names
    return [key for key in wanted if counts[key] >= min(2, len(runs))]


PREFIXES = ("policy_gradient_", "online_dpo_", "reward_model_")


def unprefixed(key: str) -> str:
    """A metric's name without that of its stage, so that stages can be drawn together."""
    for prefix in PREFIXES:
        if key.startswith(prefix):
            return key.removeprefix(prefix)
    return key


def series(run: Run, wanted: str) -> tuple[list[int], list[float]]:
    """A metric over a run's steps."""
    points = [
        (row["step"], value)
        for row in run.rows
        for key, value in row.items()
        if value is not None and unprefixed(key) == wanted
    ]
    return [step for step, _ in points], [value for _, value in points]
