"""The reward model's stage: what it reads, what its step descends, and that runs of it go on."""

import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import checksums, numbers, run, start, stop_at

from dpojax.algorithms.reward_model import reward_gradients
from dpojax.data.token_groups import TokenPair
from dpojax.errors import ConfigError
from dpojax.evaluation.reward_scale import read_normalisation
from dpojax.training.rewards import make_rewards_step, shares_of_groups
from dpojax.training.state import new_state
from dpojax.weights.open import open_weights

CONFIG = dataclasses.replace(tiny.CONFIG, scalar_head=True)
SETTINGS = {
    "stages": "sft,reward_model",
    "sft.num_steps": 4,
    "reward_model.num_steps": 6,
    "sample.max_new_tokens": 8,
    "reward_model.norm_prompts": 8,
}


@pytest.fixture(scope="module")
def model():
    return tiny.model(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return tiny.params(model)


def rewards_of(model, params, groups, **options):
    batch, _ = tiny.pack(groups, **options)
    return tiny.rewards_by_response(batch, jax.jit(make_rewards_step(model))(params, batch))


@functools.cache
def _hidden_states():
    return jax.jit(tiny.model(CONFIG).hidden_states)


def plain_reward(params, ids):
    """The head's number at the last token of one sequence alone."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(ids)] = ids
    group = (np.arange(64) < len(ids))[None].astype(np.int32)
    positions = np.arange(64, dtype=np.int32)[None]
    hidden = _hidden_states()(params, tokens, positions, group, 0 * group)
    return float(hidden[0, len(ids) - 1] @ params["score"])


def state_of(params):
    return new_state({}, {"policy": params})


def test_a_reward_is_read_at_the_last_token_whatever_surrounds_it(model, params):
    groups = tiny.groups(np.random.default_rng(0), 6, responses=3, longest=14)
    # EOS (5) and the padding id (0) anywhere, at the end of a prompt and of a response too
    groups[0] = groups[0]._replace(
        prompt=np.asarray([5, 0, 5], np.int32),
        responses=(
            np.asarray([5], np.int32),
            np.asarray([0, 0], np.int32),
            np.asarray([7, 5, 5], np.int32),
        ),
    )
    want = {
        (group.row, tuple(response.tolist())): plain_reward(
            params, [*group.prompt.tolist(), *response.tolist()]
        )
        for group in groups
        for response in group.responses
    }
    for options in (
        {},
        {"layout": "separate"},
        {"shard_rows": 1, "row_tokens": 96},
        {"num_shards": 2},
    ):
        found = rewards_of(model, params, groups, **options)
        assert found.keys() == want.keys()
        for key, value in found.items():
            np.testing.assert_allclose(value, want[key], rtol=0, atol=2e-6)
    order = rewards_of(model, params, groups[::-1])
    for key, value in order.items():
        np.testing.assert_allclose(value, want[key], rtol=0, atol=2e-6)


def written_loss(params, groups, centring):
    """The mean over prompts of the mean over pairs, in numpy."""
    losses = []
    for group in groups:
        own = []
        for pair in group.pairs:
            r_w, r_l = (
                plain_reward(params, [*group.prompt.tolist(), *group.responses[k].tolist()])
                for k in (pair.chosen, pair.rejected)
            )
            gap = r_w - r_l - pair.margin
            p = pair.soft_label
            nll = p * np.log1p(np.exp(-gap)) + (1 - p) * np.log1p(np.exp(gap))
            own.append(pair.weight * (nll + centring * (r_w + r_l) ** 2))
        losses.append(np.mean(own))
    return np.mean(losses)


def step(model, params, groups, *, centring=0.0, **options: Any):
    batch, _ = tiny.pack(groups, **options)
    return gradients_of(model, params, batch, centring=centring)


def gradients_of(model, params, batch, *, centring=0.0):
    batch = jax.tree.map(jnp.asarray, batch)
    gradients = reward_gradients(model, centring=centring)
    return jax.jit(lambda p, b: gradients(state_of(p), {}, b, False, lambda tree: tree))(
        params, batch
    )


def ranked(seed=1):
    """Groups of 2, 3 and 4 responses, with margins, soft labels and weights."""
    rng = np.random.default_rng(seed)
    groups = []
    for row, count in enumerate((2, 4, 3, 2)):
        group = tiny.groups(rng, 1, responses=count, longest=12)[0]
        pairs = tuple(
            TokenPair(
                p.chosen,
                p.rejected,
                weight=float(rng.uniform(0.5, 1.5)),
                soft_label=float(rng.uniform(0.5, 1.0)),
                margin=float(rng.uniform(0.0, 0.4)),
            )
            for p in group.pairs
        )
        groups.append(group._replace(pairs=pairs, row=row))
    return groups


@pytest.mark.parametrize("centring", [0.0, 0.01])
def test_the_loss_is_the_mean_over_prompts_of_bradley_terry(model, params, centring):
    groups = ranked()
    found = step(model, params, groups, centring=centring)
    want = written_loss(params, groups, centring)
    np.testing.assert_allclose(found.loss, want, rtol=2e-6)


def test_the_gradient_does_not_depend_on_micro_batches_shards_or_layout(model, params):
    groups = ranked()
    one = step(model, params, groups, row_tokens=256, shard_rows=4)
    layouts: tuple[dict[str, Any], ...] = (
        {"shard_rows": 1, "row_tokens": 96},
        {"num_shards": 2, "row_tokens": 96},
        {"layout": "separate"},
    )
    for options in layouts:
        other = step(model, params, groups, **options)
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(one.grads), jax.tree.leaves(other.grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


def test_a_prompt_with_many_pairs_counts_as_one():
    batch, _ = tiny.pack(ranked(), row_tokens=96, shard_rows=1)
    shares = np.asarray(shares_of_groups(jax.tree.map(jnp.asarray, batch)))
    by_prompt = [shares[batch.row_id == row].sum() for row in range(4)]
    np.testing.assert_allclose(by_prompt, 1.0, rtol=1e-6)
    assert shares[~batch.valid].sum() == 0


def test_what_stands_at_padding_reaches_neither_loss_nor_gradient(model, params):
    groups = ranked()
    clean = step(model, params, groups)
    batch, _ = tiny.pack(groups)
    pairs = np.where(batch.valid, batch.margin, np.nan).astype(np.float32)
    labels = np.where(batch.valid, batch.soft_label, np.nan).astype(np.float32)
    found = gradients_of(model, params, batch._replace(margin=pairs, soft_label=labels))
    assert float(found.loss) == float(clean.loss)
    for a, b in zip(jax.tree.leaves(found.grads), jax.tree.leaves(clean.grads), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_learns_resumes_bit_equal_and_leaves_the_policy_alone(files, tmp_path):
    whole = tmp_path / "whole"
    run(files, whole, **SETTINGS, export=True)
    summary = json.loads((whole / "summary.json").read_text())
    low, high = summary["eval_accuracy_low"], summary["eval_accuracy_high"]
    assert low < summary["eval_accuracy"] < high and 0 <= summary["eval_ece"] <= 1
    assert "ECE" in (whole / "report.html").read_text()

    stopped = tmp_path / "stopped"
    stop_at(start(files, stopped, **SETTINGS), "Reward model 2/")
    run(files, stopped, **SETTINGS)
    assert numbers(stopped) == numbers(whole)
    assert checksums(stopped / "reward_model", 6) == checksums(whole / "reward_model", 6)

    # The scale is that of samples of the reference; as a language model the workdir is SFT's.
    scale = read_normalisation(whole)
    assert scale is not None
    assert (scale.mean, scale.std) == (summary["reward_mean"], summary["reward_std"])
    assert open_weights(str(whole), scalar_head=True).config.scalar_head
    assert not open_weights(str(whole)).config.scalar_head
    with pytest.raises(ConfigError, match="it is a reward model"):
        open_weights(str(whole / "export"))
    copied = shutil.copytree(whole / "export", tmp_path / "copied" / "model")
    assert read_normalisation(copied) == scale

    # Trained after the reward model, DPO starts from what SFT left: it is the run without it.
    both = tmp_path / "both"
    run(files, both, **{**SETTINGS, "stages": "sft,reward_model,dpo"}, num_steps=2)
    alone = tmp_path / "alone"
    run(files, alone, **{**SETTINGS, "stages": "sft,dpo"}, num_steps=2)
    assert checksums(both / "checkpoints", 2) == checksums(alone / "checkpoints", 2)
