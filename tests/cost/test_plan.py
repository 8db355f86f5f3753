"""Plans: what a step costs on a TPU slice, from shapes alone; and what is compiled for TPUs ahead
of time.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runs import ROOT

from dpojax.config.load import apply_override, from_config_dict, load_config_file
from dpojax.cost.devices import open_topology
from dpojax.cost.lengths import QUANTILES, draw_lengths
from dpojax.cost.planning import make_plan
from dpojax.cost.traffic import BETWEEN, collective_traffic
from dpojax.data.packing import PackShape, abstract_batch
from dpojax.models.attention import kernels
from dpojax.models.attention.blocks import NO_WINDOW, Rows
from dpojax.models.logits import logits_product
from dpojax.runtime.mesh import ROW_AXES, make_mesh
from dpojax.training.logps import HeadInputs, Targets, token_logps

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not here: pip install '.[tpu]'",
)
SMALL_LLAMA = dict(
    model_type="llama",
    hidden_act="silu",
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    tie_word_embeddings=False,
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    attention_bias=False,
)


def topology(name):
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_WORKER_HOSTNAMES="localhost"
    )
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


@pytest.mark.parametrize("layout", ["shared", "slots", "separate"])
def test_the_abstract_batch_is_shaped_like_a_packed_one(layout):
    made = tiny.groups(np.random.default_rng(0), 9)
    batch, shape = tiny.pack(made, layout=layout, row_tokens=160, num_shards=2)
    described = abstract_batch(shape, with_ref=False)
    for name, own, expected in zip(batch._fields, described, batch, strict=True):
        if expected is None:
            assert own is None
        else:
            assert (own.shape, own.dtype) == (expected.shape, expected.dtype), name


def test_lengths_are_those_of_the_data_within_the_limits():
    for name, (prompts, chosen, _) in QUANTILES.items():
        drawn = draw_lengths(name, max_prompt=10_000, max_response=10_000)
        assert abs(np.median(drawn.prompts) - prompts[10]) < 0.15 * prompts[10]
        assert abs(np.median([ys[0] for ys in drawn.responses]) - chosen[10]) < 0.15 * chosen[10]
        cut = draw_lengths(name, max_prompt=100, max_response=50)
        assert (
            cut.prompts.max() == 100
            and max(map(max, cut.responses)) == 50
            and min(map(min, cut.responses)) >= 1
        )


def test_collectives_count_as_often_as_their_loops_run():
    mesh = make_mesh(data=1, fsdp=8, tensor=1)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P("fsdp"), check_vma=False
    )
    def f(x, n):
        def layer(x, _):
            return x + jax.lax.all_gather(x, "fsdp", tiled=True).sum(axis=0, keepdims=True), None

        def body(i, x):
            return jax.lax.scan(layer, x, None, length=5)[0] + jax.lax.psum(x, "fsdp")

        return jax.lax.fori_loop(0, n, body, x)

    text = jax.jit(f).lower(jnp.ones((16, 4)), jnp.int32(3)).compile().as_text() or ""
    found = {t.kind: t for t in collective_traffic(text, trips=(3.0, 100.0))}
    assert found["all-gather"].runs == 15 and found["all-gather"].sent == 15 * 16 * 4 * 4 * 7 / 8
    assert found["all-reduce"].runs == 3 and found["all-reduce"].sent == 3 * 2 * 2 * 4 * 4 * 7 / 8


@needs_tpu_compiler
@pytest.mark.slow
def test_a_plan_over_slices_says_what_travels_between_them(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL_LLAMA))
    config = load_config_file("configs/llama3_8b.py")
    small = {
        "model.shape": str(tmp_path),
        "batch_size": "16",
        "data.max_prompt_tokens": "256",
        "data.max_response_tokens": "128",
    }
    small |= {"data.micro_batch_tokens": "1024", "mesh.data": "2", "mesh.fsdp": "4"}
    for key, text in small.items():
        apply_override(config, key, text)
    plan = make_plan(from_config_dict(config), open_topology("v5e:2x2", 2), "ultrafeedback")
    (crossing,) = (t.sent for t in plan.traffic if t.kind == BETWEEN)
    trained = plan.categories_gib["parameters"] * 2**30
    # A micro-batch's gradients cross, a device's share of their sum in bf16 or float32, and next to
    # nothing else.
    assert 0.5 * trained <= crossing / plan.work.micro < 1.5 * trained, (
        crossing,
        trained,
        plan.work.micro,
    )
    assert plan.num_slices == 2 and plan.roofline.dcn == pytest.approx(crossing / 6.25e9)


@needs_tpu_compiler
def test_kernels_compile_for_tpus_on_a_mesh():
    """Lanes with windows, soft-capped, grouped heads, and slots; forward and backward."""
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=topology("v5e:2x2"))
    rows, length, heads, kv_heads = 2, 512, 4, 2

    def place(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    spread = P(ROW_AXES)
    for slots, dim, windows, cap in ((None, 128, (0, 128), 30.0), ((256, 128), 64, (), None)):
        shape = PackShape("slots" if slots else "shared", 1, 1, 2, length, 4, 2, 2, 300, 0, slots)
        own = (
            kernels.splash_slots(shape, interpret=False)
            if slots
            else kernels.splash_lanes(shape, windows, interpret=False)
        )
        kernel = kernels.on_mesh(own, mesh, ROW_AXES, ("tensor",))

        def f(q, k, v, group, branch, position, kernel=kernel, windows=windows, cap=cap):
            window = jnp.int32(NO_WINDOW) if windows else None
            where = kernel.prepare(Rows(group, branch, position))
            return jnp.sum(kernel.attend(q, k, v, where, window, softcap=cap).astype(jnp.float32))

        inputs = [
            place((rows, length, h, dim), jnp.bfloat16, spread) for h in (heads, kv_heads, kv_heads)
        ]
        inputs += [place((rows, length), jnp.int32, spread)] * 3
        text = jax.jit(jax.grad(f, argnums=(0, 1, 2))).lower(*inputs).compile().as_text()
        assert text is not None and "splash_mha" in text


@needs_tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("remat, passes", [("full", 2), ("attention", 1), ("dots_offload", 1)])
def test_remat_policies_keep_splashs_attention(remat, passes):
    """How often attention's forward pass is in the compiled program of a gradient."""
    gradient, *args = tiny.gradient_on(kernels.make_kernel, "splash", platform="tpu", remat=remat)
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=topology("v5e:2x2")[:1])
    here = NamedSharding(mesh, P())

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)

    lines = jax.jit(gradient).lower(*jax.tree.map(place, args)).compile().as_text().splitlines()
    assert sum("tpu_custom_call" in line and "splash_mha_fwd" in line for line in lines) == passes


