"""Every way of computing attention against the one rule: values and gradients, through every
layout.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import marks
import numpy as np
import pytest
import tiny

from dpojax.config.model import SHARDING_RULES, MeshConfig
from dpojax.data.row_plan import plan_step
from dpojax.data.shapes import Lengths, Work, make_shape
from dpojax.errors import ConfigError
from dpojax.models.attention import kernels
from dpojax.models.attention.blocks import NO_WINDOW, Rows, blocked, masked, spans
from dpojax.models.attention.lanes import collect, dense_lanes, one_sequence_each, to_lanes
from dpojax.models.placed import place_decoder
from dpojax.runtime import mesh as meshes
from dpojax.runtime import sharding
from dpojax.runtime.mesh import ROW_AXES, config_mesh, make_mesh, num_shards
from dpojax.training.logps import HeadInputs, Targets, token_logps
from dpojax.training.micro_batches import micro_batch
from dpojax.training.scores import batch_scores

HEADS = {"grouped": (4, 2), "one key head": (4, 1), "a key head each": (2, 2)}


def rows_of(batch) -> Rows:
    return Rows(*(jnp.asarray(x[0]) for x in (batch.group, batch.branch, batch.positions)))


def qkv(rows, heads, *, dtype=jnp.float32, head_dim=8):
    rng = np.random.default_rng(2)
    return tuple(
        jnp.asarray(rng.normal(size=(*rows.group.shape, h, head_dim)), dtype)
        for h in (heads[0], heads[1], heads[1])
    )


def value_and_gradients(kernel, rows, inputs, *, window=None, softcap=None):
    """The attention output of every real token, and the gradients of a function of it."""
    real = (rows.group > 0)[..., None, None]
    limit = None if window is None else jnp.asarray(window, jnp.int32)

    @jax.jit
    def run(q, k, v):
        def f(q, k, v):
            out = kernel.attend(q, k, v, kernel.prepare(rows), limit, softcap=softcap).astype(
                jnp.float32
            )
            out = jnp.where(real, out, 0.0)
            return jnp.sum(jnp.sin(out)), out

        (_, out), grads = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *grads

    return [np.asarray(x, np.float32) for x in run(*inputs)]


def assert_equal_to_the_rule(kernel, rows, inputs, *, atol=3e-6, **options):
    for a, b in zip(
        value_and_gradients(kernel, rows, inputs, **options),
        value_and_gradients(masked(), rows, inputs, **options),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (40, 3.0), (1, None)])
@pytest.mark.parametrize("layout", ["shared", "slots", "separate"])
def test_blocks_equal_the_rule(layout, window, softcap):
    made = tiny.groups(np.random.default_rng(2), 8, responses=3)
    batch, _ = tiny.pack(made, layout=layout, row_tokens=190)  # 190 is no multiple of the block
    rows = rows_of(batch)
    assert_equal_to_the_rule(
        blocked(block=32, chains=1), rows, qkv(rows, (4, 2)), window=window, softcap=softcap
    )
    assert_equal_to_the_rule(
        blocked(block=32, chains=0), rows, qkv(rows, (4, 2)), window=window, softcap=softcap
    )


@pytest.mark.parametrize("most", [1, 2, 9, 33, 257])
def test_every_number_of_blocks_has_a_span_that_holds_it_and_little_more(most):
    sizes = spans(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for n in range(1, most + 1):
        assert n <= min(s for s in sizes if s >= n) <= max(n, n * 1.25)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 150])
def test_blocks_equal_the_rule_where_groups_are_many_blocks_long(window):
    """Spans of more blocks than are needed, at both ends of a row, behind padding and across rows
    that are chained.
    """
    branch = np.zeros((3, 500), np.int32)
    position, group = np.zeros_like(branch), np.zeros_like(branch)
    for row, parts in enumerate(
        [[(380, 40, 60)], [(20, 3, 5), (300, 90, 80)], [(7, 2, 1), (150, 60, 41), (9, 30, 30)]]
    ):
        at = 0
        for number, (prompt, *responses) in enumerate(parts, 1):
            for own, size in enumerate((prompt, *responses)):
                here = (row, slice(at, at + size))
                group[here], branch[here] = number, own
                position[here] = np.arange(size) + (prompt if own else 0)
                at += size
    rows = Rows(*(jnp.asarray(x) for x in (group, branch, position)))
    for chains in (0, 1):
        assert_equal_to_the_rule(
            blocked(block=16, chains=chains), rows, qkv(rows, (4, 2)), window=window, atol=1e-5
        )


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (9, None), (None, 4.0)])
@pytest.mark.parametrize("responses", marks.cases([2], [1, 3]))
def test_splash_lanes_equal_the_rule(heads, window, softcap, responses):
    if (heads != (4, 2) and (window or softcap)) or (responses == 1 and heads != (4, 2)):
        pytest.skip("interpreted kernels are slow: one thing at a time")
    made = tiny.groups(np.random.default_rng(3), 7, responses=responses)
    batch, shape = tiny.pack(made, row_tokens=200)
    rows = rows_of(batch)
    windows = () if window is None else (0, window, window)
    kernel = kernels.splash_lanes(shape, windows, interpret=True)
    assert_equal_to_the_rule(kernel, rows, qkv(rows, heads), window=window, softcap=softcap)
    if window is not None:  # the layers of a scan share one program
        assert_equal_to_the_rule(kernel, rows, qkv(rows, heads), window=NO_WINDOW, softcap=softcap)


@pytest.mark.parametrize("responses", [2, 3])
def test_splash_slots_equal_the_rule(responses):
    made = tiny.groups(np.random.default_rng(4), 9, responses=responses)
    batch, shape = tiny.pack(made, layout="slots", row_tokens=60 + responses * 48)
    rows = rows_of(batch)
    assert int(batch.group.max()) > 1
    assert_equal_to_the_rule(kernels.splash_slots(shape, interpret=True), rows, qkv(rows, (4, 2)))


@pytest.mark.parametrize(("window", "heads"), [(None, (4, 2)), (9, (2, 1))])
@pytest.mark.parametrize("responses", [1, 2, 3])
def test_sequences_of_their_own_equal_the_rule(window, heads, responses):
    made = tiny.groups(np.random.default_rng(5), 7, responses=responses)
    batch, shape = tiny.pack(made, row_tokens=200, row_groups=4)
    assert int(batch.group.max()) <= 4
    rows = rows_of(batch)
    windows = () if window is None else (window, 0)
    kernel = kernels.cudnn_sequences(shape, windows, implementation="xla")
    assert_equal_to_the_rule(kernel, rows, qkv(rows, heads), window=window)


def test_kernels_in_bfloat16_stay_within_its_rounding():
    """Stated bound: 2 % of the largest output, and of the largest gradient; the masked softmax
    itself has as much.
    """
    made = tiny.groups(np.random.default_rng(6), 6)
    for layout in ("shared", "slots"):
        batch, shape = tiny.pack(made, layout=layout, row_tokens=160)
        rows = rows_of(batch)
        exact = value_and_gradients(masked(), rows, qkv(rows, (4, 2)))
        ways = (
            [kernels.splash_slots(shape, interpret=True)]
            if layout == "slots"
            else [
                kernels.splash_lanes(shape, (), interpret=True),
                kernels.cudnn_sequences(
                    dataclasses.replace(shape, row_groups=8), (), implementation="xla"
                ),
                blocked(block=32, chains=1),
            ]
        )
        for kernel in ways:
            for a, b in zip(
                value_and_gradients(kernel, rows, qkv(rows, (4, 2), dtype=jnp.bfloat16)),
                exact,
                strict=True,
            ):
                assert np.abs(a - b).max() < 0.02 * np.abs(b).max()


def test_the_transposes_of_the_lanes_gathers_are_their_transposes():
    made = tiny.groups(np.random.default_rng(7), 6, responses=3)
    rows = rows_of(tiny.pack(made, row_tokens=160)[0])
    rng = np.random.default_rng(0)
    for lanes in (dense_lanes(rows, 3), one_sequence_each(rows, 3, 6, 64)):
        x = jnp.asarray(rng.normal(size=(*rows.group.shape, 2, 4)), jnp.float32)
        y = jnp.asarray(rng.normal(size=(*lanes.source.shape, 2, 4)), jnp.float32)
        for function, at, other in ((to_lanes, x, y), (collect, y, x)):
            out, pull = jax.vjp(lambda z, f=function, l=lanes: f(z, l), at)
            np.testing.assert_allclose(
                jnp.vdot(out, other), jnp.vdot(at, pull(other)[0]), rtol=1e-4
            )


@pytest.mark.parametrize(
    "mesh", [dict(data=2, fsdp=2, tensor=2), dict(data=2, fsdp=1, tensor=1, sequence=4)]
)
@pytest.mark.parametrize("name", ["xla", "splash"])
def test_kernels_on_a_mesh_equal_the_rule(mesh, name):
    """Rows over data axes, heads over tensor and sequence axes, fewer key heads than devices."""
    made = tiny.groups(np.random.default_rng(8), 12)
    batch, shape = tiny.pack(
        made, row_tokens=128, shard_rows=1, num_shards=4 if "sequence" not in mesh else 2
    )
    rows = rows_of(batch)
    on = make_mesh(**mesh)
    own = kernels.make_kernel(name, tiny.CONFIG, shape, platform="cpu")
    kernel = kernels.on_mesh(own, on, ROW_AXES, sharding.attention_axes(on, SHARDING_RULES))
    inputs = qkv(rows, (4, 2))
    constrain = sharding.constrain_rows(on)
    spread_out = kernel._replace(
        attend=lambda q, *rest, **options: constrain(kernel.attend(constrain(q), *rest, **options))
    )
    assert_equal_to_the_rule(spread_out, rows, inputs)


def test_slots_hold_every_group_and_are_chosen_where_they_cost_less():
    rng = np.random.default_rng(0)

    def draw(low, high):
        return rng.integers(low, high, 500)

    prompts, answers = draw(200, 500), draw(5, 60)
    for work, expected in ((Work(1.0, 0.002), "slots"), (Work(1.0, 0.0001), "shared")):
        lengths = Lengths(
            prompts, [[int(a), int(b)] for a, b in zip(answers, answers[::-1], strict=True)]
        )
        options: dict[str, Any] = dict(
            num_groups=64, num_shards=1, micro_batch_tokens=4096, row_tokens=0
        )
        found = make_shape([lengths], layout="auto", work=work, **options)
        assert found.layout == expected
        slots = make_shape([lengths], layout="slots", work=work, **options)
        assert slots.slots is not None and slots.row_tokens == slots.slots[0] + 2 * slots.slots[1]
        own = rng.choice(500, 64, replace=False)
        plan = plan_step([int(prompts[i]) for i in own], [lengths.responses[i] for i in own], slots)
        for row in (row for cells in plan.cells for cell in cells for row in cell):
            held = [own[s.group] for s in row]
            assert sum(prompts[i] for i in held) <= slots.slots[0]
            assert all(sum(lengths.responses[i][k] for i in held) <= slots.slots[1] for k in (0, 1))


def test_auto_takes_what_the_device_and_the_model_allow():
    choose = functools.partial(kernels.choose, "auto", dtype="bfloat16", layout="auto")
    plain, capped = tiny.CONFIG, dataclasses.replace(tiny.CONFIG, attention_softcap=50.0)
    assert (
        choose(plain, platform="tpu")[0] == "splash"
        and choose(capped, platform="tpu")[0] == "splash"
    )
    assert (
        choose(plain, platform="cuda")[0] == "cudnn"
        and choose(plain, platform="gpu")[0] == "xla"
        and choose(plain, platform="cpu")[0] == "xla"
    )
    assert choose(capped, platform="cuda") == ("xla", "cuDNN has no soft-capped scores")
    assert (
        kernels.choose("auto", plain, dtype="float32", layout="auto", platform="cuda")[0] == "xla"
    )
    assert (
        kernels.choose("auto", plain, dtype="bfloat16", layout="separate", platform="cuda")[0]
        == "xla"
    )
    with pytest.raises(ConfigError, match=r"cuDNN runs on NVIDIA GPUs .*, this is cpu"):
        kernels.choose("cudnn", plain, dtype="bfloat16", layout="shared", platform="cpu")
    windowed = dataclasses.replace(tiny.CONFIG, windows=(4, 0))
    with pytest.raises(ConfigError, match="windows are not distances"):
        kernels.choose("splash", windowed, dtype="float32", layout="slots", platform="tpu")


def test_cudnn_is_for_nvidia_gpus_that_it_runs_on():
    def device(kind, capability):
        return types.SimpleNamespace(
            platform="gpu", device_kind=kind, compute_capability=capability
        )

    assert kernels.device_platform(device("NVIDIA H200", "9.0")) == "cuda"
    assert kernels.device_platform(device("NVIDIA B200", "10.0")) == "cuda"
    assert kernels.device_platform(device("NVIDIA Tesla V100", "7.0")) == "gpu"
    assert kernels.device_platform(device("AMD Instinct MI300X", "gfx942")) == "gpu"
    assert kernels.device_platform(jax.devices()[0]) == "cpu"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What jax asks of the device before it takes cuDNN is answered."""
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    for name, answer in (("check_cudnn_version", 91500), ("check_compute_capability", True)):
        if not hasattr(private, name):
            pytest.skip("this jax asks for the GPU elsewhere")
        monkeypatch.setattr(private, name, lambda *args, answer=answer: answer)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_cudnn_is_lowered_for_gpus():
    """The call passes the checks of shapes and dtypes that jax makes before a GPU is needed."""
    made = tiny.groups(np.random.default_rng(9), 5)
    batch, shape = tiny.pack(made, row_tokens=160, row_groups=4)
    rows = rows_of(batch)
    kernel = kernels.cudnn_sequences(shape, ())
    q, k, v = qkv(rows, (4, 2), dtype=jnp.bfloat16, head_dim=64)

    def f(q, k, v):
        return jnp.sum(kernel.attend(q, k, v, kernel.prepare(rows)).astype(jnp.float32))

    text = (
        jax.jit(jax.grad(f, argnums=(0, 1, 2)))
        .trace(q, k, v)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    assert "cudnn" in text and "PADDING_CAUSAL" in text


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "remat, passes", [("full", 2), ("attention", 1), ("dots", 1), ("dots_offload", 1)]
)
def test_remat_policies_keep_cudnns_attention(remat, passes):
    """How often attention's forward pass is in the program of a gradient."""
    gradient, *args = tiny.gradient_on(kernels.make_kernel, "cudnn", platform="gpu", remat=remat)
    text = str(jax.make_jaxpr(gradient)(*args))
    assert text.count("= dot_product_attention_fwd_wrapper") == passes


