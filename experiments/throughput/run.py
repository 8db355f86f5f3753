"""Pairs per second of dpojax, TRL and Tunix on the same machine, model, weights, real pairs and
pairs per step.

    python experiments/throughput/run.py --data tldr=tldr/train.jsonl.gz hh=hh/helpful-base.jsonl.gz
    \\
        --tokenizer=llama2/tokenizer.model --tunix-python=TUNIX_VENV/bin/python --out=DIR

Every trainer is a process of its own; in a round they run one after another, so that ratios are
taken side by side. The losses of every step are compared: the work is the same. A trainer's first
step, which compiles or warms up, is not timed. Needs the `parity` extra here, and google-tunix in
an environment of its own (without --tunix-python it is left out).

On a GPU: --device=gpu --size=1b --dtype=bfloat16 --pairs=64 --tokenizer=llama3/tokenizer.json;
--size=8b --lora=16 for adapters on a frozen base. All trainers are held to the first device that is
visible. Writes result.json, result.md and result.png.
"""

import argparse
import fnmatch
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dpojax.data.dataset import Dataset
from dpojax.data.groups import Dropped
from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.data.records import open_records
from dpojax.data.rows import RowReader
from dpojax.data.tokens import Limits
from dpojax.runtime.subprocess_run import run_in_process

HERE = pathlib.Path(__file__).parent
TEMPLATES = {"tldr": "{prompt}\n\nTL;DR:"}
# vocabulary, width, mlp, layers, heads, kv heads, tied; 1b and 8b: the shapes of Llama 3.2 1B and
# Llama 3.1 8B. Positions turn
# alike in all of them (theta 1e4): Tunix has no scaling of theirs.
SIZES = {
    "21m": (32_000, 256, 640, 6, 4, 4, False),
    "1b": (128_256, 2048, 8192, 16, 32, 8, True),
    "8b": (128_256, 4096, 14336, 32, 32, 8, False),
}
# TRL is fastest at 1 pair a micro-batch on two cores, and leaves a GPU idle there.
MICRO = {"cpu": (1, 8), "gpu": (4, 8, 16, 32)}
ON_GPU = {"data.micro_batch_tokens": 16384, "model.logps_chunk_tokens": 1024}
LIMITS = Limits(512, 128)


def write_rows(file: pathlib.Path, data: str, template: str, tokenizer: str, count: int) -> None:
    """The first `count` usable pairs as token ids, which all trainers read."""
    dataset = Dataset(open_records(data), RowReader(template), load_tokenizer(tokenizer), LIMITS)
    with file.open("w") as out:
        row = -1
        while count:
            row += 1
            try:
                group, _ = dataset.token_group(row)
            except Dropped:
                continue
            ids = [x.tolist() for x in (group.prompt, *group.responses)]
            out.write(
                json.dumps(
                    dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))
                )
                + "\n"
            )
            count -= 1


def write_model(folder: pathlib.Path, size: str) -> None:
    """Random weights, which all trainers read."""
    import torch
    import transformers

    vocab, width, mlp, layers, heads, kv_heads, tied = SIZES[size]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
    )
    # Drawn on the GPU where there is one, in the stored dtype: 8B would take minutes on a host.
    dtype = torch.bfloat16 if size == "8b" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def environment(own: dict[str, Any]) -> dict[str, str]:
    """What holds a trainer to the device that is measured: JAX fails where it cannot have it."""
    if own["device"] == "cpu":
        return {
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_NUM_CPU_DEVICES": str(own["devices"]),
        }
    return {
        "JAX_PLATFORMS": "cuda",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
    }


