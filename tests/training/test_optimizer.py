"""Optimizers and schedules against their published update rules, in plain numpy."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import ROOT

from dpojax.algorithms.dpo import saved_rate
from dpojax.config.load import apply_override, from_config_dict, load_config_file
from dpojax.config.rules import doubts
from dpojax.training import resume
from dpojax.training.optimizer import make_optimizer, make_schedule

AXES = {"matrix": ("embed", "mlp"), "norm": ("norm",)}
RATE = 1e-2


def follow(name, steps=5, **changes):
    """(trajectory of dpojax, gradients, start) for two parameters under fixed gradients."""
    values = load_config_file("configs/tldr.py")
    values.optim.update({"name": name, "clip_norm": float("inf"), **changes})
    config = from_config_dict(values).optim
    optimizer = make_optimizer(config, optax.constant_schedule(RATE), AXES)
    rng = np.random.default_rng(0)
    start = {
        "matrix": rng.normal(size=(3, 4)).astype(np.float32),
        "norm": rng.normal(size=4).astype(np.float32),
    }
    gradients = [
        {k: rng.normal(size=v.shape).astype(np.float32) for k, v in start.items()}
        for _ in range(steps)
    ]
    params: Any = {k: jnp.asarray(v) for k, v in start.items()}
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update({k: jnp.asarray(v) for k, v in g.items()}, state, params)
        params = optax.apply_updates(params, updates)
    return params, gradients, start


def test_adamw_is_loshchilov_and_hutters_with_decay_on_matrices_alone():
    found, gradients, start = follow("adamw", weight_decay=0.1)
    for key, x in start.items():
        m = v = np.zeros_like(x)
        for t, g in enumerate((g[key] for g in gradients), 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            x = x - RATE * (step + (0.1 * x if key == "matrix" else 0))
        np.testing.assert_allclose(found[key], x, rtol=2e-5)


def test_rmsprop_is_torchs_which_the_dpo_authors_used():
    found, gradients, start = follow("rmsprop")
    for key, x in start.items():
        v = np.zeros_like(x)
        # torch.optim.RMSprop: alpha 0.99, eps 1e-8 outside the root, not centred
        for g in (g[key] for g in gradients):
            v = 0.99 * v + 0.01 * g**2
            x = x - RATE * g / (np.sqrt(v) + 1e-8)
        np.testing.assert_allclose(found[key], x, rtol=2e-5)


def test_lion_moves_by_signs():
    found, gradients, start = follow("lion")
    for key, x in start.items():
        m = np.zeros_like(x)
        for g in (g[key] for g in gradients):
            x = x - RATE * np.sign(0.9 * m + 0.1 * g)
            m = 0.99 * m + 0.01 * g
        np.testing.assert_allclose(found[key], x, rtol=2e-5)


def test_adafactor_moves_relative_to_the_parameters_size():
    found, _, start = follow("adafactor", steps=1)
    for key, x in start.items():
        moved = np.sqrt(np.mean((np.asarray(found[key]) - x) ** 2))
        # Shazeer & Stern 2018: the first update has root mean square at most 1, times the
        # parameter's own.
        assert 0.5 * RATE * np.sqrt(np.mean(x**2)) < moved < 1.01 * RATE * np.sqrt(np.mean(x**2))


def test_clipping_scales_the_whole_gradient():
    found, gradients, start = follow("rmsprop", steps=1, clip_norm=0.5)
    norm = np.sqrt(sum((g**2).sum() for g in gradients[0].values()))
    for key, x in start.items():
        g = gradients[0][key] * min(1, 0.5 / norm)
        np.testing.assert_allclose(
            found[key], x - RATE * g / (np.sqrt(0.01 * g**2) + 1e-8), rtol=2e-5
        )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1, 1, *(0.5 * (1 + np.cos(np.pi * np.arange(1, 4) / 4)))]),
    ],
)
def test_schedules_warm_up_from_above_zero_and_decay_to_the_end(name, expected):
    schedule = make_schedule(name, learning_rate=2.0, warmup_steps=4, num_steps=8)
    np.testing.assert_allclose(
        np.asarray([schedule(i) for i in range(8)]), 2.0 * np.asarray(expected), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"optim.warmup_steps": "150"}, "optim.warmup_steps=150"),
        ({"sft.num_steps": "10", "sft.warmup_steps": "10"}, "sft.warmup_steps=10"),
        ({"sample.kl_prompts": "9", "sample.num_prompts": "8"}, "sample.kl_prompts=9"),
        ({"sample.temperature": "0", "sample.top_k": "5"}, "sample.top_k"),
        (
            {"sft.num_steps": "0", "sft.data": "x.jsonl", "data.train": "a", "data.eval": "b"},
            "sft.data",
        ),
        ({"optim.name": "adafactor", "sft.b2": "0.9"}, "sft.b2"),
        ({"lora.dropout": "0.1"}, "lora.dropout"),
        ({"optim.skip_spikes": "True", "optim.spike_factor": "inf"}, "spike_factor"),
        (
            {"loss.name": "simpo", "loss.gamma": "0.5", "reference.dtype": "bfloat16"},
            "reference.dtype",
        ),
    ],
)
def test_settings_that_cannot_do_what_they_say_are_named(changes, named):
    values = load_config_file(str(ROOT / "configs/tldr.py"))
    for key, text in changes.items():
        apply_override(values, key, text)
    said = doubts(from_config_dict(values))
    assert len(said) == (named is not None) and all(named in text for text in said), said


@pytest.mark.parametrize(
    ("then", "num_steps", "rises"),
    [(100, 100, False), (100, 200, True), (200, 100, False), (100, 101, False)],
)
def test_a_rate_that_rises_where_a_run_is_resumed_is_said(then, num_steps, rises):
    def schedule(steps):
        return make_schedule("linear", learning_rate=1e-3, warmup_steps=10, num_steps=steps)

    said = []
    job: Any = SimpleNamespace(say=said.append)
    stage: Any = SimpleNamespace(
        name="DPO", num_steps=num_steps, schedule=schedule(num_steps), rate_settings=saved_rate
    )
    saved = {
        "num_steps": then,
        "optim": {"schedule": "linear", "learning_rate": 1e-3, "warmup_steps": 10},
    }
    resume._warn_of_rising_rate(job, stage, {"config": saved, "step": 90})
    assert bool(said) == rises
    resume._warn_of_rising_rate(job, stage, {"config": saved, "step": 5})
    assert bool(said) == rises  # a warmup rises by itself
