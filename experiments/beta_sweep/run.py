"""How do beta and the objective trade true reward against KL? A grid through ml_collections
overrides.

    python experiments/beta_sweep/run.py --out=runs/beta_sweep

Trains the embedded world once with SFT, then DPO for every beta and loss, all in one program
(dpojax.sweep); writes table.md, results.json and frontier.png. About ten minutes on 2 cores;
cost.py measures what that saves.
"""

import argparse
import itertools
import json
import pathlib
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"sigmoid": "#4575b4", "ipo": "#f46d43", "hinge": "#1b7837"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/beta_sweep")
    parser.add_argument("--betas", default="0.03,0.1,0.3,1.0")
    parser.add_argument("--losses", default="sigmoid,ipo,hinge")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = []
    # IPO here averages over tokens: its beta acts per token.
    settings = {"num_steps": args.steps, "optim.learning_rate": 2e-4}
    flags = [f"--config.{k}={v}" for k, v in settings.items()]
    grid = [f"--sweep.loss.name={args.losses}", f"--sweep.loss.beta={args.betas}"]
    argv = [
        sys.executable,
        "-m",
        "dpojax.sweep",
        "--config=configs/tldr.py",
        f"--workdir={out}",
        *flags,
        *grid,
    ]
    subprocess.run(argv, check=True)
    for name, text in itertools.product(args.losses.split(","), args.betas.split(",")):
        beta = float(text)
        found = json.loads((out / f"name={name},beta={text}" / "summary.json").read_text())
        keys = (
            "win_rate",
            "win_rate_low",
            "win_rate_high",
            "win_rate_length_controlled",
            "kl",
            "mean_reward",
            "mean_length",
        )
        results.append({"loss": name, "beta": beta, **{k: found[k] for k in keys}})
        r = results[-1]
        print(
            f"{name:8s} beta {beta:<5g} win rate {r['win_rate']:.3f}  KL {r['kl']:.2f}  reward"
            f" {r['mean_reward']:+.2f}",
            flush=True,
        )
    (out / "results.json").write_text(json.dumps(results, indent=1))
    lines = [
        "| loss | beta | win rate [95 %] | length-controlled | KL (nats) | true reward | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        rate = f"{r['win_rate']:.1%} [{r['win_rate_low']:.1%}, {r['win_rate_high']:.1%}]"
        rest = (
            f"{r['win_rate_length_controlled']:.1%} | {r['kl']:.2f} | {r['mean_reward']:+.2f} |"
            f" {r['mean_length']:.1f}"
        )
        lines.append(f"| {r['loss']} | {r['beta']:g} | {rate} | {rest} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(r["loss"] for r in results):
        own = sorted((r for r in results if r["loss"] == name), key=lambda r: r["kl"])
        axis.plot(
            [r["kl"] for r in own],
            [r["mean_reward"] for r in own],
            "o-",
            label=name,
            color=COLORS.get(name),
        )
        for r in own:
            axis.annotate(
                f"{r['beta']:g}",
                (r["kl"], r["mean_reward"]),
                textcoords="offset points",
                xytext=(5, -10),
                fontsize=8,
            )
    axis.set(
        xlabel="KL(policy || reference), nats",
        ylabel="true reward",
        title="True reward against KL (labels: beta)",
    )
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(out / "frontier.png", dpi=130)
    print(out / "table.md")


if __name__ == "__main__":
    main()