def run_dpojax(folder: pathlib.Path, own: dict[str, Any]) -> dict[str, Any]:
    settings = {
        "data.train": folder / "rows.jsonl",
        "data.eval": folder / "rows.jsonl",
        "data.shuffle": False,
        "data.eval_max_pairs": 8,
        "model.init": folder / "model",
        "model.dtype": own["dtype"],
        "model.remat": "full" if own["remat"] else "dots",
        "reference.mode": "cached" if own["cached"] else "live",
        "batch_size": own["pairs"],
        "num_steps": own["steps"],
        "log_every_steps": 1,
        "eval_every_steps": 10**6,
        "checkpoint_every_steps": 10**6,
        "self_check": "off",
        "sft.num_steps": 0,
        "loss.beta": 0.1,
        "optim.learning_rate": 1e-4,
        "optim.schedule": "constant",
        "optim.warmup_steps": 0,
        "sample.num_prompts": 0,
    }
    if own["lora"]:
        settings |= {
            "reference.mode": "adapter",
            "lora.rank": own["lora"],
            "lora.base_dtype": own["dtype"],
        }
    settings |= own["settings"]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        workdir = pathlib.Path(place)
        summary = run_in_process(workdir, "configs/tldr.py", settings, environment=environment(own))
        rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [r for r in rows if "loss" in r]
    return {
        "loss": [r["loss"] for r in rows],
        "seconds": [r["step_time_s"] for r in rows],
        "padding": [r["padding/packing"] * r["padding/rounding"] for r in rows],
        "useful_tflops": summary.get("useful_tflops"),
        "useful_mfu": summary.get("useful_mfu"),
        "compile_seconds": summary["seconds_compiling"],
        "peak_gib": summary.get("peak_device_memory_gib") or summary["peak_process_memory_gib"],
        "summary": {k: v for k, v in summary.items() if k.startswith(("step_time", "tokens_per"))},
    }


def run_child(
    script: str, python: str, folder: pathlib.Path, own: dict[str, Any]
) -> dict[str, Any] | None:
    """A trainer's run in a process of its own; None where its micro-batch does not fit the GPU."""
    argv = [python, str(HERE / script), str(folder), json.dumps(own)]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | environment(own))
    if done.returncode and "CUDA out of memory" in done.stderr:
        return None
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.split("RESULT")[1])


def trainers(args: argparse.Namespace) -> dict[str, Any]:
    """Name -> a function of the folder that trains."""
    common = dict(
        steps=args.steps,
        pairs=args.pairs,
        dtype=args.dtype,
        device=args.device,
        remat=args.remat,
        lora=args.lora,
    )
    settings = (ON_GPU if args.device == "gpu" else {}) | dict(
        pair.split("=", 1) for pair in args.set
    )
    common |= dict(vocab_size=SIZES[args.size][0], cached=False, devices=1, settings=settings)
    micro = args.micro or MICRO[args.device]
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {}

    def add(name, function, *leading, **own):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.only):
            found[name] = lambda folder: function(*leading, folder, common | own)

    add("dpojax", run_dpojax)
    devices, name = (
        (cores, f"dpojax, {cores} devices") if args.device == "cpu" and cores > 1 else (1, "dpojax")
    )
    if devices > 1:
        add(f"{name} of a core each", run_dpojax, devices=devices)
    trl = (run_child, "with_trl.py", sys.executable)
    for size in micro:
        add(f"TRL, {size} a micro-batch", *trl, micro=size)
    if args.lora:  # the base is the reference
        return found
    add(f"{name}, cached reference", run_dpojax, devices=devices, cached=True)
    for size in micro if args.device == "gpu" else micro[:1]:
        add(f"TRL, {size} a micro-batch, precomputed", *trl, micro=size, cached=True)
    if args.tunix_python:
        add(
            f"Tunix, {args.tunix_micro} a micro-batch",
            run_child,
            "with_tunix.py",
            args.tunix_python,
            micro=args.tunix_micro,
        )
    return found


