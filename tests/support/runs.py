"""Whole runs through the command line, on a small world: what the tests of runs and of faults
share.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
# Most of a test's time is compiling. Without LLVM's optimisations it takes half the time, in one
# piece less than in several, and by the older emitter, which newer jaxlibs do not know, half again.
QUICK_COMPILING = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK_COMPILING += " --xla_cpu_use_fusion_emitters=false"
SMALL = {
    "batch_size": 8,
    "num_steps": 6,
    "log_every_steps": 1,
    "eval_every_steps": 3,
    "checkpoint_every_steps": 2,
    "self_check": "off",
    "data.eval_max_pairs": 16,
    "data.micro_batch_tokens": 512,
    "data.row_tokens": 384,
    "model.hidden_size": 64,
    "model.intermediate_size": 96,
    "model.head_dim": 16,
    "sft.num_steps": 0,
    "sample.num_prompts": 0,
    "sample.reward": "",
    "optim.learning_rate": 1e-3,
}


def small_world(folder: pathlib.Path) -> pathlib.Path:
    """Writes preferences as JSONL, and a tokenizer, of a small world; returns the folder."""
    from dpojax.data import world  # imports jax, whose flags conftest sets

    made = world.make_world(7, num_posts=2000, num_pairs=64, num_eval=16)
    for name, records in (("train", made.train), ("eval", made.eval)):
        lines = [json.dumps(records.get(i)) + "\n" for i in range(records.size)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    made.tokenizer.save(folder)
    return folder


def sampled_settings(preset: str, labels: str = "") -> dict[str, Any]:
    """Of a short run of a stage that trains on its own samples.

    Args:
      preset: of policy_gradient, or "online_dpo".
      labels: of online_dpo.
    """
    stage = {"policy_gradient.preset": preset, "policy_gradient.num_samples": 2}
    if preset == "online_dpo":
        stage = {"online_dpo.labels": labels, "online_dpo.num_samples": 3}
    name = next(iter(stage)).partition(".")[0]
    return {
        "stages": f"sft,{name}",
        "sft.num_steps": 3,
        "num_steps": 4,
        "sample.max_new_tokens": 8,
        "sample.reward": "dpojax.data.world:true_reward",
        **stage,
    }


def command(files, workdir, **changes):
    own = {"data.train": "train.jsonl", "data.eval": "eval.jsonl", "tokenizer": "tokenizer.model"}
    settings = (
        SMALL
        | ({} if files is None else {key: files / name for key, name in own.items()})
        | changes
    )
    flags = [f"--config.{k}={v}" for k, v in settings.items() if v is not None]
    return [
        sys.executable,
        "-m",
        "dpojax.main",
        "--config=configs/tldr.py",
        f"--workdir={workdir}",
        *flags,
    ]


def environment(devices=1, **more):
    """Of a run on so many devices; what it compiles lies in the folder that conftest names, as most
    runs are one program.
    """
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILING}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **more}


def own_cache_environment(home: pathlib.Path) -> dict[str, str]:
    """Of a run whose user's cache directory is `home`, so that what it compiles lies there.

    The flags of compiling are those of every run: two emitters differ in the last digit.
    """
    told = environment(1, XDG_CACHE_HOME=str(home))
    return {
        k: v for k, v in told.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }


def run(files, workdir, *, devices: Any = 1, code: Any = 0, flags: Any = (), **changes: Any):
    done = subprocess.run(
        [*command(files, workdir, **changes), *flags],
        env=environment(devices),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


TIMES = (
    "pairs_per_second",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "step_time_s",
    "useful_tflops",
)


def numbers(workdir):
    """Everything logged that is no time, by step; nothing is logged twice."""
    found = [
        ((r["step"], k), v)
        for r in rows(workdir)
        for k, v in r.items()
        if k != "step" and not k.endswith(TIMES)  # a stage's prefix stands before its keys
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


def content(folder: pathlib.Path) -> dict[str, str]:
    """Every file and folder of a workdir, with what it holds."""
    found = {}
    for place in sorted(folder.rglob("*")):
        found[str(place.relative_to(folder))] = (
            "" if place.is_dir() else hashlib.sha256(place.read_bytes()).hexdigest()
        )
    return found


def checksums(folder, step):
    """Of every array of a checkpoint, by its path."""
    from dpojax.training.checkpoint import Checkpoints  # imports jax, whose flags conftest sets

    return Checkpoints(folder, keep=9).meta(step)["checksums"]


def losses(workdir):
    return np.array([r["loss"] for r in rows(workdir) if "loss" in r])


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(files, workdir, env=None, *, command=command, **changes):
    """The command in the background, its output in one pipe."""
    argv = command(files, workdir, **changes)
    return subprocess.Popen(
        argv,
        env=env or environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def by_jax(count, i, port):
    """What tells a process of its others: JAX's own variables."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(i),
    }


def by_slurm(count, i, port):
    """What srun tells each task; the port comes from the job's number."""
    job = 4096 * 3 + port % 4096  # JAX takes 61440 + job % 4096
    own = {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": count,
        "SLURM_PROCID": i,
        "SLURM_LOCALID": i,
    }
    return {k: str(v) for k, v in own.items()}


def start_several(files, workdir, count, *, told=by_jax, env=None, last=None, **changes):
    """Processes of one run on localhost, one device each; `last` changes settings of the last one
    only.
    """
    changes = {"mesh.data": 1, "mesh.fsdp": count, **changes}
    port, settings = free_port(), [changes] * (count - 1) + [{**changes, **(last or {})}]
    return [
        start(files, workdir, environment(1, **told(count, i, port), **(env or {})), **s)
        for i, s in enumerate(settings)
    ]


def start_two(files, workdir, *, env=None, second=None, **changes):
    """Two processes of one run, as `start_several`."""
    return start_several(files, workdir, 2, env=env, last=second, **changes)


def ask_trl(script, out, *arguments, timeout=390):
    """What an oracle of tests/oracles writes to `out`; its arguments, in which `out` stands."""
    argv = [sys.executable, f"tests/oracles/{script}", *map(str, arguments)]
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def stop_at(process, text):
    """Stops a run by SIGTERM once it has said `text`."""
    for line in process.stdout:
        if text in line:
            break
    process.send_signal(signal.SIGTERM)
    assert "stopped at step" in finish(process, 143)


def wait_for(process, text):
    """Reads a process's output up to a line that starts with `text`."""
    read = []
    for line in process.stdout:
        read.append(line)
        if line.startswith(text):
            return
    raise AssertionError(f"no line {text!r} in:\n{''.join(read)[-3000:]}")


def finish(process, code, timeout=200):
    output = process.communicate(timeout=timeout)[0]
    assert process.returncode == code, output[-3000:]
    return output
