"""Reward losses against TRL's frozen numbers, their minimisers and loops over pairs."""

import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit, logit

from dpojax.errors import ConfigError, DataError
from dpojax.objectives import reward
from dpojax.objectives.loss import make_loss
from dpojax.objectives.pairs import pair_logps

FROZEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "oracles/frozen/trl_policy_losses.json").read_text()
)
RNG = np.random.default_rng(31)


def float64(function, *arrays):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*map(jnp.asarray, arrays)))


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", FROZEN["reward"])
def test_values_and_gradients_are_trls(label):
    case = FROZEN["reward"][label]
    margin = np.asarray(FROZEN["inputs"]["margin"]) if case["margin"] else None

    def loss(rewards):
        chosen, rejected = jnp.split(rewards, 2)
        return jnp.mean(
            reward.bradley_terry_loss(
                chosen, rejected, margin=margin, centring=case["centring"] or 0.0
            )
        )

    value, gradient = float64(jax.value_and_grad(loss), np.array(FROZEN["inputs"]["rewards"]))
    np.testing.assert_allclose(value, case["loss"], rtol=1e-12)
    np.testing.assert_allclose(gradient, case["gradient"], rtol=1e-12, atol=1e-15)


def test_on_log_ratios_it_is_dpos_loss_to_the_bit():
    policy, ref = RNG.normal(-20, 3, (2, 2, 8)).astype(np.float32)
    lengths = np.full(8, 5)
    expected = make_loss("sigmoid", beta=0.1)(
        pair_logps(policy[0], policy[1], lengths, lengths),
        pair_logps(ref[0], ref[1], lengths, lengths),
    )
    h = (jnp.asarray(policy[0]) - ref[0]) - (jnp.asarray(policy[1]) - ref[1])
    found = reward.bradley_terry_loss(0.1 * h, jnp.zeros(8))
    np.testing.assert_array_equal(found, expected.loss)


def test_soft_labels_weigh_both_orders():
    chosen, rejected = RNG.normal(0, 1, (2, 6))
    p = RNG.uniform(0, 1, 6)

    def loss(a, b, label):
        return reward.bradley_terry_loss(a, b, soft_label=label)

    found = float64(loss, chosen, rejected, p)
    expected = -p * np.log(expit(chosen - rejected)) - (1 - p) * np.log(expit(rejected - chosen))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    certain = float64(loss, chosen, rejected, np.ones(6))
    plain = float64(reward.bradley_terry_loss, chosen, rejected)
    np.testing.assert_allclose(certain, plain, rtol=1e-14)


def test_far_rewards_stay_finite_in_float32():
    def loss(a):
        return reward.bradley_terry_loss(a, jnp.float32(0), soft_label=jnp.float32(0.3))

    for value in (-1e4, 1e4):
        loss_value, slope = jax.value_and_grad(loss)(jnp.float32(value))
        assert np.isfinite(loss_value) and np.isfinite(slope)


# --- groups ---------------------------------------------------------------------------------------


def comparisons(k):
    return np.ones((1, k, k), bool)


def minimiser(preferences, margins=None, centring=0.0):
    """The K rewards that minimise the population loss of one prompt."""
    k = preferences.shape[-1]

    @jax.jit
    def loss(rewards):
        return reward.group_loss(
            rewards[None], preferences, comparisons(k), margins=margins, centring=centring
        )[0]

    with jax.enable_x64(True):
        solve = jax.value_and_grad(loss)

        def of_host(x):
            value, gradient = solve(jnp.asarray(x))
            return float(value), np.asarray(gradient)

        return scipy.optimize.minimize(of_host, np.zeros(k), jac=True, tol=1e-12).x


def test_the_minimisers_differences_are_the_logits_of_the_preferences():
    truth = np.array([0.3, -1.0, 1.2, 0.0])
    preferences = expit(truth[:, None] - truth[None])[None]
    found = minimiser(preferences)
    np.testing.assert_allclose(found - found[0], truth - truth[0], atol=2e-3)


def test_a_margin_moves_the_minimiser_by_itself():
    preferences = np.full((1, 2, 2), 0.8)
    margins = np.full((1, 2, 2), 0.5)
    found = minimiser(preferences, margins)
    np.testing.assert_allclose(found[0] - found[1], logit(0.8) + 0.5, atol=1e-4)


def test_centring_chooses_the_constant_of_a_prompt():
    truth = np.array([3.0, 2.0, 5.0])
    preferences = expit(truth[:, None] - truth[None])[None]
    found = minimiser(preferences, centring=1e-3)
    assert abs(found.mean()) < 0.05
    np.testing.assert_allclose(found - found[0], truth - truth[0], atol=0.05)


def group_of(rewards, scores, compared=None):
    k = rewards.shape[-1]
    if compared is None:
        compared = np.broadcast_to(comparisons(k), (rewards.shape[0], k, k))

    def loss(r, s):
        return reward.group_loss(r, reward.preferences_of_scores(s), compared)

    return float64(loss, rewards, scores)


def test_the_groups_loss_is_the_mean_over_its_pairs():
    rewards, scores = RNG.normal(0, 1, (2, 3, 4))
    found = group_of(rewards, scores)
    for row in range(3):
        losses = []
        for i, j in itertools.permutations(range(4), 2):
            if scores[row, i] > scores[row, j]:
                losses.append(-np.log(expit(rewards[row, i] - rewards[row, j])))
        np.testing.assert_allclose(found[row], np.mean(losses), rtol=1e-12)


