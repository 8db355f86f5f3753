"""What goes wrong on real machines, each with its outcome: kills, damaged files, bad numbers, full
disks, bad weights.
"""

import importlib.util
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import optax
import pytest
import tiny
from runs import (
    ROOT,
    by_slurm,
    command,
    environment,
    finish,
    free_port,
    losses,
    numbers,
    rows,
    run,
    start,
    start_several,
    start_two,
    wait_for,
)

from dpojax import convert, generate, score
from dpojax.config.load import from_config_dict, load_config_file
from dpojax.data.batches import _name_failures
from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.errors import ConfigError, DataError
from dpojax.evaluation import plots
from dpojax.evaluation.pair_findings import PANELS
from dpojax.main import main
from dpojax.runtime.log import MetricsLog, finite_json
from dpojax.runtime.processes import alone_on_its_machine, launcher, tpu_host
from dpojax.runtime.workdir import locked_workdir, workdir_path
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.gradients import Gradients
from dpojax.training.state import new_state
from dpojax.training.update import SPIKE_AFTER_STEPS, Spikes, make_train_step, make_update
from dpojax.weights import huggingface, safetensors


def checksums(workdir, step=6):
    return Checkpoints(workdir / "checkpoints", keep=9).meta(step)["checksums"]


# --- signals and kills ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sigkill_at_any_moment_of_a_save_loses_nothing_that_was_committed(plain, files, tmp_path):
    rng = random.Random(0)
    for moment in ("DPO 2/", "DPO 4/"):
        process = start(files, tmp_path, **{"checkpoint_every_steps": 1})
        wait_for(process, moment)
        time.sleep(rng.uniform(0, 0.3))  # somewhere in the asynchronous saves
        process.kill()
        process.communicate(timeout=60)
    run(files, tmp_path, **{"checkpoint_every_steps": 1})
    assert numbers(tmp_path) == numbers(plain[0])
    assert checksums(tmp_path) == checksums(plain[0])


@pytest.mark.slow
def test_a_second_interrupt_leaves_at_once_and_the_run_resumes(plain, files, tmp_path):
    process = start(files, tmp_path)
    wait_for(process, "DPO 2/")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    finish(process, 130, timeout=30)
    run(files, tmp_path)
    assert numbers(tmp_path) == numbers(plain[0])


def test_an_interrupt_outside_the_loop_stops_at_once(files, tmp_path):
    process = start(files, tmp_path)
    wait_for(process, "model:")
    process.send_signal(signal.SIGTERM)
    assert "Traceback" not in finish(process, 143, timeout=60)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_the_same_step_in_both_and_resumes_bit_equal(
    plain_two, files, tmp_path
):
    first, second = start_two(files, tmp_path)
    wait_for(first, "DPO 2/")
    second.send_signal(signal.SIGTERM)
    outputs = finish(first, 143), finish(second, 143)
    assert "stopped at step" in outputs[0]
    for process in start_two(files, tmp_path):
        finish(process, 0)
    assert numbers(tmp_path) == numbers(plain_two)
    assert checksums(tmp_path) == checksums(plain_two)


@pytest.mark.slow
def test_when_one_of_four_processes_is_killed_the_others_end_and_a_restart_resumes(files, tmp_path):
    """As srun starts them: nothing but Slurm's own variables says who they are."""
    first, *others = start_several(
        files, tmp_path, 4, told=by_slurm, env={"DPOJAX_HEARTBEAT_SECONDS": "10"}, num_steps=12
    )
    wait_for(first, "DPO 4/")
    others[1].kill()
    start_time = time.monotonic()
    for process in (first, *others):
        process.communicate(timeout=120)
        assert process.returncode not in (0, None)
    assert time.monotonic() - start_time < 60
    outputs = [finish(p, 0) for p in start_several(files, tmp_path, 4, told=by_slurm, num_steps=12)]
    assert "4 process(es)" in outputs[0] and "resumed at step" in outputs[0]


