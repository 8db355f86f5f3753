"""The policy-gradient stage: its step is the exact gradient, on any layout, and runs go on."""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import marks
import numpy as np
import optax
import pytest
import tiny
from runs import checksums, numbers, run, sampled_settings, start, stop_at

from dpojax.data.rollouts import own_pairs
from dpojax.data.token_groups import TokenGroup
from dpojax.evaluation.on_policy import read_on_policy
from dpojax.objectives.policy_loss import make_policy_loss
from dpojax.objectives.policy_presets import PRESETS
from dpojax.training.policy_step import (
    BETA,
    VALUE,
    Critic,
    PolicyGradients,
    make_policy_step,
    token_values,
)
from dpojax.training.response_tokens import response_tokens, step_responses
from dpojax.training.state import POLICY, new_state
from dpojax.training.update import Spikes

WIDTH = 12
SPIKES = Spikes(float("inf"), False)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def params(model):
    return tiny.params(model)


@pytest.fixture(scope="module")
def ref_params(model):
    return tiny.params(model, seed=1)


def rollouts(seed=0, prompts=4, samples=3, rewards=None):
    """Random samples with rewards, as a stage packs them."""
    rng = np.random.default_rng(seed)
    made = []
    for row in range(prompts):
        group = tiny.groups(rng, 1, responses=samples, longest=WIDTH)[0]
        scores = rng.normal(size=samples) if rewards is None else rewards[row]
        made.append(group._replace(pairs=own_pairs(np.ones(samples), scores), row=row))
    return made


def gradients_of(model, preset="rloo", *, critic=None, overlong=0, **settings: Any):
    loss = make_policy_loss(preset, **settings)
    return PolicyGradients(model, loss, critic, width=WIDTH, chunk=16, overlong_tokens=overlong)


def step_program(gradients):
    """(trees, batch, ref=) -> (loss, gradients by role, scalars) of a step's first update."""

    @jax.jit
    def first(trees, frozen, batch):
        state = new_state({}, trees)
        rollout = gradients.rollout(state, frozen, batch)
        found = gradients.gradients(
            state, frozen, batch, True, lambda tree: tree, rollout, jnp.asarray(True)
        )
        return found.loss, found.grads, found.scalars

    def program(trees, batch, ref=None):
        frozen = {"reference": ref, "base": None}
        return first(trees, frozen, jax.tree.map(jnp.asarray, batch))

    return program


def step_of(gradients, trees, batch, *, ref=None):
    return step_program(gradients)(trees, batch, ref)


def compiled(function, model, params):
    return np.asarray(jax.jit(functools.partial(function, model))(params))


class Plain(NamedTuple):
    """Responses as plain sequences, one a row: N responses, 64 tokens, W predictions."""

    tokens: np.ndarray  # [N, 64]
    live: np.ndarray  # [N, 64]
    predictor: np.ndarray  # [N, W], the place of the token before
    target: np.ndarray  # [N, W]
    mask: np.ndarray  # [N, W]

    def hidden(self, model, params):
        """Hidden states of the tokens before those of the responses, [N, W, D]."""
        positions = np.broadcast_to(np.arange(64, dtype=np.int32), self.tokens.shape)
        tokens, live, positions = map(jnp.asarray, (self.tokens, self.live, positions))
        hidden = model.hidden_states(params, tokens, positions, live, 0 * live)
        return jnp.take_along_axis(hidden, jnp.asarray(self.predictor)[..., None], axis=1)

    def distributions(self, model, params):
        """log pi(. | prefix), [N, W, V]."""
        return jax.nn.log_softmax(model.unembed(model.head(params), self.hidden(model, params)))

    def logps(self, model, params):
        """log pi of each token, 0 outside, [N, W]."""
        target = jnp.asarray(self.target)[..., None]
        logps = jnp.take_along_axis(self.distributions(model, params), target, axis=-1)[..., 0]
        return jnp.where(self.mask, logps, 0.0)


def plain(groups):
    count = sum(len(group.responses) for group in groups)
    rows = Plain(*(np.zeros((count, size), np.int32) for size in (64, 64, WIDTH, WIDTH, WIDTH)))
    n = 0
    for group in groups:
        for response in group.responses:
            ids = [*group.prompt.tolist(), *response.tolist()]
            rows.tokens[n, : len(ids)] = ids
            rows.live[n, : len(ids)] = 1
            size = len(response)
            rows.predictor[n, :size] = np.arange(size) + len(group.prompt) - 1
            rows.target[n, :size] = response
            rows.mask[n, :size] = 1
            n += 1
    return rows._replace(mask=rows.mask.astype(bool))


