"""Shared caches, compaction, batches, meshes and merged adapters against the training forward."""

import dataclasses
import functools
import importlib.util
import json
from typing import Any

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import pytest
import runs
import tiny
from jax.sharding import PartitionSpec
from transformers_families import CASES, VOCAB, theirs

from dpojax.config.model import SHARDING_RULES
from dpojax.generation import batching
from dpojax.generation.decoding import (
    Sampler,
    SampleSettings,
    compile_sampler,
    draw_tokens,
    first_largest,
    make_sampler,
)
from dpojax.generation.sampler import (
    draw,
    fetch_whole,
    rows_put,
    sample_keys,
)
from dpojax.models import lora, quantise
from dpojax.models.attention.blocks import masked
from dpojax.models.decoder import make_decoder
from dpojax.models.placed import place_decoder
from dpojax.runtime import sharding
from dpojax.runtime.mesh import make_mesh, num_shards

MODEL = tiny.model(full=True)
PARAMS = tiny.params(MODEL)
ENDS = (2, 3, 4)
RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(5, 61, n).tolist() for n in (3, 1, 40, 17)]
NEVER = (1000,)  # the id of no token


def settings_of(**changes) -> SampleSettings:
    plain: dict[str, Any] = dict(
        max_new_tokens=70, temperature=1.0, top_k=0, top_p=1.0, eos_ids=ENDS, pad_id=0
    )
    options: dict[str, Any] = {**plain, "num_samples": 3, **changes}
    return SampleSettings(**options)


def sample(model, params, prompts, settings, sampler=None, **changes):
    """Responses on one device."""
    sampler = sampler or Sampler(*map(jax.jit, make_sampler(model, settings)))
    common: dict[str, Any] = dict(
        seed=3, width=64, batch_size=len(prompts), put=jnp.asarray, fetch=np.asarray
    )
    return draw(
        sampler,
        params,
        prompts,
        settings=settings,
        progress=lambda n: None,
        **common | changes,
    )


@functools.cache
def plain_samples() -> list[list[int]]:
    """What the keys say, by the training forward of each whole text: no cache and no batch."""
    keys = jax.random.wrap_key_data(jnp.asarray(sample_keys(3, len(PROMPTS), 3)))
    categorical = jax.jit(
        lambda key, step, logps: jax.random.categorical(jax.random.fold_in(key, step), logps)
    )
    responses = []
    for number, prompt in enumerate(PROMPTS):
        for key in keys[number]:
            ids: list[int] = []
            while len(ids) < 70 and (not ids or ids[-1] not in ENDS):
                logps = tiny.all_logps(MODEL, PARAMS, [*prompt, *ids])[-1]
                ids.append(int(categorical(key, len(ids), logps)))
            responses.append(ids)
    return responses


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_samples_are_those_of_their_keys_whatever_is_drawn_beside_them(batch_size):
    settings = settings_of()
    taken = []
    sampler = Sampler(*map(jax.jit, make_sampler(MODEL, settings)))

    def take(decoding, prompts, rows, live):
        taken.append((len(decoding.done), len(rows)))
        return take_rows(decoding, prompts, rows, live)

    take_rows = sampler.take
    sampler = sampler._replace(take=take)
    responses = sample(MODEL, PARAMS, PROMPTS, settings, sampler, batch_size=batch_size)
    assert [response.ids for response in responses] == plain_samples()
    # Rows have given up their places on the way.
    assert taken and all(2 * after <= before for before, after in taken)
    for response, ids in zip(responses, plain_samples(), strict=True):
        assert response.ended == (ids[-1] in ENDS)


def test_a_stop_string_ends_its_own_row_alone():
    whole = plain_samples()

    def stopped(ids):
        return ids.index(9) + 1 if 9 in ids else None

    responses = sample(MODEL, PARAMS, PROMPTS, settings_of(), stopped=stopped)
    assert any(9 in ids for ids in whole)
    for response, ids in zip(responses, whole, strict=True):
        assert response.ids == ids[: stopped(ids)]
        assert response.ended == (9 in ids or ids[-1] in ENDS)