def test_what_started_the_processes_is_recognised():
    slurm = {
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_NTASKS": "2",
    }
    cases = {
        "jax": {"JAX_COORDINATOR_ADDRESS": "a:1", **slurm},
        "slurm": slurm,
        "open mpi": {"OMPI_COMM_WORLD_SIZE": "2"},
        "kubernetes": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
        "tpu": {"TPU_WORKER_HOSTNAMES": "a,b"},
        "": {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the script of a batch job
    }
    for expected, environ in cases.items():
        assert launcher(environ) == expected
    for alone in (
        {},
        {**slurm, "SLURM_NTASKS": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ):
        assert launcher(alone) == ""
    assert (
        launcher({"JAX_PLATFORMS": "cpu"}, tpu_host=True) == ""
        and launcher({}, tpu_host=True) == "tpu"
    )


def test_a_process_that_is_alone_on_its_machine_has_all_its_gpus():
    for tasks, alone in {
        "1": True,
        "1(x4)": True,
        "1(x2),1": True,
        "8(x4)": False,
        "1,2": False,
        "": False,
    }.items():
        assert alone_on_its_machine({"SLURM_STEP_TASKS_PER_NODE": tasks}) == alone, tasks
    assert alone_on_its_machine({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}) and not alone_on_its_machine(
        {}
    )


def test_tpus_are_found_on_the_pci_bus(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    # a network card of Google's
    for name, vendor, device in (("a", "0x8086", "0x0063"), ("b", "0x1ae0", "0x001f")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "device").write_text(device + "\n")
    assert not tpu_host(tmp_path)
    (tmp_path / "b" / "device").write_text("0x0063\n")  # v5e
    assert tpu_host(tmp_path)


@pytest.mark.parametrize("change", ["config", "data"])
def test_processes_with_different_config_or_data_all_exit_2(files, tmp_path, change):
    other = tmp_path / "other.jsonl"
    other.write_text((files / "train.jsonl").read_text().replace("dollars", "Dollars"))
    copy = tmp_path / "train.jsonl"
    shutil.copy(files / "train.jsonl", copy)
    if change == "config":
        started = start_two(files, tmp_path / "w", second={"loss.beta": 0.2})
    else:  # the same path in the config, other bytes: each process sees its own folder
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        shutil.copy(copy, tmp_path / "a/train.jsonl")
        shutil.copy(other, tmp_path / "b/train.jsonl")
        argv = command(
            files, tmp_path / "w", **{"data.train": "train.jsonl", "mesh.data": 1, "mesh.fsdp": 2}
        )
        argv = [a.replace("configs/", f"{ROOT}/configs/") for a in argv]
        shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
        started = [
            subprocess.Popen(
                argv,
                cwd=tmp_path / folder,
                env=environment(1, **shared, JAX_PROCESS_ID=str(i)),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i, folder in enumerate("ab")
        ]
    for process in started:
        assert f"another {change}" in finish(process, 2)


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def finished(plain, tmp_path):
    """A copy of a finished run that thinks it is not finished."""
    shutil.copytree(plain[0], tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "deleted", "garbage metadata"])
def test_a_damaged_checkpoint_is_refused_with_the_step_to_fall_back_to(files, finished, damage):
    folder = finished / "checkpoints/6"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "truncated":
        os.truncate(largest, largest.stat().st_size // 2)
    elif damage == "deleted":
        largest.unlink()
    else:
        next(folder.rglob("_METADATA")).write_text("{]")
    output = run(files, finished, code=4)
    assert "checkpoints/6" in output and "restore_step=4" in output and "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"loss.name": "ipo"}, "another loss: {'name': 'sigmoid'} then, {'name': 'ipo'} now"),
        ({"seed": 1}, "another"),
        (
            {"model.intermediate_size": 128},
            "another model: {'intermediate_size': 96} then, {'intermediate_size': 128} now",
        ),
        ({"model.param_dtype": "bfloat16"}, "allow_changed=dtype"),
        ({"data.max_response_tokens": 20}, "another layout: {'max_response_tokens': 128} then"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(
    files, finished, changes, names
):
    output = run(files, finished, code=4, **changes)
    assert names in output and "Traceback" not in output
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.slow
def test_another_dtype_is_taken_where_it_is_allowed(files, finished):
    changes = {"model.param_dtype": "bfloat16", "checkpoint.allow_changed": "dtype", "num_steps": 8}
    assert "resumed at step 6 of 8" in run(files, finished, **changes)


@pytest.mark.slow
def test_what_is_allowed_to_change_is_said_and_recorded(files, finished):
    changes = {
        "loss.beta": 0.2,
        "num_steps": 8,
        "checkpoint.allow_changed": "loss",
        "optim.learning_rate": 5e-4,
    }
    output = run(files, finished, **changes)
    assert (
        "resuming with another loss, as allowed" in output
        and "optim.learning_rate 0.001 -> 0.0005" in output
    )
    changed = Checkpoints(finished / "checkpoints", keep=9).meta(8)["changed"]
    assert changed[0]["step"] == 6 and changed[0]["names"] == ["loss"]


@pytest.mark.slow
def test_a_run_moves_between_topologies_with_the_same_batches(plain, files, tmp_path):
    process = start(
        files, tmp_path, env=environment(8), **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    )
    wait_for(process, "DPO 2/")
    process.send_signal(signal.SIGTERM)
    finish(process, 143)
    stopped = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    run(files, tmp_path, devices=2, num_steps=max(4, stopped), **{"mesh.data": -1})
    (tmp_path / "summary.json").unlink()
    run(files, tmp_path)
    assert [r["num_tokens"] for r in rows(tmp_path) if "loss" in r] == [
        r["num_tokens"] for r in rows(plain[0]) if "loss" in r
    ]
    np.testing.assert_allclose(losses(tmp_path), losses(plain[0]), atol=1e-5)


@pytest.mark.slow
def test_a_full_disk_stops_no_training_and_saves_go_on_when_there_is_room(files, tmp_path):
    room = resource.prlimit(os.getpid(), resource.RLIMIT_FSIZE)
    full = (200 * 1024, room[1])  # bytes that a file may have: metrics fit, arrays do not
    uncached = environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    settings = {"model.hidden_size": 256, "num_steps": 30, "eval_every_steps": 100}
    process = start(
        files, tmp_path / "freed", env=uncached, **settings, **{"checkpoint_every_steps": 10}
    )
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, full)
    wait_for(process, "warning: a checkpoint")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, room)
    finish(process, 0)
    assert 30 in Checkpoints(tmp_path / "freed/checkpoints", keep=9).steps()


@pytest.mark.slow
def test_three_failed_saves_in_a_row_end_the_run_with_exit_4(files, tmp_path):
    uncached = environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = start(
        files, tmp_path, env=uncached, **{"model.hidden_size": 256, "checkpoint_every_steps": 1}
    )
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200 * 1024, 200 * 1024))
    assert "3 saves failed in a row" in finish(process, 4)


@pytest.mark.slow
def test_metrics_that_cannot_be_written_stop_nothing(files, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    output = run(files, tmp_path, num_steps=2)
    assert output.count("cannot be written") == 1 and (tmp_path / "report.html").is_file()


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_non_finite_steps_name_their_rows_and_three_in_a_row_end_the_run_with_a_dump(
    files, tmp_path
):
    lines = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    # both in step 2 of the unshuffled data: their losses add up to more than float32 holds
    for bad in (8, 9):
        lines[bad]["weight"] = 3e38
    one = tmp_path / "one.jsonl"
    one.write_text("".join(json.dumps(r) + "\n" for r in lines))
    common = {"data.shuffle": False, "eval_every_steps": 100}
    output = run(files, tmp_path / "one", **common, **{"data.train": one, "num_steps": 4})
    assert "DPO 2: not finite" in output and "parameters unchanged" in output
    note = json.loads((tmp_path / "one/quarantine.jsonl").read_text())
    assert note["step"] == 2 and {"one.jsonl:9", "one.jsonl:10"} <= set(note["rows"])
    assert json.loads((tmp_path / "one/summary.json").read_text())["skipped_steps"] == 1
    for bad in range(8, 32):
        lines[bad]["weight"] = 3e38
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps(r) + "\n" for r in lines))
    output = run(files, tmp_path / "many", code=5, **common, **{"data.train": many})
    assert "3 steps in a row up to step 4" in output
    dump = json.loads((tmp_path / "many/dump-dpo-4.json").read_text())
    assert len(dump["rows"]) == 8 and dump["config"]["batch_size"] == 8