def assert_trees_close(found, want, atol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)


# --- the gradient ---------------------------------------------------------------------------------


def test_a_packed_step_has_the_exact_gradient_of_reward_minus_kl(model, params, ref_params):
    """An expectation over given responses: each one's share of it stands in its reward."""
    beta = 0.3
    groups = rollouts(prompts=2, samples=4)
    rows = plain(groups)
    rewards = np.array([pair.margin for group in groups for pair in group.pairs])
    ref = compiled(rows.logps, model, ref_params).sum(axis=1)

    def objective(params):
        """J = mean of pi(y) (r(y) - beta log pi(y) / ref(y)) by plain sequences, times 1e3."""
        logps = rows.logps(model, params).sum(axis=1)
        return 1e3 * jnp.mean(jnp.exp(logps) * (rewards - beta * (logps - ref)))

    want = jax.jit(jax.grad(objective))(params)
    logps = compiled(rows.logps, model, params).sum(axis=1)
    # d/dpi of pi (r - beta log pi / ref) is r - beta log pi / ref - beta
    shares = 1e3 * np.exp(logps) * (rewards - beta * (logps - ref) - beta)
    weighed = [
        group._replace(pairs=own_pairs(np.ones(4), shares[4 * n : 4 * n + 4]))
        for n, group in enumerate(groups)
    ]
    batch, _ = tiny.pack(weighed)
    _, grads, _ = step_of(gradients_of(model, "reinforce", beta=0.0), {POLICY: params}, batch)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    assert scale > 0
    assert_trees_close(grads[POLICY], jax.tree.map(jnp.negative, want), atol=1e-5 * scale)


@pytest.mark.parametrize("preset", marks.cases(["rloo", "grpo"], ["dr_grpo", "dapo", "gspo"]))
def test_a_step_is_the_loss_on_arrays_of_plain_sequences(model, params, ref_params, preset):
    groups = rollouts(seed=3)
    settings: dict[str, Any] = {"beta": 0.2}
    loss = make_policy_loss(preset, **settings)
    rows = plain(groups)
    ref = compiled(rows.logps, model, ref_params)
    rewards = np.array([pair.margin for group in groups for pair in group.pairs])
    prompts = np.arange(12) // 3

    def on_arrays(params):
        logps = rows.logps(model, params)
        old = jax.lax.stop_gradient(logps)
        return loss(logps, old, ref, rewards, rows.mask, prompts).loss

    value, want = jax.jit(jax.value_and_grad(on_arrays))(params)
    batch, _ = tiny.pack(groups, shard_rows=1)
    gradients = gradients_of(model, preset, **settings)
    found, grads, scalars = step_of(gradients, {POLICY: params}, batch, ref=ref_params)
    np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5)
    assert_trees_close(grads[POLICY], want, atol=2e-5)
    np.testing.assert_allclose(scalars["objective/scores"], rewards.mean(), rtol=1e-5)
    assert scalars["val/ratio"] == 1.0 and scalars["policy/approx_kl"] == 0.0


def marks_of(name):
    """Presets that share their code with a faster one are left to the exhaustive run."""
    if name == "rloo":
        return []
    return [pytest.mark.slow] + [pytest.mark.exhaustive] * (name not in ("grpo", "ppo"))


