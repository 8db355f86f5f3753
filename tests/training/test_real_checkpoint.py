"""A real chat checkpoint, SmolLM2-135M-Instruct, through its own template: it trains in every
precision, and as TRL does.

DPOJAX_TEST_SMOLLM2 names its folder; without that it is built where the shared data's script and
its libraries are.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT, environment
from shared_data import DATA

# two trainers of 135M parameters on whatever cores there are
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1300)]

needs_oracles = pytest.mark.skipif(
    not all(importlib.util.find_spec(m) for m in ("torch", "transformers", "trl", "datasets")),
    reason="torch, transformers and TRL are not installed: pip install .[parity]",
)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> pathlib.Path:
    """The checkpoint's folder."""
    named = os.environ.get("DPOJAX_TEST_SMOLLM2")
    if named:
        assert (pathlib.Path(named) / "config.json").is_file(), (
            f"DPOJAX_TEST_SMOLLM2={named} holds no config.json"
        )
        return pathlib.Path(named)
    script = DATA / "models/make_smollm2.sh"
    missing = [
        m
        for m in ("torch", "transformers", "gguf", "accelerate")
        if importlib.util.find_spec(m) is None
    ]
    if missing or not script.is_file():
        pytest.skip(
            "SmolLM2 is not there (DPOJAX_TEST_SMOLLM2), and cannot be built:"
            f" {', '.join(missing) or script}"
        )
    folder = tmp_path_factory.mktemp("smollm2")
    build = ["bash", str(script), str(folder)]
    done = subprocess.run(
        build,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.skip(
            "SmolLM2 is not there (DPOJAX_TEST_SMOLLM2), and its build failed:"
            f" {done.stderr[-300:]}"
        )
    return folder


@pytest.fixture(scope="session")
def messages() -> pathlib.Path:
    """Pairs of messages."""
    path = DATA / "ultrafeedback/messages_sample.jsonl"
    if not path.is_file():
        pytest.skip(f"real data is not at {DATA}; set DPOJAX_TEST_DATA")
    return path


@pytest.fixture(scope="session")
def short_pairs(messages, tmp_path_factory) -> pathlib.Path:
    """The eight shortest pairs, so that nothing is cut and a step is cheap."""
    lines = messages.read_text().splitlines()
    rows = sorted(
        ({k: r[k] for k in ("chosen", "rejected")} for r in map(json.loads, lines)),
        key=lambda r: len(str(r)),
    )
    path = tmp_path_factory.mktemp("pairs") / "short.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    return path


def train(model, data, workdir, **changes):
    """(output, logged steps) of a run whose self-check is on, as by default."""
    settings = {
        "model.init": model,
        "data.train": data,
        "data.eval": data,
        "data.eval_max_pairs": 1,
        "batch_size": 2,
        "num_steps": 2,
        "log_every_steps": 1,
        "optim.warmup_steps": 0,
        "optim.schedule": "constant",
        "optim.learning_rate": 1e-5,
        "sample.num_prompts": 0,
        **changes,
    }
    flags = [f"--config.{k}={v}" for k, v in settings.items()]
    argv = [
        sys.executable,
        "-m",
        "dpojax.main",
        "--config=configs/tldr.py",
        f"--workdir={workdir}",
        *flags,
    ]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return done.stdout, [r for r in rows if "loss" in r]


@pytest.mark.parametrize(
    "changes",
    [
        {"model.dtype": "bfloat16"},
        {"lora.rank": 4},
        {"lora.rank": 4, "lora.base_dtype": "nf4", "model.dtype": "bfloat16"},
    ],
    ids=["bfloat16", "lora", "qlora"],
)
def test_a_real_checkpoint_trains_with_the_default_settings(smollm2, messages, tmp_path, changes):
    limits = {"data.max_prompt_tokens": 128, "data.max_response_tokens": 64}
    output, steps = train(smollm2, messages, tmp_path, **limits, **changes)
    assert "self-check: loss 0.693147 = 0.693147" in output and "warning: self-check" not in output
    # In bfloat16 the two forward passes of a step round apart, each by 2^-9 of a logit.
    bound = 0.05 if changes.get("model.dtype") == "bfloat16" else 1e-3
    assert (
        abs(steps[0]["loss"] - np.log(2)) < bound
        and np.isfinite([s["grad_norm"] for s in steps]).all()
    )


@pytest.mark.parity
@needs_oracles
def test_a_real_checkpoint_follows_trl_through_its_chat_template(smollm2, short_pairs, tmp_path):
    out = tmp_path / "trl.json"
    argv = [
        sys.executable,
        "tests/oracles/trl_chat_oracle.py",
        smollm2,
        short_pairs,
        out,
        "4",
        "2",
        "1e-5",
    ]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    theirs = subprocess.run(
        list(map(str, argv)), cwd=ROOT, env=offline, capture_output=True, text=True, timeout=600
    )
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    expected = json.loads(out.read_text())
    output, steps = train(
        smollm2,
        short_pairs,
        tmp_path / "run",
        num_steps=4,
        **{"data.shuffle": False, "loss.beta": 0.1},
    )
    assert "self-check: loss 0.693147 = 0.693147" in output
    assert len(expected) == 4 and abs(steps[-1]["loss"] - steps[0]["loss"]) > 0.01  # it has moved
    np.testing.assert_allclose([s["loss"] for s in steps], [s["loss"] for s in expected], atol=2e-4)
    np.testing.assert_allclose(
        [s["rewards/margins"] for s in steps], [s["rewards/margins"] for s in expected], atol=1e-3
    )