def spiky_step(*, skip):
    """A step whose loss is the batch's weight times a parameter."""
    batch, _ = tiny.pack(tiny.groups(np.random.default_rng(0), 2))
    batch = jax.tree.map(jnp.asarray, batch)

    def gradients(state, frozen, b, details, constrain):
        loss, grads = jax.value_and_grad(lambda p: b.pair_weight[0, 0, 0] * p["x"])(state.policy)
        losses = jnp.zeros(b.valid.shape)
        return Gradients(loss, {"policy": grads}, {"seen": loss}, losses, b.row_id, {})

    optimizer = optax.sgd(1e-3)
    step = make_train_step(
        gradients, {"policy": optimizer}, lambda x: x, spikes=Spikes(100.0, skip)
    )
    state = new_state({"policy": optimizer}, {"policy": {"x": jnp.ones(())}})
    return (
        jax.jit(step),
        state,
        lambda w: batch._replace(pair_weight=jnp.full_like(batch.pair_weight, w)),
    )


@pytest.mark.parametrize("skip", [False, True])
def test_a_loss_spike_is_noticed_and_skipped_only_where_the_guard_is_on(skip):
    step, state, batch = spiky_step(skip=skip)
    for _ in range(SPIKE_AFTER_STEPS):
        state, metrics = step(state, None, batch(1.0), False)
        assert not metrics.spike
    after, metrics = step(state, None, batch(150.0), False)
    assert metrics.spike and metrics.finite
    assert (after.policy["x"] == state.policy["x"]) == skip
    assert int(after.skipped) == int(skip) and int(after.step) == SPIKE_AFTER_STEPS + 1


