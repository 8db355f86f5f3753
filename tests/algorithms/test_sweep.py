"""Runs trained in one program: each equals its solo run, also after a stop."""

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT, command, content, environment, numbers, run, start, start_two, wait_for

from dpojax.config.grid import combinations
from dpojax.config.load import apply_override, load_config_file
from dpojax.errors import ConfigError


def sweeping(*grid):
    """`sweep_command` of this grid, as `runs.start` takes commands."""
    return lambda files, workdir, **changes: sweep_command(files, workdir, *grid, **changes)


def sweep_command(files, workdir, *grid, **changes):
    argv = command(files, workdir, **changes)
    return [sys.executable, "-m", "dpojax.sweep", *argv[3:], *grid]


def run_sweep(files, workdir, *grid, **changes):
    argv = sweep_command(files, workdir, *grid, **changes)
    done = subprocess.run(
        argv, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def assert_equal_runs(found, solo, atol=2e-5):
    a, b = numbers(found), numbers(solo)

    # While policy and reference are equal, a margin is 0 or rounding's, and its sign says nothing.
    def by_sign(k):
        return k[0] <= 1 and ("accurac" in k[1] or "displacement" in k[1])

    shared = [k for k in b if k in a and not by_sign(k)]
    assert {"loss", "grad_norm", "rewards/margins", "eval_loss", "learning_rate"} <= {
        k[1] for k in shared
    }
    np.testing.assert_allclose([a[k] for k in shared], [b[k] for k in shared], rtol=1e-4, atol=atol)


@pytest.mark.slow
def test_each_run_of_a_sweep_equals_its_solo_run(files, plain, tmp_path):
    output = run_sweep(
        files,
        tmp_path,
        "--sweep.loss.beta=0.1,0.4",
        "--sweep.loss.name=sigmoid,ipo",
        "--sweep.optim.learning_rate=1e-3",
    )
    assert "4 runs in one program" in output and re.search(
        r"programs (compiled 1 time\(s\)|loaded from).*: .*sweep_step", output
    )
    names = {p.name for p in tmp_path.glob("beta=*")}
    assert names == {
        f"beta={b},name={n},learning_rate=1e-3" for b in (0.1, 0.4) for n in ("sigmoid", "ipo")
    }
    # the plain run has beta 0.1
    assert_equal_runs(tmp_path / "beta=0.1,name=sigmoid,learning_rate=1e-3", plain[0])
    summary = json.loads(
        (tmp_path / "beta=0.4,name=ipo,learning_rate=1e-3/summary.json").read_text()
    )
    assert summary["runs_together"] == 4 and summary["num_steps"] == 6
    table = (tmp_path / "sweep.md").read_text()
    assert table.rstrip() in output and all(
        re.search(rf"\| {re.escape(name)} \| \d", table) for name in names
    )
    # What a run leaves is what dpojax.main leaves: it can be gone on from, and loaded.
    again = run(
        files,
        tmp_path / "beta=0.4,name=sigmoid,learning_rate=1e-3",
        num_steps=8,
        **{"loss.beta": 0.4, "optim.learning_rate": 1e-3},
    )
    assert "resumed at step 6" in again


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_a_learning_rate_is_that_of_the_solo_run(files, tmp_path):
    grid = "--sweep.optim.learning_rate=1e-3,3e-4"
    process = start(files, tmp_path / "a", command=sweeping(grid))
    wait_for(process, "DPO 3/")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert "resumed at step" in run_sweep(files, tmp_path / "a", grid)
    before = content(tmp_path / "a")
    other = sweep_command(files, tmp_path / "a", "--sweep.optim.learning_rate=1e-3,1e-4")
    assert subprocess.run(other, env=environment(), cwd=ROOT, timeout=300).returncode == 4
    assert content(tmp_path / "a") == before  # a sweep that is refused leaves every byte as it was
    run(files, tmp_path / "solo", **{"optim.learning_rate": 3e-4})
    assert_equal_runs(tmp_path / "a/learning_rate=3e-4", tmp_path / "solo")


@pytest.mark.slow
def test_seeds_of_adapters_are_those_of_their_solo_runs(files, plain, tmp_path):
    model = {
        "model.hidden_size": None,
        "model.intermediate_size": None,
        "model.head_dim": None,
        "model.init": plain[0],
    }
    settings = {
        **model,
        "lora.rank": 2,
        "lora.dropout": 0.1,
        "data.seed": 3,
        "tokenizer": files / "tokenizer.model",
    }
    for together in ("vmap", "loop"):
        run_sweep(
            files, tmp_path / together, "--sweep.seed=1,2", f"--together={together}", **settings
        )
    run(files, tmp_path / "solo", **settings, seed=2)
    assert_equal_runs(tmp_path / "vmap/seed=2", tmp_path / "solo")
    assert_equal_runs(tmp_path / "loop/seed=2", tmp_path / "solo")
    first, second = (numbers(tmp_path / f"vmap/seed={s}")[6, "loss"] for s in (1, 2))
    assert first != second


@pytest.mark.slow
def test_a_sweep_in_two_processes_is_that_of_one(files, tmp_path):
    grid = "--sweep.loss.beta=0.1,0.4"
    two = start_two(files, tmp_path / "two", command=sweeping(grid))
    outputs = [p.communicate(timeout=300)[0] for p in two]
    assert [p.returncode for p in two] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    run_sweep(files, tmp_path / "one", grid)
    for name in ("beta=0.1", "beta=0.4"):
        assert_equal_runs(tmp_path / "two" / name, tmp_path / "one" / name)


@pytest.mark.parametrize(
    ("grid", "overrides", "message"),
    [
        ({"batch_size": ["8", "16"]}, {}, "differ in loss"),
        ({"loss.name": ["sigmoid", "aot"]}, {}, "couples the pairs"),
        ({"seed": ["1", "2"]}, {}, "set lora.rank"),
        (
            {"seed": ["1", "2"]},
            {"lora.rank": "2", "data.seed": "3", "sft.num_steps": "0"},
            "model.init",
        ),
        ({"loss.beta": ["0.1", "0.1"]}, {}, "stands there twice"),
        ({"loss.beta": ["0.1", "-1"]}, {}, "beta"),
    ],
)
def test_what_a_sweep_cannot_do_is_said(grid, overrides, message):
    values = load_config_file(str(ROOT / "configs/tldr.py"))
    for key, text in overrides.items():
        apply_override(values, key, text)
    with pytest.raises(ConfigError, match=message):
        combinations(values, grid)