@needs_tpu_compiler
def test_the_loss_layer_needs_a_quarter_of_a_gibibyte():
    """8,192 tokens x 128,256 pieces x 4,096 wide, backward included, the head's gradient
    accumulated in float32.
    """
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=topology("v5p:2x2x1")[:1])
    tokens, vocab, width = 8192, 128_256, 4096

    def unembed(head: Any, hidden: Any) -> Any:
        return logits_product("...D,DV->...V", hidden, head["w"].astype(hidden.dtype))

    def f(w, hidden, predictor, target, count):
        targets = Targets(predictor, target, count)
        return jnp.sum(token_logps(unembed, HeadInputs({"w": w}, hidden), targets, chunk=128))

    def place(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    ids = place((1, tokens), jnp.int32)
    step = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))
    inputs = (
        place((width, vocab), jnp.float32),
        place((1, tokens, width), jnp.bfloat16),
        ids,
        ids,
        place((), jnp.int32),
    )
    temporary = step.lower(*inputs).compile().memory_analysis().temp_size_in_bytes
    # The float32 gradient is an output. The head in bf16, as the matrix unit takes it, is the
    # layer's input.
    assert (temporary - 2 * width * vocab) / 2**30 <= 0.25


@pytest.mark.slow
@needs_tpu_compiler
def test_a_plan_of_a_whole_step_says_what_it_needs_and_what_does_not_fit_ends_with_6(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL_LLAMA))

    def plan(*flags, code=0):
        argv = [
            sys.executable,
            "-m",
            "dpojax.plan",
            "--config=configs/llama3_8b.py",
            "--topology=v5e:2x2",
            *flags,
        ]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout + done.stderr

    small = (
        f"--config.model.shape={tmp_path}",
        "--config.batch_size=16",
        "--config.data.max_prompt_tokens=256",
    )
    small = (
        *small,
        "--config.data.max_response_tokens=128",
        "--config.data.micro_batch_tokens=1024",
    )
    text = plan(*small, f"--json={tmp_path / 'plan.json'}")
    found = json.loads((tmp_path / "plan.json").read_text())
    layer = 512 * 128 * (4 + 2 + 2 + 4) + 3 * 512 * 1024 + 2 * 512
    count = 3 * layer + 2 * 4096 * 512 + 512
    # All but the norms' scales (whole on every device) is spread over four devices.
    norms = 3 * 2 * 512 + 512
    assert found["categories_gib"]["parameters"] * 2**30 == 4 * ((count - norms) / 4 + norms)
    assert found["categories_gib"]["optimizer"] * 2**30 >= 8 * count / 4
    assert 0 < found["hbm_gib"] < 2 and found["devices"] == 4 and found["work"]["rounding"] >= 1
    kinds = {t["kind"] for t in found["traffic"]}
    assert (
        kinds & {"all-gather", "collective-permute", "all-reduce"} and 0 < found["useful_mfu"] < 1
    )
    assert "bound by" in text and "rounding is under 10 %" in text
    table = plan(*small, "--table", "--modes=live int8,adapter", "--remats=full", "--batches=16")
    assert table.count("| full | 16 |") == 2 and "the largest that fits" in table
    over = plan("--config.mesh.data=4", "--config.mesh.fsdp=1", code=6)
    assert "needs" in over and "15.75 GiB" in over and "Traceback" not in over