@pytest.mark.parametrize("tied", [True, False])
def test_the_heads_products_are_of_bfloat16_in_both_passes(tied):
    """On GPUs too, where JAX makes both operands float32 if one of them is; and the gradients are
    float32's, rounded.
    """
    config = dataclasses.replace(tiny.CONFIG, tie_embeddings=tied)
    rng = np.random.default_rng(4)

    def rounded(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    shape = (
        (config.vocab_size, config.hidden_size) if tied else (config.hidden_size, config.vocab_size)
    )
    head, hidden = (
        {"embed" if tied else "unembed": rounded(*shape)},
        rounded(1, 24, config.hidden_size),
    )
    predictor = jnp.asarray(rng.integers(0, 24, (1, 16)))
    target = jnp.asarray(rng.integers(0, config.vocab_size, (1, 16)))

    def gradients(dtype):
        model = tiny.model(config, dtype=dtype)

        def f(head, hidden):
            targets = Targets(predictor, target, jnp.asarray(16))
            inputs = HeadInputs(head, hidden)
            return jnp.sum(token_logps(model.unembed, inputs, targets, chunk=8))

        return jax.jit(jax.grad(f, argnums=(0, 1)))

    text = gradients("bfloat16").trace(head, hidden).lower(lowering_platforms=("cuda",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all(line.count("bf16>") == 2 for line in products), products
    exact = gradients("float32")(*jax.tree.map(lambda x: x.astype(jnp.float32), (head, hidden)))
    for a, b in zip(
        jax.tree.leaves(gradients("bfloat16")(head, hidden)), jax.tree.leaves(exact), strict=True
    ):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.02 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("tied", marks.cases([True], [False]))
@pytest.mark.parametrize(
    "mesh", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=2, tensor=1, sequence=4)]
)
def test_scores_by_shard_equal_those_of_one_device_with_gradients(mesh, tied):
    config = dataclasses.replace(tiny.CONFIG, tie_embeddings=tied, vocab_size=64)
    on = make_mesh(**mesh)
    shards = num_shards(on)
    made = tiny.groups(np.random.default_rng(8), 12)
    batch, shape = tiny.pack(made, row_tokens=128, shard_rows=1, num_shards=shards)
    mb = micro_batch(jax.tree.map(jnp.asarray, batch), 0)
    plain = tiny.model(config)
    params = tiny.params(plain)
    kinds: dict[str, Any] = dict(dtype="float32", param_dtype="float32", remat="full")
    spread = place_decoder(config, on, SHARDING_RULES | {"embed": "fsdp,sequence"}, **kinds)
    assert spread.head_sharding is not None

    def run(model, params):
        def f(p):
            found = batch_scores(model, p, mb, chunk=16)
            return jnp.sum(jnp.where(mb.weight > 0, jnp.sin(found.logps), 0.0)), found.logps

        (_, logps), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(params)
        return np.where(mb.weight > 0, logps, 0), grads

    abstract = jax.eval_shape(lambda: params)
    placed = jax.device_put(
        params,
        sharding.param_shardings(
            abstract, spread.axes, on, SHARDING_RULES | {"embed": "fsdp,sequence"}
        ),
    )
    (a, ga), (b, gb) = run(spread, placed), run(plain, params)
    np.testing.assert_allclose(a, b, atol=2e-5)
    norm = np.sqrt(sum(float(jnp.vdot(x, x)) for x in jax.tree.leaves(gb)))
    for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() < 1e-5 * norm


def test_slices_are_those_of_tpus():
    """GPUs say in which machine they are by the same name; a mesh that spans them is one."""

    def device(platform, i):
        return types.SimpleNamespace(platform=platform, slice_index=i, id=i)

    section = MeshConfig(data=1, fsdp=2, sequence=1, tensor=1, num_slices=0, rules={})
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda **options: found.append(options["num_slices"]))
        for platform in ("tpu", "gpu"):
            config_mesh(section, [device(platform, 0), device(platform, 1)])
    assert found == [2, 1]


