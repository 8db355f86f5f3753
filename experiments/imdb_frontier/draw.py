"""The figure and the table of the frontier."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

COLORS = {
    "DPO": "#0072b2",
    "IPO": "#56b4e9",
    "PPO": "#d55e00",
    "PPO-GT": "#e69f00",
    "RLOO-GT": "#cc79a7",
    "online DPO": "#009e73",
    "Preferred-FT": "#999999",
}


def frontier_at(kl: float, reference: dict[str, Any]) -> float:
    """The most reward at a KL, by the tilted reference."""
    return float(np.interp(kl, reference["kl"], reference["reward"]))


def draw_frontier(
    points: Sequence[dict[str, Any]], reference: dict[str, Any], path: pathlib.Path
) -> None:
    """Reward against KL, a line for each run, under the exact frontier."""
    figure, axis = plt.subplots(figsize=(8, 5.2), layout="constrained")
    shown = np.array(reference["kl"]) <= 4
    axis.plot(
        np.array(reference["kl"])[shown],
        np.array(reference["reward"])[shown],
        color="black",
        linewidth=1.5,
        label="exact frontier (tilted reference)",
    )
    best = [row for row in reference["best_of"] if row["kl"] <= 4]
    axis.plot(
        [row["kl"] for row in best],
        [row["reward"] for row in best],
        "k^",
        markersize=5,
        label="best of 1, 2, 4, ... samples",
    )
    named = set()
    for key in dict.fromkeys((p["method"], p["setting"], p["seed"]) for p in points):
        own = [p for p in points if (p["method"], p["setting"], p["seed"]) == key]
        method = key[0]
        axis.errorbar(
            [p["kl"] for p in own],
            [p["reward"] for p in own],
            [
                [p["reward"] - p["reward_low"] for p in own],
                [p["reward_high"] - p["reward"] for p in own],
            ],
            fmt="o-",
            markersize=3.5,
            linewidth=0.9,
            elinewidth=0.5,
            alpha=0.8,
            color=COLORS[method],
            label=None if method in named else method,
        )
        named.add(method)
    axis.set(
        xlabel="KL(policy || reference) of a completion, nats",
        ylabel="mean P(positive) by the gold classifier",
    )
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_table(
    points: Sequence[dict[str, Any]], reference: dict[str, Any], path: pathlib.Path
) -> None:
    """The last point of every run, and how far below the frontier it lies."""
    lines = [
        "| method | beta | seed | reward [95 %] | KL | frontier there | gold calls | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    last = {(p["method"], p["setting"], p["seed"]): p for p in points}
    for p in last.values():
        most = "beyond KL 4"
        if p["kl"] <= 4:
            most = f"{frontier_at(p['kl'], reference):.3f}"
        cells = [
            p["method"],
            p["setting"],
            str(p["seed"]),
            f"{p['reward']:.3f} [{p['reward_low']:.3f}, {p['reward_high']:.3f}]",
            f"{p['kl']:.2f} ± {p['kl_error']:.2f}",
            most,
            f"{p['gold_calls']:,}",
            f"{p['minutes']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n")