def machine(args: argparse.Namespace) -> dict[str, str]:
    """What the figures belong to."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    found = {
        "CPU": f"{', '.join(names) or platform.processor()}, {len(os.sched_getaffinity(0))} cores"
    }
    if args.device == "gpu":
        import torch

        found["GPU"] = torch.cuda.get_device_name()
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "trl")
    found["versions"] = f"Python {platform.python_version()}, " + ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in packages
    )
    if args.tunix_python:
        asked = (
            "import importlib.metadata as m; print(m.version('google-tunix'), 'on jax',"
            " m.version('jax'))"
        )
        done = subprocess.run(
            [args.tunix_python, "-c", asked], check=True, capture_output=True, text=True
        )
        found["versions"] += f", google-tunix {done.stdout.strip()}"
    return found | {"system": platform.platform(), "date": time.strftime("%Y-%m-%d")}


def matrix_rate(args: argparse.Namespace) -> float:
    """TFLOP/s of square matrix products of the run's dtype, in a process of its own: what these
    cores can do just now.
    """
    size = 8192 if args.device == "gpu" else 2048
    code = f"""
import time, jax, jax.numpy as jnp
x = jax.random.normal(jax.random.key(0), ({size}, {size}), "{args.dtype}")
f = jax.jit(lambda x: x @ x)
f(x).block_until_ready()
seconds = []
for _ in range(10):
    start = time.perf_counter()
    f(x).block_until_ready()
    seconds.append(time.perf_counter() - start)