def test_slices_are_crossed_by_the_data_axis_alone():
    mesh = make_mesh(data=4, fsdp=2, tensor=1, num_slices=2)
    ids = np.vectorize(lambda d: d.id)(mesh.devices)
    assert set(ids[:2].ravel()) == {0, 1, 2, 3} and set(ids[2:].ravel()) == {4, 5, 6, 7}
    with pytest.raises(
        ConfigError, match=r"mesh.num_slices=3: it must divide mesh.data, which is 4"
    ):
        make_mesh(data=4, fsdp=2, tensor=1, num_slices=3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_of_the_precision_that_the_dtype_promises(dtype):
    """In both passes, on any device: JAX's default rounds float32 to tf32 on GPUs and to bfloat16
    on TPUs.
    """
    model = tiny.model(dtype=dtype)
    batch, _ = tiny.pack(tiny.groups(np.random.default_rng(1), 4))
    mb = micro_batch(jax.tree.map(jnp.asarray, batch), 0)

    def total(params):
        return jnp.sum(batch_scores(model, params, mb, chunk=16).logps)

    params = jax.eval_shape(model.init, jax.random.key(0))
    text = jax.jit(jax.grad(total)).lower(params).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    highest = [line for line in products if "precision = [HIGHEST, HIGHEST]" in line]
    assert len(products) > 20
    assert len(highest) == (len(products) if dtype == "float32" else 0)


def test_attention_prepares_without_scatters():
    """XLA rewrites scatters where it must be deterministic on GPUs, and did so wrongly in several
    versions.
    """
    batch, shape = tiny.pack(tiny.groups(np.random.default_rng(1), 4), row_groups=4)
    rows = rows_of(batch)
    for kernel in (
        blocked(block=32, chains=1),
        kernels.cudnn_sequences(shape, ()),
        kernels.splash_lanes(shape, (), interpret=True),
    ):
        assert "scatter" not in str(jax.make_jaxpr(kernel.prepare)(rows))
