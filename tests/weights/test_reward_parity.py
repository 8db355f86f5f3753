"""A reward model's run, step for step, against TRL's RewardTrainer on real HH pairs."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from model_folders import make_classifier
from runs import ROOT, ask_trl, environment

FROZEN = json.loads((ROOT / "tests/oracles/frozen/trl_reward.json").read_text())["settings"]
CENTRING = {"plain": 0.0, "centred": 0.01}
has_oracles = all(importlib.util.find_spec(m) for m in ("torch", "transformers", "trl", "datasets"))


@pytest.fixture
def classifier(shared_data, tmp_path):
    return make_classifier(shared_data / "models/TinyStories-656K", tmp_path / "classifier")


@pytest.mark.slow
@pytest.mark.parametrize("name", FROZEN)
def test_twenty_steps_follow_trl(shared_data, classifier, tmp_path, name):
    rows = shared_data / "hh/token_rows.jsonl"
    settings = {
        "stages": "reward_model",
        "data.train": rows,
        "data.eval": rows,
        "data.shuffle": False,
        "data.eval_max_pairs": 8,
        "model.init": classifier,
        "batch_size": 8,
        "log_every_steps": 1,
        "reward_model.num_steps": 20,
        "reward_model.learning_rate": 1e-4,
        "reward_model.schedule": "constant",
        "reward_model.warmup_steps": 0,
        "reward_model.centring": CENTRING[name],
    }
    flags = [f"--config.{k}={v}" for k, v in settings.items()]
    argv = [sys.executable, "-m", "dpojax.main", "--config=tldr", f"--workdir={tmp_path}/run"]
    done = subprocess.run(
        [*argv, *flags], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    logged = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    found = [row for row in logged if "reward_model_loss" in row]
    assert len(found) == 20
    for key, bound in {
        "loss": 2e-4,
        "accuracy": 0.0,
        "margin": 4e-4,
        "mean_reward": 4e-4,
        "min_reward": 1e-3,
        "max_reward": 1e-3,
    }.items():
        values = [row[f"reward_model_{key}"] for row in found]
        np.testing.assert_allclose(values, FROZEN[name][key], rtol=0, atol=bound, err_msg=key)
    norms = [row["reward_model_grad_norm"] for row in found]
    np.testing.assert_allclose(norms, FROZEN[name]["grad_norm"], rtol=1e-3)


def scored(rows, out, *flags):
    argv = [sys.executable, "-m", "dpojax.score", f"--data={rows}", f"--out={out}", *flags]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parity
@pytest.mark.skipif(not has_oracles, reason="transformers is not installed: pip install .[parity]")
def test_scores_of_a_foreign_reward_model_are_transformers_logits(
    shared_data, classifier, tmp_path
):
    import torch
    import transformers

    rows = [json.loads(x) for x in (shared_data / "hh/token_rows.jsonl").open()][:6]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = scored(file, tmp_path / "scores.jsonl", f"--reward_model={classifier}")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        classifier, dtype=torch.float32
    ).eval()
    for row, written in zip(rows, found, strict=True):
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                want = float(model(ids).logits[0, 0])
            assert written[f"{side}_reward"] == pytest.approx(want, abs=1e-5)
        margin = written["chosen_reward"] - written["rejected_reward"]
        assert written["margin"] == pytest.approx(margin, abs=1e-6)
        assert "chosen_logps" not in written


def test_candidates_are_ranked_by_a_reward_model_and_the_best_of_k_is_counted(
    shared_data, classifier, tmp_path
):
    row = {
        "prompt": "Tom had a dog.",
        "completions": [" It ran.", " It ate the cat and was very sad.", " He ran.", " No."],
    }
    file, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    file.write_text(json.dumps(row) + "\n")
    flags = (f"--reward_model={classifier}", "--best_of=1,2,4,8")
    written = scored(file, out, *flags)[0]
    rewards = written["reward"]
    assert len(rewards) == 4 and written["best"] == int(np.argmax(rewards))
    summary = json.loads((tmp_path / "scores.jsonl.summary.json").read_text())
    one, two, four, eight = summary["best_of"]
    assert one["mean_reward"] == pytest.approx(np.mean(rewards), abs=1e-6)
    pairs = [max(a, b) for i, a in enumerate(rewards) for b in rewards[i + 1 :]]
    assert two["mean_reward"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert four["mean_reward"] == pytest.approx(max(rewards), abs=1e-6)
    assert eight == {"k": 8, "prompts": 0}
    assert one["kl_bound"] == 0 and four["kl_estimate"] < np.log(4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of --model and --reward_model"),
        (["--reward_model=a", "--ref=b"], "has no reference"),
        (["--reward_model=a", "--best_of=0"], "whole numbers from 1 on"),
        (["--model=a", "--best_of=2"], "told by rewards"),
    ],
)
def test_flags_that_do_not_go_together_are_said(tmp_path, capsys, flags, message):
    from dpojax import score

    assert score.main([f"--data={tmp_path}/rows.jsonl", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_language_model_is_no_reward_model(shared_data, tmp_path, capsys):
    from dpojax import score

    model = shared_data / "models/TinyStories-656K"
    assert score.main([f"--data={tmp_path}/rows.jsonl", f"--reward_model={model}"]) == 2
    assert "it is a language model; a reward model is wanted" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.skipif(not has_oracles, reason="TRL is not installed: pip install .[parity]")
def test_trl_still_gives_the_frozen_numbers(shared_data, classifier, tmp_path):
    out = tmp_path / "trl.json"
    rows = shared_data / "hh/token_rows.jsonl"
    found = ask_trl("trl_reward_oracle.py", out, classifier, rows, out, 6)["settings"]
    for name in FROZEN:
        np.testing.assert_allclose(found[name]["loss"], FROZEN[name]["loss"][:6], atol=1e-4)
