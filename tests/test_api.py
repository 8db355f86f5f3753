"""What `import dpojax` gives: every name is there, its doctest
runs, and it is what the commands do.
"""

import dataclasses
import doctest
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import tiny
from runs import ROOT, SMALL, environment, numbers, rows

import dpojax
from dpojax.algorithms.dpo import schedule_of
from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.training.optimizer import make_optimizer
from dpojax.weights.export import export_params, llama_fields


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    """A small model with a tokenizer beside it, which the doctests open."""
    place = tmp_path_factory.mktemp("opened")
    config = dataclasses.replace(tiny.CONFIG, vocab_size=load_tokenizer(str(files)).vocab_size)
    params = tiny.params(tiny.model(config))
    fields = llama_fields(config, bos_id=1, eos_id=2)
    export_params(params, config, place, fields=fields, dtype="float32", companions=None)
    shutil.copy(files / "tokenizer.model", place / "tokenizer.model")
    return place


@pytest.mark.parametrize("name", dpojax.__all__)
def test_every_name_is_there(name):
    assert getattr(dpojax, name) is not None and name in dir(dpojax)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        dpojax.no_such_name  # noqa: B018


def test_importing_brings_neither_jax_nor_a_device():
    code = "import sys, dpojax; print({'jax', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# A table has no docstring of its own: its module's shows it.
SHOWN_BY = {"OBJECTIVES": "losses"}
WHOLE_RUNS = ("run", "run_in_process")


def doctests(name, scope):
    """The examples of a name and of what it holds that is public."""
    if name in SHOWN_BY:
        name = SHOWN_BY[name]
    thing = getattr(dpojax, name)
    if inspect.ismodule(thing):
        text = inspect.getdoc(thing) or ""
        return [doctest.DocTestParser().get_doctest(text, dict(scope), name, None, 0)]
    finder = doctest.DocTestFinder(exclude_empty=True)
    module = importlib.import_module(thing.__module__)
    return finder.find(thing, name, module=module, extraglobs=scope)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in WHOLE_RUNS else name
        for name in dpojax.__all__
    ],
)
def test_the_examples_of_every_name_run(name, folder, tmp_path):
    scope = {"dpojax": dpojax, "folder": str(folder), "workdir": tmp_path}
    scope |= {"jax": jax, "np": np, "optax": optax}
    examples = [test for test in doctests(name, scope) if test.examples]
    assert examples
    runner = doctest.DocTestRunner()
    for test in examples:
        runner.run(test)
    assert not runner.summarize(verbose=False).failed


def test_log_probs_of_ids_are_those_of_the_model_alone(folder):
    policy = dpojax.open_model(str(folder))
    prompts = [[1, 5, 9], [1, 4], [1, 7, 8, 3]]
    responses = [[11, 12, 2], [13], [14, 15]]
    tokens = policy.logps(prompts, responses, per_token=True, batch_size=2)
    model = tiny.model(policy.loaded.config)
    params = jax.device_get(policy.params)
    for prompt, response, values in zip(prompts, responses, tokens, strict=True):
        expected = tiny.naive_logps(model, params, prompt, response)
        np.testing.assert_allclose(values, expected, atol=2e-5)
    sums = [float(values.sum()) for values in tokens]
    np.testing.assert_allclose(policy.logps(prompts, responses), sums, rtol=1e-6)


def test_samples_are_texts_and_follow_the_seed(folder):
    policy = dpojax.open_model(str(folder))
    options = {"num_samples": 2, "max_new_tokens": 6}
    first = policy.sample(["a b", "c"], seed=1, **options)
    assert [len(texts) for texts in first] == [2, 2]
    assert all(isinstance(text, str) for texts in first for text in texts)
    assert policy.sample(["a b", "c"], seed=1, **options) == first
    assert policy.sample(["a b", "c"], seed=2, **options) != first


def test_as_many_responses_as_prompts(folder):
    policy = dpojax.open_model(str(folder))
    with pytest.raises(dpojax.errors.ConfigError, match="2 prompts and 1 responses"):
        policy.logps(["a", "b"], ["c"])


