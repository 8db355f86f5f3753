"""How does the cost of a step grow? Seconds of a step against row length, vocabulary, responses,
pairs, micro-batch and devices.

    python experiments/throughput/scaling.py --out=DIR

The real step of the main job, on random groups of one size and the 21M Llama, one thing varied at a
time. The exponent is the slope of log seconds over log size, by least squares, through all points
and through the last two. Writes scaling.json, scaling.md and scaling.png.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import matplotlib

matplotlib.use("Agg")
import jax
import matplotlib.pyplot as plt
import numpy as np

from dpojax.algorithms.dpo import preference_step
from dpojax.config.load import from_config_dict, load_config_file
from dpojax.cost.step_work import NeverStop
from dpojax.data.row_filling import StepLengths, pack_step
from dpojax.data.row_plan import plan_step
from dpojax.data.shapes import Lengths
from dpojax.data.token_groups import TokenGroup, TokenPair
from dpojax.models.config import ModelConfig
from dpojax.models.placed import describe, fitted
from dpojax.runtime.context import Job
from dpojax.runtime.log import MetricsLog
from dpojax.runtime.mesh import config_mesh, num_shards
from dpojax.training.rows import batch_shape

BASE = {
    "prompt": 256,
    "response": 64,
    "responses": 2,
    "groups": 16,
    "vocabulary": 32_000,
    "micro_batch": 4096,
    "devices": 1,
}
VARIED = {
    "prompt": (64, 256, 1024, 2048),
    "response": (16, 64, 256),
    "responses": (2, 4, 8),
    "groups": (8, 16, 64),
    "vocabulary": (8_000, 32_000, 128_000),
    "micro_batch": (1024, 4096, 8192),
    "devices": tuple(2**i for i in range((len(os.sched_getaffinity(0))).bit_length())),
}
LABELS = {
    "prompt": "tokens of a prompt",
    "response": "tokens of a response",
    "responses": "responses of a prompt, K",
    "groups": "prompts a step",
    "vocabulary": "vocabulary",
    "micro_batch": "tokens of a micro-batch",
    "devices": "devices, a core each",
}


def measure(point: dict[str, int], steps: int) -> float:
    """Median seconds of a step, its compiling left out."""
    raw = load_config_file("configs/tldr.py")
    groups, k, x, y = (point[n] for n in ("groups", "responses", "prompt", "response"))
    raw.batch_size, raw.data.micro_batch_tokens, raw.lora.rank = (
        groups,
        max(point["micro_batch"], x + k * y),
        0,
    )
    config = from_config_dict(raw)
    mesh = config_mesh(config.mesh, jax.devices()[: point["devices"]])
    job = Job(config, pathlib.Path(), mesh, MetricsLog(pathlib.Path(), enabled=False), NeverStop())
    policy = describe(
        job,
        ModelConfig(
            vocab_size=point["vocabulary"],
            hidden_size=256,
            intermediate_size=640,
            num_layers=6,
            num_heads=4,
            num_kv_heads=4,
            head_dim=64,
            norm="rms",
            norm_eps=1e-6,
            mlp="gated",
            activation="silu",
            rope_theta=1e4,
            attention_bias=False,
            mlp_bias=False,
            tie_embeddings=False,
            max_positions=8192,
            init_std=0.02,
        ),
    )
    prompts, responses, pairs = (
        [x] * groups,
        [[y] * k] * groups,
        [tuple(TokenPair(i, i + 1, 1.0, 1.0, 0.0) for i in range(k - 1))] * groups,
    )
    shape = batch_shape(job, policy, [Lengths(np.array(prompts), responses)], groups)
    shape = dataclasses.replace(shape, num_pairs=groups * (k - 1))
    policy = fitted(job, policy, shape)
    rng = np.random.default_rng(0)

    def ids(n):
        return rng.integers(3, point["vocabulary"], n)

    made = [
        TokenGroup(ids(x), tuple(ids(y) for _ in range(k)), pairs[i], row=i) for i in range(groups)
    ]
    batch = pack_step(
        plan_step(prompts, responses, shape),
        shape,
        lambda g: made[g],
        StepLengths(prompts=prompts, responses=responses, counted=responses, pairs=pairs),
        shards=range(num_shards(mesh)),
        pad_id=0,
        with_ref=False,
    )
    step = preference_step(job, policy)

    def params():
        return jax.jit(policy.model.init, out_shardings=policy.shardings)(jax.random.key(0))

    state = jax.jit(step.make_state)({"policy": params()}, {})
    frozen = {"reference": params(), "base": None}
    batch = job.put(batch)
    seconds = []
    for _ in range(1 + steps):
        start = time.perf_counter()
        state, metrics = step.program(state, frozen, batch, np.bool_(False))
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def slope(sizes: list[int], seconds: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def draw(found: dict[str, dict], file: pathlib.Path) -> None:
    """A panel for each variation, all on one scale of seconds."""
    columns = -(-len(found) // 2)
    figure, axes = plt.subplots(
        2, columns, figsize=(3.2 * columns, 5.6), sharey=True, squeeze=False
    )
    for axis, (name, own) in zip(axes.flat, found.items(), strict=False):
        axis.loglog(own["size"], own["seconds"], "o-")
        axis.set(xlabel=LABELS[name], title=f"exponent {own['exponent']:.2f}")
        axis.set_xticks(own["size"], [f"{s:,}" for s in own["size"]], rotation=30)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(found) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds of a step")
    every = [s for own in found.values() for s in own["seconds"]]
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if min(every) / 2 < t < 2 * max(every)]
    axes[0, 0].set_yticks(ticks, [f"{t:g}" for t in ticks])
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(VARIED), choices=list(VARIED))
    # a process of its own: the number of devices is its own
    parser.add_argument("--point", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print("RESULT" + json.dumps(measure(json.loads(args.point), args.steps)))
        return
    found: dict[str, dict[str, Any]] = {}
    known: dict[str, float] = {}  # every variation goes through the same point
    for name in args.only:
        found[name] = {"size": list(VARIED[name]), "seconds": []}
        for size in VARIED[name]:
            point = BASE | {name: size}
            key = json.dumps(point)
            if key not in known:
                argv = [sys.executable, __file__, f"--steps={args.steps}", f"--point={key}"]
                environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(point["devices"])}
                done = subprocess.run(
                    argv, check=True, stdout=subprocess.PIPE, text=True, env=environment
                )
                known[key] = json.loads(done.stdout.split("RESULT")[1])
            found[name]["seconds"].append(known[key])
            print(f"{LABELS[name]} {size}: {found[name]['seconds'][-1]:.2f} s", flush=True)
    lines = [
        "| varied | from | to | seconds of a step | exponent | of the last two |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        sizes, seconds = own["size"], own["seconds"]
        own["exponent"], own["last"] = slope(sizes, seconds), slope(sizes[-2:], seconds[-2:])
        shown = ", ".join(f"{s:.2f}" for s in seconds)
        lines.append(
            f"| {LABELS[name]} | {sizes[0]:,} | {sizes[-1]:,} | {shown} | {own['exponent']:.2f} |"
            f" {own['last']:.2f} |"
        )
    text = (
        "\n".join(lines)
        + f"\n\nOtherwise: {', '.join(f'{LABELS[n]} {v:,}' for n, v in BASE.items())}.\n"
    )
    out = pathlib.Path(args.out or ".")
    out.mkdir(parents=True, exist_ok=True)
    (out / "scaling.json").write_text(json.dumps({"base": BASE, "found": found}, indent=1) + "\n")
    (out / "scaling.md").write_text(text)
    draw(found, out / "scaling.png")
    print(text)


if __name__ == "__main__":
    main()