def test_a_mesh_changes_no_sample():
    settings = settings_of()
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    options: dict[str, Any] = dict(dtype="float32", param_dtype="float32", remat="none")
    model = place_decoder(tiny.CONFIG, mesh, SHARDING_RULES, **options)
    shardings = sharding.param_shardings(PARAMS, model.axes, mesh, SHARDING_RULES)
    params = jax.device_put(PARAMS, shardings)
    sampler = compile_sampler(model, settings, mesh, lambda name, f, **o: jax.jit(f, **o))
    served = sampler.serve(params)
    # FSDP's parts are joined once, and tensor parallelism's stay apart.
    assert params["layers"]["gate"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert served["layers"][0]["gate"].sharding.spec == PartitionSpec(None, "tensor")
    responses = sample(
        model,
        params,
        PROMPTS,
        settings,
        sampler,
        put=rows_put(mesh),
        fetch=fetch_whole,
        shards=num_shards(mesh),
    )
    assert [response.ids for response in responses] == plain_samples()


@pytest.mark.parity
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))),
    reason="torch and transformers are not installed: pip install .[parity]",
)
@pytest.mark.parametrize("name", CASES)
def test_shared_caches_give_the_log_probs_of_the_training_forward(tmp_path, name):
    theirs(name, tmp_path)
    _, model, params = model_folders.opened(tmp_path)
    settings = settings_of(max_new_tokens=14, num_samples=2, eos_ids=NEVER)
    rng = np.random.default_rng(1)
    # Of several lengths, past every window.
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (3, 19, 11)]
    responses = sample(model, params, prompts, settings, width=32)
    for i, response in enumerate(responses):
        want = tiny.naive_logps(model, params, prompts[i // 2], response.ids)
        np.testing.assert_allclose(response.logps, want, atol=1e-4)


def adapted(base):
    """A model with adapters that count, and its parameters."""
    plain: dict[str, Any] = dict(
        attention=masked(), dtype=jnp.dtype("float32"), param_dtype=jnp.dtype("float32")
    )
    model = make_decoder(tiny.CONFIG, remat="none", adapter=lora.Adapter(2.0, 0.0), **plain)
    rows = lora.adapter_rows(tiny.CONFIG, "*", 3)
    adapters = lora.init_adapters(jax.random.key(0), rows, 2, jnp.float32)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapters)
    return model, lora.join(base, moved)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_adapters_that_are_merged_for_decoding_count_as_beside_the_base(kind):
    model, params = adapted(quantise.store_as(PARAMS, tiny.CONFIG, kind))
    names = model.serve(params)["layers"][0]
    # Where the base was quantised for want of memory, it stays so, with its adapters beside it.
    assert any("lora" in name for name in names) == (kind == "int8")
    settings = settings_of(max_new_tokens=12, eos_ids=NEVER)
    responses = sample(model, params, PROMPTS, settings)
    bare = [r.logps for r in sample(MODEL, PARAMS, PROMPTS, settings)]
    for i, response in enumerate(responses):
        want = tiny.naive_logps(model, params, PROMPTS[i // 3], response.ids)
        np.testing.assert_allclose(response.logps, want, atol=1e-4)
        assert np.abs(response.logps - bare[i]).max() > 0.01


def test_weights_are_cast_once_and_not_in_the_loop():
    model = tiny.model(full=True, dtype="bfloat16")
    settings = settings_of()
    sampler = make_sampler(model, settings)
    served = sampler.serve(PARAMS)
    assert {x.dtype for x in jax.tree.leaves(served)} == {jnp.dtype("bfloat16")}
    start = jax.eval_shape(
        sampler.start, PARAMS, jnp.ones((2, 64), int), jnp.ones((2, 64), int), keys_of(2)
    )
    (loop,) = [
        e
        for e in jax.make_jaxpr(sampler.extend)(served, start, 9).eqns
        if e.primitive.name == "while"
    ]
    matrices = (tiny.CONFIG.hidden_size, tiny.CONFIG.intermediate_size)
    casts = [
        e
        for e in loop.params["body_jaxpr"].jaxpr.eqns
        if e.primitive.name == "convert_element_type" and e.invars[0].aval.shape == matrices
    ]
    assert not casts


def keys_of(prompts: int):
    return jnp.asarray(sample_keys(0, prompts, 3).reshape(prompts * 3, -1))


def test_a_prompts_cache_is_there_once_for_all_its_samples():
    config = tiny.CONFIG
    sampler = make_sampler(MODEL, settings_of())
    group = jnp.ones((4, 64), int)
    cache = jax.eval_shape(sampler.start, PARAMS, group, group, keys_of(4)).cache
    tokens = 4 * 64 + 4 * 3 * 70
    of_token = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) == tokens * of_token


def test_the_caches_are_updated_in_place():
    """Of what XLA keeps beside its arguments, nothing is as large as the caches."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=4)
    model = tiny.model(config)
    params = tiny.params(model)
    settings = settings_of(max_new_tokens=256)
    sampler = make_sampler(model, settings)
    group = jnp.ones((4, 256), int)
    decoding = jax.eval_shape(sampler.start, params, group, group, keys_of(4))
    extend = jax.jit(sampler.extend, donate_argnums=1)
    served = jax.eval_shape(sampler.serve, params)
    memory = extend.lower(served, decoding, 9).compile().memory_analysis()
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(decoding.cache))
    assert memory.temp_size_in_bytes < cache / 4


def test_a_draw_is_that_of_categorical():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 61)), jnp.float32)
    keys = jax.random.split(jax.random.key(4), 50)
    want = [
        int(jax.random.categorical(jax.random.fold_in(key, 7), row))
        for key, row in zip(keys, logits, strict=True)
    ]
    assert draw_tokens(logits, keys, jnp.asarray(7), settings_of()).tolist() == want
    ties = jnp.asarray([[1.0, 3.0, 3.0], [-jnp.inf, -jnp.inf, -jnp.inf]])
    assert first_largest(ties).tolist() == jnp.argmax(ties, axis=-1).tolist()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_compaction_holds_every_live_row_once_beside_its_prompt(shards):
    rng = np.random.default_rng(0)
    smaller = 0
    for _ in range(300):
        prompts = shards * int(rng.integers(1, 9))
        samples = int(rng.integers(1, 9))
        live = rng.random((prompts, samples)) < rng.random()
        if not live.any():
            continue
        plan = batching.compacted(live, shards)
        if plan is None:
            continue
        smaller += 1
        assert sorted(plan.rows[plan.live].tolist()) == np.flatnonzero(live.reshape(-1)).tolist()
        each = len(plan.rows) // len(plan.prompts)
        owners = np.repeat(plan.prompts, each)
        assert (plan.rows[plan.live] // samples == owners[plan.live]).all()
        assert 2 * len(plan.rows) <= live.size and len(plan.prompts) % shards == 0
    assert smaller > 50


@pytest.mark.parametrize("shards", [1, 4])
def test_batches_hold_every_prompt_once_and_packing_its_tokens(shards):
    lengths = np.random.default_rng(1).integers(1, 60, 21).tolist()
    prompts = [[i + 1] * length for i, length in enumerate(lengths)]
    drawn: list[int] = []
    for numbers in batching.batch_order(lengths, batch_size=8, shards=shards):
        assert len(numbers) == 8
        drawn += np.asarray(numbers)[batching.first_places(numbers)].tolist()
        ours = [prompts[i] for i in numbers]
        packed = batching.pack_prompts(ours, shards=shards, width=64, pad_id=0)
        rows, length = packed.tokens.shape
        assert rows == shards and length == batching.rounded(length)
        for place, prompt in enumerate(ours):
            columns = packed.places[place][packed.places[place] < length]
            row = packed.tokens[place * shards // 8]
            assert row[columns].tolist() == prompt
        assert (packed.group > 0).sum() == sum(map(len, ours))
    assert sorted(drawn) == list(range(21))


def test_few_sizes_are_compiled_and_none_is_much_too_large():
    for tokens in range(1, 5000, 7):
        size = batching.rounded(tokens)
        assert tokens <= size <= tokens * 9 / 8 + 64
        assert batching.least_half(tokens, 8192) in (64 * 2**k for k in range(8)) or tokens < 64
        assert tokens <= batching.least_half(tokens, 8192)
    assert len({batching.rounded(n) for n in range(1024, 8192)}) <= 25


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(files, tmp_path):
    sampling = {
        "num_steps": 1,
        "eval_every_steps": 1,
        "sample.num_prompts": 6,
        "sample.kl_prompts": 6,
        "sample.max_new_tokens": 40,
    }
    runs.run(files, tmp_path / "one", **sampling)
    started = runs.start_two(files, tmp_path / "two", **sampling)
    outputs = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    summaries = [json.loads((tmp_path / k / "summary.json").read_text()) for k in ("one", "two")]
    one, two = ({k: s[k] for k in ("kl", "mean_length", "distinct_2")} for s in summaries)
    # The KL is of log-probs, which reductions over two processes round otherwise.
    assert one == pytest.approx(two, abs=1e-4)
