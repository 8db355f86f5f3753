"""Whole runs through the command line: the same numbers on any topology, and after a kill."""

import gzip
import json
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from runs import ROOT, command, environment, losses, numbers, rows, run, start, wait_for

from dpojax.training.checkpoint import Checkpoints


def test_a_run_leaves_report_metrics_and_summary_and_compiles_each_program_once(plain, files):
    workdir, output = plain
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["num_steps"] == 6 and summary["pairs_per_second"] > 0
    assert {"eval_loss", "eval_rewards/accuracies"} <= set(summary)
    assert [r["step"] for r in rows(workdir) if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows(workdir) if "eval_loss" in r] == [0, 3, 6]
    assert summary["programs"] and all(
        p["compiled"] + p["loaded"] == 1 for p in summary["programs"].values()
    )
    assert re.search(r"^programs .*dpo_step", output, re.MULTILINE)
    page = (workdir / "report.html").read_text()
    assert "<img" in page and "http" not in page.split("</style>")[1]  # self-contained
    facts = (
        "M parameters",
        "64 rows",
        "16 rows",
        "1 x cpu",
        f"jax {jax.__version__}",
        "dpojax.main",
    )
    for fact in (
        *facts,
        "Before and after",
        "this process took",
        "accuracy of the implicit rewards",
    ):
        assert fact in page, fact
    assert "finished" in run(files, workdir)


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(plain, files, tmp_path):
    run(files, tmp_path, devices=8, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    np.testing.assert_allclose(losses(tmp_path), losses(plain[0]), atol=1e-5)


@pytest.mark.slow
def test_rows_of_slots_whose_tokens_are_shared_give_the_losses_of_one_device(
    plain, files, tmp_path
):
    """Another layout, four devices, two of which share every row;
    parameters spread over both axes.
    """
    mesh = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.sequence": 2, "mesh.rules.embed": "fsdp,sequence"}
    layout = {
        "data.layout": "slots",
        "data.row_tokens": 0,
        "data.micro_batch_tokens": 2048,
        "model.remat": "full",
    }
    output = run(files, tmp_path, devices=4, **mesh, **layout)
    assert "sequence 2" in output and "layout slots of" in output
    np.testing.assert_allclose(losses(tmp_path), losses(plain[0]), atol=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_losses_and_the_batches_of_one(plain, plain_two):
    np.testing.assert_allclose(losses(plain_two), losses(plain[0]), atol=1e-5)

    def tokens(workdir):
        return [r["num_tokens"] for r in rows(workdir) if "loss" in r]

    assert tokens(plain_two) == tokens(plain[0])


@pytest.mark.slow
def test_a_cached_reference_gives_the_losses_of_a_live_one_and_is_checked_before_use(
    plain, files, tmp_path
):
    run(files, tmp_path, **{"reference.mode": "cached"})
    np.testing.assert_allclose(losses(tmp_path), losses(plain[0]), atol=1e-5)
    (tmp_path / "summary.json").unlink()
    assert "reference cache of train: loaded" in run(
        files, tmp_path, **{"reference.mode": "cached"}
    )
    damaged = next((tmp_path / "cache").glob("reference-train-*.npy"))
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    (tmp_path / "summary.json").unlink()
    assert "reference cache of train: loaded" not in run(
        files, tmp_path, **{"reference.mode": "cached"}
    )


@pytest.mark.slow
def test_sigterm_and_resume_are_bit_equal_to_an_uninterrupted_run(plain, files, tmp_path):
    process = start(files, tmp_path)
    wait_for(process, "DPO 3/")
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 143, rest
    assert "resumed at step" in run(files, tmp_path)
    assert numbers(tmp_path) == numbers(plain[0])  # to the bit
    checks = [
        Checkpoints(w / "checkpoints", keep=9).meta(6)["checksums"] for w in (tmp_path, plain[0])
    ]
    assert checks[0] == checks[1] and len(checks[0]) > 20


@pytest.mark.slow
def test_a_flipped_bit_is_refused_and_the_step_before_works(plain, files, tmp_path):
    import shutil

    shutil.copytree(plain[0], tmp_path / "run")
    workdir = tmp_path / "run"
    data = max(
        (p for p in (workdir / "checkpoints/6").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 16
    data.write_bytes(content)
    (workdir / "summary.json").unlink()
    output = run(files, workdir, code=4)
    assert "checkpoints/6" in output and "restore_step=4" in output
    (workdir / "checkpoints/7").mkdir()  # a stray folder is no checkpoint
    output = run(files, workdir, **{"checkpoint.restore_step": 4})
    assert "not checkpoints, left alone: 7" in output
    (workdir / "checkpoints/7").rmdir()
    assert numbers(workdir) == numbers(plain[0])


@pytest.mark.slow
def test_the_self_check_takes_weights_soft_labels_and_equal_answers(files, tmp_path):
    lines = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    rows = [
        {**r, "chosen": " Yes.", "rejected": " No.", "weight": 0.5, "soft_label": 0.8}
        for r in lines
    ]
    data = tmp_path / "short.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    output = run(
        files, tmp_path / "w", **{"data.train": data, "num_steps": 1, "self_check": "full"}
    )
    assert "self-check: loss 0.693147 = 0.693147" in output


@pytest.mark.slow
def test_falling_back_keeps_what_it_replaces_and_the_same_command_goes_on(plain, files, tmp_path):
    import shutil

    shutil.copytree(plain[0], tmp_path / "run")
    workdir = tmp_path / "run"
    (workdir / "summary.json").unlink()
    fall_back = {"checkpoint.restore_step": 4, "num_steps": 8}
    assert "set aside as set-aside-6" in run(files, workdir, **fall_back)
    assert (workdir / "checkpoints/set-aside-6").is_dir()
    (workdir / "summary.json").unlink()
    # not at step 4 again
    assert "resumed at step 8 of 9" in run(files, workdir, **{**fall_back, "num_steps": 9})
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["pairs_per_second"] > 0
    numbers(workdir)


def test_a_run_that_is_only_reported_again_logs_nothing_twice(plain, files, tmp_path):
    import shutil

    shutil.copytree(plain[0], tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    run(files, tmp_path / "run")
    assert numbers(tmp_path / "run") == numbers(plain[0])
    assert json.loads((tmp_path / "run/summary.json").read_text())["pairs_per_second"] > 0


def test_a_finished_runs_settings_are_a_config_whose_unset_keys_can_be_set(plain):
    from dpojax.config.load import apply_override, from_config_dict, load_config_file

    values = load_config_file(str(plain[0] / "run.json"))
    apply_override(values, "loss.label_smoothing", "0.1")
    apply_override(values, "optim.b2", "0.95")
    apply_override(values, "data.prompt_template", r"{prompt}\n\nTL;DR:")  # as a shell passes it on
    config = from_config_dict(values)
    assert (
        config.loss.label_smoothing == 0.1 and config.data.prompt_template == "{prompt}\n\nTL;DR:"
    )
    apply_override(values, "optim.b2", "None")
    assert from_config_dict(values).optim.b2 is None


def test_sft_is_for_random_weights_unless_it_is_asked_for():
    from dpojax.config.load import from_config_dict, load_config_file

    values = load_config_file(str(ROOT / "configs/tldr.py"))
    assert from_config_dict(values).sft.num_steps == 240
    values.data.train = values.data.eval = "x.jsonl"
    values.model.init = "model"
    assert from_config_dict(values).sft.num_steps == 0
    values.sft.num_steps = 7
    assert from_config_dict(values).sft.num_steps == 7


@pytest.mark.parametrize(
    ("changes", "code", "names"),
    [
        ({"loss.beta": -1}, 2, "loss.beta"),
        ({"optim.learning_rate": "nan"}, 2, "optim.learning_rate"),
        ({"loss.nothing": 1}, 2, "loss.nothing"),
        ({"data.train": "missing.jsonl"}, 2, "missing.jsonl"),
        ({"mesh.tensor": 3}, 2, "mesh.tensor"),
        ({"model.init": "nowhere"}, 2, "model.init"),
        ({"batch_size": "many"}, 2, "batch_size"),
        ({"optim.b1": "nan"}, 2, "optim.b1"),
        ({"optim.name": "lion", "optim.eps": 1e-8}, 2, "optim.eps"),
        ({"checkpoint.allow_changed": "everything"}, 2, "checkpoint.allow_changed"),
        ({"sample.reward": "nowhere:judge", "sample.num_prompts": 1}, 2, "sample.reward"),
        ({"data.prompt_template": "{x}"}, 2, "data.prompt_template"),
    ],
)
def test_bad_settings_exit_2_and_name_the_field(files, tmp_path, changes, code, names, capsys):
    from dpojax.main import main

    argv = command(files, tmp_path, **changes)[3:]
    assert main(argv) == code
    assert names in capsys.readouterr().err


def test_a_malformed_line_exits_3_with_file_and_line(files, tmp_path, capsys):
    from dpojax.main import main

    lines = (files / "train.jsonl").read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*lines[:2], '{"prompt": "x", "chosen"', *lines[2:]]))
    assert main(command(files, tmp_path / "w", **{"data.train": bad})[3:]) == 3
    assert "bad.jsonl:3" in capsys.readouterr().err


def test_importing_is_quick_and_brings_no_torch():
    code = (
        "import sys, time; t = time.process_time(); import dpojax; t = time.process_time() - t;"
        " import dpojax.whole_run, dpojax.audit; import jax._src.xla_bridge as b; print(t < 2,"
        " sorted({'torch', 'transformers'} & set(sys.modules)), b._backends)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    # quick, no torch, no device touched
    assert done.stdout.strip() == "True [] {}", done.stdout + done.stderr


@pytest.mark.slow
def test_sft_a_cached_reference_sampling_with_a_reward_and_export_work_together(files, tmp_path):
    (tmp_path / "judge.py").write_text(
        "def shorter(prompts, responses):\n    return [-len(r) for r in responses]\n"
    )
    changes = {
        "sft.num_steps": 3,
        "reference.mode": "cached",
        "sample.num_prompts": 8,
        "sample.max_new_tokens": 8,
        "sample.reward": f"{tmp_path / 'judge.py'}:shorter",
        "export": True,
    }
    output = run(files, tmp_path / "w", flags=("--profile=2",), **changes)
    summary = json.loads((tmp_path / "w/summary.json").read_text())
    assert "trace of steps 3 to 4" in output
    (trace,) = (tmp_path / "w/profile").rglob("perfetto_trace.json.gz")
    with gzip.open(trace) as file:
        assert json.load(file)["traceEvents"]
    assert (
        0 < summary["step_time_p50_s"] <= summary["step_time_p99_s"]
        and summary["peak_process_memory_gib"] > 0.1
    )
    # 5 steps of 8 pairs, 3 passes (the reference is cached), in the time that they took
    flops = summary["useful_tflops"] * 1e12 / summary["pairs_per_second"]
    layer = 64 * 16 * (4 + 4 + 4 + 4) + 3 * 64 * 96
    # a pair has more than 80 tokens, 20 of them of responses
    assert flops > 3 * 2 * (2 * layer * 80 + 64 * 1024 * 20)
    assert "tokens per second and device" in (tmp_path / "w/report.html").read_text()
    assert 0 <= summary["win_rate_low"] <= summary["win_rate"] <= summary["win_rate_high"] <= 1
    assert summary["kl"] >= -1 and summary["num_samples"] == 8
    # A sampler has a program for each size that its batches shrink to, if they do; others have one.
    opened = {name: p["compiled"] + p["loaded"] for name, p in summary["programs"].items()}
    assert all(n <= 8 for name, n in opened.items() if name.startswith("sampler"))
    assert all(n == 1 for name, n in opened.items() if not name.startswith("sampler"))
    assert [r["step"] for r in rows(tmp_path / "w") if "sft_loss" in r] == [1, 2, 3]
    # The export is a policy that another run starts from: its reference is what was trained here.
    again = {
        "model.init": tmp_path / "w/export",
        "tokenizer": "",
        "num_steps": 1,
        "log_every_steps": 1,
    }
    sizes = ("hidden_size", "intermediate_size", "head_dim")  # those of the export count
    argv = [
        a
        for a in command(files, tmp_path / "again", **again)
        if not any(f"model.{s}=" in a for s in sizes)
    ]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    first = next(r for r in rows(tmp_path / "again") if "eval_loss" in r)
    last = [r for r in rows(tmp_path / "w") if "eval_loss" in r][-1]
    assert abs(first["eval_logps/chosen"] - last["eval_logps/chosen"]) < 1e-3


@pytest.mark.slow
def test_groups_of_different_sizes_train_alike_in_both_layouts(files, tmp_path):
    pairs = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    made = []
    for i in range(0, 60, 3):  # two to four responses, whose scores make one to six pairs
        texts = [
            pairs[i]["chosen"],
            pairs[i]["rejected"],
            pairs[i + 1]["chosen"],
            pairs[i + 2]["chosen"],
        ][: 2 + i % 3 + i % 2]
        made.append(
            {"prompt": pairs[i]["prompt"], "responses": texts, "scores": list(range(len(texts)))}
        )
    data = tmp_path / "ranked.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in made))
    found = {}
    for layout in ("shared", "separate"):
        changes = {
            "data.train": data,
            "batch_groups": 4,
            "num_steps": 3,
            "data.layout": layout,
            "data.row_tokens": 512,
        }
        run(files, tmp_path / layout, **changes)
        found[layout] = losses(tmp_path / layout)
    np.testing.assert_allclose(found["shared"], found["separate"], atol=1e-5)
    assert "1 steps of 4 prompts with 8 pairs" in run(
        files, tmp_path / "w", **{"data.train": data, "num_steps": 1}
    )


def test_a_sweep_only_reads_a_finished_run(plain, files, monkeypatch):
    from runs import SMALL

    from dpojax.runtime.subprocess_run import run_in_process

    monkeypatch.chdir(ROOT)
    data = {
        "data.train": files / "train.jsonl",
        "data.eval": files / "eval.jsonl",
        "tokenizer": files / "tokenizer.model",
    }
    before = (plain[0] / "metrics.jsonl").read_bytes()
    found = run_in_process(plain[0], "configs/tldr.py", SMALL | data)
    assert found == json.loads((plain[0] / "summary.json").read_text())
    assert (plain[0] / "metrics.jsonl").read_bytes() == before
