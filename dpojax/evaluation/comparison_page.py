"""A comparison of runs -> one self-contained page."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from dpojax.evaluation import comparison
from dpojax.evaluation.comparison import Run, Versus
from dpojax.evaluation.pages import page_template
from dpojax.evaluation.plots import COLUMNS, STYLE, png
from dpojax.evaluation.statistics import Interval

# Okabe and Ito's colours, which color-blind readers tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
TITLES = {
    "eval_loss": "loss, held out",
    "eval_rewards/accuracies": "accuracy of implicit rewards, held out",
    "eval_rewards/margins": "reward margin, held out",
    "eval_logps/chosen": "log-prob of chosen, held out (nats)",
    "eval_on_policy_kl": "on-policy KL(policy || reference), nats",
    "eval_on_policy_reward": "reward of own answers to held-out prompts",
    "objective/scores": "reward of the training samples",
    "objective/kl": "KL of the training samples, nats",
    "completions/mean_length": "length of the training samples, tokens",
    "loss": "loss, train",
}


def versus_rows(found: Sequence[Versus]) -> list[list[str]]:
    """Head and rows of the table of runs against the first one."""
    rows = [
        ["against the first", "prompts", "wins", "reward", "tokens", "p", "p, Holm"],
    ]
    for c in found:
        rows.append(
            [
                f"{c.name} - {c.baseline}",
                str(c.prompts),
                f"{c.wins.value:.1%} [{c.wins.low:.1%}, {c.wins.high:.1%}]",
                _signed(c.reward, 3),
                _signed(c.tokens, 1),
                _p_value(c.p_value),
                _p_value(c.adjusted),
            ]
        )
    return rows


def _signed(x: Interval, digits: int) -> str:
    return f"{x.value:+.{digits}f} [{x.low:+.{digits}f}, {x.high:+.{digits}f}]"


def _p_value(p: float) -> str:
    if p < 1e-3:
        return "< 0.001"
    return f"{p:.3f}"


def plot_comparison(runs: Sequence[Run]) -> Any:
    """Reward against KL where runs measured both, and the metrics over the steps; None: nothing."""
    keys = comparison.curve_keys(runs)
    frontiers = [comparison.frontier(run) for run in runs]
    panels = len(keys) + any(frontiers)
    if not panels:
        return None
    height = math.ceil(panels / COLUMNS)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            height, COLUMNS, figsize=(12, 3.2 * height), layout="constrained", squeeze=False
        )
        free = iter(axes.flat)
        if any(frontiers):
            axis = next(free)
            for i, points in enumerate(frontiers):
                xy = np.array(points).reshape(-1, 2)
                axis.plot(xy[:, 0], xy[:, 1], "o-", markersize=4, color=COLORS[i % len(COLORS)])
            axis.set(title="reward against KL", xlabel="KL(policy || reference), nats")
        for key in keys:
            axis = next(free)
            for i, run in enumerate(runs):
                x, y = comparison.series(run, key)
                marker = "o" if len(x) < 12 else None
                axis.plot(x, y, marker=marker, markersize=4, color=COLORS[i % len(COLORS)])
            axis.set_title(TITLES[key])
            axis.set_xlabel("step")
        for axis in free:
            axis.axis("off")
        handles = [
            Line2D([], [], color=COLORS[i % len(COLORS)], label=run.name)
            for i, run in enumerate(runs)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False)
        return figure


def _answers(runs: Sequence[Run], shown: int) -> list[dict[str, Any]]:
    """Each run's answer to the prompts that the first one answered."""
    tables = [{row["prompt"]: row for row in run.samples} for run in runs]
    found = []
    for prompt in list(tables[0])[:shown]:
        answers = []
        for run, table in zip(runs, tables, strict=True):
            row = table.get(prompt)
            if row is not None:
                score = row.get("policy_score")
                text = "" if score is None else f", reward {score:+.2f}"
                answers.append({"name": f"{run.name}{text}", "text": row["policy"] or "(empty)"})
        found.append({"prompt": prompt, "answers": answers})
    return found


def comparison_page(
    runs: Sequence[Run], found: Sequence[Versus], reasons: Sequence[str], shown: int
) -> str:
    """The page, with everything in the one file.

    Args:
      found: each run against the first one.
      reasons: why others could not be compared.
      shown: prompts whose answers stand side by side.
    """
    figure = plot_comparison(runs)
    return page_template("compare.html.jinja").render(
        names=[run.name for run in runs],
        settings=comparison.differing_settings(runs),
        results=comparison.results(runs),
        versus=versus_rows(found) if found else [],
        reasons=reasons,
        figure="" if figure is None else png(figure),
        answers=_answers(runs, shown),
    )
