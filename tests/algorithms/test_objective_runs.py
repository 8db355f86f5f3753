"""Objectives through the command line: unpaired data, moving and absent references, functions of
one's own, resuming.
"""

import dataclasses
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT, command, environment, losses, numbers, rows, run, start, start_two, wait_for

from dpojax.training.checkpoint import Checkpoints

KTO = {"loss.name": "kto", "batch_size": 16}
TR = {"loss.name": "tr_dpo", "loss.alpha": 0.6, "loss.tau": 2}


@pytest.fixture(scope="session")
def unpaired(files):
    """The pairs of `files` as rows of prompt, completion and label."""
    for name in ("train", "eval"):
        lines = []
        for line in (files / f"{name}.jsonl").read_text().splitlines():
            pair = json.loads(line)
            both = ((pair["chosen"], True), (pair["rejected"], False))
            lines += [
                json.dumps({"prompt": pair["prompt"], "completion": text, "label": label})
                for text, label in both
            ]
        (files / f"unpaired-{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return {
        "data.train": files / "unpaired-train.jsonl",
        "data.eval": files / "unpaired-eval.jsonl",
    }


@pytest.fixture(scope="session")
def kto(files, unpaired, tmp_path_factory):
    """An uninterrupted KTO run."""
    workdir = tmp_path_factory.mktemp("kto")
    return workdir, run(files, workdir, **KTO, **unpaired)


def stop_and_resume(files, workdir, **changes):
    process = start(files, workdir, **changes)
    wait_for(process, "DPO 3/")
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 143, rest
    assert "resumed at step" in run(files, workdir, **changes)


@pytest.mark.slow
def test_kto_trains_on_labelled_responses(kto, files, unpaired):
    workdir, output = kto
    assert [r["step"] for r in rows(workdir) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    first = next(r for r in rows(workdir) if "loss" in r)
    assert abs(first["loss"] - 0.5) < 1e-6 and first["kl"] == 0  # policy == reference
    assert {"objective/accuracy", "lengths/chosen", "displacement", "gradient_weight/q50"} <= set(
        first
    )
    assert (
        "held-out responses" in output
        and "Held-out responses" in (workdir / "report.html").read_text()
    )
    program = json.loads((workdir / "summary.json").read_text())["programs"]["dpo_step"]
    assert program["compiled"] + program["loaded"] == 1


@pytest.mark.slow
def test_kill_and_resume_with_kto_is_bit_equal(kto, files, unpaired, tmp_path):
    stop_and_resume(files, tmp_path, **KTO, **unpaired)
    assert numbers(tmp_path) == numbers(kto[0])
    checks = [
        Checkpoints(w / "checkpoints", keep=9).meta(6)["checksums"] for w in (tmp_path, kto[0])
    ]
    assert checks[0] == checks[1]


@pytest.mark.slow
def test_kto_is_the_same_in_two_processes_and_with_a_cached_reference(
    kto, files, unpaired, tmp_path
):
    changes = KTO | unpaired
    started = start_two(files, tmp_path / "two", **changes)
    outputs = [p.communicate(timeout=300)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], outputs[0][-3000:]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(kto[0]), atol=1e-5)
    run(files, tmp_path / "cached", **{"reference.mode": "cached"}, **changes)
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(kto[0]), atol=1e-5)


@pytest.mark.slow
def test_kill_and_resume_with_a_moving_reference_is_bit_equal(files, tmp_path):
    run(files, tmp_path / "plain", **TR)
    stop_and_resume(files, tmp_path / "stopped", **TR)
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "plain")
    metas = [
        Checkpoints(tmp_path / w / "checkpoints", keep=9).meta(6)["checksums"]
        for w in ("plain", "stopped")
    ]
    assert metas[0] == metas[1] and any(k.startswith(".memory['reference']") for k in metas[0])
    # the reference has moved: the run is another one than DPO's, from the third step on
    run(files, tmp_path / "fixed")
    moved, fixed = losses(tmp_path / "plain"), losses(tmp_path / "fixed")
    np.testing.assert_array_equal(moved[:2], fixed[:2])
    assert abs(moved[2] - fixed[2]) > 1e-5


