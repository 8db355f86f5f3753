"""Is DPO's implicit reward a calibrated reward model? Against a Bradley-Terry reward model on the
embedded world, whose true reward is known.

    python experiments/reward_models/run.py --out=runs/reward_models

DPO and two reward models (as many steps as DPO, and four times as many) are trained from the same
SFT policy on the same pairs. All judge the same new pairs, by three authors: the world's writers
(whose pairs they were trained on), the SFT policy, and the DPO policy. Prompts are training prompts
or new ones, labels are drawn from the true reward. Writes result.json, table.md and
reliability.png; a step whose files are there is skipped. About 13 minutes of CPU time on 2 cores.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import scipy.optimize

from dpojax.command_line import Output
from dpojax.data.world import make_post, make_summary, make_world, read_facts, reward
from dpojax.evaluation.reward_scale import read_normalisation
from dpojax.evaluation.statistics import mcnemar, paired_difference, wilson
from dpojax.objectives.reward import reliability
from dpojax.runtime.subprocess_run import run_in_process
from dpojax.untrusted.plain_data import read_whole_lines

SEED = 0  # of the world and of the runs
BETA = 0.1  # loss.beta of configs/tldr.py
LONG_STEPS = 600
RESAMPLES = 500
AUTHORS = ("writers", "SFT samples", "DPO samples")
PROMPTS = ("training", "new")
JUDGES = {
    "DPO": "DPO's implicit reward",
    "reward_model": "reward model, 150 steps",
    "reward_model_long": "reward model, 600 steps",
    "truth": "the true reward",
}
COLORS = {
    "DPO": "#4575b4",
    "reward_model": "#f46d43",
    "reward_model_long": "#b2182b",
    "truth": "#777777",
}


def write_lines(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """A file that is there is whole."""
    with Output(str(path)) as file:
        for row in rows:
            file.write(row)


def run_tool(name: str, out: pathlib.Path, **flags: Any) -> None:
    """python -m dpojax.NAME, unless its file is there."""
    if out.exists():
        return
    argv = [f"--{key}={value}" for key, value in flags.items()]
    subprocess.run([sys.executable, "-m", f"dpojax.{name}", *argv, f"--out={out}"], check=True)


def train(out: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The three runs; what their summaries say."""
    arm = "configs/tldr.py:reward_model"
    return {
        "DPO": run_in_process(out / "dpo", "configs/tldr.py", {"sample.num_prompts": 0}),
        "reward_model": run_in_process(out / "reward_model", arm, {}, sft_from=out / "dpo"),
        "reward_model_long": run_in_process(
            out / "reward_model_long",
            arm,
            {"reward_model.num_steps": LONG_STEPS},
            sft_from=out / "dpo",
        ),
    }


def sample(out: pathlib.Path, count: int) -> None:
    """Two responses of either policy to `count` training prompts, and to as many new ones."""
    rng = np.random.default_rng([SEED, 1])
    train_rows = make_world(SEED).train
    places = rng.choice(train_rows.size, count, replace=False)
    prompts = [train_rows.get(int(place))["prompt"] for place in places]
    prompts += [make_post(rng).text for _ in range(count)]
    path = out / "prompts.jsonl"
    if not path.exists():
        write_lines(path, [{"prompt": prompt} for prompt in prompts])
    common = {"prompts": path, "num_samples": 2, "max_new_tokens": 48, "batch_size": 32}
    run_tool("generate", out / "sft_samples.jsonl", model=out / "dpo" / "sft", **common)
    run_tool("generate", out / "dpo_samples.jsonl", model=out / "dpo", **common)


