"""The README's figure, from a finished run: python experiments/embedded_world/plot.py runs/tldr
experiments/embedded_world/result.png.
"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(workdir: str, out: str) -> None:
    rows = [
        json.loads(line)
        for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    ]
    summary = json.loads((pathlib.Path(workdir) / "summary.json").read_text())

    def series(key):
        return zip(*[(r["step"], r[key]) for r in rows if r.get(key) is not None], strict=True)

    figure, axes = plt.subplots(1, 3, figsize=(11, 2.9), layout="constrained")
    axes[0].plot(*series("sft_loss"), color="#777777")
    axes[0].set_title("1. SFT: nats per token", loc="left", fontsize=10)
    axes[1].plot(*series("loss"), color="#4575b4", alpha=0.7, label="train")
    axes[1].plot(*series("eval_loss"), "o-", color="#f46d43", label="held out")
    axes[1].set_title("2. DPO: loss", loc="left", fontsize=10)
    axes[1].legend(frameon=False)
    names = ["win rate", "length-\ncontrolled"]
    values = [summary["win_rate"], summary["win_rate_length_controlled"]]
    axes[2].barh(names, values, color=["#1b7837", "#7fbf7b"])
    low, high = summary["win_rate_low"], summary["win_rate_high"]
    axes[2].errorbar(
        values[0], 0, xerr=[[values[0] - low], [high - values[0]]], color="black", capsize=4
    )
    axes[2].axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes[2].set_xlim(0, 1)
    axes[2].set_title(
        f"3. true reward: DPO beats SFT on {summary['win_rate']:.0%}", loc="left", fontsize=10
    )
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        axis.set_xlabel("step")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
