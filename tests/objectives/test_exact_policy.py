"""Closed forms on enumerated responses against brute force: every draw is written out here."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, log_softmax, logsumexp

import dpojax.exact
from dpojax.errors import ConfigError
from dpojax.objectives import exact, exact_policy, exact_tokens

RNG = np.random.default_rng(3)
REF = np.log(RNG.dirichlet(np.ones(5)))
POLICY = np.log(RNG.dirichlet(np.ones(5)))
REWARDS = RNG.normal(0, 1, 5)
TIED = np.array([0.5, -1.0, 0.5, 2.0, -1.0])
BETA = 0.4


def test_dpojax_exact_has_them_under_their_short_names():
    names = ("policy_gradient", "best_of_n", "best_of_n_kl", "tilted_frontier", "grpo_factor")
    for name in names:
        assert getattr(dpojax.exact, name) is getattr(exact_policy, name)
    assert dpojax.exact.gae is exact_tokens.gae


def value(logits, beta=BETA):
    logps = logits - logsumexp(logits)
    return sum(
        math.exp(p) * (r - beta * (p - q)) for p, q, r in zip(logps, REF, REWARDS, strict=True)
    )


def slope(function, x, step=1e-5):
    return np.array(
        [
            (function(x + step * unit) - function(x - step * unit)) / (2 * step)
            for unit in np.eye(x.size)
        ]
    )


def test_the_policy_gradient_is_the_slope_of_the_objective():
    found = exact_policy.policy_gradient(POLICY, REF, REWARDS, BETA)
    np.testing.assert_allclose(found, slope(value, POLICY), atol=1e-9)


def test_the_policy_gradient_is_zero_at_the_optimum_alone():
    star = exact.optimal_logps(REF, REWARDS, BETA)
    assert np.abs(exact_policy.policy_gradient(star, REF, REWARDS, BETA)).max() < 1e-16
    assert np.abs(exact_policy.policy_gradient(POLICY, REF, REWARDS, BETA)).max() > 1e-2


def test_prompts_are_computed_apart_and_logits_are_known_up_to_a_constant():
    both = exact_policy.policy_gradient(
        np.stack([POLICY + 3, REF]), REF, np.stack([REWARDS, TIED]), BETA
    )
    alone = exact_policy.policy_gradient(POLICY, REF, REWARDS, BETA)
    np.testing.assert_allclose(both[0], alone, atol=1e-15)
    np.testing.assert_allclose(
        both[1], exact_policy.policy_gradient(REF, REF, TIED, BETA), atol=1e-15
    )


@pytest.mark.parametrize("beta", [0.01, 0.4, 5.0])
def test_k3s_fixed_point_solves_its_equation_and_is_not_the_optimum(beta):
    found = exact_policy.k3_fixed_point(REF, REWARDS, beta)
    p = np.exp(found)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
    multiplier = beta + np.sum(p * REWARDS)
    np.testing.assert_allclose(p, beta * np.exp(REF) / (multiplier - REWARDS), rtol=1e-9)
    star = np.exp(exact.optimal_logps(REF, REWARDS, beta))
    assert np.abs(p - star).sum() / 2 > 1e-4  # at beta 5 both are near the reference


def test_k3s_fixed_point_of_equal_rewards_is_the_reference():
    found = exact_policy.k3_fixed_point(np.stack([REF, POLICY]), np.zeros(5), 0.3)
    np.testing.assert_allclose(found, np.stack([REF, POLICY]), rtol=1e-12)


@pytest.mark.parametrize("group_size", [2, 3, 4, 6])
@pytest.mark.parametrize("ddof", [0, 1])
def test_the_grpo_factor_is_the_mean_over_all_groups(group_size, ddof):
    p = 0.3
    gradient = 0.0  # of p = s(z) in z: each draw has the score r - p
    for rewards in itertools.product((0.0, 1.0), repeat=group_size):
        weight = math.prod(p if r else 1 - p for r in rewards)
        spread = np.std(rewards, ddof=ddof)
        if spread == 0:
            continue
        advantages = (np.array(rewards) - np.mean(rewards)) / spread
        gradient += weight * np.mean(advantages * (np.array(rewards) - p))
    found = exact_policy.grpo_factor(group_size, p, ddof=ddof)
    np.testing.assert_allclose(found, gradient / (p * (1 - p)), rtol=1e-13)


def test_the_grpo_factor_at_known_places():
    p = np.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(exact_policy.grpo_factor(2, p), 1, rtol=1e-13)
    np.testing.assert_allclose(exact_policy.grpo_factor(2, p, ddof=1), math.sqrt(0.5), rtol=1e-13)
    assert round(float(exact_policy.grpo_factor(4, 0.5)), 3) == 1.616
    many = exact_policy.grpo_factor(4000, p)
    np.testing.assert_allclose(many, 1 / np.sqrt(p * (1 - p)), rtol=4e-3)


def test_groups_of_one_have_no_factor():
    with pytest.raises(ConfigError, match="group_size is 1"):
        exact_policy.grpo_factor(1, 0.5)
    with pytest.raises(ConfigError, match="ddof is 2"):
        exact_policy.grpo_factor(4, 0.5, ddof=2)


# --- best of n ------------------------------------------------------------------------------------


def enumerated_best(logps, rewards, n):
    """The distribution of the best of n draws, a tie broken by one of its draws at random."""
    total = np.zeros(logps.size)
    for draws in itertools.product(range(logps.size), repeat=n):
        weight = math.prod(math.exp(logps[i]) for i in draws)
        most = max(rewards[i] for i in draws)
        best = [i for i in draws if rewards[i] == most]
        for i in best:
            total[i] += weight / len(best)
    return total


@pytest.mark.parametrize("rewards", [REWARDS, TIED, np.zeros(5)], ids=["distinct", "tied", "equal"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_is_the_distribution_of_the_best_draw(rewards, n):
    found = dpojax.exact.best_of_n(POLICY, rewards, n)
    np.testing.assert_allclose(found, enumerated_best(POLICY, rewards, n), rtol=1e-12)
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-13)
    by_hand = np.sum(found * np.log(found / np.exp(POLICY)))
    np.testing.assert_allclose(
        dpojax.exact.best_of_n_kl(POLICY, rewards, n), by_hand, rtol=1e-11, atol=1e-15
    )


def test_best_of_n_of_equal_rewards_is_the_policy():
    np.testing.assert_allclose(exact_policy.best_of_n(POLICY, np.ones(5), 64), np.exp(POLICY))
    assert abs(exact_policy.best_of_n_kl(POLICY, np.ones(5), 64)) < 1e-13


@pytest.mark.parametrize("n", [2, 16, 300])
def test_binary_rewards_move_bernoulli_mass(n):
    rewards = np.array([1.0, 0, 0, 1, 0])
    p = float(np.exp(POLICY) @ rewards)
    after = 1 - (1 - p) ** n
    failed = (1 - after) * (n * math.log1p(-p) - math.log1p(-p))
    expected = after * math.log(after / p) + failed
    np.testing.assert_allclose(exact_policy.best_of_n_kl(POLICY, rewards, n), expected, rtol=1e-12)


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_the_bounds_of_best_of_n_hold(n, seed):
    rng = np.random.default_rng(seed)
    logps = log_softmax(rng.normal(0, 3, 6))
    rewards = rng.normal(0, 1, 6)
    found = exact_policy.best_of_n_kl(logps, rewards, n)
    assert -1e-12 <= found <= exact_policy.best_of_n_kl_bound(n) + 1e-12
    assert found <= -logps[rewards.argmax()] + 1e-12


def test_the_bound_is_tight_for_many_distinct_rewards():
    rng = np.random.default_rng(0)
    logps = np.full(5000, -math.log(5000))
    found = exact_policy.best_of_n_kl(logps, rng.normal(0, 1, 5000), 8)
    np.testing.assert_allclose(found, exact_policy.best_of_n_kl_bound(8), rtol=1e-6)


def test_impossible_and_rare_responses_leave_finite_numbers():
    logps = log_softmax(np.array([0.0, -700.0, -np.inf, 1.0]))
    rewards = np.array([0.0, 1.0, 2.0, 0.5])
    found = exact_policy.best_of_n(logps, rewards, 10**6)
    np.testing.assert_allclose(found.sum(), 1, rtol=1e-12)
    assert found[2] == 0
    np.testing.assert_allclose(found[1], 1e6 * np.exp(logps[1]), rtol=1e-6)
    assert np.isfinite(exact_policy.best_of_n_kl(logps, rewards, 10**6))


def test_no_samples_have_no_best():
    with pytest.raises(ConfigError, match="n is 0"):
        exact_policy.best_of_n(POLICY, REWARDS, 0)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_win_rate_of_distinct_rewards_is_n_over_n_plus_1(n):
    rng = np.random.default_rng(1)
    logps = np.full(20_000, -math.log(20_000))
    found = exact_policy.best_of_n_win_rate(logps, rng.normal(0, 1, 20_000), n)
    np.testing.assert_allclose(found, n / (n + 1), atol=2e-3)


def test_ties_win_half():
    np.testing.assert_allclose(exact_policy.best_of_n_win_rate(POLICY, np.ones(5), 9), 0.5)


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_the_best_of_k_estimate_is_the_mean_over_all_subsets(k):
    rewards = np.random.default_rng(2).normal(0, 1, (2, 7))
    by_hand = [np.mean([max(s) for s in itertools.combinations(row, k)]) for row in rewards]
    np.testing.assert_allclose(exact_policy.best_of_k_mean(rewards, k), by_hand, rtol=1e-12)


def test_the_best_of_k_estimate_is_unbiased():
    logps = np.log([0.5, 0.3, 0.2])
    rewards = np.array([0.0, 1.0, 0.3])
    estimate = 0.0
    for draws in itertools.product(range(3), repeat=5):
        weight = math.exp(sum(logps[i] for i in draws))
        estimate += weight * exact_policy.best_of_k_mean(rewards[list(draws)], 3)
    expected = np.sum(enumerated_best(logps, rewards, 3) * rewards)
    np.testing.assert_allclose(estimate, expected, rtol=1e-12)
    with pytest.raises(ConfigError, match="k is 6"):
        exact_policy.best_of_k_mean(np.zeros(5), 6)


def test_thousands_of_samples_have_finite_weights():
    np.testing.assert_allclose(exact_policy.best_of_k_mean(np.ones(5000), 2500), 1, rtol=1e-9)


# --- the frontier ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_no_policy_lies_above_the_frontier(seed):
    betas = np.array([0.05, 0.3, 1.0, 4.0])
    frontier = exact_policy.tilted_frontier(REF, REWARDS, betas)
    logps = np.log(np.random.default_rng(seed).dirichlet(np.ones(5)))
    bound = frontier.reward + betas * (exact.kl(logps, REF) - frontier.kl)
    assert np.all(np.sum(np.exp(logps) * REWARDS) <= bound + 1e-12)


def test_the_frontier_rises_from_the_reference_to_the_best_response():
    frontier = exact_policy.tilted_frontier(REF, REWARDS, np.array([1e4, 1.0, 1e-3]))
    assert np.all(np.diff(frontier.kl) > 0) and np.all(np.diff(frontier.reward) > 0)
    np.testing.assert_allclose(frontier.kl[-1], -REF[REWARDS.argmax()], rtol=1e-6)
    np.testing.assert_allclose(frontier.reward[0], np.exp(REF) @ REWARDS, atol=1e-3)


def test_best_of_n_lies_below_the_frontier():
    betas = np.geomspace(0.02, 20, 400)
    frontier = exact_policy.tilted_frontier(REF, REWARDS, betas)
    for n in (2, 4, 16):
        kl = exact_policy.best_of_n_kl(REF, REWARDS, n)
        reward = np.sum(exact_policy.best_of_n(REF, REWARDS, n) * REWARDS)
        assert reward <= np.min(frontier.reward + betas * (kl - frontier.kl)) + 1e-12


# --- online DPO -----------------------------------------------------------------------------------


def sampled_gradient(logits, pair_loss):
    """The slope of the mean loss over two draws whose distribution is held fixed."""
    p = np.exp(log_softmax(logits))

    def mean(x):
        h = log_softmax(x) - REF
        return sum(
            p[i] * p[j] * pair_loss(h[i] - h[j], REWARDS[i] - REWARDS[j])
            for i, j in itertools.product(range(5), repeat=2)
        )

    return slope(mean, logits)


PAIR_LOSSES = {
    "square": lambda h, r: (BETA * h - r) ** 2,
    "soft": lambda h, r: (
        np.logaddexp(0, -BETA * h) * expit(r) + np.logaddexp(0, BETA * h) * expit(-r)
    ),
    "argmax": lambda h, r: np.logaddexp(0, -np.sign(r) * BETA * h),
}


@pytest.mark.parametrize("labels", exact_policy.LABELS)
def test_the_online_gradient_is_the_slope_of_the_sampled_loss(labels):
    found = exact_policy.online_gradient(POLICY, REF, REWARDS, BETA, labels=labels)
    np.testing.assert_allclose(found, sampled_gradient(POLICY, PAIR_LOSSES[labels]), atol=1e-8)


def test_regression_on_reward_differences_is_policy_gradient():
    found = exact_policy.online_gradient(POLICY, REF, REWARDS, BETA, labels="square")
    expected = -4 * BETA * exact_policy.policy_gradient(POLICY, REF, REWARDS, BETA)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_soft_online_dpo_tends_to_policy_gradient_as_differences_vanish():
    errors = []
    for scale in (1.0, 0.1, 0.01):
        policy = REF + scale * (POLICY - REF)
        policy = log_softmax(policy)
        found = exact_policy.online_gradient(policy, REF, scale * REWARDS, BETA, labels="soft")
        limit = -BETA / 2 * exact_policy.policy_gradient(policy, REF, scale * REWARDS, BETA)
        errors.append(np.abs(found - limit).max() / np.abs(limit).max())
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-4


def descend(labels, steps):
    logits = REF.copy()
    for _ in range(steps):
        logits = logits - 2.0 * exact_policy.online_gradient(
            logits, REF, REWARDS, BETA, labels=labels
        )
    return log_softmax(logits)


@pytest.mark.parametrize("labels", ["square", "soft"])
def test_online_dpo_with_bradley_terry_labels_reaches_the_optimum(labels):
    star = exact.optimal_logps(REF, REWARDS, BETA)
    found = descend(labels, 4000)
    assert np.abs(np.exp(found) - np.exp(star)).sum() / 2 < 1e-4


def test_argmax_labels_drift_past_the_optimum_without_end():
    star = exact.kl(exact.optimal_logps(REF, REWARDS, BETA), REF)
    distances = [exact.kl(descend("argmax", steps), REF) for steps in (3000, 12_000)]
    assert star < distances[0] < distances[1]


def test_unknown_labels_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean soft"):
        exact_policy.online_gradient(POLICY, REF, REWARDS, BETA, labels="softt")
