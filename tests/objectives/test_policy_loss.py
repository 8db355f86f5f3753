"""The presets against TRL's frozen numbers, exact policy
gradients, fixed points and invariances.
"""

import functools
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT
from scipy.special import log_softmax

from dpojax.errors import ConfigError
from dpojax.objectives import exact, exact_policy, exact_tokens
from dpojax.objectives.advantages import gae_advantages, informative_groups, token_rewards
from dpojax.objectives.policy_gradient import KL_PLACEMENTS, count_denominators
from dpojax.objectives.policy_loss import PRESETS, make_policy_loss

FROZEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "oracles/frozen/trl_policy_losses.json").read_text()
)
INPUTS = {name: np.asarray(values) for name, values in FROZEN["inputs"].items()}
NAMES = ("logps", "old_logps", "ref_logps", "rewards", "mask", "group")
REWARDED = [name for name in PRESETS if name != "ppo"]


def float64(function, *arrays):
    with jax.enable_x64(True):
        given = [None if a is None else jnp.asarray(a) for a in arrays]
        return jax.tree.map(np.asarray, function(*given))


def loss_and_gradient(loss, logps, *arrays, **more):
    def value(x, *given):
        return loss(x, *given, **more).loss

    return float64(jax.value_and_grad(value), logps, *arrays)


# --- TRL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", FROZEN["losses"])
def test_values_gradients_and_advantages_are_trls(label):
    case = FROZEN["losses"][label]
    loss = make_policy_loss(case["preset"], **case["settings"])
    arrays = [INPUTS[name] for name in NAMES]
    value, gradient = loss_and_gradient(loss, *arrays)
    # TRL's nanstd has its n / (n - 1) in float32.
    np.testing.assert_allclose(value, case["loss"], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-6, atol=1e-8)
    advantages = float64(loss, *arrays).advantages
    expected = np.asarray(case["advantages"])[:, None] * INPUTS["mask"]
    np.testing.assert_allclose(advantages, expected, rtol=1e-6, atol=1e-7)


has_oracles = all(importlib.util.find_spec(m) for m in ("torch", "trl"))


