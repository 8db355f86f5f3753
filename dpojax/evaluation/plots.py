"""Metrics, held-out pairs and samples -> pictures."""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from dpojax.objectives.reward import Reliability
from dpojax.training.findings import (
    CHOSEN_COLOR,
    EVAL_COLOR,
    REJECTED_COLOR,
    TRAIN_COLOR,
    Line,
    Panel,
)
from dpojax.training.pairs import PairResults

matplotlib.use("Agg")  # before pyplot: no display is needed

GREY = "#777777"
COLUMNS = 3

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": 110,
}


def png(figure: Any) -> str:
    """A picture as base64 text; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
    return [x for x, _ in points], [y for _, y in points]


def measured(panels: Sequence[Panel], rows: Sequence[dict[str, Any]]) -> list[Panel]:
    """The panels of which a run has numbers; all of them, where it has none of any."""
    keys = {key for row in rows for key, value in row.items() if value is not None}
    found = [panel for panel in panels if any(line.key in keys for line in panel.lines)]
    return found or list(panels)


def filled(panels: Sequence[Panel], prefix: str) -> tuple[Panel, ...]:
    """The panels, with the learning rate of a stage where that fills the last row.

    Args:
      prefix: of the stage's keys.
    """
    if len(panels) % COLUMNS == COLUMNS - 1:
        rate = Panel("learning rate", (Line(f"{prefix}learning_rate", "train"),))
        return (*panels, rate)
    return tuple(panels)


def plot_curves(rows: Sequence[dict[str, Any]], panels: Sequence[Panel]) -> Any:
    """The panels' metrics over the steps.

    Args:
      rows: of metrics.jsonl.
    """
    height = math.ceil(len(panels) / COLUMNS)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            height,
            COLUMNS,
            figsize=(12, 3.13 * height),
            layout="constrained",
            squeeze=False,
        )
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, rows, panel)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        return figure


def _draw_panel(axis: Any, rows: Sequence[dict[str, Any]], panel: Panel) -> None:
    for line in panel.lines:
        x, y = _series(rows, line.key)
        marker = "o" if len(x) < 12 else None
        axis.plot(x, y, color=line.color, label=line.label, marker=marker, markersize=4)
    axis.set_title(panel.title, loc="left")
    axis.set_xlabel("step")
    if not any(line.get_xdata().size for line in axis.lines):
        axis.text(
            0.5,
            0.5,
            "not measured in this run",
            transform=axis.transAxes,
            ha="center",
            color=GREY,
        )
    elif len(panel.lines) > 1:
        beside_the_title(axis)
    if panel.level is not None:
        axis.axhline(panel.level, color=GREY, linewidth=0.8, linestyle=":")
    first = panel.lines[0]
    if panel.band is not None:
        low, high = panel.band
        _band(axis, rows, lambda row: (row[low], row[high]), first.color)
    if panel.error is not None:
        error = panel.error
        _band(
            axis,
            rows,
            lambda row: (row[first.key] - row[error], row[first.key] + row[error]),
            first.color,
        )


def _band(axis, rows: Sequence[dict[str, Any]], ends, color: str) -> None:
    """A shaded interval around a line; rows that lack a part of it are left out."""
    spans = []
    for row in rows:
        try:
            low, high = ends(row)
        except (KeyError, TypeError):  # another kind of row, or a value that was not finite
            continue
        if low is not None and high is not None:
            spans.append((row["step"], low, high))
    if spans:
        steps, low, high = zip(*spans, strict=True)
        axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def plot_heldout(results: PairResults, *, unpaired: bool) -> Any:
    """Histograms of the rewards and margins, and margin against length (difference)."""
    good = results.label > 0.5
    rewards = (results.chosen_rewards, results.rejected_rewards)
    margin = rewards[0] - rewards[1]
    names = ("chosen", "rejected")
    difference = results.chosen_lengths - results.rejected_lengths
    labels = (
        "reward of chosen − reward of rejected",
        "margin against length difference",
        "tokens of chosen − tokens of rejected",
    )
    if unpaired:
        rewards = (rewards[0][good], rewards[0][~good])
        margin = results.margin
        names = ("desirable", "undesirable")
        difference = results.chosen_lengths
        labels = (
            "log pi/ref on the labelled side of the reference point",
            "margin against length",
            "tokens of the response",
        )
    rewards = [r[np.isfinite(r)] for r in rewards]  # what is not a number has no place on an axis
    margin = np.where(np.isfinite(margin), margin, np.nan)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
        both = np.concatenate(rewards) if any(map(len, rewards)) else np.zeros(1)
        low, high = np.percentile(both, [0.5, 99.5])
        bins = np.linspace(low - 1e-6, high + 1e-6, 41)
        axes[0].hist(rewards[0], bins, alpha=0.6, color=CHOSEN_COLOR, label=names[0])
        axes[0].hist(rewards[1], bins, alpha=0.6, color=REJECTED_COLOR, label=names[1])
        axes[0].set_title("implicit rewards", loc="left")
        axes[0].set_xlabel("beta log pi/ref")
        beside_the_title(axes[0])
        axes[1].hist(margin[np.isfinite(margin)], 41, color=TRAIN_COLOR)
        axes[1].axvline(0, color="black", linewidth=0.8)
        axes[1].set_title("margins (right of 0: ranked as labelled)", loc="left")
        axes[1].set_xlabel(labels[0])
        axes[2].scatter(difference, margin, s=8, alpha=0.5, color=TRAIN_COLOR, linewidths=0)
        axes[2].axhline(0, color="black", linewidth=0.8)
        axes[2].set_title(labels[1], loc="left")
        axes[2].set_xlabel(labels[2])
        return figure


def plot_reliability(calibration: Reliability, results: Any) -> Any:
    """How often a reward model is right by how sure it is, its margins, and they against length.

    Args:
      calibration: of the margins.
      results: heldout_rewards.RewardResults.
    """
    margins = results.margins
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
        used = calibration.count > 0
        sizes = 20 + 180 * calibration.count[used] / max(1, calibration.count.max())
        axes[0].plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, linestyle=":")
        axes[0].plot(calibration.confidence[used], calibration.accuracy[used], color=TRAIN_COLOR)
        axes[0].scatter(
            calibration.confidence[used], calibration.accuracy[used], s=sizes, color=TRAIN_COLOR
        )
        axes[0].set(xlim=(0.48, 1.02), ylim=(-0.02, 1.05), xlabel="sigmoid(|margin|)")
        axes[0].set_title(f"accuracy by confidence (ECE {calibration.ece:.3f})", loc="left")
        axes[1].hist(margins, 41, color=TRAIN_COLOR)
        axes[1].axvline(0, color="black", linewidth=0.8)
        axes[1].set_title("margins (right of 0: ranked as labelled)", loc="left")
        axes[1].set_xlabel("reward of chosen minus rejected")
        axes[2].scatter(
            results.differences, margins, s=8, alpha=0.5, color=TRAIN_COLOR, linewidths=0
        )
        axes[2].axhline(0, color="black", linewidth=0.8)
        axes[2].set_title("margin against length", loc="left")
        axes[2].set_xlabel("tokens by which the chosen one is longer")
        return figure


def beside_the_title(axis: Any) -> None:
    """The legend above the axes, on the right.

    Matplotlib's search for the emptiest place takes seconds where there is much data.
    """
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0.1, frameon=False, ncols=2)


def plot_samples(samples: dict[str, Any]) -> Any:
    """Lengths of the samples, and their rewards where there is one."""
    with plt.rc_context(STYLE):
        panels = 2 if "scores" in samples else 1
        figure, axes = plt.subplots(
            1, panels, figsize=(6 * panels, 3.2), layout="constrained", squeeze=False
        )
        lengths = {name: [len(r) for r in samples["ids"][name]] for name in ("policy", "reference")}
        _two_histograms(axes[0, 0], lengths, "length of samples (tokens)")
        if panels == 2:
            _two_histograms(axes[0, 1], samples["scores"], "reward of samples")
        return figure


def _two_histograms(axis, values: dict[str, Sequence[float]], title: str) -> None:
    everything = np.concatenate([np.asarray(v, float) for v in values.values()])
    bins = np.linspace(everything.min() - 0.5, everything.max() + 0.5, 33)
    for name, color in (("policy", EVAL_COLOR), ("reference", GREY)):
        axis.hist(values[name], bins, alpha=0.55, color=color, label=name)
    axis.set_title(title, loc="left")
    beside_the_title(axis)
