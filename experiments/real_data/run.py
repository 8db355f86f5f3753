"""Does the main job train on published preferences as they are? TL;DR comparisons and the three
Anthropic HH files.

    python experiments/real_data/run.py --data=DIR --model=DIR --out=runs/real_data

DIR of data holds tldr/{train,validation}.jsonl.gz and hh/*.jsonl.gz; the model is a Hugging Face
Llama directory with its tokenizer. HH comes as one file each: its last tenth, line by line and bad
rows included, is held out. Writes table.md, results.json and curves.png.
"""

import argparse
import gzip
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dpojax.runtime.subprocess_run import run_in_process

HH = ("helpful-base", "harmless-base", "helpful-rejection-sampled")


def split(source: pathlib.Path, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """The first nine tenths of a file's lines, and the last."""
    with gzip.open(source, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    cut = len(lines) * 9 // 10
    found = {}
    for name, part in (("train", lines[:cut]), ("eval", lines[cut:])):
        found[name] = folder / f"{source.name.split('.')[0]}-{name}.jsonl"
        found[name].write_bytes(b"".join(part))
    return found


def read(workdir: pathlib.Path) -> dict:
    """What a finished run found."""
    evals = [
        r
        for r in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in r
    ]
    return {"evals": evals, "summary": json.loads((workdir / "summary.json").read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", default="runs/real_data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", default="tldr," + ",".join(HH))
    args = parser.parse_args()
    data, out = pathlib.Path(args.data), pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    common = {
        "model.init": args.model,
        "num_steps": args.steps,
        "batch_size": 32,
        "eval_every_steps": 50,
        "data.eval_max_pairs": 0,
        "sft.num_steps": 0,
        "optim.learning_rate": 1e-4,
        "sample.num_prompts": 16,
    }
    tldr = {"train": data / "tldr/train.jsonl.gz", "eval": data / "tldr/validation.jsonl.gz"}
    for name in args.only.split(","):
        files = tldr if name == "tldr" else split(data / f"hh/{name}.jsonl.gz", out)
        own = {"data.train": files["train"], "data.eval": files["eval"]}
        if name == "tldr":
            own |= {"data.prompt_template": "{prompt}\n\nTL;DR:", "optim.learning_rate": 3e-5}
        config = "configs/tldr.py" if name == "tldr" else "configs/hh.py"
        run_in_process(out / name, config, common | own)
    write(
        out,
        {
            name: read(out / name)
            for name in ("tldr", *HH)
            if (out / name / "summary.json").is_file()
        },
    )


def write(out: pathlib.Path, found: dict[str, dict]) -> None:
    """The table and the curves of all runs."""
    (out / "results.json").write_text(json.dumps(found, indent=1))
    lines = [
        (
            "| data | rows | dropped | pairs held out | eval loss before | after | accuracy before"
            " | after |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, result in found.items():
        rows, evals = result["summary"]["train_rows"], result["evals"]
        dropped = ", ".join(
            f"{v} {k.removeprefix('dropped/')}"
            for k, v in rows.items()
            if k.startswith("dropped/") and v
        )
        held = result["summary"]["eval_rows"]
        usable = held["rows"] - sum(
            v for k, v in held.items() if k.startswith("dropped/") or k == "bad_line"
        )
        first, last = evals[0], evals[-1]
        key = "eval_rewards/accuracies"
        lines.append(
            f"| {name} | {rows['rows']:,} | {dropped or 'none'} | {usable:,} |"
            f" {first['eval_loss']:.4f} | {last['eval_loss']:.4f} | {first[key]:.3f} |"
            f" {last[key]:.3f} |"
        )
        steps = [r["step"] for r in evals]
        axes[0].plot(steps, [r["eval_loss"] for r in evals], "o-", label=name)
        axes[1].plot(steps, [r[key] for r in evals], "o-", label=name)
    for axis, title in zip(axes, ("held-out loss", "held-out reward accuracy"), strict=True):
        axis.set_title(title, loc="left")
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(0.6931, color="black", linewidth=0.8, linestyle=":")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(out / "curves.png", dpi=110)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