def test_a_step_that_is_not_finite_changes_nothing_to_the_bit():
    step, state, batch = spiky_step(skip=False)
    state, _ = step(state, None, batch(1.0), False)
    after, metrics = step(state, None, batch(np.nan), False)
    assert not metrics.finite
    for name, (old, new) in {
        "params": (state.policy["x"], after.policy["x"]),
        "average": (state.loss_average, after.loss_average),
    }.items():
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes(), name
    assert int(after.skipped) == 1 and int(after.step) == 2


def test_an_update_that_is_not_finite_changes_nothing_though_loss_and_gradient_are_finite():
    optimizer = optax.sgd(1e38, momentum=0.9)
    update = make_update({"policy": optimizer}, spikes=Spikes(math.inf, False))
    state = tiny.policy_state(optimizer, {"x": jnp.ones(3), "y": jnp.zeros(2)})
    grads = {"x": jnp.asarray([0.0, 30.0, 0.0]), "y": jnp.ones(2)}  # 30 x 1e38 is past float32
    zero = jnp.zeros((1, 1, 1))
    memory = {"reward_mean": jnp.zeros(())}
    found = Gradients(jnp.ones(()), {"policy": grads}, {}, zero, zero.astype(jnp.int32), memory)
    after, metrics = jax.jit(update)(state, found)
    assert (
        np.isfinite(metrics.scalars["loss"])
        and np.isfinite(metrics.scalars["grad_norm"])
        and not metrics.finite
    )
    for old, new in zip(*map(jax.tree.leaves, (state[:2], after[:2])), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    assert int(after.skipped) == 1 and int(after.step) == 1


def test_json_holds_no_nan_and_a_report_of_steps_without_numbers_is_drawn(tmp_path, capfd):
    value = {"a": math.nan, "b": [1.0, -math.inf, {"c": (math.inf, 2)}], "d": "NaN"}
    assert json.loads(finite_json(value), parse_constant=pytest.fail) == {
        "a": None,
        "b": [1.0, None, {"c": [None, 2]}],
        "d": "NaN",
    }
    log = MetricsLog(tmp_path, enabled=True)
    keys = (
        "loss",
        "eval_on_policy_kl",
        "eval_on_policy_kl_standard_error",
        "gradient_weight/q10",
        "gradient_weight/q90",
    )
    for step, number in enumerate((0.5, math.nan, math.inf, 0.25)):
        log.write(step, dict.fromkeys(keys, number))
    log.close()
    assert "NaN" not in capfd.readouterr().err  # of TensorBoard
    log.rewind(lambda row: row["step"] <= 2)
    assert [r["loss"] for r in log.rows()] == [0.5, None, None]
    figure = plots.plot_curves(log.rows(), PANELS)
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[0.0, 0.5]]