def make_pairs(out: pathlib.Path) -> list[dict[str, Any]]:
    """Every author's two responses to each prompt, labelled by Bradley-Terry."""
    path = out / "pairs.jsonl"
    if path.exists():
        return read_whole_lines(path)
    rng = np.random.default_rng([SEED, 2])
    prompts = [row["prompt"] for row in read_whole_lines(out / "prompts.jsonl")]
    written = []
    for prompt in prompts:
        facts = read_facts(prompt)
        written.append([make_summary(rng, facts) for _ in range(2)])
    responses = {"writers": written}
    for author, name in (("SFT samples", "sft_samples"), ("DPO samples", "dpo_samples")):
        rows = read_whole_lines(out / f"{name}.jsonl")
        responses[author] = [[r["text"] for r in row["responses"]] for row in rows]
    rows = []
    for author in AUTHORS:
        for place, (prompt, pair) in enumerate(zip(prompts, responses[author], strict=True)):
            first, second = pair
            if first == second or not (first and second):
                continue
            margin = reward(prompt, first) - reward(prompt, second)
            if rng.random() >= 1 / (1 + np.exp(-margin)):
                first, second, margin = second, first, -margin
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": first,
                    "rejected": second,
                    "author": author,
                    "prompts": PROMPTS[int(place >= len(prompts) // 2)],
                    "true_margin": margin,
                }
            )
    write_lines(path, rows)
    return rows


