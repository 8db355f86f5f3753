"""Adapters, quantised and host-resident frozen trees, and mixtures of experts."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import optax
import pytest
import tiny
import transformers_families
from runs import ROOT, rows, run

from dpojax.algorithms.preference import preference_gradients
from dpojax.config.model import SHARDING_RULES
from dpojax.main import main
from dpojax.models import lora, placed, quantise
from dpojax.models.attention.blocks import masked
from dpojax.models.config import ModelConfig
from dpojax.models.decoder import make_decoder
from dpojax.models.layer import OnMesh, linear
from dpojax.models.params import ParamRow
from dpojax.objectives.loss import make_loss
from dpojax.runtime import sharding
from dpojax.runtime.mesh import make_mesh
from dpojax.training.checksums import checksums
from dpojax.training.router_loss import Balance
from dpojax.training.scores import make_token_logps_step
from dpojax.training.update import Spikes, make_train_step
from dpojax.weights import peft

RANK, SCALE = 3, 2.0
MIXTURE = ModelConfig(
    **{
        **vars(tiny.CONFIG),
        "num_experts": 5,
        "experts_per_token": 2,
        "renormalise_experts": True,
        "init_std": 0.3,
    }
)
F32 = jnp.dtype("float32")


def decoder(config=tiny.CONFIG, **more):
    plain = dict(attention=masked(), dtype=F32, param_dtype=F32, remat="none")
    return make_decoder(config, **plain, **more)


MODEL = decoder(adapter=lora.Adapter(SCALE, 0.0))
BASE = tiny.params(MODEL)


def adapters(config=tiny.CONFIG, targets="*", *, moved=False, seed=0):
    made = lora.init_adapters(
        jax.random.key(seed), lora.adapter_rows(config, targets, RANK), config.num_layers, F32
    )
    if not moved:
        return made
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    return jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), made)


def logits(model, params, ids):
    ids = jnp.asarray(ids)
    one = jnp.ones_like(ids)
    return model.unembed(
        model.head(params), model.hidden_states(params, ids, jnp.cumsum(one, 1) - 1, one, 0 * one)
    )


IDS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (2, 20)))


def test_the_policy_starts_as_the_base_with_exactly_one_factor_zero():
    fresh = adapters()
    for name, value in fresh["layers"].items():
        assert bool(jnp.any(value != 0)) == name.endswith(lora.LORA_A), name
    np.testing.assert_array_equal(
        logits(MODEL, lora.join(BASE, fresh), IDS), logits(MODEL, BASE, IDS)
    )


def test_adapters_and_merged_weights_give_the_same_logits():
    policy = lora.join(BASE, adapters(moved=True))
    merged = lora.merge(policy, tiny.CONFIG, SCALE)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)
    own = logits(MODEL, policy, IDS)
    np.testing.assert_allclose(logits(MODEL, merged, IDS), own, atol=1e-5)
    assert float(jnp.abs(own - logits(MODEL, BASE, IDS)).max()) > 0.1


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("q,v", {"q", "v"}),
        ("*", {"q", "k", "v", "o", "gate", "up", "down"}),
        ("[gu]*", {"gate", "up"}),
    ],
)
def test_targets_are_patterns_of_names(targets, found):
    assert {r.name for r in lora.target_rows(tiny.CONFIG, targets)} == found
    with pytest.raises(ValueError, match=r"lora\.targets: 'query' matches none of .*: q, k, v, o"):
        lora.target_rows(tiny.CONFIG, "q,query")


def train(model, base, start, steps=3, **options):
    loss = make_loss("sigmoid", beta=0.5)
    optimizer = optax.adam(1e-2)
    step = make_train_step(
        preference_gradients(model, loss, chunk=32, **options),
        {"policy": optimizer},
        lambda x: x,
        spikes=Spikes(np.inf, False),
    )
    step, state = jax.jit(step), tiny.policy_state(optimizer, start)
    batch = jax.tree.map(
        jnp.asarray, tiny.pack(tiny.groups(np.random.default_rng(1), 6), row_tokens=96)[0]
    )
    metrics = []
    for _ in range(steps):
        state, found = step(state, tiny.frozen(base, base), batch, np.bool_(False))
        metrics.append(found.scalars)
    return state, metrics


def test_training_moves_adapters_and_leaves_the_base_bit_equal():
    before = checksums(BASE)
    start = adapters()
    state, metrics = train(MODEL, BASE, start)
    assert (
        abs(float(metrics[0]["loss"]) - np.log(2)) < 1e-6
        and abs(float(metrics[0]["rewards/chosen"])) < 1e-6
    )
    assert float(metrics[-1]["loss"]) < float(metrics[0]["loss"])
    assert checksums(BASE) == before
    assert jax.tree.structure(state.policy) == jax.tree.structure(start)

    def sizes(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    # adam's two moments of the adapters alone
    assert sizes(state.opt_state) <= 2 * sizes(start) + 2


def test_the_gradient_of_an_adapter_is_that_of_its_product():
    """dL/dA and dL/dB follow from dL/dW of the merged weights: dA = s dW B', dB = s A' dW."""
    start = adapters(targets="gate", moved=True)

    def mean(params):
        return jnp.sum(jnp.sin(logits(MODEL, params, IDS)))

    own = jax.grad(lambda a: mean(lora.join(BASE, a)))(start)["layers"]
    merged = lora.merge(lora.join(BASE, start), tiny.CONFIG, SCALE)
    d = jax.grad(mean)(merged)["layers"]["gate"]
    a, b = start["layers"]["gate_lora_a"], start["layers"]["gate_lora_b"]
    np.testing.assert_allclose(
        own["gate_lora_a"], SCALE * jnp.einsum("NDF,NZF->NDZ", d, b), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        own["gate_lora_b"], SCALE * jnp.einsum("NDZ,NDF->NZF", a, d), rtol=1e-3, atol=1e-4
    )


def test_dropout_is_of_the_adapters_alone_and_follows_seed_and_step():
    model = decoder(adapter=lora.Adapter(SCALE, 0.5))
    batch = jax.tree.map(
        jnp.asarray, tiny.pack(tiny.groups(np.random.default_rng(1), 6), row_tokens=96)[0]
    )
    loss = make_loss("sigmoid", beta=0.5)
    gradients = preference_gradients(model, loss, chunk=32, dropout_seed=0)
    run = jax.jit(
        lambda state: (
            gradients(state, tiny.frozen(BASE, BASE), batch, np.bool_(False), lambda x: x).loss
        )
    )
    state = tiny.policy_state(optax.identity(), adapters(moved=True))
    first, again, later = run(state), run(state), run(state._replace(step=state.step + 1))
    plain = jax.jit(
        lambda: (
            preference_gradients(model, loss, chunk=32)(
                state, tiny.frozen(BASE, BASE), batch, np.bool_(False), lambda x: x
            ).loss
        )
    )()
    assert float(first) == float(again) and len({float(first), float(later), float(plain)}) == 3
    fresh = state._replace(
        params={"policy": adapters()}
    )  # B is 0: dropout of A's input changes nothing
    assert float(run(fresh)) == pytest.approx(np.log(2), abs=1e-6)


def test_dropout_keeps_the_mean_of_a_map():
    rng = np.random.default_rng(0)
    w = {
        "up": rng.normal(size=(8, 5)),
        "up_lora_a": rng.normal(size=(8, RANK)),
        "up_lora_b": rng.normal(size=(RANK, 5)),
    }
    x, keys = jnp.asarray(rng.normal(size=(3, 8))), jax.random.split(jax.random.key(0), 4000)

    def apply(key):
        row = ParamRow("up", (8, 5), ("embed", "mlp"), "normal", 1)
        return linear(jax.tree.map(jnp.asarray, w), row, x, lora.Adapter(SCALE, 0.25), key)

    drawn = jax.jit(jax.vmap(apply))(keys)
    np.testing.assert_array_less(
        jnp.abs(drawn.mean(axis=0) - apply(None)), 5 * drawn.std(axis=0) / 4000**0.5
    )


# --- fewer bits, other memory ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "most", "bits"), [("int8", 0.05, 8), ("fp8", 0.2, 8), ("nf4", 0.6, 4)]
)
def test_quantised_layers_are_small_and_near(kind, most, bits):
    config = ModelConfig(**{**vars(tiny.CONFIG), "hidden_size": 128, "intermediate_size": 256})
    model = tiny.model(config)
    params = tiny.params(model)
    small = quantise.quantise_params(params, config, kind)
    matrix = small["layers"]["up"]
    assert (
        sum(x.nbytes for x in jax.tree.leaves(matrix))
        < params["layers"]["up"].nbytes * (bits + 2) / 32
    )
    moved = jnp.abs(quantise.in_compute(matrix, F32) - params["layers"]["up"])
    # The step between two values: absmax / 127, 1/16 of the value, and 0.16 of the tile's absmax.
    assert (
        float(moved.max() / jnp.abs(params["layers"]["up"]).max())
        < {"int8": 0.5 / 127 + 1e-3, "fp8": 1 / 16, "nf4": 0.16}[kind]
    )
    ids = IDS[:, :12]
    difference = jnp.abs(
        jax.nn.log_softmax(logits(model, small, ids))
        - jax.nn.log_softmax(logits(model, params, ids))
    )
    assert 0 < float(difference.mean()) < most


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_under_adapters_trains_and_stays(kind):
    base = quantise.quantise_params(BASE, tiny.CONFIG, kind)
    before = checksums(base)
    _, metrics = train(MODEL, base, adapters())
    assert abs(float(metrics[0]["loss"]) - np.log(2)) < 1e-6 and float(metrics[-1]["loss"]) < float(
        metrics[0]["loss"]
    )
    assert checksums(base) == before
    merged = lora.merge(lora.join(base, adapters(moved=True)), tiny.CONFIG, SCALE)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)


def test_a_reference_in_the_hosts_memory_gives_the_same_log_probs():
    batch = jax.tree.map(jnp.asarray, tiny.pack(tiny.groups(np.random.default_rng(3), 3))[0])
    mesh = make_mesh(data=-1, fsdp=1, tensor=1)

    def place(memory):
        return sharding.param_shardings(BASE, MODEL.axes, mesh, {}, memory)

    there, here = (jax.device_put(BASE, place(m)) for m in ("pinned_host", "device"))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(there)} == {"pinned_host"}
    step = make_token_logps_step(MODEL, chunk=32)
    np.testing.assert_array_equal(jax.jit(step)(there, batch), jax.jit(step)(here, batch))


# --- PEFT -----------------------------------------------------------------------------------------

needs_peft = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "peft"))),
    reason="torch and PEFT are not installed: pip install .[parity]",
)


@pytest.mark.slow
@pytest.mark.parity
@needs_peft
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_adapters_go_to_peft_and_back(tmp_path, name):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    reference = transformers_families.theirs(name, tmp_path / "base")
    config, _, base = model_folders.opened(tmp_path / "base")
    model = decoder(config, adapter=lora.Adapter(SCALE, 0.0))
    ids = np.random.default_rng(0).integers(0, 61, (2, 20))
    own = adapters(config, moved=True)
    peft.export_adapters(own, config, tmp_path / "ours", scale=SCALE, base=str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(reference, tmp_path / "ours").eval()
    np.testing.assert_allclose(
        logits(model, lora.join(base, own), ids),
        transformers_families.their_logits(theirs, ids),
        atol=1e-4,
    )
    again, scale = peft.load_adapters(
        tmp_path / "ours", peft.read_settings(tmp_path / "ours"), config
    )
    back = decoder(config, adapter=lora.Adapter(scale, 0.0))
    np.testing.assert_allclose(
        logits(back, lora.join(base, again), ids),
        transformers_families.their_logits(theirs, ids),
        atol=1e-4,
    )

    # And one that PEFT made itself, with modules of its own choice, and ranks and alphas by
    # pattern.
    torch.manual_seed(1)
    modules = {
        "llama": ["q_proj", "down_proj"],
        "gpt2": ["c_attn"],
        "gpt_neox": ["query_key_value"],
        "phi3": ["qkv_proj", "o_proj"],
    }
    reference = transformers_families.theirs(name, tmp_path / "base")
    settings = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=modules[name],
        task_type="CAUSAL_LM",
        use_rslora=name == "llama",
        rank_pattern={modules[name][-1]: 2},
        alpha_pattern={modules[name][-1]: 5},
    )
    made = get_peft_model(reference, settings).eval()
    for key, p in made.named_parameters():
        if "lora_B" in key:
            p.data += 0.1 * torch.randn_like(p)
    made.save_pretrained(tmp_path / "theirs")
    found, scale = peft.load_adapters(
        tmp_path / "theirs", peft.read_settings(tmp_path / "theirs"), config
    )
    policy = decoder(config, adapter=lora.Adapter(scale, 0.0))
    np.testing.assert_allclose(
        logits(policy, lora.join(base, found), ids),
        transformers_families.their_logits(made, ids),
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "peft_type"),
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused_by_name(tmp_path, change, named):
    from dpojax.errors import ConfigError

    peft.export_adapters(adapters(), tiny.CONFIG, tmp_path, scale=SCALE, base="x")
    peft.read_settings(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=named):
        peft.read_settings(tmp_path)


# --- experts --------------------------------------------------------------------------------------


def every_expert(x, weights, ids, maps, *, activation, axis=None):
    """The oracle: all experts for all tokens, weighted."""
    gate, up, down = maps
    dense = jnp.einsum(
        "TXF,XFD->TXD",
        activation(jnp.einsum("TD,XDF->TXF", x, gate)) * jnp.einsum("TD,XDF->TXF", x, up),
        down,
    )
    share = jnp.sum(jax.nn.one_hot(ids, gate.shape[0]) * weights[..., None], axis=1)
    return jnp.einsum("TX,TXD->TD", share, dense)


def test_experts_equal_computing_every_one_with_gradients():
    fast, slow = decoder(MIXTURE), decoder(MIXTURE, on_mesh=OnMesh(mix=every_expert))
    params = tiny.params(fast)

    def f(model, p):
        return jnp.sum(jnp.sin(logits(model, p, IDS)))

    (a, ga), (b, gb) = (jax.value_and_grad(functools.partial(f, m))(params) for m in (fast, slow))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-4), ga, gb)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(data=8, tensor=1), dict(data=2, tensor=4)])
def test_experts_spread_over_a_mesh_give_the_same(mesh):
    config = ModelConfig(**{**vars(MIXTURE), "num_experts": 8})
    plain, devices = decoder(config), make_mesh(fsdp=1, **mesh)
    params = tiny.params(plain)
    there = decoder(config, on_mesh=OnMesh(mix=placed.spread_experts(devices, SHARDING_RULES)))
    shardings = sharding.param_shardings(params, plain.axes, devices, SHARDING_RULES)
    assert shardings["layers"]["up"].spec[1] == "tensor"
    ids = jnp.tile(IDS, (4, 1))
    rows_of = jax.device_put(ids, sharding.rows_sharding(devices, leading=0))

    def f(model, p, x):
        return jnp.sum(jnp.sin(logits(model, p, x)))

    a, ga = jax.value_and_grad(functools.partial(f, plain))(params, ids)
    b, gb = jax.jit(jax.value_and_grad(functools.partial(f, there)))(
        jax.device_put(params, shardings), rows_of
    )
    np.testing.assert_allclose(a, b, rtol=1e-4)
    # To the global norm of the gradient, as design.md bounds it: sums over devices come in another
    # order.
    assert (
        float(
            optax.tree.norm(jax.tree.map(lambda x, y: x - jax.device_get(y), ga, gb))
            / optax.tree.norm(ga)
        )
        < 1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid", "aot"])
def test_the_routers_loss_is_that_of_the_step_however_it_is_cut(name):
    model = decoder(MIXTURE)
    params, loss = tiny.params(model), make_loss(name, beta=0.5)
    made = tiny.groups(np.random.default_rng(4), 6, longest=16)
    state = tiny.policy_state(optax.identity(), params)

    def run(batch, balance):
        step = preference_gradients(model, loss, chunk=32, balance=balance)
        return jax.jit(lambda s, b: step(s, tiny.frozen(params), b, np.bool_(False), lambda x: x))(
            state, batch
        )

    batches = [
        jax.tree.map(jnp.asarray, tiny.pack(made, row_tokens=64, shard_rows=r)[0]) for r in (1, 8)
    ]
    assert int(batches[0].num_micro) > 2 and int(batches[1].num_micro) == 1
    (cut, one), without = (
        (run(b, Balance(3.0, MIXTURE.num_layers)) for b in batches),
        run(batches[1], None),
    )

    # By hand: a row for each group, all of them at once, a shared prompt once.
    length = max(len(g.prompt) + sum(map(len, g.responses)) for g in made)
    ids, branch, position = (np.zeros((len(made), length), np.int32) for _ in range(3))
    for row, g in enumerate(made):
        start, sizes = len(g.prompt), [len(g.prompt), *map(len, g.responses)]
        ids[row, : sum(sizes)] = np.concatenate([g.prompt, *g.responses])
        branch[row, : sum(sizes)] = np.repeat(range(3), sizes)
        position[row, : sum(sizes)] = np.concatenate(
            [np.arange(start), *(start + np.arange(n) for n in sizes[1:])]
        )
    tokens = [len(g.prompt) + sum(map(len, g.responses)) for g in made]
    real = (np.arange(length) < np.asarray(tokens)[:, None]).astype(np.int32)
    rows_of = tuple(map(jnp.asarray, (ids, position, real, branch)))

    def whole(p):
        routing = model.routed(p, *rows_of)[1]
        shares = (
            x / (MIXTURE.num_layers * sum(tokens))
            for x in (jax.lax.stop_gradient(routing.counts), routing.probabilities)
        )
        return 3.0 * 5 * jnp.sum(functools.reduce(jnp.multiply, shares))

    value, grads = jax.jit(jax.value_and_grad(whole))(params)
    np.testing.assert_allclose(3.0 * one.scalars["aux_loss"], value, rtol=1e-5)
    np.testing.assert_allclose(one.loss - without.loss, value, rtol=1e-4)
    own = jax.tree.map(lambda a, b: a - b, one.grads["policy"], without.grads["policy"])
    np.testing.assert_allclose(
        own["layers"]["router"], grads["layers"]["router"], rtol=1e-3, atol=2e-5
    )
    np.testing.assert_allclose(cut.loss, one.loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), cut.grads, one.grads
    )


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_with_adapters_resumes_bit_equal_and_its_export_is_the_policy(files, tmp_path):
    own = {
        "lora.rank": 4,
        "lora.base_dtype": "int8",
        "lora.dropout": 0.1,
        "sft.num_steps": 2,
        "optim.learning_rate": 1e-2,
        "self_check": "full",
    }
    whole = run(files, tmp_path / "whole", **own, export=True)
    assert "adapters:" in whole and "self-check" in whole
    run(files, tmp_path / "cut", **own, num_steps=4)
    run(files, tmp_path / "cut", **own, num_steps=6, **{"checkpoint.allow_changed": ""})

    def last(name):
        return [r for r in rows(tmp_path / name) if "loss" in r][-1]

    assert last("whole")["loss"] == last("cut")["loss"]
    first = next(r for r in rows(tmp_path / "whole") if "eval_loss" in r)
    assert abs(first["eval_rewards/margins"]) < 1e-5 and abs(first["eval_loss"] - np.log(2)) < 1e-5

    def size(name):
        return sum(p.stat().st_size for p in (tmp_path / "whole" / name).rglob("*") if p.is_file())

    assert size("checkpoints/6") < size("sft/2")  # adapters with their moments, not the model

    # The merged export and the workdir itself are one and the same policy. PEFT cannot open what
    # stands on an SFT stage.
    from dpojax.weights.open import open_weights

    assert (
        not (tmp_path / "whole" / "adapter").exists()
        and "the adapters are not exported alone: they stand on the result of the SFT stage"
        in whole
    )
    trees = []
    for place in ("export", ""):
        weights = open_weights(str(tmp_path / "whole" / place))
        model = tiny.model(weights.config)
        abstract = jax.eval_shape(model.init, jax.random.key(0))
        spread = sharding.param_shardings(
            abstract, model.axes, make_mesh(data=-1, fsdp=1, tensor=1), SHARDING_RULES
        )
        trees.append(jax.device_get(weights.load(spread, F32, lambda n: None)))
    export, workdir = trees
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), export, workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "lora.rank": 4,
            "lora.base_dtype": "nf4",
            "reference.mode": "cached",
            "self_check": "full",
        },
        {"lora.rank": 4, "lora.base_dtype": "nf4", "reference.mode": "live", "self_check": "full"},
        {"reference.mode": "cached", "reference.dtype": "bfloat16", "self_check": "full"},
        {"lora.rank": 4, "loss.name": "simpo", "loss.beta": 2.0, "loss.gamma": 0.5},
        {"reference.dtype": "int8", "reference.memory": "pinned_host", "self_check": "full"},
    ],
)
def test_frozen_trees_of_every_kind_train(files, tmp_path, changes):
    output = run(files, tmp_path, **changes)
    losses = [r["loss"] for r in rows(tmp_path) if "loss" in r]
    assert len(losses) == 6 and np.isfinite(losses).all()
    if "loss.name" not in changes:  # the policy starts at its reference, up to what rounding does
        assert abs(losses[0] - np.log(2)) < 0.02
    assert ("a token's log-prob moves by" in output) == (
        "lora.base_dtype" in changes or "reference.dtype" in changes
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora.rank": 4, "loss.name": "tr_dpo", "loss.alpha": 0.5, "loss.tau": 2.0}, "lora.rank"),
        ({"lora.rank": 4, "reference.dtype": "int8"}, "reference.dtype"),
        ({"lora.base_dtype": "int8"}, "lora.base_dtype"),
        ({"reference.mode": "adapter"}, "reference.mode"),
        ({"lora.rank": 4, "lora.dropout": 1.0}, "lora.dropout"),
        ({"lora.rank": 4, "lora.alpha": 0.0}, "lora.alpha"),
        ({"lora.rank": -1}, "lora.rank"),
        ({"reference.dtype": "int4"}, "reference.dtype"),
        ({"reference.memory": "disk"}, "reference.memory"),
        (
            {
                "reference.memory": "pinned_host",
                "loss.name": "tr_dpo",
                "loss.alpha": 0.5,
                "loss.tau": 2.0,
            },
            "reference.memory",
        ),
        (
            {"lora.rank": 4, "reference.mode": "cached", "reference.dtype": "int8"},
            "reference.dtype",
        ),
        ({"model.router_loss_weight": -1.0}, "router_loss_weight"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(changes, named):
    from dpojax.config.load import from_config_dict, load_config_file
    from dpojax.errors import ConfigError

    values = load_config_file("configs/tldr.py")
    for key, value in changes.items():
        section, name = key.split(".")
        with values.unlocked(), values.ignore_type():
            getattr(values, section)[name] = value
    with pytest.raises(ConfigError, match=named):
        from_config_dict(values)


def test_stacked_adapters_are_the_sum_of_both():
    under, over = adapters(targets="q,v", moved=True), adapters(targets="v,o", moved=True, seed=5)
    twice = lora.merge(
        lora.join(lora.merge(lora.join(BASE, under), tiny.CONFIG, 0.5), over), tiny.CONFIG, SCALE
    )
    stacked, scale = lora.stack(under, 0.5, over, SCALE)
    assert (
        stacked["layers"]["v_lora_a"].shape[-1]
        == stacked["layers"]["v_lora_b"].shape[1]
        == 2 * RANK
    )
    once = lora.merge(lora.join(BASE, stacked), tiny.CONFIG, scale)
    for a, b in zip(*map(jax.tree.leaves, (once, twice)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "peft"))),
    reason="torch and peft are not installed",
)
def test_peft_opens_what_was_trained_on_a_base_of_any_kind_or_no_adapter_is_written(
    files, tmp_path, monkeypatch, capfd
):
    import peft as their_peft
    import torch
    import transformers

    monkeypatch.chdir(tmp_path)
    pairs, base = (
        model_folders.write_pairs(tmp_path / "pairs.jsonl"),
        model_folders.make_model(tmp_path / "base", files),
    )
    moved = {
        "lora.rank": 2,
        "optim.learning_rate": 3e-2,
        "optim.warmup_steps": 0,
        "export": True,
        "checkpoint_every_steps": 2,
    }

    def train(name, init, **settings):
        argv = model_folders.training(
            files, tmp_path / name, pairs, **{"model.init": init, **moved, **settings}
        )
        argv = [a.replace("=configs/", f"={ROOT}/configs/") for a in argv]
        assert main(argv) == 0, (name, capfd.readouterr().err)
        return tmp_path / name, capfd.readouterr().out

    def logits(model):
        with torch.no_grad():
            return model(torch.arange(2, 42)[None]).logits.numpy()

    def opened(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def check(workdir, output, *, exported=True):
        if not exported:
            assert not (workdir / "adapter").exists() and "not exported alone" in output
            return
        settings = json.loads((workdir / "adapter" / "adapter_config.json").read_text())
        assert pathlib.Path(settings["base_model_name_or_path"]).is_absolute()
        model = their_peft.PeftModel.from_pretrained(
            opened(settings["base_model_name_or_path"]), str(workdir / "adapter")
        )
        np.testing.assert_allclose(logits(model), logits(opened(workdir / "export")), atol=2e-5)
        assert np.abs(logits(model) - logits(opened(base))).max() > 1e-2  # something was trained

    first, output = train("relative", "base", **{"lora.targets": "q,v"})
    check(first, output)
    on_adapter, output = train(
        "on_adapter", first / "adapter", **{"lora.targets": "v,down", "lora.alpha": 7.0}
    )
    check(on_adapter, output)
    check(*train("on_two", on_adapter / "adapter"))
    check(*train("on_lora_run", first))
    check(
        *train("on_quantised_run", train("quantised", "base", **{"lora.base_dtype": "int8"})[0]),
        exported=False,
    )
    check(*train("on_full_run", train("full", "base", **{"lora.rank": 0})[0]), exported=False)
    check(*train("after_sft", "base", **{"sft.num_steps": 1}), exported=False)
