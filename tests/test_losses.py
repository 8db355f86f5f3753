"""Objectives against closed forms, finite differences, hand-written gradients and their exact optima."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from dpojax.losses import OBJECTIVES, PairInfo, PairLogps, closed_form, dpo_gradient, make_loss

SETTINGS = {"sigmoid": {"beta": 0.1}, "ipo": {"beta": 0.1}, "hinge": {"beta": 0.05}}


def pair(chosen, rejected, chosen_lengths=None, rejected_lengths=None):
    chosen, rejected = jnp.atleast_1d(jnp.asarray(chosen)), jnp.atleast_1d(jnp.asarray(rejected))
    ones = jnp.ones(chosen.shape, jnp.int32)
    lengths = [ones if x is None else jnp.asarray(x) for x in (chosen_lengths, rejected_lengths)]
    return PairLogps(chosen, rejected, *lengths)


def random_pairs(seed, n=16):
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, 20, n) for _ in range(2)]
    policy, ref = (pair(*rng.normal(-30, 5, (2, n)).astype(np.float32), *lengths) for _ in range(2))
    return policy, ref


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_at_policy_equal_reference_is_the_closed_form(name):
    policy, _ = random_pairs(0)
    loss = make_loss(name, **SETTINGS[name])(policy, policy).loss
    np.testing.assert_allclose(loss, closed_form(name, **SETTINGS[name]), rtol=1e-6)


def test_sigmoid_is_eq_7_computed_in_plain_python():
    policy, ref = random_pairs(1)
    found = make_loss("sigmoid", beta=0.3)(policy, ref)
    for i in range(16):
        h = float(policy.chosen[i] - ref.chosen[i]) - float(policy.rejected[i] - ref.rejected[i])
        assert math.isclose(found.loss[i], math.log1p(math.exp(-0.3 * h)), rel_tol=2e-5)
        assert math.isclose(found.chosen_rewards[i], 0.3 * float(policy.chosen[i] - ref.chosen[i]), rel_tol=1e-5)


def test_eq_8_by_hand_equals_autodiff():
    policy, ref = random_pairs(2)
    loss = make_loss("sigmoid", beta=0.1)
    grad = jax.grad(lambda p: loss(p, ref).loss.sum(), allow_int=True)(policy)
    by_hand = dpo_gradient(policy, ref, beta=0.1)
    np.testing.assert_allclose(grad.chosen, by_hand[0], rtol=1e-5)
    np.testing.assert_allclose(grad.rejected, by_hand[1], rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_is_the_finite_difference(name):
    with jax.enable_x64(True):
        policy, ref = random_pairs(3)
        policy, ref = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), p) for p in (policy, ref))
        loss = make_loss(name, **SETTINGS[name], sft_weight=0.2)
        check_grads(lambda c, r: loss(policy._replace(chosen=c, rejected=r), ref).loss, policy[:2], order=1, modes=["rev"])


def test_the_reference_gets_no_gradient():
    policy, ref = random_pairs(4)
    grad = jax.grad(lambda r: make_loss("sigmoid", beta=0.1)(policy, r).loss.sum(), allow_int=True)(ref)
    assert not np.any(grad.chosen) and not np.any(grad.rejected)


def minimise(loss, p, *, smoothing=0.0):
    """The h that minimises the population loss of one pair seen in both orders, by a fine grid."""
    h = jnp.linspace(-60, 60, 240_001)
    zero = jnp.zeros_like(h)
    ref = pair(zero, zero)
    value = p * loss(pair(h, zero), ref).loss + (1 - p) * loss(pair(zero, h), ref).loss
    return float(h[jnp.argmin(value)])


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9])
def test_optima_of_the_population_loss(p):
    with jax.enable_x64(True):
        logit = math.log(p / (1 - p))
        assert abs(0.1 * minimise(make_loss("sigmoid", beta=0.1), p) - logit) < 2e-3
        e = 0.1
        noisy = (1 - e) * p + e * (1 - p)
        found = 0.1 * minimise(make_loss("sigmoid", beta=0.1, label_smoothing=e), p)
        assert abs(found - math.log(noisy / (1 - noisy))) < 2e-3
        assert abs(minimise(make_loss("ipo", beta=0.1), p) - (2 * p - 1) / 0.2) < 2e-3
        assert abs(0.1 * minimise(make_loss("hinge", beta=0.1), p) - 1) < 2e-3


@settings(deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.sampled_from(sorted(OBJECTIVES)))
def test_extreme_log_ratios_stay_finite(a, b, name):
    policy, ref = pair(np.float32(a), np.float32(b)), pair(np.float32(0), np.float32(0))
    loss = make_loss(name, **SETTINGS[name])
    value, grad = jax.value_and_grad(lambda p: loss(p, ref).loss.sum(), allow_int=True)(policy)
    assert np.isfinite(value) and np.isfinite(grad.chosen).all() and np.isfinite(grad.rejected).all()


@settings(deadline=None)
@given(st.floats(-50, 50), st.floats(-50, 50))
def test_soft_label_is_the_weighted_mean_of_both_orders(a, b):
    policy, ref = pair(np.float32(a), np.float32(b)), pair(np.float32(0), np.float32(0))
    loss = make_loss("sigmoid", beta=0.1)
    mixed = loss(policy, ref, PairInfo(soft_label=jnp.array([0.3]))).loss
    swapped = loss(pair(np.float32(b), np.float32(a)), ref).loss
    np.testing.assert_allclose(mixed, 0.3 * loss(policy, ref).loss + 0.7 * swapped, rtol=1e-5, atol=1e-6)


def test_sft_term_averages_to_the_token_mean():
    policy, ref = random_pairs(5)
    with_term = make_loss("sigmoid", beta=0.1, sft_weight=0.2)(policy, ref).loss
    without = make_loss("sigmoid", beta=0.1)(policy, ref).loss
    token_mean = -float(policy.chosen.sum()) / float(policy.chosen_lengths.sum())
    assert math.isclose(float((with_term - without).mean()), 0.2 * token_mean, rel_tol=1e-4)


def test_weight_scales_and_silences_a_pair():
    policy, ref = random_pairs(6)
    weight = jnp.asarray([0.0, 2.0] * 8)
    plain = make_loss("sigmoid", beta=0.1)(policy, ref).loss
    np.testing.assert_allclose(make_loss("sigmoid", beta=0.1)(policy, ref, PairInfo(weight=weight)).loss, plain * weight)


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        (dict(name="sigmoid", beta=-1.0), "loss.beta"),
        (dict(name="sigmoid", beta=math.nan), "loss.beta"),
        (dict(name="sigmoid"), "loss.beta"),
        (dict(name="sigmoid", beta=0.1, label_smoothing=0.5), "loss.label_smoothing"),
        (dict(name="hinge", beta=0.1, label_smoothing=0.1), "loss.label_smoothing"),
        (dict(name="dpo", beta=0.1), "loss.name"),
        (dict(name="ipo", beta=0.1, average="yes"), "loss.average"),
    ],
)
def test_bad_settings_fail_when_the_loss_is_made_and_name_the_field(kwargs, names):
    with pytest.raises(ValueError, match=names):
        make_loss(**kwargs)