def judge(out: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The pairs as each judge scores them, by dpojax.score, with margins in log-odds."""
    data = {"data": out / "pairs.jsonl", "batch_size": 32}
    policies = {"model": out / "dpo", "ref": out / "dpo" / "sft", "beta": BETA}
    run_tool("score", out / "scored_DPO.jsonl", **policies, **data)
    for name in ("reward_model", "reward_model_long"):
        run_tool("score", out / f"scored_{name}.jsonl", reward_model=out / name, **data)
    trained = [name for name in JUDGES if name != "truth"]
    scored = {name: read_whole_lines(out / f"scored_{name}.jsonl") for name in trained}
    for name in ("reward_model", "reward_model_long"):
        # score divides by the standard deviation of the reference's rewards, and a margin is
        # log-odds only without that
        scale = read_normalisation(out / name)
        assert scale is not None
        for row in scored[name]:
            row["margin"] *= scale.std
    return scored


# --- what is measured -----------------------------------------------------------------------------


def slope(margins: np.ndarray) -> float:
    """The factor on the margins under which the labels are likeliest: 1 is calibrated, less than 1
    is over-confident.
    """

    def loss(factor: float) -> float:
        return float(np.mean(np.logaddexp(0, -factor * margins)))

    found: Any = scipy.optimize.minimize_scalar(loss, bounds=(-50, 50), method="bounded")
    return float(found.x)


def correlation(margins: np.ndarray, truth: np.ndarray) -> float:
    """Of differences of rewards, which have no order: a pair and its reverse are the same."""
    return float(np.sum(margins * truth) / np.sqrt(np.sum(margins**2) * np.sum(truth**2)))


def with_interval(statistic, *values: np.ndarray) -> dict[str, float]:
    """A statistic of the pairs with its percentile bootstrap interval at 95 %."""
    rng = np.random.default_rng(SEED)
    count = len(values[0])
    places = rng.integers(count, size=(RESAMPLES, count))
    drawn = [statistic(*(v[place] for v in values)) for place in places]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": statistic(*values), "low": float(low), "high": float(high)}


def accuracy(margins: np.ndarray) -> dict[str, float]:
    """Ties count half; Wilson's interval."""
    rate = wilson(float(np.heaviside(margins, 0.5).sum()), len(margins))
    return {"value": rate.value, "low": rate.low, "high": rate.high, "pairs": len(margins)}


def describe(margins: np.ndarray, truth: np.ndarray, longer: np.ndarray) -> dict[str, Any]:
    """One judge on one set of pairs.

    Args:
      margins: reward of the chosen response minus that of the rejected one. [B].
      truth: the same by the true reward. [B].
      longer: tokens by which the chosen response is longer. [B].
    """
    return {
        "accuracy": accuracy(margins),
        "accuracy_chosen_longer": accuracy(margins[longer > 0]),
        "accuracy_chosen_shorter": accuracy(margins[longer < 0]),
        # no interval: a bootstrap adds to ECE's bias; the true reward's row is the floor
        "ece": reliability(margins).ece,
        "slope": with_interval(slope, margins),
        "correlation": with_interval(correlation, margins, truth),
    }


def measure(pairs, scored) -> dict[str, dict[str, Any]]:
    """Every judge on every set of pairs, and DPO against the reward models."""
    margins = {name: np.array([row["margin"] for row in rows]) for name, rows in scored.items()}
    margins["truth"] = np.array([row["true_margin"] for row in pairs])
    longer = np.array([r["chosen_length"] - r["rejected_length"] for r in scored["DPO"]])
    found = {}
    for author in AUTHORS:
        for prompts in PROMPTS:
            inside = np.array([(r["author"], r["prompts"]) == (author, prompts) for r in pairs])
            own = {name: values[inside] for name, values in margins.items()}
            right = {name: np.heaviside(values, 0.5) for name, values in own.items()}
            table: dict[str, Any] = {
                name: describe(own[name], own["truth"], longer[inside]) for name in JUDGES
            }
            for name in ("reward_model", "reward_model_long"):
                gain = paired_difference(right["DPO"], right[name], resamples=1999)
                table[f"DPO - {name}"] = {
                    **gain._asdict(),
                    "mcnemar_p": mcnemar(right["DPO"] > 0.5, right[name] > 0.5),
                }
            table["bins"] = {
                name: {
                    "confidence": reliability(values).confidence.tolist(),
                    "accuracy": reliability(values).accuracy.tolist(),
                    "count": reliability(values).count.tolist(),
                }
                for name, values in own.items()
            }
            found[f"{author}, {prompts} prompts"] = table
            print(f"{author}, {prompts} prompts: {inside.sum()} pairs", flush=True)
    return found


# --- what is written ------------------------------------------------------------------------------


def percent(rate: dict[str, float]) -> str:
    low, high = 100 * rate["low"], 100 * rate["high"]
    return f"{rate['value']:.1%} [{low:.1f}, {high:.1f}]"


def number(value: dict[str, float]) -> str:
    return f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def write_table(found: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    lines = [
        "| pairs | judge | accuracy [95 %] | chosen longer | chosen shorter | ECE | slope |"
        " correlation with the truth |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pairs, table in found.items():
        for name, label in JUDGES.items():
            row = table[name]
            cells = [
                f"{pairs} ({row['accuracy']['pairs']})",
                label,
                percent(row["accuracy"]),
                percent(row["accuracy_chosen_longer"]),
                percent(row["accuracy_chosen_shorter"]),
                f"{row['ece']:.2f}",
                number(row["slope"]),
                number(row["correlation"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n")
    print(path.read_text())


def plot(found: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """How often each judge is right, by how sure it is, on new prompts."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), sharey=True, layout="constrained")
    for axis, author in zip(axes, AUTHORS, strict=True):
        table = found[f"{author}, new prompts"]
        axis.plot([0.5, 1], [0.5, 1], color="black", linestyle=":", linewidth=1)
        for name, label in JUDGES.items():
            bins = table["bins"][name]
            kept = np.array(bins["count"]) >= 20  # fewer say little
            confidence = np.array(bins["confidence"])[kept]
            right = np.array(bins["accuracy"])[kept]
            axis.plot(confidence, right, "o-", color=COLORS[name], markersize=4, label=label)
        axis.set(xlabel="confidence s(|margin|)", xlim=(0.48, 1.02), ylim=(0.35, 1.02))
        axis.set_title(author, loc="left", fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share that is right")
    axes[2].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/reward_models")
    parser.add_argument("--prompts", type=int, default=1024, help="of either kind")
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    summaries = train(out)
    sample(out, args.prompts)
    pairs = make_pairs(out)
    found = measure(pairs, judge(out))
    own = {
        name: {key: value for key, value in summary.items() if key.startswith("eval_")}
        for name, summary in summaries.items()
    }
    result = {"beta": BETA, "pairs": found, "evaluation_of_the_runs": own}
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    write_table(found, out / "table.md")
    plot(found, out / "reliability.png")


if __name__ == "__main__":
    main()
