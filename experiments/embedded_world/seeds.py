"""Is the result on the embedded world the labels' doing? True labels against shuffled ones, over
seeds.

    python experiments/embedded_world/seeds.py --out=runs/seeds --seeds=0,1,2

Every seed makes its own world, tokenizer and SFT policy; both arms start from that policy. With
shuffled labels (half of them flipped at random) the win rate must stay at 50 %. Writes table.md and
results.json. About 3 minutes a seed and arm on 2 cores.
"""

import argparse
import json
import pathlib

from dpojax.evaluation.statistics import wilson
from dpojax.runtime.subprocess_run import run_in_process


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/seeds")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    out, found = pathlib.Path(args.out), []
    for seed in map(int, args.seeds.split(",")):
        for arm, flip in (("true", 0.0), ("shuffled", 0.5)):
            settings = {"seed": seed, "data.flip_labels": flip}
            s = run_in_process(
                out / f"{arm}-{seed}", "configs/tldr.py", settings, sft_from=out / f"true-{seed}"
            )
            found.append(
                {
                    "labels": arm,
                    "seed": seed,
                    **{k: v for k, v in s.items() if not isinstance(v, dict)},
                }
            )
            print(
                f"{arm:9s} seed {seed}  win rate {s['win_rate']:.3f}  KL {s['kl']:.2f}", flush=True
            )
    (out / "results.json").write_text(json.dumps(found, indent=1))
    lines = [
        (
            "| labels | seed | win rate [95 %] | length-controlled | KL (nats) | tokens, DPO / SFT"
            " | distinct-2, DPO / SFT |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for s in found:
        rate = f"{s['win_rate']:.1%} [{s['win_rate_low']:.1%}, {s['win_rate_high']:.1%}]"
        length = f"{s['mean_length']:.1f} / {s['reference_mean_length']:.1f}"
        distinct = f"{s['distinct_2']:.3f} / {s['reference_distinct_2']:.3f}"
        kl = f"{s['kl']:.2f} ± {s['kl_standard_error']:.2f}"
        lines.append(
            f"| {s['labels']} | {s['seed']} | {rate} | {s['win_rate_length_controlled']:.1%} | {kl}"
            f" | {length} | {distinct} |"
        )
    for arm in ("true", "shuffled"):
        own = [s for s in found if s["labels"] == arm]
        trials = sum(s["num_samples"] for s in own)
        rate = wilson(sum(s["win_rate"] * s["num_samples"] for s in own), trials)
        lines.append(
            f"| {arm} | all | {rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}] of {trials:,} | |"
            " | | |"
        )
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
