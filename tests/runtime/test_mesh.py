"""Any model on any mesh: a step's loss and gradient are those of one device, or an error that names
the setting.
"""

import dataclasses
import functools
import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest
import tiny

from dpojax.algorithms.preference import preference_gradients
from dpojax.config.model import SHARDING_RULES
from dpojax.errors import ConfigError
from dpojax.models.placed import check_mesh, place_decoder
from dpojax.objectives.loss import make_loss
from dpojax.runtime import sharding
from dpojax.runtime.context import Job
from dpojax.runtime.log import MetricsLog
from dpojax.runtime.mesh import make_mesh, num_shards

OPTIMIZER = optax.sgd(0.0)
# Heads, key-value heads, vocabulary (61 is prime), width and experts that the axes of the meshes
# divide, or do not.
MODELS = {
    "grouped": dict(num_heads=8, num_kv_heads=4),
    "one key head": dict(num_heads=8, num_kv_heads=1),
    "nothing divides": dict(
        num_heads=6, num_kv_heads=3, hidden_size=36, intermediate_size=50, tie_embeddings=True
    ),
    "experts": dict(
        num_heads=4, num_kv_heads=2, num_experts=5, experts_per_token=2, renormalise_experts=True
    ),
}
MESHES = {
    "tensor 8": dict(tensor=8),
    "tensor 4, fsdp 2": dict(tensor=4, fsdp=2),
    "tensor 2, data 4": dict(tensor=2, data=4),
    "fsdp 8": dict(fsdp=8),
    "sequence 4, tensor 2": dict(sequence=4, tensor=2),
    "sequence 8": dict(sequence=8),
}


def step(config, mesh):
    """(loss, gradients) of one step of four pairs on the mesh."""
    model = place_decoder(
        config, mesh, SHARDING_RULES, dtype="float32", param_dtype="float32", remat="none"
    )
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    shardings = sharding.param_shardings(abstract, model.axes, mesh, SHARDING_RULES)
    params = jax.jit(tiny.model(config).init)(jax.random.key(0))
    params = jax.device_put(jax.device_get(params), shardings)
    shards = num_shards(mesh)
    made = tiny.groups(np.random.default_rng(0), 4, longest=20)
    batch, _ = tiny.pack(made, row_tokens=128, shard_rows=1, num_shards=shards)
    put = sharding.put_batch(batch, mesh)
    gradients = preference_gradients(
        model, make_loss("sigmoid", beta=0.5, sft_weight=1.0), chunk=16
    )

    def constrain(tree):
        return jax.lax.with_sharding_constraint(tree, {"policy": shardings})

    @jax.jit
    def run(params, ref, batch):
        state = tiny.policy_state(OPTIMIZER, params)
        found = gradients(state, tiny.frozen(ref), batch, np.bool_(True), constrain)
        return found.loss, found.grads["policy"], found.scalars

    ref = jax.tree.map(lambda x: x + 0.01, params)
    return jax.device_get(run(params, ref, put))


@functools.cache
def alone(name):
    """The step on one device."""
    config = dataclasses.replace(tiny.CONFIG, **MODELS[name])
    return step(config, make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]))


def cases():
    """Every model on every mesh; CI takes one model on all of them, and the others on three."""
    for name, mesh in itertools.product(MODELS, MESHES):
        in_ci = name == "grouped" or mesh in ("tensor 8", "fsdp 8", "sequence 4, tensor 2")
        yield pytest.param(name, mesh, marks=[pytest.mark.exhaustive] * (not in_ci))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), list(cases()))
def test_a_step_on_a_mesh_is_that_of_one_device(name, mesh):
    config = dataclasses.replace(tiny.CONFIG, **MODELS[name])
    sizes: dict[str, Any] = {"data": 1, "fsdp": 1, "tensor": 1, **MESHES[mesh]}
    if config.num_experts and sizes.get("sequence", 1) > 1:
        with pytest.raises(ConfigError, match="sequence"):
            step(config, make_mesh(**sizes))
        return
    loss, grads, scalars = step(config, make_mesh(**sizes))
    want_loss, want_grads, want_scalars = alone(name)
    assert loss == pytest.approx(want_loss, abs=1e-5)
    norm = optax.tree.norm(want_grads)
    difference = jax.tree.map(np.subtract, grads, want_grads)
    assert optax.tree.norm(difference) <= 1e-5 * norm
    for key, value in want_scalars.items():
        np.testing.assert_allclose(scalars[key], value, atol=1e-4, err_msg=key)


@pytest.mark.parametrize(
    ("kv_heads", "vocab_size", "tensor", "vocab_rule", "refused"),
    [
        (4, 64, 8, "tensor", True),  # XLA's partitioner fails there
        (1, 64, 2, "tensor", False),  # four data shards
        (4, 64, 8, "", False),
        (4, 61, 8, "tensor", False),  # a vocabulary that does not divide stays whole
        (8, 64, 8, "tensor", False),
        (4, 64, 4, "tensor", False),
    ],
)
def test_a_mesh_that_cannot_be_compiled_is_refused_with_its_setting(
    tmp_path, kv_heads, vocab_size, tensor, vocab_rule, refused
):
    config = dataclasses.replace(
        tiny.CONFIG, num_heads=8, num_kv_heads=kv_heads, vocab_size=vocab_size
    )
    rules = {**SHARDING_RULES, "vocab": vocab_rule}
    mesh = make_mesh(data=-1, fsdp=1, tensor=tensor)
    section = SimpleNamespace(mesh=SimpleNamespace(rules=rules))
    log = MetricsLog(tmp_path, enabled=False)
    job = Job(section, tmp_path, mesh, log, nullcontext())  # pyright: ignore[reportArgumentType]
    with (
        pytest.raises(ConfigError, match=f"tensor={tensor}: .* {kv_heads} key-value heads")
        if refused
        else nullcontext()
    ):
        check_mesh(job, config)
