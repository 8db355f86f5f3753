"""What runs on an accelerator alone: the vendor's kernels and the whole step against the rule, in
float32, at real sizes.

    DPOJAX_TEST_PLATFORM=cuda python -m pytest -n 0 tests/training/test_accelerator.py

The oracle is the masked softmax in float32 on the CPU of the same process. Without an accelerator
everything here skips.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dpojax.config.model import SHARDING_RULES
from dpojax.models.attention import kernels
from dpojax.models.attention.blocks import Rows, blocked, masked
from dpojax.models.decoder import make_decoder
from dpojax.models.placed import place_decoder
from dpojax.runtime.mesh import make_mesh
from dpojax.training.micro_batches import micro_batch
from dpojax.training.scores import batch_scores

PLATFORM = jax.devices()[0].platform
pytestmark = pytest.mark.skipif(
    PLATFORM == "cpu", reason="no accelerator; DPOJAX_TEST_PLATFORM=cuda or tpu"
)
on_cuda = pytest.mark.skipif(
    kernels.device_platform(jax.devices()[0]) != "cuda",
    reason="cuDNN's attention runs on NVIDIA GPUs",
)
on_tpu = pytest.mark.skipif(PLATFORM != "tpu", reason="splash runs on TPUs")

# heads, key-value heads, head size: of Llama 3.2 1B, of Llama 3.1 8B, and one key head for all.
HEADS = {"1b": (32, 8, 64), "8b": (32, 8, 128), "one key head": (8, 1, 64)}
BFLOAT16 = 0.02  # of the largest entry: the masked softmax in bfloat16 itself differs by as much


def packed(seed: int, *, responses: int, row_tokens: int = 1024, layout: str = "shared"):
    """Rows of groups whose longest part has 200 tokens, and their shape."""
    groups = tiny.groups(np.random.default_rng(seed), 12, responses=responses, longest=200)
    return tiny.pack(groups, layout=layout, row_tokens=row_tokens, row_groups=8)


def attention_inputs(batch, heads: tuple[int, int, int]):
    """(rows, q, k, v) in float32, as numpy: each side puts them on its own device."""
    rng = np.random.default_rng(2)
    lanes: list[Any] = [np.asarray(x[0]) for x in (batch.group, batch.branch, batch.positions)]
    rows = Rows(*lanes)
    queries, keys, size = heads
    shapes = [(*rows.group.shape, count, size) for count in (queries, keys, keys)]
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return rows, q * size**-0.5, k, v


def output_and_gradients(kernel, inputs, *, device, dtype, window=None):
    """Attention's output at real tokens and the gradients of a function of it, as float32 numpy
    arrays.
    """
    rows, *arrays = jax.device_put(inputs, device)
    arrays = [x.astype(dtype) for x in arrays]
    real = (rows.group > 0)[..., None, None]
    limit = None if window is None else jax.device_put(jnp.asarray(window, jnp.int32), device)

    def scalar(q, k, v):
        out = kernel.attend(q, k, v, kernel.prepare(rows), limit).astype(jnp.float32)
        out = jnp.where(real, out, 0.0)
        return jnp.sum(jnp.sin(out)), out

    gradient = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True))
    (_, out), grads = gradient(*arrays)
    return [np.asarray(x, np.float32) for x in (out, *grads)]


def assert_follows_the_rule(kernel, batch, heads, *, dtype="bfloat16", bound=BFLOAT16, **options):
    inputs = attention_inputs(batch, heads)
    measured = output_and_gradients(kernel, inputs, device=jax.devices()[0], dtype=dtype, **options)
    exact = output_and_gradients(
        masked(), inputs, device=jax.devices("cpu")[0], dtype="float32", **options
    )
    for value, oracle in zip(measured, exact, strict=True):
        assert np.abs(value - oracle).max() < bound * np.abs(oracle).max()


@on_cuda
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("responses", "window"), [(2, None), (1, None), (3, None), (2, 150)])
def test_cudnn_follows_the_rule(heads, responses, window):
    if heads != HEADS["1b"] and responses != 2:
        pytest.skip("one thing at a time")
    batch, shape = packed(responses, responses=responses)
    windows = () if window is None else (window, 0)
    kernel = kernels.cudnn_sequences(shape, windows)
    assert_follows_the_rule(kernel, batch, heads, window=window)


@on_tpu
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("layout", ["shared", "slots"])
def test_splash_follows_the_rule(heads, layout):
    batch, shape = packed(2, responses=2, layout=layout)
    kernel = kernels.make_kernel("splash", tiny.CONFIG, shape, platform="tpu")
    assert_follows_the_rule(kernel, batch, heads)


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", BFLOAT16), ("float32", 2e-5)])
@pytest.mark.parametrize("window", [None, 150])
def test_blocks_follow_the_rule(layout, dtype, bound, window):
    """In float32 too: where products are rounded to tf32 or bfloat16 on the way, this fails."""
    batch, _ = packed(2, responses=2, layout=layout)
    kernel = blocked(block=256, chains=0)
    assert_follows_the_rule(kernel, batch, HEADS["1b"], dtype=dtype, bound=bound, window=window)


CONFIG = dataclasses.replace(
    tiny.CONFIG,
    vocab_size=2048, hidden_size=512, intermediate_size=1024, num_layers=8, num_heads=8,
    num_kv_heads=4, head_dim=64, init_std=0.05,
)  # fmt: skip
"""Eight layers at the widths of a small real model; bfloat16 and cuDNN take its heads."""


def scores_and_gradient(model, params, batch, device):
    """(log-probs of every scored token, gradient) of one micro-batch, as numpy."""
    params, mb = jax.device_put((params, micro_batch(jax.tree.map(jnp.asarray, batch), 0)), device)

    def scalar(tree):
        scores = batch_scores(model, tree, mb, chunk=128)
        logps = jnp.where(mb.weight > 0, scores.logps, 0.0)
        return jnp.sum(jnp.sin(logps)), logps

    (_, logps), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
    return jax.tree.map(np.asarray, (logps, gradient))


@functools.cache
def on_the_cpu():
    """(parameters, batch, its shape, log-probs, gradient) of the oracle."""
    groups = tiny.groups(np.random.default_rng(1), 12, longest=200)
    batch, shape = tiny.pack(groups, row_tokens=1024, row_groups=8)
    oracle = make_decoder(
        CONFIG, attention=masked(), dtype=jnp.dtype("float32"), param_dtype=jnp.dtype("float32"),
        remat="none",
    )  # fmt: skip
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        params = jax.tree.map(np.asarray, tiny.params(oracle))
    return params, batch, shape, *scores_and_gradient(oracle, params, batch, cpu)


def relative(a, b) -> float:
    """|a - b| / |b| over whole trees."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    difference = sum(float(np.sum((np.float64(x) - np.float64(y)) ** 2)) for x, y in pairs)
    return (difference / sum(float(np.sum(np.float64(y) ** 2)) for _, y in pairs)) ** 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "attention", "full"])