print(2 * {size}**3 / sorted(seconds)[5] / 1e12)"""
    own = environment({"device": args.device, "devices": 1})
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | own,
    )
    return float(done.stdout)


def speed(run: dict[str, Any], pairs: int) -> float:
    """Pairs per second of the steps after the first."""
    return pairs * len(run["seconds"][1:]) / sum(run["seconds"][1:])


def report(
    args: argparse.Namespace, found: dict[str, dict[str, list]], facts: dict[str, str]
) -> str:
    lines = []
    for data, runs in found.items():
        live = [n for n in runs if n.startswith("dpojax") and "cached" not in n] or list(runs)
        ours = max(live, key=lambda n: np.median([speed(r, args.pairs) for r in runs[n]]))
        lines += [
            f"### {data}",
            "",
            f"| trainer | pairs/s | `{ours}` is faster by | largest loss difference | peak GiB |",
            "|---|---|---|---|---|",
        ]
        for name, own in runs.items():
            values = [speed(r, args.pairs) for r in own]
            ratios = [speed(a, args.pairs) / v for a, v in zip(runs[ours], values, strict=True)]
            gap = max(np.abs(np.subtract(r["loss"], runs[ours][0]["loss"])).max() for r in own)
            between = f" ({min(ratios):.1f} to {max(ratios):.1f})" if len(ratios) > 1 else ""
            peak = max(r["peak_gib"] for r in own)
            lines.append(
                f"| {name} | {np.median(values):.2f} | {np.median(ratios):.1f} x{between} |"
                f" {gap:.0e} | {peak:.1f} |"
            )
        lines += [
            "",
            "| dpojax | tokens over ideal | step, p50 s | compiling s | useful TFLOP/s | MFU |",
            "|---|---|---|---|---|---|",
        ]
        for name in (n for n in runs if n.startswith("dpojax")):
            r = runs[name][-1]
            mfu = "" if r["useful_mfu"] is None else f"{r['useful_mfu']:.1%}"
            own = (
                f"{np.mean(r['padding']):.3f} | {np.median(r['seconds'][1:]):.2f} |"
                f" {r['compile_seconds']:.0f}"
            )
            lines.append(f"| {name} | {own} | {r['useful_tflops']:.3f} | {mfu} |")
        lines.append("")
    return "\n".join(lines + [f"{k}: {v}  " for k, v in facts.items()]) + "\n"


def draw(args: argparse.Namespace, found: dict[str, dict[str, list]], file: pathlib.Path) -> None:
    names = list(next(iter(found.values())))
    figure, axes = plt.subplots(
        1,
        len(found),
        figsize=(5.2 * len(found), 0.5 + 0.42 * len(names)),
        sharey=True,
        squeeze=False,
    )
    for axis, (data, runs) in zip(axes[0], found.items(), strict=True):
        values = [float(np.median([speed(r, args.pairs) for r in runs[n]])) for n in names]
        colours = ["tab:blue" if n.startswith("dpojax") else "tab:gray" for n in names]
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [f"{v:.2f}" for v in values], padding=3)
        axis.set(title=data, xlabel="pairs per second", xlim=(0, 1.18 * max(values)))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()  # of all plots: they share it
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=FILE")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument(
        "--tunix-python", default="", help="the Python of an environment with google-tunix"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--size", choices=SIZES, default="21m")
    parser.add_argument("--pairs", type=int, default=32, help="pairs a step")
    parser.add_argument(
        "--micro",
        type=int,
        nargs="+",
        default=[],
        help="pairs of TRL's micro-batches (1 8, on a GPU 4 8 16 32)",
    )
    parser.add_argument(
        "--lora", type=int, default=0, help="rank of adapters; 0: all parameters are trained"
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="settings of dpojax, as --config.KEY=VALUE",
    )
    parser.add_argument("--tunix-micro", type=int, default=1)
    parser.add_argument(
        "--remat", action="store_true", help="all trainers compute activations again"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--only", nargs="*", default=["*"], help="patterns of trainers' names, e.g. 'TRL, 8*'"
    )
    parser.add_argument(
        "--tolerance", type=float, help="between the losses of a step (0.005; in bfloat16 0.03)"
    )
    args = parser.parse_args()
    # of this process alone, which must leave the GPU's memory to the trainers
    os.environ["JAX_PLATFORMS"] = "cpu"
    if args.tolerance is None:
        args.tolerance = 5e-3 if args.dtype == "float32" else 3e-2
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    facts, found, rates = machine(args), {}, []
    with tempfile.TemporaryDirectory() as place:
        model = pathlib.Path(place) / "model"
        write_model(model, args.size)
        for entry in args.data:
            data, _, file = entry.partition("=")
            folder = pathlib.Path(place) / data
            folder.mkdir()
            (folder / "model").symlink_to(model)
            write_rows(
                folder / "rows.jsonl",
                file,
                TEMPLATES.get(data, "{prompt}"),
                args.tokenizer,
                args.steps * args.pairs,
            )
            own = trainers(args)
            found[data] = {name: [] for name in own}
            for i in range(args.rounds):
                rates.append(matrix_rate(args))
                facts["matrix products, this dtype"] = (
                    f"{np.median(rates):.2f} TFLOP/s beside the runs"
                )
                for name, train in own.items():
                    run = train(folder)
                    if run is None:
                        print(f"{data} round {i + 1}: {name}: does not fit", flush=True)
                        facts["does not fit"] = ", ".join(
                            {*facts.get("does not fit", "").split(", "), name} - {""}
                        )
                        continue
                    found[data][name].append(run)
                    took = ", ".join(f"{s:.1f}" for s in run["seconds"])
                    print(
                        f"{data} round {i + 1}: {name}: {speed(run, args.pairs):.2f} pairs/s, steps"
                        f" {took} s",
                        flush=True,
                    )
                    (out / "result.json").write_text(
                        json.dumps(
                            {"machine": facts, "settings": vars(args), "runs": found}, indent=1
                        )
                    )
            found[data] = {name: runs for name, runs in found[data].items() if runs}
    text = report(args, found, facts)
    (out / "result.md").write_text(text)
    draw(args, found, out / "result.png")
    print(text)
    for data, runs in found.items():
        # adapters begin at random places: after a step they differ
        compared = slice(1 if args.lora else None)
        losses = {name: [r["loss"][compared] for r in own] for name, own in runs.items()}
        first = next(iter(losses.values()))[0]
        for name, own in losses.items():
            if not np.allclose(own, first, atol=args.tolerance):
                raise SystemExit(
                    f"{data}: the losses of {name} are not those of the others: {own} and {first}"
                )


if __name__ == "__main__":
    main()