def test_the_order_of_a_prompts_responses_changes_nothing():
    rewards, scores = RNG.normal(0, 1, (2, 3, 5))
    order = RNG.permutation(5)
    found = group_of(rewards, scores)
    np.testing.assert_allclose(group_of(rewards[:, order], scores[:, order]), found, rtol=1e-12)


def test_tied_scores_are_soft_labels_of_one_half():
    found = group_of(np.array([[1.0, 0.0]]), np.array([[2.0, 2.0]]))
    np.testing.assert_allclose(found, -np.log(expit(1)) / 2 - np.log(expit(-1)) / 2, rtol=1e-12)


def test_responses_that_no_pair_compares_may_be_anything():
    rewards = RNG.normal(0, 1, (2, 4))
    rewards[:, [1, 3]] = np.nan
    compared = np.zeros((2, 4, 4), bool)
    compared[0, 0, 2] = compared[0, 2, 0] = True

    def loss(r):
        return reward.group_loss(r, jnp.ones((2, 4, 4)), jnp.asarray(compared))

    found = float64(loss, rewards)
    expected = -np.log(expit(rewards[0, 0] - rewards[0, 2]))
    np.testing.assert_allclose(found, [expected, 0], rtol=1e-12)
    gradient = float64(jax.grad(lambda r: jnp.sum(loss(r))), rewards)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradient != 0, [[True, False, True, False], [False] * 4])


def test_plackett_luce_is_the_product_of_choices_among_what_is_left():
    rewards = RNG.normal(0, 1, (2, 4))
    valid = np.array([[True] * 4, [True, True, False, False]])
    rewards[1, 2:] = np.nan
    found = float64(reward.plackett_luce_loss, rewards, valid)
    for row, size in enumerate((4, 2)):
        expected = 0.0
        for place in range(size):
            left = np.exp(rewards[row, place:size])
            expected -= np.log(left[0] / left.sum())
        np.testing.assert_allclose(found[row], expected, rtol=1e-12)
    pair = reward.bradley_terry_loss(rewards[1, 0], rewards[1, 1])
    np.testing.assert_allclose(found[1], pair, rtol=1e-6)

    def total(r):
        return jnp.sum(reward.plackett_luce_loss(r, jnp.asarray(valid)))

    assert np.all(np.isfinite(float64(jax.grad(total), rewards)))


# --- held-out pairs -------------------------------------------------------------------------------


def test_ties_are_half_right():
    assert reward.pair_accuracy(np.array([1.0, -1, 0, 2])) == 0.625


def test_reliability_counts_each_pair_in_its_bin():
    margins = np.array([0.1, -0.2, 3.0, 2.5, -2.5, 0.0, 50.0])
    found = reward.reliability(margins, bins=5)
    confidence = expit(np.abs(margins))
    right = [1, 0, 1, 1, 0, 0.5, 1]
    gap = 0.0
    for i in range(5):
        low, high = found.edges[i], found.edges[i + 1]
        inside = [k for k, c in enumerate(confidence) if low <= c < high or (i == 4 and c == 1)]
        assert found.count[i] == len(inside)
        if inside:
            mean_confidence = np.mean(confidence[inside])
            mean_right = np.mean([right[k] for k in inside])
            np.testing.assert_allclose(found.confidence[i], mean_confidence)
            np.testing.assert_allclose(found.accuracy[i], mean_right)
            gap += len(inside) / 7 * abs(mean_confidence - mean_right)
        else:
            assert np.isnan(found.accuracy[i])
    np.testing.assert_allclose(found.ece, gap)


def test_true_rewards_are_calibrated_and_stretched_ones_are_not():
    rng = np.random.default_rng(0)
    gaps = rng.normal(0, 2, 100_000)
    margins = np.where(rng.random(gaps.size) < expit(gaps), gaps, -gaps)
    assert reward.reliability(margins).ece < 0.01
    assert reward.reliability(3 * margins).ece > 0.08


@pytest.mark.parametrize(
    ("margins", "bins", "error", "message"),
    [
        ([], 10, DataError, "no pairs"),
        ([1.0, np.nan], 10, DataError, "1 of 2 margins"),
        ([1.0], 0, ConfigError, "bins is 0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(margins, bins, error, message):
    with pytest.raises(error, match=message):
        reward.reliability(np.array(margins), bins=bins)


def test_normalised_rewards_have_mean_0_and_deviation_1_and_the_same_order():
    rewards = RNG.normal(3, 7, 256)
    found = reward.fit_normalisation(rewards)
    normalised = found.apply(rewards)
    np.testing.assert_allclose([normalised.mean(), normalised.std()], [0, 1], atol=1e-12)
    np.testing.assert_array_equal(np.argsort(normalised), np.argsort(rewards))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (np.full(9, 0.1), "do not vary"),
        (np.array([1.0]), "1 samples of the reference do not vary"),
        (np.array([1.0, np.inf, np.nan]), "2 of 3 rewards"),
    ],
)
def test_rewards_that_cannot_be_normalised_are_refused(rewards, message):
    with pytest.raises(DataError, match=message):
        reward.fit_normalisation(rewards)
