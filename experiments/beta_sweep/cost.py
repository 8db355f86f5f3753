"""What does a sweep in one program cost, against a run for each setting? Eight betas on the
embedded world, one round.

    python experiments/beta_sweep/cost.py --out=DIR

Times are whole processes, start-up and compiling included; the solo runs share one SFT stage as the
sweep's runs do. Every number that a run logs is compared: each run of the sweep must equal its solo
run.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

from dpojax.runtime.subprocess_run import run_in_process

BETAS = ("0.02", "0.03", "0.05", "0.1", "0.2", "0.3", "0.5", "1.0")


def numbers(folder: pathlib.Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("second", "step_time", "tflops", "mfu")
    return {
        (r["step"], k): v
        for r in rows
        if "sft_loss" not in r
        for k, v in r.items()
        if k != "step" and v is not None and not any(t in k for t in times)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    out = pathlib.Path(args.out)
    settings = {
        "num_steps": args.steps,
        "sample.num_prompts": 128,
        "sample.kl_prompts": 32,
        "eval_every_steps": 25,
    }
    flags = [f"--config.{k}={v}" for k, v in settings.items()]
    start = time.monotonic()
    argv = [
        sys.executable,
        "-m",
        "dpojax.sweep",
        "--config=configs/tldr.py",
        f"--workdir={out / 'together'}",
        *flags,
    ]
    subprocess.run(
        [*argv, f"--sweep.loss.beta={','.join(BETAS)}"], check=True, stdout=subprocess.DEVNULL
    )
    together = time.monotonic() - start
    start = time.monotonic()
    for beta in BETAS:
        own = settings | {"loss.beta": beta}
        run_in_process(
            out / f"solo-{beta}", "configs/tldr.py", own, sft_from=out / f"solo-{BETAS[0]}"
        )
    alone = time.monotonic() - start
    worst = 0.0
    for beta in BETAS:
        a, b = numbers(out / "together" / f"beta={beta}"), numbers(out / f"solo-{beta}")
        assert a.keys() >= b.keys() - {k for k in b if "gradient_weight" in k[1]}, sorted(
            b.keys() - a.keys()
        )[:3]
        worst = max(
            worst,
            *(abs(a[k] - b[k]) / max(1.0, abs(b[k])) for k in b if k in a and "kl" not in k[1]),
        )
    found = {
        "together_s": together,
        "alone_s": alone,
        "ratio": together / alone,
        "worst_difference": worst,
        "runs": len(BETAS),
    }
    (out / "cost.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    main()