@pytest.mark.parametrize(
    "preset",
    [pytest.param(name, marks=marks_of(name)) for name in PRESETS],
)
def test_statistics_are_of_the_step_whatever_its_shards_micro_batches_and_order(
    model, params, ref_params, preset
):
    groups = rollouts(seed=5, prompts=6)
    trees = {POLICY: params}
    critic = None
    if preset == "ppo":
        critic, trees[VALUE] = make_critic()
    step = step_program(gradients_of(model, preset, critic=critic, beta=0.1))
    first = step(trees, tiny.pack(groups)[0], ref_params)
    other = step(trees, tiny.pack(groups, num_shards=2, shard_rows=1)[0], ref_params)
    turned = step(trees, tiny.pack(groups[::-1])[0], ref_params)
    for loss, grads, scalars in (other, turned):
        np.testing.assert_allclose(loss, first[0], rtol=1e-4, atol=2e-6)
        assert_trees_close(grads, first[1], atol=2e-5)
        for name, value in first[2].items():
            np.testing.assert_allclose(scalars[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_ratio_is_exactly_one_and_the_kl_zero_where_the_policy_is_the_reference(model, params):
    gradients = gradients_of(model, "rloo", beta=0.1)
    _, _, scalars = step_of(gradients, {POLICY: params}, tiny.pack(rollouts())[0], ref=params)
    # Two forwards that XLA may compile differently: measured 6e-8.
    np.testing.assert_allclose(scalars["objective/kl"], 0.0, atol=1e-6)
    assert scalars["val/ratio"] == 1.0
    assert scalars["policy/clipfrac"] == 0.0


def test_the_kl_is_that_over_the_vocabulary_and_never_negative(model, params, ref_params):
    group = rollouts(prompts=1, samples=2)[0]
    _, _, scalars = step_of(
        gradients_of(model), {POLICY: params}, tiny.pack([group])[0], ref=ref_params
    )
    rows = plain([group])
    policy = compiled(rows.distributions, model, params)
    ref = compiled(rows.distributions, model, ref_params)
    kl = np.sum(np.exp(policy) * (policy - ref), axis=-1)
    total = np.where(rows.mask, kl, 0.0).sum()
    assert scalars["objective/kl"] > 0
    np.testing.assert_allclose(scalars["objective/kl"], total / 2, rtol=1e-5)


# --- rewards --------------------------------------------------------------------------------------


def test_fractional_rewards_arrive_exactly_and_none_is_no_reward(model, params):
    nan = float("nan")
    rewards = [[0.7, -1.6, nan], [nan, nan, nan], [0.25, 0.25, 0.25], [2.0, nan, -2.0]]
    groups = rollouts(rewards=rewards)
    batch, _ = tiny.pack(groups)
    step = step_responses(jax.tree.map(jnp.asarray, batch), WIDTH)
    found = sorted(float(x) for x in step.rewards if not np.isnan(x))
    assert found == sorted(float(np.float32(x)) for row in rewards for x in row if x == x)
    _, _, scalars = step_of(gradients_of(model, beta=0.0), {POLICY: params}, batch)
    np.testing.assert_allclose(scalars["objective/scores"], np.nanmean(rewards), rtol=1e-5)
    np.testing.assert_allclose(scalars["groups/informative"], 4 / 7, rtol=1e-6)


def test_groups_of_equal_rewards_have_a_gradient_of_exactly_zero(model, params):
    groups = rollouts(rewards=[[0.1, 0.1, 0.1]] * 4)
    for preset in ("rloo", "grpo"):
        gradients = gradients_of(model, preset, beta=0.0)
        _, grads, _ = step_of(gradients, {POLICY: params}, tiny.pack(groups)[0])
        assert all(not np.any(x) for x in jax.tree.leaves(grads))


def test_a_long_response_loses_up_to_one_over_its_last_tokens(model, params):
    rng = np.random.default_rng(0)
    lengths = (4, 8, 10, 12)
    responses = tuple(rng.integers(1, 61, n).astype(np.int32) for n in lengths)
    prompt = np.asarray([3, 4], np.int32)
    group = TokenGroup(prompt, responses, own_pairs(np.ones(4), np.zeros(4)), 0)
    batch = jax.tree.map(jnp.asarray, tiny.pack([group])[0])
    gradients = gradients_of(model, "reinforce", beta=0.0, overlong=4)
    state = new_state({}, {POLICY: params})
    rollout = jax.jit(gradients.rollout)(state, {"reference": None}, batch)
    first = {
        int(m.sum()): float(a[0]) for m, a in zip(rollout.mask, rollout.advantages, strict=True)
    }
    first.pop(0, None)
    assert first == {4: 0.0, 8: 0.0, 10: -0.5, 12: -1.0}


# --- ppo ------------------------------------------------------------------------------------------


def make_critic(**changes: Any):
    config = dataclasses.replace(tiny.CONFIG, scalar_head=True)
    value_model = tiny.model(config)
    settings = {"clip": 0.2, "gamma": 1.0, "lam": 0.95, "target_kl": 0.0, "horizon": 100.0}
    return Critic(value_model, **(settings | changes)), tiny.params(value_model, seed=2)


def test_ppos_value_is_read_at_the_token_before_and_its_targets_are_gae(model, params):
    critic, value_params = make_critic(lam=0.9)
    group = rollouts(prompts=1, samples=2)[0]
    batch = jax.tree.map(jnp.asarray, tiny.pack([group])[0])
    gradients = gradients_of(model, "ppo", critic=critic, beta=0.0)
    state = new_state({}, {POLICY: params, VALUE: value_params})
    rollout = jax.jit(gradients.rollout)(state, {"reference": None}, batch)
    mb = jax.tree.map(lambda x: x[0] if x.ndim else x, batch)
    rows = jax.jit(lambda p: response_tokens(mb, token_values(critic.model, p, mb), WIDTH))(
        value_params
    )
    np.testing.assert_allclose(rollout.values[: len(rows)], rows, rtol=1e-6)
    hidden = compiled(plain([group]).hidden, critic.model, value_params)
    plain_values = hidden @ np.asarray(value_params["score"])
    for k, response in enumerate(group.responses):
        values = plain_values[k]
        reward = group.pairs[k].margin
        returns = np.zeros(len(response))
        advantage = 0.0
        for t in range(len(response) - 1, -1, -1):
            is_last = t == len(response) - 1
            following = 0.0 if is_last else values[t + 1]
            delta = (reward if is_last else 0.0) + following - values[t]
            advantage = delta + 0.9 * advantage
            returns[t] = advantage + values[t]
        row = next(n for n in range(len(rows)) if int(rollout.mask[n].sum()) == len(response))
        np.testing.assert_allclose(rollout.returns[row, : len(response)], returns, atol=1e-5)


@pytest.mark.slow
def test_epochs_reuse_the_samples_and_a_step_counts_once(model, params, ref_params):
    critic, value_params = make_critic(target_kl=0.01)
    gradients = gradients_of(model, "ppo", critic=critic, beta=0.1, epochs=3)
    optimizers = {POLICY: optax.sgd(1e-2), VALUE: optax.sgd(1e-2)}
    state = new_state(optimizers, {POLICY: params, VALUE: value_params}, {BETA: jnp.float32(0.1)})
    step = jax.jit(make_policy_step(gradients, optimizers, lambda tree: tree, spikes=SPIKES))
    batch = jax.tree.map(jnp.asarray, tiny.pack(rollouts())[0])
    after, metrics = step(state, {"reference": ref_params, "base": None}, batch, True)
    assert int(after.step) == 1 and int(after.skipped) == 0
    assert metrics.scalars["val/ratio"] == 1.0
    assert metrics.scalars["val/ratio_last"] != 1.0
    # far above its target, the KL is pushed down by a fifth of what the responses weigh
    np.testing.assert_allclose(after.memory[BETA], 0.1 * (1 + 0.2 * 12 / 100), rtol=1e-6)
    for role in (POLICY, VALUE):
        moved = [
            float(jnp.abs(a - b).max())
            for a, b in zip(
                jax.tree.leaves(after.params[role]),
                jax.tree.leaves(state.params[role]),
                strict=True,
            )
        ]
        assert max(moved) > 0


# --- whole runs -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    [pytest.param(p, marks=[pytest.mark.exhaustive] * (p not in ("rloo", "ppo"))) for p in PRESETS],
)
def test_a_stopped_run_goes_on_to_the_same_bits(files, tmp_path, preset):
    held_out = {"sample.num_prompts": 4, "sample.kl_prompts": 4, "eval_every_steps": 2}
    settings = sampled_settings(preset) | held_out
    whole = tmp_path / "whole"
    run(files, whole, **settings)
    stopped = tmp_path / "stopped"
    stop_at(start(files, stopped, **settings), "Policy gradient 2/")
    run(files, stopped, **settings)
    assert numbers(stopped) == numbers(whole)
    assert checksums(stopped / "policy_gradient", 4) == checksums(whole / "policy_gradient", 4)
    evaluations = read_on_policy(whole)
    assert evaluations == read_on_policy(stopped)
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert evaluations[0]["log_ratio"] == [0.0] * 4  # the policy is the reference
    for row in evaluations:
        for name, values in (("kl", row["log_ratio"]), ("reward", row["reward"])):
            logged = numbers(whole)[row["step"], f"policy_gradient_eval_on_policy_{name}"]
            assert logged == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.slow
def test_adapters_are_trained_and_their_base_is_the_reference(files, tmp_path):
    own = {"lora.rank": 2, "sample.num_prompts": 4, "sample.kl_prompts": 0}
    settings = sampled_settings("rloo") | own
    run(files, tmp_path, **settings)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["num_steps"] == 4 and {"win_rate", "win_rate_low", "kl"} <= set(summary)
    values = numbers(tmp_path)
    assert abs(values[1, "policy_gradient_objective/kl"]) < 1e-5
    assert values[4, "policy_gradient_objective/kl"] > 0.0