def test_log_probs_and_gradients_are_those_of_a_cpu(dtype, remat):
    """As a run computes them on this device. float32 is float32: rounding to tf32 gives 1e-3."""
    params, batch, shape, exact_logps, exact_gradient = on_the_cpu()
    platform = kernels.device_platform(jax.devices()[0])
    name, _ = kernels.choose("auto", CONFIG, dtype=dtype, layout="shared", platform=platform)
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    kinds = dict(dtype=dtype, param_dtype="float32", remat=remat)
    model = place_decoder(CONFIG, mesh, SHARDING_RULES, kernel=name, shape=shape, **kinds)
    logps, gradient = scores_and_gradient(model, params, batch, jax.devices()[0])
    of_logps, of_gradient = relative(logps, exact_logps), relative(gradient, exact_gradient)
    print(f"{dtype}, remat {remat}, {name}: log-probs {of_logps:.1e}, gradient {of_gradient:.1e}")
    assert of_logps < (1e-5 if dtype == "float32" else 0.02)
    assert of_gradient < (1e-5 if dtype == "float32" else 0.05)


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_products_are_of_bfloat16(tied):
    """Of the program as it is compiled for this device: no product of the vocabulary's size in
    float32.
    """
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    model = tiny.model(config, dtype="bfloat16")
    head = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.head(tiny.params(model)))
    hidden = jnp.ones((1, 256, config.hidden_size), jnp.bfloat16)
    text = jax.jit(model.unembed).lower(head, hidden).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all(line.count("bf16>") == 2 for line in products)