@pytest.mark.slow
def test_a_reference_free_objective_holds_no_reference(files, tmp_path):
    changes = {
        "loss.name": "simpo",
        "loss.beta": 2.0,
        "loss.gamma": 0.5,
        "self_check": "full",
        "num_steps": 3,
    }
    output = run(files, tmp_path / "none", **changes)
    assert "self-check: loss" in output
    first = next(r for r in rows(tmp_path / "none") if "loss" in r)
    assert "displacement" not in first and "objective/accuracy" in first


OWN = """
import jax
import jax.numpy as jnp

def mine(x, *, beta, kappa):
    return -jax.nn.log_sigmoid(beta * x.h) * kappa

def centred(x, *, beta):
    return jnp.square(beta * (x.h - x.h.mean()) - 1)
"""
CONFIG = """
from dpojax.configs import tldr

def get_config():
    config = tldr.get_config()
    config.loss.name = "{place}:{function}"
    {more}
    return config
"""


def run_own(files, folder, function, more, *, code=0, source=OWN, **changes):
    (folder / "own.py").write_text(source)
    (folder / "config.py").write_text(
        CONFIG.format(place=folder / "own.py", function=function, more=more)
    )
    argv = [a for a in command(files, folder / "w", **changes) if not a.startswith("--config=")]
    argv.insert(3, f"--config={folder / 'config.py'}")
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_config_outside_the_package_brings_its_own_objective(plain, files, tmp_path):
    changes = {"num_steps": 4, "self_check": "full"}
    output = run_own(files, tmp_path, "mine", "config.loss.extra.kappa = 2.0", **changes)
    assert "no closed form at policy == reference" in output
    np.testing.assert_allclose(losses(tmp_path / "w")[:2], 2 * losses(plain[0])[:2], rtol=1e-6)
    # another function under the same name is another loss
    output = run_own(
        files,
        tmp_path,
        "mine",
        "config.loss.extra.kappa = 2.0",
        code=4,
        source=OWN.replace("* kappa", "* kappa * 1.0"),
        num_steps=5,
    )
    assert "another loss" in output


@pytest.mark.slow
def test_the_self_check_finds_a_hidden_coupling(files, tmp_path):
    output = run_own(files, tmp_path, "centred", "", code=5, num_steps=2, self_check="full")
    assert "coupled=True" in output


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"loss.name": "tdpo1", "reference.mode": "cached"}, 2, "reference.mode"),
        ({**TR, "reference.mode": "cached"}, 2, "reference.mode"),
        ({"reference.mode": "none"}, 2, "reference.mode"),
        ({"loss.name": "simpo"}, 2, "loss.gamma"),
        ({"loss.gamma": 1.0}, 2, "loss.gamma"),
        ({"loss.name": "nowhere.py:mine"}, 2, "loss.name"),
        ({"loss.name": "sigmoid+kto"}, 2, "loss.name"),
        ({"data.mask_tokens": "<nothing>"}, 2, "data.mask_tokens"),
        ({"loss.name": "odpo", "loss.alpha": 1.0}, 3, "train.jsonl:1"),
        ({"loss.name": "odpo", "loss.alpha": 1.0, "data.flip_labels": 0.1}, 2, "data.flip_labels"),
    ],
)
def test_what_an_objective_cannot_do_is_said_before_training(
    files, tmp_path, changes, code, names, capsys
):
    from dpojax.main import main

    assert main(command(files, tmp_path, **changes)[3:]) == code
    assert names in capsys.readouterr().err


def test_odpo_names_the_row_whose_scores_are_the_wrong_way_round(files, tmp_path, capsys):
    from dpojax.main import main

    pairs = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    made = [
        {**p, "score_chosen": 2.0, "score_rejected": 2.5 if i == 4 else 1.0}
        for i, p in enumerate(pairs)
    ]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    changes = {
        "loss.name": "odpo",
        "loss.alpha": 1.0,
        "data.train": tmp_path / "scored.jsonl",
        "data.eval": tmp_path / "scored.jsonl",
    }
    assert main(command(files, tmp_path / "w", **changes)[3:]) == 3
    error = capsys.readouterr().err
    assert "scored.jsonl:5" in error and "-0.5" in error