@pytest.mark.slow
def test_every_command_that_computes_log_probs_names_weights_that_are_not_finite(
    files, tmp_path, capfd
):
    def broken(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = np.nan
        return tensors

    base, bad = (
        model_folders.make_model(tmp_path / n, files, tensors=t)
        for n, t in (("base", None), ("bad", broken))
    )
    large = model_folders.make_model(
        tmp_path / "large", files, tensors=lambda t: {k: v * 1e17 for k, v in t.items()}
    )
    pairs, out = model_folders.write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "out"
    scoring = [f"--data={pairs}", f"--out={out}"]

    def of_run(**settings):
        return model_folders.training(files, tmp_path / "run", pairs, **settings)

    calls = {
        "score": (score.main, [f"--model={bad}", *scoring]),
        "score --ref": (score.main, [f"--model={base}", f"--ref={bad}", *scoring]),
        "generate": (generate.main, [f"--model={bad}", "--prompt=Hi", f"--out={out}"]),
        "convert": (convert.main, [f"--model={bad}", f"--out={out}"]),
        "train": (main, of_run(**{"model.init": bad})),
        "reference": (main, of_run(**{"model.init": base, "reference.init": bad})),
    }
    for name, (function, argv) in calls.items():
        assert function(argv) == 5, (name, capfd.readouterr())
        said = capfd.readouterr()
        assert "model.layers.1.mlp.down_proj.weight" in said.err.splitlines()[-1], (name, said.err)
        assert not out.exists(), name
    # Weights that are numbers, whose products are none.
    for function, argv in ((score.main, scoring), (generate.main, ["--prompt=Hi", f"--out={out}"])):
        assert function([f"--model={large}", *argv]) == 5
        assert "not finite" in capfd.readouterr().err and not out.exists()


# --- data -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_data_worker_that_dies_ends_the_run_with_exit_3_and_its_traceback(files, tmp_path):
    data = tmp_path / "train.jsonl"
    shutil.copy(files / "train.jsonl", data)
    process = start(
        files,
        tmp_path / "w",
        **{
            "data.train": data,
            "data.workers": 1,
            "num_steps": 400,
            "eval_every_steps": 500,
            "log_every_steps": 5,
        },
    )
    wait_for(process, "DPO 5/")
    children = subprocess.run(
        ["ps", "-ww", "--ppid", str(process.pid), "-o", "pid=,args="],
        capture_output=True,
        text=True,
    ).stdout
    workers = [int(line.split()[0]) for line in children.splitlines() if "spawn_main" in line]
    assert workers, children
    start_time = time.monotonic()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    output = finish(process, 3, timeout=60)
    # 5 s on an idle machine, and the prefetched batches are trained on first
    assert time.monotonic() - start_time < 30
    assert "could not be made" in output


def test_whatever_a_worker_raises_becomes_a_data_error_with_its_traceback():
    def broken():
        yield "batch"
        raise KeyError("column")

    batches = _name_failures(broken(), 4)
    assert next(batches) == "batch"
    with pytest.raises(DataError, match=r"(?s)batch of step 6 .*KeyError.*in broken"):
        next(batches)


@pytest.mark.slow
def test_fewer_rows_than_a_batch_repeat_within_the_step(files, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((files / "train.jsonl").read_text().splitlines(keepends=True)[:3]))
    run(files, tmp_path / "w", **{"data.train": few, "data.eval": few, "num_steps": 2})
    assert np.isfinite(losses(tmp_path / "w")).all()


# --- paths, weights, tokenizers -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a\0b", "x" * 4000, "FILE/below", "FILE"])
def test_a_hostile_workdir_is_a_config_error(tmp_path, name):
    (tmp_path / "FILE").write_text("")
    with (
        pytest.raises(ConfigError, match="workdir"),
        locked_workdir(workdir_path(str(tmp_path / name), "configs/tldr.py")),
    ):
        raise AssertionError("the run began")


@pytest.mark.parametrize(
    "spec", ["configs/tldr.py:../../x", "configs/tldr.py:a/b", "configs/tldr.py:" + "x" * 4000]
)
def test_a_hostile_run_name_is_a_config_error(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="set --workdir"):
        workdir_path(None, spec)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def weights(exported, tmp_path):
    """A small Hugging Face directory of the test's own."""
    model = tiny.model()
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    (tmp_path / safetensors.CHECKSUMS).unlink()  # these tests are of files that come without
    shardings = jax.tree.map(
        lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    return tmp_path, shardings


def test_sound_weights_load(weights):
    folder, shardings = weights
    loaded = huggingface.load_params(
        folder, huggingface.read_config(folder), shardings, jnp.float32
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, tiny.params(tiny.model()))


@pytest.mark.parametrize(
    "fault",
    [
        "truncated",
        "huge header",
        "pickle",
        "wrong shape",
        "missing",
        "extra",
        "integers",
        "outside",
        "absolute",
    ],
)
def test_bad_weights_are_a_config_error_before_anything_is_loaded(weights, fault):
    from safetensors.flax import load_file, save_file

    folder, shardings = weights
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if fault == "truncated":
        os.truncate(file, file.stat().st_size - 7)
    elif fault == "huge header":
        file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    elif fault == "pickle":
        file.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94")
    elif fault == "wrong shape":
        save_file({**tensors, name: tensors[name].T}, file)
    elif fault == "missing":
        save_file({k: v for k, v in tensors.items() if k != name}, file)
    elif fault == "extra":
        save_file({**tensors, "model.layers.2.mlp.up_proj.weight": tensors[name]}, file)
    elif fault == "integers":
        save_file({**tensors, name: tensors[name].astype(jnp.int32)}, file)
    else:
        place = "../model.safetensors" if fault == "outside" else str(file)
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(tensors, place)})
        )
    with pytest.raises(ConfigError, match=str(folder)):
        huggingface.load_params(folder, huggingface.read_config(folder), shardings, jnp.float32)


@pytest.mark.parametrize(
    "field",
    [
        {"num_key_value_heads": 3},
        {"hidden_size": "x"},
        {"rope_parameters": {"rope_type": "magic"}},
        {"num_attention_heads": 0},
        {"rope_scaling": {"factor": 2}},
        {"brand_new": 1},
        {"model_type": "gpt2"},
    ],
)
def test_a_config_that_is_not_understood_is_a_config_error(weights, field):
    folder, _ = weights
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **field}))
    with pytest.raises(ConfigError, match=r"config\.json"):
        huggingface.read_config(folder)


@pytest.mark.parametrize("content", [b"", b"\x00\xff" * 100, b'{"model": {}}'])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_broken_tokenizer_is_a_config_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tldr", "hh", "imdb"])
@pytest.mark.parametrize("argument", ["", ":paper"])
def test_every_shipped_config_is_valid(name, argument):
    values = load_config_file(f"configs/{name}.py{argument}")
    if name != "tldr" or argument:
        values.data.train = values.data.eval = "x.jsonl"
        values.model.init = "model"
    assert from_config_dict(values).loss.beta == {"tldr:paper": 0.5}.get(name + argument, 0.1)
