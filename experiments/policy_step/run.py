"""How long does a whole step of GRPO take (sample, score, train), against TRL's GRPOTrainer?

    python experiments/policy_step/run.py --model=SMOLLM2 --data=tldr/validation.jsonl.gz

The same weights in float32, the same prompts, as many samples, the same reward, beta 0.04 and k3 in
the loss; dpojax and TRL take turns, each in a process of its own. TRL runs with several sizes of
its micro-batches. Needs torch and TRL: pip install .[parity]
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from dpojax.data.records import open_records

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def write_prompts(path: str, folder: pathlib.Path, count: int) -> None:
    """The first distinct prompts of a file, as rows."""
    records = open_records(path)
    prompts = dict.fromkeys(records.get(i)["prompt"] for i in range(min(records.size, 20 * count)))
    rows = [{"prompt": prompt} for prompt in list(prompts)[:count]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_dpojax(folder: pathlib.Path, settings: dict[str, Any], turn: int) -> dict[str, Any]:
    """Seconds of each step, and the response tokens of each."""
    workdir = folder / f"dpojax{turn}"
    config = {
        "model.init": settings["model"],
        "stages": "policy_gradient",
        "data.train": folder / "prompts.jsonl",
        "data.eval": "",
        "data.eval_share": 0,
        "data.text_as_chat": False,
        "data.prompt_template": "",
        "data.max_prompt_tokens": 1024,
        "policy_gradient.preset": "grpo",
        "policy_gradient.num_samples": settings["samples"],
        "reward.terms": f"{HERE / 'reward.py'}:length",
        "batch_size": settings["prompts"],
        "num_steps": settings["steps"],
        "log_every_steps": 1,
        "sample.max_new_tokens": settings["new_tokens"],
        "sample.num_prompts": 0,
        "optim.learning_rate": 1e-6,
        "export": False,
        "mesh.data": 1,
        "mesh.fsdp": 1,
    }
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    argv = [sys.executable, "-m", "dpojax.main", "--config=dpo", f"--workdir={workdir}", *flags]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    prefix = "policy_gradient_"
    steps = [row for row in rows if f"{prefix}step_time_s" in row]
    lengths = [row[f"{prefix}completions/mean_length"] for row in steps]
    return {
        "seconds": [row[f"{prefix}step_time_s"] for row in steps],
        "tokens": [mean * settings["prompts"] * settings["samples"] for mean in lengths],
    }


def run_trl(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The same of TRL."""
    argv = [sys.executable, str(HERE / "with_trl.py"), str(folder), json.dumps(settings)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return json.loads(lines[0].removeprefix("RESULT "))


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--model", required=True)
    flags.add_argument("--data", required=True)
    flags.add_argument("--prompts", type=int, default=4)
    flags.add_argument("--samples", type=int, default=8)
    flags.add_argument("--new_tokens", type=int, default=48)
    flags.add_argument(
        "--steps", type=int, default=3, help="the first, which compiles, is left out"
    )
    flags.add_argument("--rounds", type=int, default=2)
    flags.add_argument("--micro_batches", default="8,32", help="of TRL, in responses")
    return flags


def main() -> None:
    """Prints a line for each run, and the ratio."""
    args = parser().parse_args()
    names = ("prompts", "samples", "new_tokens", "steps")
    settings = {name: getattr(args, name) for name in names}
    settings["model"] = str(pathlib.Path(args.model).resolve())
    trls = [int(size) for size in args.micro_batches.split(",")]
    step_seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_prompts(args.data, folder, args.prompts * args.steps)
        for turn in range(args.rounds):
            runs = {"dpojax": run_dpojax(folder, settings, turn)}
            for size in trls:
                runs[f"TRL, {size} a micro-batch"] = run_trl(
                    folder, settings | {"micro_batch": size}
                )
            for label, run in runs.items():
                step_seconds.setdefault(label, []).append(float(np.median(run["seconds"][1:])))
                shown = ", ".join(f"{s:.1f}" for s in run["seconds"])
                print(f"round {turn + 1}: {label}: steps of {shown} s", flush=True)
    best = min(step_seconds["dpojax"])
    for label, seconds in step_seconds.items():
        print(f"| {label} | {min(seconds):.1f} s | {min(seconds) / best:.1f} x |")


if __name__ == "__main__":
    main()