@pytest.mark.parity
@pytest.mark.skipif(
    not has_oracles, reason="torch and TRL are not installed: pip install .[parity]"
)
def test_trl_still_gives_the_frozen_policy_losses(tmp_path):
    out = tmp_path / "trl.json"
    done = subprocess.run(
        [sys.executable, "tests/oracles/trl_policy_losses.py", str(out)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads(out.read_text())
    for kind in ("losses", "reward"):
        assert set(again[kind]) == set(FROZEN[kind])
        for label, case in FROZEN[kind].items():
            for name in ("loss", "gradient"):
                np.testing.assert_allclose(
                    again[kind][label][name], case[name], rtol=1e-6, atol=1e-12, err_msg=label
                )


# --- expected gradients on four responses of one token --------------------------------------------

RNG = np.random.default_rng(21)
LOGITS = RNG.normal(0, 1, 4)
REF = log_softmax(RNG.normal(0, 1, 4))
REWARDS = RNG.normal(0, 1, 4)
BETA = 0.3


def expected_gradient(loss, logits, rewards, group_size, ref=REF):
    """The mean over every group of draws of the gradient in the logits."""
    draws = np.array(list(itertools.product(range(4), repeat=group_size)))
    group = np.zeros(group_size, int)
    mask = np.ones((group_size, 1), bool)

    def mean(x, ref_logps, given_rewards):
        logps = jax.nn.log_softmax(x)
        weights = jax.lax.stop_gradient(jnp.exp(jnp.sum(logps[draws], axis=-1)))

        def of_group(drawn):
            token_logps = logps[drawn][:, None]
            ref_of_tokens = ref_logps[drawn][:, None]
            out = loss(token_logps, token_logps, ref_of_tokens, given_rewards[drawn], mask, group)
            return out.loss

        return jnp.sum(weights * jax.vmap(of_group)(jnp.asarray(draws)))

    return float64(jax.jit(jax.grad(mean)), logits, ref, rewards)


def reward_gradient():
    return exact_policy.policy_gradient(LOGITS, REF, REWARDS, 0.0)


def value_gradient():
    return exact_policy.policy_gradient(LOGITS, REF, REWARDS, BETA)


@pytest.mark.parametrize("group_size", [2, 3, 4, 6])
def test_leave_one_out_has_the_policy_gradient_and_the_mean_g_minus_1_over_g_of_it(group_size):
    loo = expected_gradient(make_policy_loss("rloo", beta=0), LOGITS, REWARDS, group_size)
    np.testing.assert_allclose(-loo, reward_gradient(), atol=1e-15)
    mean = expected_gradient(make_policy_loss("dr_grpo"), LOGITS, REWARDS, group_size)
    share = (group_size - 1) / group_size
    np.testing.assert_allclose(-mean, share * reward_gradient(), atol=1e-15)


@pytest.mark.parametrize("kl", ["reward", "loss_k2_sequence"])
@pytest.mark.parametrize(("preset", "group_size"), [("reinforce", 1), ("rloo", 2), ("rloo", 4)])
def test_the_exact_placements_have_the_gradient_of_the_regularised_objective(
    kl, preset, group_size
):
    loss = make_policy_loss(preset, beta=BETA, kl=kl)
    found = expected_gradient(loss, LOGITS, REWARDS, group_size)
    np.testing.assert_allclose(-found, value_gradient(), atol=1e-15)


@pytest.mark.parametrize("preset", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("group_size", [2, 3, 4, 6])
def test_standardised_binary_rewards_have_the_grpo_factor(preset, group_size):
    rewards = np.array([1.0, 0, 1, 0])
    success = float(np.exp(log_softmax(LOGITS)) @ rewards)
    loss = make_policy_loss(preset, beta=0, epsilon=0)
    found = expected_gradient(loss, LOGITS, rewards, group_size)
    factor = exact_policy.grpo_factor(group_size, success, ddof=1)
    direction = exact_policy.policy_gradient(LOGITS, REF, rewards, 0.0)
    np.testing.assert_allclose(-found, factor * direction, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_standardised_rewards_of_other_kinds_turn_the_gradient(group_size):
    found = expected_gradient(
        make_policy_loss("grpo", beta=0, epsilon=0), LOGITS, REWARDS, group_size
    )
    expected = -reward_gradient()
    cosine = found @ expected / np.linalg.norm(found) / np.linalg.norm(expected)
    assert 0.5 < cosine < 0.95


@pytest.mark.parametrize("preset", ["reinforce", "rloo", "dr_grpo"])
def test_the_optimum_is_a_fixed_point_with_the_kl_in_the_reward(preset):
    star = exact.optimal_logps(REF, REWARDS, BETA)
    loss = make_policy_loss(preset, beta=BETA)
    assert np.abs(expected_gradient(loss, star, REWARDS, 2)).max() < 1e-15


def test_grpo_as_published_has_k3s_fixed_point_and_not_the_optimum():
    loss = make_policy_loss("grpo", scale="none", beta=BETA)
    # The group's mean holds half of the reward itself.
    point = exact_policy.k3_fixed_point(REF, REWARDS / 2, BETA)
    assert np.abs(expected_gradient(loss, point, REWARDS, 2)).max() < 1e-14
    star = exact.optimal_logps(REF, REWARDS / 2, BETA)
    assert np.abs(expected_gradient(loss, star, REWARDS, 2)).max() > 1e-3


@pytest.mark.parametrize("kl", ["reward", "loss_k2_sequence"])
def test_leave_one_out_reaches_the_optimum_from_the_reference(kl):
    loss = make_policy_loss("rloo", beta=BETA, kl=kl)
    draws = np.array(list(itertools.product(range(4), repeat=2)))

    def mean(x):
        logps = jax.nn.log_softmax(x)
        weights = jax.lax.stop_gradient(jnp.exp(jnp.sum(logps[draws], axis=-1)))

        def of_group(drawn):
            rows = logps[drawn][:, None]
            rewards = jnp.asarray(REWARDS)[drawn]
            ref = jnp.asarray(REF)[drawn][:, None]
            return loss(rows, rows, ref, rewards, jnp.ones((2, 1), bool), jnp.zeros(2, int)).loss

        return jnp.sum(weights * jax.vmap(of_group)(jnp.asarray(draws)))

    def descend(x):
        return jax.lax.fori_loop(0, 1000, lambda _, y: y - 2.0 * jax.grad(mean)(y), x)

    policy = log_softmax(float64(jax.jit(descend), REF))
    star = exact.optimal_logps(REF, REWARDS, BETA)
    assert np.abs(np.exp(policy) - np.exp(star)).sum() / 2 < 0.01


# --- responses of several tokens ------------------------------------------------------------------

SPACE = exact_tokens.token_space(3, 3)
TABLE = RNG.normal(0, 0.7, (SPACE.num_states, 3))
REF_TABLE = RNG.normal(0, 0.7, (SPACE.num_states, 3))
SCORES = RNG.normal(0, 0.5, 15)


def ref_token_logps():
    return float64(functools.partial(exact_tokens.token_logps, SPACE), REF_TABLE)


REF_LOGPS = ref_token_logps()


def gradient_of_each_alone(loss, table=TABLE, advantages=None):
    """The expected gradient of a loss that takes each of the 15 responses as a step of its own."""

    def losses(logps):
        def alone(row_logps, ref, reward, mask, of_tokens):
            given = dict(mask=mask[None], group=jnp.zeros(1, jnp.int32))
            if advantages is None:
                given["rewards"] = reward[None]
            else:
                given["advantages"] = of_tokens[None]
            return loss(row_logps[None], row_logps[None], ref[None], **given).loss

        of_tokens = jnp.zeros(logps.shape) if advantages is None else jnp.asarray(advantages)
        return jax.vmap(alone)(
            logps, jnp.asarray(REF_LOGPS), jnp.asarray(SCORES), SPACE.mask, of_tokens
        )

    return exact_tokens.expected_gradient(SPACE, table, losses)


def regularised_gradient(beta=BETA, table=TABLE):
    return exact_tokens.regularised_gradient(SPACE, table, REF_TABLE, SCORES, beta)


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("kl", ["reward", "loss_k2_sequence"])
def test_the_exact_placements_stay_exact_over_several_tokens(kl):
    found = gradient_of_each_alone(make_policy_loss("reinforce", beta=BETA, kl=kl))
    np.testing.assert_allclose(-found, regularised_gradient(), atol=1e-14)


@pytest.mark.parametrize("kl", ["loss_k3", "loss_k3_ratio"])
def test_the_placements_of_parity_miss_part_of_the_kls_gradient(kl):
    with_kl = gradient_of_each_alone(make_policy_loss("reinforce", beta=BETA, kl=kl))
    without = gradient_of_each_alone(make_policy_loss("reinforce", beta=0.0))
    expected = regularised_gradient(0.0) - regularised_gradient()
    assert 0.03 < relative_error(with_kl - without, expected) < 1


@pytest.mark.parametrize("ratio", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
def test_on_policy_gradients_do_not_depend_on_the_ratio(ratio, aggregate):
    settings = dict(aggregate=aggregate, beta=0.1, clip_low=None, clip_high=None)
    found = gradient_of_each_alone(make_policy_loss("reinforce", ratio=ratio, **settings))
    expected = gradient_of_each_alone(make_policy_loss("reinforce", ratio="token", **settings))
    np.testing.assert_allclose(found, expected, atol=1e-15)


def test_dividing_by_the_length_turns_the_gradient_and_a_constant_does_not():
    cosines = {}
    for aggregate in ("sequence", "constant"):
        loss = make_policy_loss("reinforce", beta=0, aggregate=aggregate, max_tokens=7)
        found = -gradient_of_each_alone(loss)
        expected = regularised_gradient(0.0)
        norm = np.linalg.norm(found) * np.linalg.norm(expected)
        cosines[aggregate] = np.sum(found * expected) / norm
    assert cosines["sequence"] < 0.999
    np.testing.assert_allclose(cosines["constant"], 1, atol=1e-13)


def exact_advantages(table, lam, values=None):
    """(advantages, values) of every response from the exact V, or from a given one."""
    logps = float64(functools.partial(exact_tokens.token_logps, SPACE), table)
    rewards = float64(
        functools.partial(token_rewards, beta=BETA), SCORES, logps, REF_LOGPS, SPACE.mask
    )
    if values is None:
        values = exact_tokens.state_values(SPACE, table, rewards)
    found = float64(
        functools.partial(gae_advantages, gamma=1.0, lam=lam), rewards, values, SPACE.mask
    )
    return found.advantages, values


PPO = {"aggregate": "constant", "beta": BETA}


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_ppo_with_the_exact_values_has_the_exact_gradient_for_every_lambda(lam):
    advantages, _ = exact_advantages(TABLE, lam)
    found = gradient_of_each_alone(make_policy_loss("ppo", **PPO), advantages=advantages)
    np.testing.assert_allclose(-found, regularised_gradient(), atol=1e-14)


def test_ppo_with_wrong_values_is_exact_at_lambda_1_alone():
    of_state = np.random.default_rng(0).normal(0, 2, SPACE.num_states)
    values = np.where(SPACE.mask, of_state[SPACE.states], 0)
    errors = []
    for lam in (0.0, 0.5, 0.95, 1.0):
        advantages, _ = exact_advantages(TABLE, lam, values)
        found = gradient_of_each_alone(make_policy_loss("ppo", **PPO), advantages=advantages)
        errors.append(relative_error(-found, regularised_gradient()))
    assert errors[0] > errors[1] > errors[2] > 1e-2
    assert errors[3] < 1e-13


def optimal_responses():
    return np.exp(exact.optimal_logps(REF_LOGPS.sum(-1), SCORES, BETA))


def response_probabilities(table):
    return np.exp(float64(functools.partial(exact_tokens.response_logps, SPACE), table))


def test_exact_ppo_reaches_the_optimum_and_its_value_is_beta_log_z():
    # The policy's advantages are held fixed for 4 epochs, so that the clip is at work.
    loss = make_policy_loss("ppo", **PPO)

    def step(table, advantages):
        old = exact_tokens.token_logps(SPACE, table)
        weights = jnp.exp(jnp.sum(old, axis=-1))

        def mean(x):
            logps = exact_tokens.token_logps(SPACE, x)

            def alone(row, old_row, of_tokens, mask):
                return loss(
                    row[None], old_row[None], None, mask=mask[None], advantages=of_tokens[None]
                ).loss

            return jnp.sum(weights * jax.vmap(alone)(logps, old, advantages, SPACE.mask))

        return jax.lax.fori_loop(0, 4, lambda _, x: x - 2.0 * jax.grad(mean)(x), table)

    compiled = jax.jit(step)
    table = REF_TABLE
    for _ in range(120):
        advantages, values = exact_advantages(table, 0.95)
        table = float64(compiled, table, advantages)
    distance = np.abs(response_probabilities(table) - optimal_responses()).sum() / 2
    assert distance < 0.01
    first = values[0, 0]  # V of the empty response
    expected = BETA * exact.log_partition(REF_LOGPS.sum(-1), SCORES, BETA)
    np.testing.assert_allclose(first, expected, atol=0.01)


@pytest.mark.parametrize("preset", ["rloo", "dr_grpo"])
def test_sampled_steps_reach_the_optimum(preset):
    group_size = 8
    # The group's mean takes (G - 1) / G of the reward and of the KL in it alike.
    loss = make_policy_loss(preset, beta=BETA)
    group = jnp.repeat(jnp.arange(4096 // group_size), group_size)

    def step(table, key):
        everything = exact_tokens.token_logps(SPACE, table)
        drawn = jax.random.categorical(key, jnp.sum(everything, axis=-1), shape=(4096,))

        def sampled(x):
            logps = exact_tokens.token_logps(SPACE, x)[drawn]
            rewards = jnp.asarray(SCORES)[drawn]
            mask = jnp.asarray(SPACE.mask)[drawn]
            return loss(logps, logps, jnp.asarray(REF_LOGPS)[drawn], rewards, mask, group).loss

        return table - 4.0 * jax.grad(sampled)(table), None

    def train(table, key):
        return jax.lax.scan(step, table, jax.random.split(key, 150))[0]

    with jax.enable_x64(True):
        table = np.asarray(jax.jit(train)(jnp.asarray(REF_TABLE), jax.random.key(0)))
    distance = np.abs(response_probabilities(table) - optimal_responses()).sum() / 2
    assert distance < 0.05


# --- invariances ----------------------------------------------------------------------------------


def inputs_of(preset, **changes):
    """(positional arrays, keyword arrays) of the frozen inputs, as the preset takes them."""
    values = {**INPUTS, **changes}
    arrays = [values[name] for name in NAMES]
    if preset != "ppo":
        return arrays, {}
    advantages = np.random.default_rng(0).normal(0, 1, values["logps"].shape)
    return arrays, {"advantages": jnp.asarray(advantages)}


@pytest.mark.parametrize("preset", REWARDED)
@pytest.mark.parametrize("scale", ["none", "group", "step"])
def test_the_order_of_responses_and_the_groups_numbers_change_nothing(preset, scale):
    loss = make_policy_loss(preset, scale=scale, beta=0.1)
    arrays = [INPUTS[name] for name in NAMES]
    value, gradient = loss_and_gradient(loss, *arrays)
    order = np.random.default_rng(1).permutation(arrays[0].shape[0])
    shuffled = [a[order] for a in arrays]
    shuffled[-1] = np.array([-5, 10**6, 3])[shuffled[-1]]
    again, moved = loss_and_gradient(loss, *shuffled)
    np.testing.assert_allclose(again, value, rtol=1e-12)
    np.testing.assert_allclose(moved, gradient[order], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("preset", "kl", "aggregate"),
    [
        *[(preset, "reward", "token") for preset in REWARDED],
        *[("grpo", kl, "sequence") for kl in KL_PLACEMENTS],
        *[(preset, "loss_k2_sequence", "constant") for preset in ("rloo", "gspo")],
    ],
)
def test_micro_batches_add_up_to_the_step(preset, kl, aggregate):
    loss = make_policy_loss(preset, kl=kl, aggregate=aggregate, beta=0.1, max_tokens=9)

    def by_parts(logps, old, ref, rewards, mask, group):
        live = loss.live_mask(rewards, mask)
        advantages = loss.step_advantages(rewards, old, ref, live, group)
        step = count_denominators(live, logps.dtype)
        total = 0.0
        for rows in jnp.array([[0, 7, 2, 11], [5, 1, 10, 4], [3, 9, 6, 8]]):
            bundle = (logps[rows], old[rows], ref[rows], advantages[rows], live[rows])
            total = total + loss.partial(*bundle, step).loss
        return total

    arrays = [INPUTS[name] for name in NAMES]
    value, gradient = loss_and_gradient(loss, *arrays)
    again, parts = float64(jax.value_and_grad(by_parts), *arrays)
    np.testing.assert_allclose(again, value, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(parts, gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("preset", "kl"),
    [
        *[(preset, "loss_k3_ratio") for preset in PRESETS],
        *[("rloo", kl) for kl in KL_PLACEMENTS],
    ],
)
def test_what_stands_at_masked_places_changes_neither_loss_nor_gradient(preset, kl):
    loss = make_policy_loss(preset, kl=kl, beta=0.1)
    arrays, more = inputs_of(preset)
    value, gradient = loss_and_gradient(loss, *arrays, **more)
    mask = INPUTS["mask"]
    poison = np.where(np.random.default_rng(2).random(mask.shape) < 0.5, np.nan, 1e9)
    for name in ("logps", "old_logps", "ref_logps"):
        arrays[NAMES.index(name)] = np.where(mask, INPUTS[name], poison)
    if more:
        more = {"advantages": jnp.where(mask, more["advantages"], jnp.nan)}
    again, poisoned = loss_and_gradient(loss, *arrays, **more)
    assert again == value
    np.testing.assert_array_equal(poisoned, np.where(mask, gradient, 0))
    np.testing.assert_array_equal(poisoned, gradient)


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_of_padding_and_responses_without_reward_are_as_though_not_drawn(preset):
    loss = make_policy_loss(preset, beta=0.1)
    arrays, more = inputs_of(preset)
    dropped = np.array([1, 6, 7])
    kept = np.setdiff1d(np.arange(12), dropped)
    few = {name: jnp.asarray(v)[kept] for name, v in more.items()}
    value, gradient = loss_and_gradient(loss, *[a[kept] for a in arrays], **few)

    rewards, mask = INPUTS["rewards"].copy(), INPUTS["mask"].copy()
    rewards[1] = np.nan
    mask[[6, 7]] = False
    holed, _ = inputs_of(preset, rewards=rewards, mask=mask)
    again, found = loss_and_gradient(loss, *holed, **more)
    np.testing.assert_allclose(again, value, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found[kept], gradient, rtol=1e-9, atol=1e-15)
    assert np.all(found[dropped] == 0)


@pytest.mark.parametrize("preset", REWARDED)
def test_a_step_without_any_reward_has_the_loss_and_gradient_0(preset):
    arrays, _ = inputs_of(preset, rewards=np.full(12, np.nan))
    value, gradient = loss_and_gradient(make_policy_loss(preset), *arrays)
    assert value == 0 and np.all(gradient == 0)


@pytest.mark.parametrize("preset", [name for name in REWARDED if name != "reinforce"])
@pytest.mark.parametrize("scale", ["none", "group", "step"])
def test_groups_without_variance_have_a_gradient_of_exactly_0(preset, scale):
    loss = make_policy_loss(preset, beta=0, scale=scale)
    rewards = np.repeat([0.1, 0.7, 1.3], 4)
    arrays = [jnp.asarray(a) for a in inputs_of(preset, rewards=rewards)[0]]
    gradient = jax.grad(lambda x: loss(x, *arrays[1:]).loss)(arrays[0])
    assert gradient.dtype == jnp.float32
    assert np.all(np.asarray(gradient) == 0)


def test_dynamic_sampling_keeps_the_groups_that_have_a_gradient():
    arrays = [jnp.asarray(INPUTS[name]) for name in NAMES]
    loss = make_policy_loss("dapo")
    kept = informative_groups(arrays[3], arrays[5], jnp.ones(12, bool))
    moved = np.any(np.asarray(loss(*arrays).advantages) != 0, axis=-1)
    np.testing.assert_array_equal(kept, moved)
    assert not kept[-1] and kept[0]


@pytest.mark.parametrize("preset", PRESETS)
def test_on_policy_the_same_array_and_a_copy_give_the_same_bits_and_ratio_1(preset):
    loss = make_policy_loss(preset)
    arrays, more = inputs_of(preset)
    logps, _, *others = [jnp.asarray(a, jnp.float32 if a.dtype == float else None) for a in arrays]
    more = {name: jnp.asarray(v, jnp.float32) for name, v in more.items()}

    def itself(x):
        return loss(x, x, *others, **more).loss

    def copied(x):
        return loss(x, logps, *others, **more).loss

    first = jax.jit(jax.value_and_grad(itself))(logps)
    second = jax.jit(jax.value_and_grad(copied))(logps)
    assert first[0] == second[0] and np.any(np.asarray(first[1]) != 0)
    np.testing.assert_array_equal(first[1], second[1])
    metrics = loss(logps, logps, logps, *others[1:], **more).metrics
    assert metrics.ratio == 1 and metrics.approx_kl == 0 and metrics.kl == 0
    assert metrics.clipped_low == 0 and metrics.clipped_high == 0


@pytest.mark.parametrize("preset", ["rloo", "grpo"])
def test_eight_devices_give_the_numbers_of_one(preset):
    loss = make_policy_loss(preset, beta=0.1)
    rows = np.arange(24) % 12  # every response twice, so that 8 devices have 3 each
    arrays = [INPUTS[name][rows] for name in NAMES]
    value, gradient = loss_and_gradient(loss, *arrays)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows_sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with jax.enable_x64(True):
        spread = [jax.device_put(jnp.asarray(a), rows_sharded) for a in arrays]

        def of_loss(x, *others):
            return loss(x, *others).loss

        again, found = jax.jit(jax.value_and_grad(of_loss))(*spread)
    np.testing.assert_allclose(again, value, rtol=1e-12)
    np.testing.assert_allclose(found, gradient, rtol=1e-9, atol=1e-15)


def test_fractional_and_whole_rewards_arrive_as_they_are():
    logps = jnp.zeros((3, 2))
    mask = jnp.ones((3, 2), bool)
    for rewards in (jnp.array([0.7, -1.6, 0.2]), jnp.array([3, -1, 0])):
        found = make_policy_loss("reinforce", beta=0)(logps, logps, None, rewards, mask)
        np.testing.assert_allclose(found.advantages[:, 1], rewards, rtol=1e-6)


def test_bfloat16_log_probs_are_summed_in_float32():
    arrays = [jnp.asarray(a) for a in inputs_of("grpo")[0]]
    low = [a.astype(jnp.bfloat16) for a in arrays[:3]]
    found = make_policy_loss("grpo")(*low, *arrays[3:]).loss
    again = make_policy_loss("grpo")(*[a.astype(jnp.float32) for a in low], *arrays[3:]).loss
    assert found.dtype == jnp.float32 and found == again


def test_metrics_count_the_tokens_of_responses_alone():
    arrays, _ = inputs_of("grpo")
    metrics = float64(make_policy_loss("grpo"), *arrays).metrics
    mask = INPUTS["mask"]
    moved = (INPUTS["logps"] - INPUTS["old_logps"])[mask]
    to_ref = np.where(mask, INPUTS["logps"] - INPUTS["ref_logps"], 0).sum(-1)
    np.testing.assert_allclose(metrics.approx_kl, np.mean(moved**2) / 2, rtol=1e-12)
    np.testing.assert_allclose(metrics.ratio, np.mean(np.exp(moved)), rtol=1e-12)
    np.testing.assert_allclose(metrics.kl, to_ref.mean(), rtol=1e-12)


# --- names and settings ---------------------------------------------------------------------------


def test_every_row_of_the_table_makes_a_loss_with_its_own_settings():
    for preset, row in PRESETS.items():
        assert make_policy_loss(preset).settings == row
    assert make_policy_loss("dapo").settings.clip_high == 0.28
    assert make_policy_loss("grpo", clip_high=None).settings.clip_high == float("inf")


@pytest.mark.parametrize(
    ("preset", "settings", "message"),
    [
        ("grpoo", {}, "did you mean grpo"),
        ("dr-grpo", {}, "did you mean dr_grpo"),
        ("grpo", {"clip_hihg": 0.2}, "did you mean clip_high"),
        ("grpo", {"scale": "batch"}, "scale is 'batch'; it must be one of none, group, step"),
        ("grpo", {"aggregate": "tokens"}, "did you mean token"),
        ("grpo", {"kl": "loss_k1"}, "does not contain the reference"),
        ("ppo", {"kl": "reward_k3"}, "responses that are rare under the policy die out"),
        ("rloo", {"kl": "rewards"}, "did you mean reward"),
        ("rloo", {"beta": -0.1}, "beta is -0.1; it must be a finite number >= 0"),
        ("rloo", {"beta": "0.1"}, "beta is '0.1'"),
        ("rloo", {"beta": float("nan")}, "beta is nan"),
        ("rloo", {"clip_low": 0}, "clip_low is 0; it must be a number > 0, or None"),
        ("dr_grpo", {"max_tokens": 0}, "max_tokens is 0; it must be a finite number >= 1"),
        ("ppo", {"scale": "group"}, "scale=step"),
    ],
)
def test_what_is_unknown_or_wrong_is_refused_with_the_nearest(preset, settings, message):
    with pytest.raises(ConfigError) as error:
        make_policy_loss(preset, **settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("grpo", {"rewards": None}, "grpo takes a reward of each response"),
        ("grpo", {"group": None}, "group is None"),
        ("grpo", {"ref_logps": None}, "grpo with kl=loss_k3 and beta=0.04 needs"),
        ("rloo", {"ref_logps": None}, "beta=0 does without"),
        ("grpo", {"rewards": np.zeros((12, 6))}, r"rewards has the shape (12, 6)"),
        ("grpo", {"old_logps": np.zeros((12, 5))}, r"it must be (12, 6)"),
        ("ppo", {}, "gae_advantages"),
    ],
)
def test_what_does_not_fit_is_refused(preset, changes, message):
    values = {**INPUTS, **changes}
    with pytest.raises(ConfigError) as error:
        make_policy_loss(preset)(*[values[name] for name in NAMES])
    assert message in str(error.value)


def test_advantages_are_for_ppo_alone():
    arrays, more = inputs_of("ppo")
    with pytest.raises(ConfigError, match="ppo takes them"):
        make_policy_loss("rloo")(*arrays, **more)


def test_ppo_whitens_over_the_step_where_asked():
    arrays, more = inputs_of("ppo")
    found = float64(functools.partial(make_policy_loss("ppo", scale="step"), **more), *arrays)
    inside = found.advantages[INPUTS["mask"]]
    np.testing.assert_allclose([inside.mean(), inside.std(ddof=1)], [0, 1], atol=1e-7)