def test_labels_are_needed_and_read_strictly(files, tmp_path, capsys):
    from dpojax.main import main

    for row, names in (({}, "'label' is missing"), ({"label": "good"}, "'good'")):
        line = json.dumps({"prompt": "a b c", "completion": "d e", **row}) + "\n"
        (tmp_path / "rows.jsonl").write_text(line * 4)
        changes = {
            "loss.name": "kto",
            "data.train": tmp_path / "rows.jsonl",
            "data.eval": tmp_path / "rows.jsonl",
        }
        assert main(command(files, tmp_path / "w", **changes)[3:]) == 3
        assert names in capsys.readouterr().err


RECIPES = {  # objectives.md's table of published settings
    "zephyr": ("sigmoid", {"beta": 0.1}, 5e-7, 32, "linear"),
    "llama3": ("sigmoid", {"beta": 0.1, "sft_weight": 0.2}, 1e-5, 128, "linear"),
    "tulu3": ("sigmoid_norm", {"beta": 5.0}, 5e-7, 128, "linear"),
    "simpo": ("simpo", {"beta": 2.5, "gamma": 1.375}, 1e-6, 128, "cosine"),
    "orpo": ("orpo", {"orpo_lambda": 0.1}, 5e-6, 128, "linear"),
}


def test_recipes_are_the_published_settings():
    from dpojax.config.load import from_config_dict, load_config_file

    for name, (objective, settings, rate, batch, schedule) in RECIPES.items():
        values = load_config_file(str(ROOT / f"configs/recipes.py:{name}"))
        values.data.train = values.data.eval = "pairs.jsonl"
        values.model.init = "model"
        config = from_config_dict(values)
        given = {
            k: v
            for k, v in dataclasses.asdict(config.loss).items()
            if v not in (None, {}) and k != "name"
        }
        assert (config.loss.name, given) == (objective, pytest.approx(settings))
        assert (config.optim.learning_rate, config.batch_size, config.optim.schedule) == (
            rate,
            batch,
            schedule,
        )
        assert config.optim.warmup_steps == config.num_steps / 10
    argv = [sys.executable, "-m", "dpojax.main", "--config=configs/recipes.py"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and "zephyr" in done.stderr


@pytest.mark.slow
def test_the_on_policy_kl_is_logged_beside_ktos_point_and_a_reference_may_lie_elsewhere(
    files, unpaired, tmp_path
):
    changes = {
        "sample.num_prompts": 8,
        "sample.max_new_tokens": 4,
        "num_steps": 3,
        "mesh.data": 1,
        "mesh.fsdp": 2,
    }
    changes |= {"reference.dtype": "bfloat16", "model.dtype": "bfloat16"}
    output = run(files, tmp_path, devices=2, **KTO, **unpaired, **changes)
    last = [r for r in rows(tmp_path) if "eval_loss" in r][-1]
    assert {"eval_kl", "eval_on_policy_kl", "eval_on_policy_kl_standard_error"} <= set(last)
    assert re.search(r"(compiled|loaded).* reference_scorer", output) and np.isfinite(
        last["eval_on_policy_kl"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("names", ["</s>", "</s>,<unk>"])
def test_formatting_tokens_are_masked_or_refused_where_no_response_holds_them(
    plain, files, tmp_path, names, capsys
):
    from dpojax.main import main

    changes = {"data.mask_tokens": names, "num_steps": 1, "self_check": "off"}
    code = main(command(files, tmp_path, **changes)[3:])
    if names == "</s>":  # every response ends in it
        assert code == 0
        one = next(r for r in rows(tmp_path) if "loss" in r)
        whole = next(r for r in rows(plain[0]) if "loss" in r)
        assert one["lengths/chosen"] == whole["lengths/chosen"] - 1
    else:
        assert code == 2 and "<unk>" in capsys.readouterr().err
