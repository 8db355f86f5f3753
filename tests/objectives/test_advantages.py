"""Advantages and group statistics against loops over the groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpojax.errors import ConfigError
from dpojax.objectives import advantages, exact_tokens

RNG = np.random.default_rng(5)
# Groups of 4, 1, 3 and 2 responses, mixed, under numbers that are no places.
GROUP = np.array([70, -3, 70, 5, 70, 5, 900, 5, 70, 900])
REWARDS = RNG.normal(0, 1, GROUP.size)
EVERY = np.ones(GROUP.size, bool)


def float64(function, *arrays, **more):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*map(jnp.asarray, arrays), **more))


def members(row, valid=EVERY):
    return np.flatnonzero((GROUP[row] == GROUP) & valid)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6))
def test_statistics_are_those_of_each_group(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 1, GROUP.size)
    valid = rng.random(GROUP.size) < 0.7
    found = float64(advantages.group_statistics, np.where(valid, values, np.nan), GROUP, valid)
    for row in np.flatnonzero(valid):
        group = values[members(row, valid)]
        assert found.count[row] == group.size
        np.testing.assert_allclose(found.mean[row], group.mean(), rtol=1e-12)
        std = group.std(ddof=1) if group.size > 1 else 0
        np.testing.assert_allclose(found.std[row], std, rtol=1e-12)
        assert found.varies[row] == (group.size > 1)


def test_leave_one_out_subtracts_the_mean_of_the_others():
    found = float64(advantages.leave_one_out_advantages, REWARDS, GROUP, EVERY)
    for row in range(GROUP.size):
        others = [k for k in members(row) if k != row]
        expected = REWARDS[row] - REWARDS[others].mean() if others else 0
        np.testing.assert_allclose(found[row], expected, rtol=1e-12)


def test_the_difference_from_the_mean_is_that_times_g_minus_1_over_g():
    centred = float64(advantages.group_mean_advantages, REWARDS, GROUP, EVERY)
    loo = float64(advantages.leave_one_out_advantages, REWARDS, GROUP, EVERY)
    sizes = np.array([members(row).size for row in range(GROUP.size)])
    np.testing.assert_allclose(centred, loo * (sizes - 1) / sizes, rtol=1e-12)


def scaled(rewards, scale, valid=EVERY, epsilon=1e-4):
    centred = float64(advantages.group_mean_advantages, rewards, GROUP, valid)
    return float64(
        advantages.scale_advantages,
        *(centred, rewards, rewards, GROUP, valid),
        scale=scale,
        epsilon=epsilon,
    )


def test_group_scale_divides_by_the_deviation_of_the_group_with_ddof_1():
    found = scaled(REWARDS, "group")
    for row in range(GROUP.size):
        group = REWARDS[members(row)]
        if group.size == 1:
            assert found[row] == 0
            continue
        expected = (REWARDS[row] - group.mean()) / (group.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(found[row], expected, rtol=1e-12)


def test_step_scale_divides_by_the_deviation_of_the_step_and_not_of_a_group():
    found = scaled(REWARDS, "step")
    centred = float64(advantages.group_mean_advantages, REWARDS, GROUP, EVERY)
    np.testing.assert_allclose(found, centred / (REWARDS.std(ddof=1) + 1e-4), rtol=1e-12)
    assert np.abs(found - scaled(REWARDS, "group")).max() > 0.1


@pytest.mark.parametrize("name", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", advantages.SCALES)
def test_equal_rewards_have_advantages_of_exactly_0_in_float32(name, scale):
    # 0.1 + 0.1 + 0.1 is not three times 0.1: some of these groups seem to vary by their deviation.
    sizes = np.arange(2, 14)
    group = jnp.asarray(np.repeat(sizes, sizes))
    rewards = jnp.asarray(np.repeat(0.1 * sizes, sizes), jnp.float32)
    valid = jnp.ones(rewards.shape, bool)
    assert np.any(np.asarray(advantages.group_statistics(rewards, group, valid).std) > 0)
    found = advantages.ADVANTAGES[name](rewards, group, valid)
    found = advantages.scale_advantages(found, rewards, rewards, group, valid, scale=scale)
    assert np.all(np.asarray(found) == 0)


@pytest.mark.parametrize("name", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", advantages.SCALES)
def test_a_group_of_one_has_no_advantage_and_never_its_raw_reward(name, scale):
    rewards = jnp.array([5.0, 1.0, 2.0])
    group = jnp.array([1, 2, 2])
    valid = jnp.ones(3, bool)
    found = advantages.ADVANTAGES[name](rewards, group, valid)
    found = advantages.scale_advantages(found, rewards, rewards, group, valid, scale=scale)
    assert found[0] == 0 and abs(found[1]) > 0.1


@pytest.mark.parametrize("name", advantages.ADVANTAGES)
def test_a_response_without_reward_changes_nothing(name):
    valid = EVERY.copy()
    valid[[1, 4, 6]] = False
    holed = np.where(valid, REWARDS, np.nan)
    for scale in advantages.SCALES:

        def of(rewards, group, kept, scale=scale):
            found = float64(advantages.ADVANTAGES[name], rewards, group, kept)
            return float64(
                advantages.scale_advantages,
                *(found, rewards, rewards, group, kept),
                scale=scale,
            )

        found = of(holed, GROUP, valid)
        alone = of(REWARDS[valid], GROUP[valid], np.ones(valid.sum(), bool))
        assert np.all(found[~valid] == 0)
        np.testing.assert_allclose(found[valid], alone, rtol=1e-12)


def test_scored_responses_have_a_reward_and_a_token():
    mask = np.array([[1, 1], [0, 0], [1, 0]], bool)
    found = advantages.scored(jnp.array([1.0, 2.0, jnp.nan]), mask)
    np.testing.assert_array_equal(found, [True, False, False])


def test_informative_groups_have_two_different_rewards():
    group = np.array([1, 1, 2, 2, 3, 3, 4])
    rewards = np.array([0.0, 1, 1, 1, 0, 1, 1])
    valid = np.array([1, 1, 1, 1, 0, 1, 1], bool)
    found = advantages.informative_groups(jnp.asarray(rewards), group, valid)
    np.testing.assert_array_equal(found, [True, True, False, False, False, False, False])


def test_the_kl_in_the_reward_is_that_of_the_whole_response():
    old, ref = RNG.normal(-2, 1, (2, 3, 4))
    mask = np.arange(4) < np.array([[4], [2], [0]])
    old[~mask], ref[~mask] = np.nan, 1e9
    found = float64(advantages.sequence_returns, REWARDS[:3], old, ref, mask, beta=0.2)
    for row in range(3):
        log_ratio = sum(old[row, t] - ref[row, t] for t in range(4) if mask[row, t])
        np.testing.assert_allclose(found[row], REWARDS[row] - 0.2 * log_ratio, rtol=1e-12)
    without = advantages.sequence_returns(jnp.asarray(REWARDS[:3]), old, None, mask, beta=0.0)
    np.testing.assert_allclose(without, REWARDS[:3], rtol=1e-6)
    with pytest.raises(ConfigError, match="ref_logps is None"):
        advantages.sequence_returns(jnp.asarray(REWARDS[:3]), old, None, mask, beta=0.1)


def test_the_overlong_penalty_counts_tokens_and_falls_to_minus_1():
    lengths = jnp.array([0, 60, 80, 85, 90, 100, 400])
    found = advantages.overlong_penalty(lengths, max_tokens=100, cache_tokens=20)
    np.testing.assert_allclose(found, [0, 0, 0, -0.25, -0.5, -1, -1], rtol=1e-6)
    with pytest.raises(ConfigError, match="cache_tokens is 0"):
        advantages.overlong_penalty(lengths, max_tokens=100, cache_tokens=0)


# --- tokens ---------------------------------------------------------------------------------------


def test_fractional_scores_arrive_at_the_last_token_as_they_are():
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]], bool)
    old, ref = RNG.normal(-1, 1, (2, 3, 4)).astype(np.float32)
    old[~mask] = np.nan
    scores = np.array([0.7, -1.6, np.nan], np.float32)
    found = np.asarray(advantages.token_rewards(jnp.asarray(scores), old, ref, mask, beta=0.0))
    np.testing.assert_array_equal(found[0], np.float32([0, 0, 0.7, 0]))
    np.testing.assert_array_equal(found[1], np.float32([0, 0, 0, -1.6]))
    assert np.all(found[2] == 0)
    found = advantages.token_rewards(jnp.asarray(scores), old, ref, mask, beta=0.5)
    np.testing.assert_allclose(found[0, :2], -0.5 * (old - ref)[0, :2], rtol=1e-6)
    np.testing.assert_allclose(found[1, 3], -1.6 - 0.5 * (old - ref)[1, 3], rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_is_its_double_sum_whatever_stands_between_a_responses_tokens(seed, lam):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(0, 1, (2, 5, 7))
    mask = rng.random((5, 7)) < 0.6
    poison = np.where(rng.random((5, 7)) < 0.5, np.nan, 1e9)
    found = float64(
        advantages.gae_advantages,
        *(np.where(mask, rewards, poison), np.where(mask, values, poison), mask),
        gamma=0.97,
        lam=lam,
    )
    expected = exact_tokens.gae(rewards, values, 0.97, lam, mask)
    np.testing.assert_allclose(found.advantages, expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        found.returns, np.where(mask, expected + values, 0), rtol=1e-12, atol=1e-14
    )
    assert np.count_nonzero(found.advantages) == mask.sum()


def test_an_observation_in_the_middle_is_passed_over():
    rewards, values = RNG.normal(0, 1, (2, 1, 4))
    plain = float64(
        advantages.gae_advantages, rewards, values, np.ones((1, 4), bool), gamma=0.9, lam=0.8
    )
    inserted = np.array([[True, True, False, False, True, True]])
    wide = [np.full((1, 6), 100.0) for _ in range(2)]
    wide[0][inserted], wide[1][inserted] = rewards[0], values[0]
    found = float64(advantages.gae_advantages, *wide, inserted, gamma=0.9, lam=0.8)
    np.testing.assert_allclose(found.advantages[inserted], plain.advantages[0], rtol=1e-13)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_over_the_tokens_of_the_step_with_ddof_1(shift_mean):
    values = RNG.normal(3, 2, (4, 5))
    mask = RNG.random((4, 5)) < 0.6
    poisoned = np.where(mask, values, np.nan)
    found = float64(advantages.whiten, poisoned, mask, shift_mean=shift_mean)
    inside = values[mask]
    expected = (inside - inside.mean()) / inside.std(ddof=1)
    if not shift_mean:
        expected = expected + inside.mean()
    np.testing.assert_allclose(found[mask], expected, rtol=1e-7)  # epsilon 1e-8 on the variance
    assert np.all(found[~mask] == 0)


def test_whitening_equal_values_gives_exactly_0():
    found = advantages.whiten(jnp.full((3, 3), 0.1), jnp.ones((3, 3), bool))
    assert np.all(np.asarray(found) == 0)


def test_an_unknown_scale_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean group"):
        advantages.scale_advantages(REWARDS, REWARDS, REWARDS, GROUP, EVERY, scale="grup")
