"""Every family against transformers: logits, log-probs through packing and prefix sharing, and
exports.
"""

import importlib.util
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import pytest
import tiny
from transformers_families import CASES, LENGTH, LLAMA3, SIZES, VOCAB, their_logits, theirs

from dpojax.errors import ConfigError
from dpojax.generation.decoding import Sampler, SampleSettings, make_sampler
from dpojax.generation.sampler import (
    draw,
)
from dpojax.models.families.fields import NEUTRAL, REFUSED_EVERYWHERE, Fields
from dpojax.models.families.table import FAMILIES
from dpojax.training.rewards import make_rewards_step
from dpojax.training.scores import make_token_logps_step
from dpojax.weights import export, huggingface

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("torch", "transformers"))),
        reason="torch and transformers are not installed: pip install .[parity]",
    ),
]


@pytest.mark.parametrize("name", CASES)
def test_logits_log_probs_and_export_are_those_of_transformers(tmp_path, name):
    source, exported = tmp_path / "source", tmp_path / "exported"
    reference = theirs(name, source)
    config, model, params = model_folders.opened(source)

    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (2, LENGTH))
    want = their_logits(reference, ids)
    one = jnp.ones(ids.shape, jnp.int32)
    run = jax.jit(
        lambda p, t: model.unembed(
            model.head(p), model.hidden_states(p, t, jnp.cumsum(one, 1) - 1, one, 0 * one)
        )
    )
    np.testing.assert_allclose(run(params, jnp.asarray(ids)), want, atol=1e-4)

    made = tiny.groups(rng, 5, longest=20)
    batch, _ = tiny.pack(made, row_tokens=96)
    logps = tiny.by_response(batch, jax.jit(make_token_logps_step(model, chunk=32))(params, batch))
    for group in made:
        for response in group.responses:
            whole = np.concatenate([group.prompt, response])[None]
            logits = their_logits(reference, whole)[0].astype(np.float64)
            normal = (
                logits
                - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
                - logits.max(-1, keepdims=True)
            )
            own = normal[np.arange(len(group.prompt) - 1, whole.size - 1), response]
            np.testing.assert_allclose(logps[tuple(response.tolist())], own, rtol=0, atol=1e-5)

    fields = huggingface.read_fields(source)
    export.export_params(
        params,
        config,
        exported,
        fields=fields,
        dtype="float32",
        companions=source,
        max_shard_bytes=40_000,
    )
    import transformers

    again = transformers.AutoModelForCausalLM.from_pretrained(
        exported, dtype="float32", attn_implementation="eager"
    ).eval()
    np.testing.assert_array_equal(their_logits(again, ids), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_refuses_the_fields_that_its_code_reads_and_ignores_the_others(name):
    import transformers

    folder = pathlib.Path(str(transformers.__file__)).parent / "models" / name.removesuffix("_text")
    code = (folder / f"modeling_{folder.name}.py").read_text()
    ways = (
        r"config\.(\w+)",
        r"""config, ["'](\w+)["']""",
        r"""rope_parameters\.get\(["'](\w+)["']""",
    )
    reads = {word for way in ways for word in re.findall(way, code)}
    example = next(k for k in CASES if k.split()[0] == name)
    kind, values = CASES[example]
    values = values if values.get("n_embd") else SIZES | values
    if kind == "GPTNeoXConfig":
        values = {k: v for k, v in values.items() if k != "num_key_value_heads"}
    fields = Fields(getattr(transformers, kind)(**values).to_dict(), pathlib.Path("config.json"))
    taken = {f.name for f in FAMILIES[name].fields.values()}
    for read in (FAMILIES[name].windows, FAMILIES[name].rope):
        known = {"family": name, "max_positions": 64, "head_dim": 8}
        if read is not None:
            known_or_count: Any = known
            if read is FAMILIES[name].windows:
                known_or_count = fields.values["num_hidden_layers"]
            read(fields, known_or_count)
    taken |= fields.taken
    for field in NEUTRAL:
        if field in REFUSED_EVERYWHERE or field in (
            "rope_scaling",
            "sliding_window",
            "layer_types",
        ):
            # read by configuration code that all families share, or checked against the logits
            # above
            continue
        assert (field in taken or field in FAMILIES[name].refused) == (field in reads), field


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("other", [True, False])
def test_a_tied_flag_beside_a_stored_head_is_read_as_transformers_reads_it(tmp_path, name, other):
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    theirs(name, tmp_path / "parts").save_pretrained(tmp_path, max_shard_size="1GB")
    names, tensors = FAMILIES[name].names, load_file(tmp_path / "model.safetensors")
    embed, head = (f"{names[x].name}.weight" for x in ("embed", "unembed"))
    table = tensors[embed if embed in tensors else embed.split(".", 1)[1]]
    tensors[head] = table + (0.3 * torch.randn_like(table) if other else 0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="float32", attn_implementation="eager"
    ).eval()
    config, model, params = model_folders.opened(tmp_path)
    assert config.tie_embeddings == (not other)
    ids = np.random.default_rng(0).integers(0, VOCAB, (1, LENGTH))
    one = jnp.ones(ids.shape, jnp.int32)
    hidden = model.hidden_states(params, jnp.asarray(ids), jnp.cumsum(one, 1) - 1, one, 0 * one)
    np.testing.assert_allclose(
        model.unembed(model.head(params), hidden), their_logits(reference, ids), atol=1e-4
    )


@pytest.mark.parametrize(
    "name",
    ["llama", "mistral", "qwen2", "gemma2", "gemma3_text", "mixtral", "gpt2", "gptj", "gpt_neox"],
)
def test_greedy_decoding_with_a_cache_follows_transformers(tmp_path, name):
    reference = theirs(name, tmp_path)
    _, model, params = model_folders.opened(tmp_path)
    settings = SampleSettings(14, 0.0, 0, 1.0, (VOCAB + 1,), 0)
    sampler = Sampler(*map(jax.jit, make_sampler(model, settings)))
    rng = np.random.default_rng(1)
    # of several lengths; past every window
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (3, 19, 11)]
    common: dict[str, Any] = dict(
        settings=settings,
        seed=0,
        width=24,
        batch_size=3,
        put=jnp.asarray,
        fetch=np.asarray,
        progress=lambda n: None,
    )
    for prompt, response in zip(prompts, draw(sampler, params, prompts, **common), strict=True):
        ids, logps = list(prompt), []
        for token in response.ids:  # by their own forward of the whole text, token by token
            logits = their_logits(reference, np.asarray([ids]))[0, -1].astype(np.float64)
            assert token == logits.argmax() or np.sort(logits)[-1] - logits[token] < 1e-4
            logps.append(logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
            ids.append(token)
        np.testing.assert_allclose(response.logps, logps, atol=1e-4)


def their_reward_model(name: str, folder: pathlib.Path):
    """A random classifier of transformers with one label."""
    return theirs(name, folder, "AutoModelForSequenceClassification", num_labels=1, pad_token_id=0)


def their_reward(model, ids) -> float:
    """Of one sequence, without padding."""
    return float(their_logits(model, [list(map(int, ids))])[0, 0])


@pytest.mark.parametrize("name", CASES)
def test_a_reward_model_scores_and_exports_as_transformers_classifier(tmp_path, name):
    source, exported = tmp_path / "source", tmp_path / "exported"
    reference = their_reward_model(name, source)
    config, model, params = model_folders.opened(source)
    assert config.scalar_head

    rng = np.random.default_rng(0)
    # 0 is their padding; ours has none, and a prompt may hold anything
    made = [
        group._replace(
            prompt=group.prompt % (VOCAB - 1) + 1,
            responses=tuple(r % (VOCAB - 1) + 1 for r in group.responses),
        )
        for group in tiny.groups(rng, 5, responses=3, longest=12)
    ]
    for layout in ("shared", "separate"):
        batch, _ = tiny.pack(made, row_tokens=96, layout=layout)
        rewards = np.asarray(jax.jit(make_rewards_step(model))(params, batch))
        scored = tiny.rewards_by_response(batch, rewards)
        assert len(scored) == 15
        for group in made:
            for response in group.responses:
                want = their_reward(reference, [*group.prompt, *response])
                value = scored[group.row, tuple(response.tolist())]
                np.testing.assert_allclose(value, want, rtol=0, atol=1e-5)

    fields = export.reward_model_fields(huggingface.read_fields(source), pad_id=0, eos_id=1)
    export.export_params(
        params, config, exported, fields=fields, dtype="float32", companions=source
    )
    import transformers

    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        exported, dtype="float32", attn_implementation="eager"
    ).eval()
    ids = rng.integers(1, VOCAB, LENGTH)
    assert their_reward(again, ids) == their_reward(reference, ids)


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path):
    their_reward_model("llama", tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(ConfigError, match="has 2 labels"):
        huggingface.read_config(tmp_path)


def test_every_family_is_tested():
    assert {name.split()[0] for name in CASES} == set(FAMILIES)


# Fields as published config.json files spell them, before transformers 5.
OLD = {
    "llama": dict(rope_theta=5e3, rope_scaling=dict(LLAMA3, rope_type="llama3")),
    "llama linear": dict(rope_theta=1e4, rope_scaling=dict(type="linear", factor=2.0)),
    "qwen2": dict(
        rope_theta=1000.0,
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "gpt_neox": dict(rotary_emb_base=10000, rotary_pct=0.5),
    "gemma3_text": dict(
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling=dict(rope_type="linear", factor=8.0),
        sliding_window_pattern=6,
    ),
}


@pytest.mark.parametrize("name", OLD)
def test_both_spellings_of_rotary_settings_are_the_same_model(tmp_path, name):
    theirs(name, tmp_path)
    new = huggingface.read_config(tmp_path)
    fields = huggingface.read_fields(tmp_path)
    del fields["rope_parameters"]
    fields.pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(fields | OLD[name]))
    assert huggingface.read_config(tmp_path) == new


def test_the_load_balancing_loss_is_that_of_transformers():
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from dpojax.models.experts import Routing, load_balancing_loss, route, routing_sums

    # layers, tokens, experts
    logits = np.random.default_rng(0).normal(size=(2, 30, 5)).astype(np.float32)
    layers: Any = tuple(map(torch.tensor, logits))
    want = float(load_balancing_loss_func(layers, 5, 2))
    sums = []
    for layer in jnp.asarray(logits):
        probabilities, _, ids = route(layer, per_token=2, renormalise=True)
        sums.append(routing_sums(probabilities, ids, jnp.ones(30, bool)))
    total = Routing(*(jnp.asarray(x).sum(axis=0) for x in zip(*sums, strict=True)))
    np.testing.assert_allclose(load_balancing_loss(total, 60), want, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {"model.router_loss_weight": 0.02, "mesh.fsdp": 2, "mesh.tensor": 2}),
        ("gemma2", {"lora.rank": 4, "lora.targets": "q,v,gate", "lora.alpha": 8.0}),
        ("gpt2", {"loss.name": "ipo", "mesh.fsdp": 4}),
    ],
)
def test_a_run_starts_from_a_family_and_exports_what_transformers_opens(tmp_path, name, changes):
    import transformers
    from runs import rows, run

    reference = theirs(name, tmp_path / "base")
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(0, VOCAB, int(rng.integers(low, high))).tolist()

    made = [
        {"prompt_ids": ids(3, 20), "chosen_ids": ids(1, 18), "rejected_ids": ids(1, 18)}
        for _ in range(24)
    ]
    for part, own in (("train", made), ("eval", made[:16])):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in own))
    settings = {
        "tokenizer": "",
        "model.init": tmp_path / "base",
        "export": True,
        "self_check": "full",
        "loss.beta": 0.5,
        **changes,
    }
    sizes = ("hidden_size", "intermediate_size", "head_dim")
    settings |= {f"model.{s}": None for s in sizes}
    run(tmp_path, tmp_path / "run", devices=4, **settings)
    logged = rows(tmp_path / "run")
    first, last = (next(r for r in order if "eval_loss" in r) for order in (logged, logged[::-1]))
    assert abs(first["eval_rewards/margins"]) < 1e-4 and last["eval_loss"] < first["eval_loss"]
    if name == "mixtral":
        assert all(r["aux_loss"] >= 1 for r in logged if "loss" in r)  # 1: perfectly balanced

    def their_mean(model):
        sums = []
        for row in made[:16]:
            whole = np.asarray([row["prompt_ids"] + row["chosen_ids"]])
            logits = their_logits(model, whole)[0].astype(np.float64)
            normal = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            sums.append(
                normal[
                    np.arange(len(row["prompt_ids"]) - 1, whole.size - 1), row["chosen_ids"]
                ].sum()
            )
        return np.mean(sums)

    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "run/export", dtype="float32", attn_implementation="eager"
    ).eval()
    np.testing.assert_allclose(first["eval_logps/chosen"], their_mean(reference), atol=1e-3)
    np.testing.assert_allclose(last["eval_logps/chosen"], their_mean(again), atol=1e-3)
