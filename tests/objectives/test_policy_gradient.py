"""Ratios, clipping, the KL's terms, aggregates and the value loss against loops and slopes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dpojax.errors import ConfigError
from dpojax.objectives import policy_gradient

RNG = np.random.default_rng(8)
N, T = 4, 5
LOGPS = -RNG.gamma(1.5, 0.8, (N, T))
OLD = LOGPS + RNG.normal(0, 0.3, (N, T))
REF = LOGPS + RNG.normal(0, 0.3, (N, T))
ADVANTAGES = RNG.normal(0, 1, (N, T))
MASK = np.arange(T) < np.array([[5], [2], [1], [0]])
LENGTHS = MASK.sum(-1)


def float64(function, *arrays, **more):
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, function(*map(jnp.asarray, arrays), **more))


def test_estimators_are_their_formulas_and_0_at_ratio_1():
    x = np.linspace(-2, 2, 9)
    np.testing.assert_allclose(float64(policy_gradient.k1, x), x)
    np.testing.assert_allclose(float64(policy_gradient.k2, x), x**2 / 2)
    np.testing.assert_allclose(
        float64(policy_gradient.k3, x), np.exp(-x) - 1 + x, rtol=1e-12, atol=1e-15
    )
    for estimator in (policy_gradient.k1, policy_gradient.k2, policy_gradient.k3):
        assert estimator(jnp.float32(0.0)) == 0
    assert np.all(float64(policy_gradient.k3, np.linspace(-1e-6, 1e-6, 11)) >= 0)


# --- ratios ---------------------------------------------------------------------------------------


def test_ratios_are_of_the_token_of_the_response_and_its_geometric_mean():
    for row in range(3):
        inside = [LOGPS[row, t] - OLD[row, t] for t in range(LENGTHS[row])]
        expected = {
            "token": inside,
            "sequence": [sum(inside)] * len(inside),
            "geometric": [sum(inside) / len(inside)] * len(inside),
        }
        for ratio, values in expected.items():
            found = float64(policy_gradient.policy_log_ratios, LOGPS, OLD, MASK, ratio=ratio)
            np.testing.assert_allclose(found[row, : LENGTHS[row]], values, rtol=1e-12)
            assert np.all(found[~MASK] == 0)


@pytest.mark.parametrize("ratio", policy_gradient.RATIOS)
def test_the_ratio_of_the_drawing_policy_itself_is_exactly_1(ratio):
    logps = jnp.asarray(LOGPS, jnp.float32)
    found = policy_gradient.policy_surrogate(
        logps,
        *(logps, jnp.asarray(ADVANTAGES, jnp.float32), MASK),
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.2,
    )
    assert np.all(np.asarray(found.ratio) == 1)


# --- clipping -------------------------------------------------------------------------------------


def surrogate_slope(ratio, advantage, low=0.2, high=0.3):
    def objective(x):
        found = policy_gradient.clipped_surrogate(x, advantage, clip_low=low, clip_high=high)
        return found.objective

    return jax.value_and_grad(objective)(jnp.float32(math.log(ratio)))


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [
        (1.4, 2.0, True),
        (1.4, -2.0, False),
        (0.7, -2.0, True),
        (0.7, 2.0, False),
        (1.25, 2.0, False),  # between 1 - low and 1 + high nothing is clipped
        (0.9, -2.0, False),
    ],
)
def test_the_four_quadrants_of_the_clip(ratio, advantage, clipped):
    value, slope = surrogate_slope(ratio, advantage)
    held = min(max(ratio, 0.8), 1.3)
    np.testing.assert_allclose(value, min(ratio * advantage, held * advantage), rtol=1e-6)
    if clipped:
        assert slope == 0
    else:
        np.testing.assert_allclose(slope, ratio * advantage, rtol=1e-6)


def test_there_is_no_second_bound_for_negative_advantages():
    value, slope = surrogate_slope(50.0, -1.0)
    np.testing.assert_allclose([value, slope], -50, rtol=1e-5)


def test_infinite_bounds_clip_nothing():
    for ratio in (0.01, 100.0):
        for advantage in (-1.0, 1.0):
            value, _ = surrogate_slope(ratio, advantage, math.inf, math.inf)
            np.testing.assert_allclose(value, ratio * advantage, rtol=1e-5)


def test_a_clipped_ratio_that_overflows_leaves_finite_gradients():
    def objective(x):
        return policy_gradient.clipped_surrogate(x, 1.0, clip_low=0.2, clip_high=0.2).objective

    value, slope = jax.value_and_grad(objective)(jnp.float32(200.0))
    np.testing.assert_allclose(value, 1.2, rtol=1e-6)
    assert slope == 0


# --- the KL ---------------------------------------------------------------------------------------


def test_kl_terms_are_their_formulas():
    to_ref = LOGPS - REF
    to_old = LOGPS - OLD
    k3 = np.exp(-to_ref) - 1 + to_ref
    expected = {
        "loss_k3": ("token", k3),
        "loss_k3_ratio": ("token", np.exp(to_old) * k3),
        "reward": ("token", np.zeros((N, T))),
        "none": ("token", np.zeros((N, T))),
    }
    for kl, (ratio, terms) in expected.items():
        found = float64(policy_gradient.kl_terms, LOGPS, OLD, REF, MASK, kl=kl, ratio=ratio)
        np.testing.assert_allclose(found, np.where(MASK, terms, 0), rtol=1e-9, atol=1e-13)
    sums = np.where(MASK, to_ref, 0).sum(-1)
    found = float64(
        policy_gradient.kl_terms, LOGPS, OLD, REF, MASK, kl="loss_k2_sequence", ratio="token"
    )
    np.testing.assert_allclose(found.sum(-1), sums**2 / 2, rtol=1e-12)
    means = np.where(MASK, to_old, 0).sum(-1) / np.maximum(LENGTHS, 1)
    found = float64(
        policy_gradient.kl_terms, LOGPS, OLD, REF, MASK, kl="loss_k3_ratio", ratio="geometric"
    )
    weighted = np.exp(means)[:, None] * k3
    np.testing.assert_allclose(found, np.where(MASK, weighted, 0), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kl", policy_gradient.KL_PLACEMENTS)
def test_the_kl_to_the_policy_itself_is_exactly_0(kl):
    logps = jnp.asarray(LOGPS, jnp.float32)
    found = policy_gradient.kl_terms(logps, logps, logps, MASK, kl=kl, ratio="token")
    assert np.all(np.asarray(found) == 0)


@pytest.mark.parametrize("kl", ["loss_k1", "reward_k3"])
def test_what_has_no_gradient_towards_the_reference_is_refused_with_the_reason(kl):
    with pytest.raises(ConfigError, match=r"gradient .* reference"):
        policy_gradient.check_kl(kl)


def test_an_unknown_placement_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean loss_k2_sequence"):
        policy_gradient.check_kl("loss_k2_sequenc")
    for kl in policy_gradient.KL_PLACEMENTS:
        policy_gradient.check_kl(kl)


# --- aggregates -----------------------------------------------------------------------------------


def by_hand(terms, aggregate, max_tokens):
    responses = [terms[row, : LENGTHS[row]] for row in range(N) if LENGTHS[row]]
    if aggregate == "token":
        return sum(r.sum() for r in responses) / sum(r.size for r in responses)
    if aggregate == "sequence":
        return np.mean([r.mean() for r in responses])
    return np.mean([r.sum() / max_tokens for r in responses])


def aggregated(terms, rows, aggregate, denominators):
    with jax.enable_x64(True):
        return float(
            policy_gradient.aggregate_terms(
                jnp.asarray(terms[rows]),
                jnp.asarray(MASK[rows]),
                denominators,
                aggregate=aggregate,
                max_tokens=64.0,
            )
        )


@pytest.mark.parametrize("aggregate", policy_gradient.AGGREGATES)
def test_micro_batches_add_up_to_the_step(aggregate):
    terms = np.where(MASK, ADVANTAGES, np.nan)
    with jax.enable_x64(True):
        step = policy_gradient.count_denominators(jnp.asarray(MASK), jnp.float64)
    expected = by_hand(ADVANTAGES, aggregate, 64)
    for parts in ([range(4)], [[0], [1, 2, 3]], [[3], [2], [1], [0]], [[1, 3], [0, 2]]):
        found = sum(aggregated(terms, np.array(rows), aggregate, step) for rows in parts)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_constant_aggregate_does_not_depend_on_the_padded_width():
    with jax.enable_x64(True):
        wide = np.pad(ADVANTAGES, ((0, 0), (0, 9)))
        mask = np.pad(MASK, ((0, 0), (0, 9)))
        step = policy_gradient.count_denominators(jnp.asarray(mask), jnp.float64)
        found = policy_gradient.aggregate_terms(
            jnp.asarray(wide), jnp.asarray(mask), step, aggregate="constant", max_tokens=64.0
        )
    np.testing.assert_allclose(found, by_hand(ADVANTAGES, "constant", 64), rtol=1e-12)


def test_a_step_without_tokens_has_the_loss_0():
    mask = jnp.zeros((2, 3), bool)
    step = policy_gradient.count_denominators(mask)
    for aggregate in policy_gradient.AGGREGATES:
        found = policy_gradient.aggregate_terms(
            jnp.full((2, 3), jnp.nan), mask, step, aggregate=aggregate
        )
        assert found == 0


@pytest.mark.parametrize(
    ("call", "nearest"),
    [
        (
            lambda: policy_gradient.policy_log_ratios(LOGPS, OLD, MASK, ratio="tokens"),
            "token",
        ),
        (
            lambda: policy_gradient.aggregate_terms(
                LOGPS,
                MASK,
                policy_gradient.count_denominators(jnp.asarray(MASK)),
                aggregate="sequense",
            ),
            "sequence",
        ),
    ],
)
def test_unknown_choices_name_the_nearest(call, nearest):
    with pytest.raises(ConfigError, match=f"did you mean {nearest}"):
        call()


# --- the value loss, and beta ---------------------------------------------------------------------


def value_terms(values, old=OLD, returns=REF, clip=0.2):
    return float64(policy_gradient.value_terms, values, old, returns, MASK, clip=clip)


def test_the_value_loss_at_the_old_values_is_half_the_squared_error():
    found = value_terms(OLD)
    np.testing.assert_allclose(found, np.where(MASK, (OLD - REF) ** 2 / 2, 0), rtol=1e-12)
    found = value_terms(LOGPS, clip=math.inf)
    np.testing.assert_allclose(found, np.where(MASK, (LOGPS - REF) ** 2 / 2, 0), rtol=1e-12)


def test_a_value_beyond_the_clip_has_a_gradient_only_where_it_got_worse():
    mask = jnp.ones((1, 1), bool)

    def slope(value, old, target):
        def loss(v):
            terms = policy_gradient.value_terms(
                jnp.full((1, 1), v),
                jnp.full((1, 1), old),
                jnp.full((1, 1), target),
                mask,
                clip=0.2,
            )
            return terms[0, 0]

        return float(jax.grad(loss)(jnp.float32(value)))

    assert slope(0.5, 0.0, 1.0) == 0  # nearer the target than the clip allows
    np.testing.assert_allclose(slope(-0.5, 0.0, 1.0), -1.5, rtol=1e-6)
    np.testing.assert_allclose(slope(0.1, 0.0, 1.0), -0.9, rtol=1e-6)


def test_value_gradients_are_slopes_and_ignore_what_is_masked():
    with jax.enable_x64(True):
        mask = jnp.asarray(MASK)

        def loss(values):
            terms = policy_gradient.value_terms(
                jnp.where(mask, values, jnp.nan),
                jnp.where(mask, OLD, 1e9),
                jnp.where(mask, REF, jnp.nan),
                mask,
                clip=0.1,
            )
            return jnp.sum(terms)

        check_grads(loss, (jnp.asarray(LOGPS),), order=1, modes=["rev"])


def test_a_constant_error_moves_beta_by_the_same_factor_each_step():
    beta = 0.15
    for step in range(1, 6):
        beta = policy_gradient.adaptive_beta(
            beta, kl=30.0, target=6.0, horizon=10_000, num_samples=256
        )
        np.testing.assert_allclose(beta, 0.15 * (1 + 0.2 * 256 / 10_000) ** step, rtol=1e-12)
    settings = dict(target=6.0, horizon=10_000, num_samples=256)
    assert policy_gradient.adaptive_beta(0.1, kl=6.0, **settings) == 0.1
    np.testing.assert_allclose(
        policy_gradient.adaptive_beta(0.1, kl=0.0, **settings), 0.1 * (1 - 0.2 * 0.0256)
    )
    np.testing.assert_allclose(
        policy_gradient.adaptive_beta(0.1, kl=6.6, **settings), 0.1 * (1 + 0.1 * 0.0256)
    )