@pytest.mark.slow
def test_a_run_from_python_is_that_of_the_command_line(files, plain, tmp_path):
    own = {"data.train": "train.jsonl", "data.eval": "eval.jsonl", "tokenizer": "tokenizer.model"}
    settings = SMALL | {key: files / name for key, name in own.items()}
    code = (
        "import dpojax, sys, json; settings = json.loads(sys.argv[1]);"
        " summary = dpojax.run('tldr', sys.argv[2], **settings); print(summary['num_steps'])"
    )
    named = {key.replace(".", "__"): str(value) for key, value in settings.items()}
    argv = [sys.executable, "-c", code, json.dumps(named), str(tmp_path / "run")]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "6"
    assert numbers(tmp_path / "run") == numbers(plain[0])


@pytest.mark.slow
def test_the_loop_of_the_readme_runs(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tldr").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in loop.splitlines() if line.strip()]) <= 15
    exec(compile(loop, "README.md", "exec"), {})
    *steps, samples = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in steps] == list(range(1, 21))
    assert samples.startswith("[[")


@pytest.mark.slow
def test_a_step_of_ones_own_loop_is_that_of_a_run(files, folder, tmp_path):
    data = str(files / "train.jsonl")
    settings = {
        "model.init": folder,
        "data.train": data,
        "data.micro_batch_tokens": 1024,
        "batch_size": 8,
        "num_steps": 3,
        "log_every_steps": 1,
        "optim.learning_rate": 1e-3,
        "sample.num_prompts": 0,
        "self_check": "off",
    }
    named = {key.replace(".", "__"): value for key, value in settings.items()}
    dpojax.run("base", tmp_path, **named)
    logged = [row for row in rows(tmp_path) if "loss" in row]

    policy = dpojax.open_model(str(folder))
    config = dpojax.load_config_file(str(tmp_path / "run.json"))
    config.num_steps = 3
    config = dpojax.from_config_dict(config)
    optimizer = make_optimizer(config.optim, schedule_of(config), policy.model.axes)
    step = dpojax.make_step(policy, dpojax.make_loss("dpo", beta=0.1), optimizer)
    batches = dpojax.open_batches(data, policy, batch_size=8, micro_batch_tokens=1024)
    state = step.start()
    for row, batch in zip(logged, batches.take(3), strict=True):
        state, metrics = step(state, batch)
        for key, value in metrics.scalars.items():
            assert row[key] == pytest.approx(float(value), rel=1e-6, abs=1e-6), key  # as logged
    trained = dpojax.open_model(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, trained.params, state.policy)


def test_ones_own_loss_is_that_of_the_step_that_it_names(files, folder):
    policy = dpojax.open_model(str(folder))
    loss = dpojax.make_loss("dpo", beta=0.1)

    def same_loss(policy, ref, info):
        assert info.weight is None  # it is multiplied by what the function returns
        return loss(policy, ref, info).loss

    data = str(files / "train.jsonl")
    batches = dpojax.open_batches(data, policy, batch_size=8, seed=None)
    losses = []
    for function in (loss, same_loss):
        step = dpojax.make_step(policy, function, optax.sgd(0.1))
        state = step.start()
        for batch in batches.take(2):
            state, metrics = step(state, batch)
        losses.append(float(metrics.scalars["loss"]))
        scored = step.model(state)
        assert not np.array_equal(
            scored.logps([[1, 5]], [[9, 2]]), policy.logps([[1, 5]], [[9, 2]])
        )
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_loss_of_the_wrong_shape_says_what_it_must_return(files, folder):
    policy = dpojax.open_model(str(folder))
    loss = dpojax.make_loss("dpo", beta=0.1)
    step = dpojax.make_step(
        policy, lambda policy, ref, info: loss(policy, ref, info), optax.sgd(1.0)
    )
    (batch,) = dpojax.open_batches(files / "train.jsonl", policy, batch_size=2).take(1)
    with pytest.raises(
        dpojax.errors.ConfigError, match=r"make_loss\(...\)\(policy, ref, info\).loss"
    ):
        step(step.start(), batch)


def test_batches_of_a_loop_go_on_where_it_stopped_and_name_what_does_not_fit(files, folder):
    policy = dpojax.open_model(str(folder))
    batches = dpojax.open_batches(files / "train.jsonl", policy, batch_size=8)
    assert batches.epoch_steps == 8
    whole = list(batches.take(3))
    (last,) = batches.take(1, after=2)
    jax.tree.map(np.testing.assert_array_equal, last, whole[2])
    row = {"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [10_000]}
    with pytest.raises(dpojax.errors.ConfigError, match="a token id of the data is 10000"):
        dpojax.open_batches([row], policy, batch_size=1)