@pytest.mark.slow
@needs_tpu_compiler
def test_a_plan_of_a_stage_that_samples_counts_both_copies_of_the_weights_and_the_caches(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL_LLAMA))
    values = load_config_file(str(ROOT / "configs/llama3_8b.py"))
    settings = {
        "stages": "policy_gradient",
        "policy_gradient.preset": "ppo",
        "policy_gradient.num_samples": "4",
        "model.shape": str(tmp_path),
        "batch_size": "16",
        "data.max_prompt_tokens": "128",
        "data.max_response_tokens": "64",
        "data.micro_batch_tokens": "1024",
        "sample.max_new_tokens": "64",
        "sample.batch_size": "32",
    }
    for key, text in settings.items():
        apply_override(values, key, text)
    topology("v5e:2x2")  # sets what the compiler asks of the environment
    plan = make_plan(from_config_dict(values), open_topology("v5e:2x2"), "hh")
    layer = 512 * 128 * (4 + 2 + 2 + 4) + 3 * 512 * 1024 + 2 * 512
    body = 3 * layer + 4096 * 512 + 512
    norms = 3 * 2 * 512 + 512
    net = 4 * ((body - norms) / 4 + norms)  # float32 over four devices, norms whole on each
    assert plan.categories_gib["value net"] * 2**30 == pytest.approx(net, rel=0.01)
    assert plan.unit == "prompts" and plan.rollout is not None
    rollout = plan.rollout
    assert (rollout.batches, rollout.rows) == (2, 32)
    # FSDP's parts are gathered once: bfloat16 weights are whole on every device.
    served = 2 * (body + 4096 * 512)
    assert rollout.categories_gib["served weights"] * 2**30 == pytest.approx(served, rel=0.01)
    # Keys and values of 2 heads of 128 numbers in 3 layers; a device holds 2 prompts of 128
    # columns and their 8 samples of 64.
    caches = 2 * 2 * (2 * 128) * 3 * (2 * 128 + 8 * 64)
    assert rollout.categories_gib["caches"] * 2**30 == pytest.approx(caches, rel=0.05)
    assert rollout.hbm_gib > plan.categories_gib["optimizer"] + served / 2**30


def test_a_plan_says_what_is_wrong_with_its_arguments():
    from dpojax.cost.devices import open_topology
    from dpojax.plan import main

    with pytest.raises(ValueError, match="it is one of v4, v5e"):
        open_topology("v9:2x2")
    assert main(["--config=configs/tldr.py", "--topology=v5e:2x2", "--lengths=novels"]) == 2
