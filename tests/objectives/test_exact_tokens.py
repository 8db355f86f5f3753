"""Token-level closed forms against sums over every response, and the placements of the KL."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import dpojax.exact
from dpojax.errors import ConfigError
from dpojax.objectives import exact_tokens

RNG = np.random.default_rng(11)
SPACE = exact_tokens.token_space(3, 3)
LOGITS = RNG.normal(0, 1, (SPACE.num_states, 3))
REF_LOGITS = RNG.normal(0, 1, (SPACE.num_states, 3))
REWARDS = RNG.normal(0, 1, 15)
BETA = 0.3


def table_of(logits):
    """{response: log-prob of each of its tokens}, from a dictionary of prefixes."""
    rows = {}
    log_probs = log_softmax(logits, axis=-1)
    for row in range(15):
        tokens = SPACE.tokens[row][SPACE.mask[row]]
        states = SPACE.states[row][SPACE.mask[row]]
        rows[tuple(tokens)] = [log_probs[s, t] for s, t in zip(states, tokens, strict=True)]
    return rows


def test_a_space_holds_every_response_once():
    expected = {(2,), (0, 2), (1, 2)}
    expected |= {(*prefix, 2) for prefix in itertools.product((0, 1), repeat=2)}
    expected |= set(itertools.product((0, 1), repeat=3))
    table = table_of(LOGITS)
    assert set(table) == expected and SPACE.num_states == 7
    total = sum(math.exp(sum(logps)) for logps in table.values())
    np.testing.assert_allclose(total, 1, rtol=1e-13)
    with pytest.raises(ConfigError, match="vocab_size is 1"):
        exact_tokens.token_space(1, 3)


def test_token_logps_are_those_of_the_table():
    with jax.enable_x64(True):
        found = np.asarray(exact_tokens.response_logps(SPACE, jnp.asarray(LOGITS)))
    np.testing.assert_allclose(found, [sum(v) for v in table_of(LOGITS).values()], rtol=1e-13)


def objective(logits, beta=BETA):
    policy = table_of(logits)
    ref = table_of(REF_LOGITS)
    total = 0.0
    for reward, response in zip(REWARDS, policy, strict=True):
        logp = sum(policy[response])
        total += math.exp(logp) * (reward - beta * (logp - sum(ref[response])))
    return total


def test_the_regularised_gradient_is_the_slope_of_the_objective():
    found = exact_tokens.regularised_gradient(SPACE, LOGITS, REF_LOGITS, REWARDS, BETA)
    step = 1e-5
    for state, token in itertools.product(range(SPACE.num_states), range(3)):
        moved = np.zeros_like(LOGITS)
        moved[state, token] = step
        slope = (objective(LOGITS + moved) - objective(LOGITS - moved)) / (2 * step)
        np.testing.assert_allclose(found[state, token], slope, atol=1e-9)


def test_the_kl_at_visited_states_has_the_kl_as_its_mean_and_is_never_negative():
    found = exact_tokens.visited_kl(SPACE, LOGITS, REF_LOGITS)
    policy = table_of(LOGITS)
    ref = table_of(REF_LOGITS)
    weights = np.array([math.exp(sum(v)) for v in policy.values()])
    ratios = np.array([sum(policy[y]) - sum(ref[y]) for y in policy])
    np.testing.assert_allclose(weights @ found, weights @ ratios, rtol=1e-12)
    assert found.min() >= 0 > ratios.min()
    spread = weights @ found**2 - (weights @ found) ** 2
    assert spread < weights @ ratios**2 - (weights @ ratios) ** 2
    assert np.all(exact_tokens.visited_kl(SPACE, LOGITS, LOGITS) == 0)


def test_state_values_are_the_means_over_the_responses_that_pass_through():
    token_rewards = RNG.normal(0, 1, SPACE.tokens.shape)
    found = exact_tokens.state_values(SPACE, LOGITS, np.where(SPACE.mask, token_rewards, np.nan))
    weights = [math.exp(sum(v)) for v in table_of(LOGITS).values()]
    for row, place in np.argwhere(SPACE.mask):
        prefix = tuple(SPACE.tokens[row, :place])
        through = [
            k
            for k in range(15)
            if SPACE.lengths[k] > place and tuple(SPACE.tokens[k, :place]) == prefix
        ]
        to_go = [token_rewards[k, place : SPACE.lengths[k]].sum() for k in through]
        expected = np.average(to_go, weights=[weights[k] for k in through])
        np.testing.assert_allclose(found[row, place], expected, rtol=1e-12)


# --- generalised advantages -----------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_satisfies_its_recursion(lam):
    rewards, values = RNG.normal(0, 1, (2, 4, 6))
    found = dpojax.exact.gae(rewards, values, 0.9, lam)
    following = np.zeros(4)
    next_value = np.zeros(4)
    for t in reversed(range(6)):
        delta = rewards[:, t] + 0.9 * next_value - values[:, t]
        following = delta + 0.9 * lam * following
        next_value = values[:, t]
        np.testing.assert_allclose(found[:, t], following, rtol=1e-12)


def test_gae_at_lambda_1_is_the_return_minus_the_value():
    rewards, values = RNG.normal(0, 1, (2, 6))
    to_go = np.array([rewards[t:].sum() for t in range(6)])
    np.testing.assert_allclose(exact_tokens.gae(rewards, values, 1.0, 1.0), to_go - values)


def test_gae_never_reads_what_the_mask_leaves_out():
    rewards, values = RNG.normal(0, 1, (2, 5))
    alone = exact_tokens.gae(rewards, values, 0.9, 0.8)
    mask = np.array([True, True, False, False, True, True, True, False])
    wide = np.full((2, 8), np.nan)
    wide[:, mask] = rewards, values
    found = exact_tokens.gae(*wide, 0.9, 0.8, mask)
    np.testing.assert_allclose(found[mask], alone, rtol=1e-14)
    assert np.all(found[~mask] == 0)


# --- where the KL goes (algorithms.md A0) ---------------------------------------------------------


def negative(loss):
    return exact_tokens.expected_gradient(SPACE, LOGITS, loss)


def with_table(function):
    """The gradient in the table of logits of something that needs more than token log-probs."""
    with jax.enable_x64(True):
        return np.asarray(jax.grad(function)(jnp.asarray(LOGITS)))


def kl_gradient():
    """The gradient of KL(pi || ref) of whole responses."""
    return -exact_tokens.regularised_gradient(SPACE, LOGITS, REF_LOGITS, np.zeros(15), 1.0)


def log_ratios(logps):
    return logps - jnp.asarray(_REF_LOGPS)


with jax.enable_x64(True):
    _REF_LOGPS = np.asarray(exact_tokens.token_logps(SPACE, jnp.asarray(REF_LOGITS)))
MASK = SPACE.mask


def k3(lr):
    return jnp.exp(-lr) - 1 + lr


def score_weighted(weights):
    """A loss whose gradient is weight times score, token by token."""
    return lambda logps: jnp.sum(jnp.where(MASK, weights(logps) * logps, 0), axis=-1)


def detached_sum(logps):
    lr = jax.lax.stop_gradient(log_ratios(logps))
    return jnp.sum(jnp.where(MASK, lr, 0), axis=-1, keepdims=True) + jnp.zeros_like(logps)


def detached_to_go(logps):
    lr = jnp.where(MASK, jax.lax.stop_gradient(log_ratios(logps)), 0)
    return jnp.cumsum(lr[:, ::-1], axis=-1)[:, ::-1]


def tokens_of(function):
    return lambda logps: jnp.sum(jnp.where(MASK, function(logps), 0), axis=-1)


def ratio(logps):
    return jnp.exp(logps - jax.lax.stop_gradient(logps))


EXACT = {
    "k1 of the response in the reward": score_weighted(detached_sum),
    "k1 in the reward, reward to go": score_weighted(detached_to_go),
    "half the squared log-ratio of the response in the loss": lambda logps: (
        0.5 * jnp.sum(jnp.where(MASK, log_ratios(logps), 0), axis=-1) ** 2
    ),
}
PARTIAL = {
    "ratio * k3 in the loss": tokens_of(lambda x: ratio(x) * k3(log_ratios(x))),
    "ratio * k1 in the loss": tokens_of(lambda x: ratio(x) * log_ratios(x)),
    "k2 of each token in the loss": tokens_of(lambda x: 0.5 * log_ratios(x) ** 2),
}


@pytest.mark.parametrize("placement", EXACT)
def test_these_placements_have_the_kls_gradient(placement):
    found = negative(EXACT[placement])
    np.testing.assert_allclose(found, kl_gradient(), atol=1e-15)


def full_vocabulary_gradient():
    """Of the KL at visited states, while the states themselves stay as they are."""
    with jax.enable_x64(True):
        weights = np.exp(np.asarray(exact_tokens.response_logps(SPACE, jnp.asarray(LOGITS))))

    def mean(table):
        log_probs = jax.nn.log_softmax(table, axis=-1)
        ref = jax.nn.log_softmax(jnp.asarray(REF_LOGITS), axis=-1)
        of_state = jnp.sum(jnp.exp(log_probs) * (log_probs - ref), axis=-1)
        return jnp.sum(weights[:, None] * jnp.where(MASK, of_state[SPACE.states], 0))

    return with_table(mean)


@pytest.mark.parametrize("placement", PARTIAL)
def test_these_placements_miss_that_tokens_change_later_kl(placement):
    partial = full_vocabulary_gradient()
    np.testing.assert_allclose(negative(PARTIAL[placement]), partial, atol=1e-15)
    error = np.linalg.norm(partial - kl_gradient()) / np.linalg.norm(kl_gradient())
    assert error > 0.05


def test_k1_in_the_loss_does_not_know_the_reference():
    found = negative(tokens_of(log_ratios))
    assert np.abs(found).max() < 1e-15
    by_length = negative(lambda x: tokens_of(log_ratios)(x) / SPACE.lengths)
    without_ref = negative(lambda x: tokens_of(lambda y: y)(x) / SPACE.lengths)
    assert np.linalg.norm(by_length) > 0.05
    np.testing.assert_allclose(by_length, without_ref, atol=1e-15)


def test_k3_in_the_loss_descends_the_reverse_direction_of_each_tokens_kl():
    found = negative(tokens_of(lambda x: k3(log_ratios(x))))
    with jax.enable_x64(True):
        weights = np.exp(np.asarray(exact_tokens.response_logps(SPACE, jnp.asarray(LOGITS))))

    def mean(table):
        ref = jax.nn.log_softmax(jnp.asarray(REF_LOGITS), axis=-1)
        of_state = jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(table, axis=-1)), axis=-1)
        return jnp.sum(weights[:, None] * jnp.where(MASK, of_state[SPACE.states], 0))

    np.testing.assert_allclose(found, with_table(mean), atol=1e-15)
    error = np.linalg.norm(found - kl_gradient()) / np.linalg.norm(kl_gradient())
    assert error > 0.05


def test_k3_in_the_reward_has_the_difference_of_two_kls_as_its_gradient():
    def loss(logps):
        lr = jnp.sum(jnp.where(MASK, log_ratios(logps), 0), axis=-1)
        return jax.lax.stop_gradient(k3(lr)) * jnp.sum(logps, axis=-1)

    def reverse(table):
        logps = exact_tokens.response_logps(SPACE, table)
        ref = exact_tokens.response_logps(SPACE, jnp.asarray(REF_LOGITS))
        return jnp.sum(jnp.exp(ref) * (ref - logps))

    np.testing.assert_allclose(negative(loss), kl_gradient() - with_table(reverse), atol=1e-14)


def test_every_estimator_has_the_kl_as_its_mean():
    with jax.enable_x64(True):
        logps = np.asarray(exact_tokens.token_logps(SPACE, jnp.asarray(LOGITS)))
    weights = np.exp(logps.sum(-1))
    lr = logps - _REF_LOGPS
    k1_mean = weights @ lr.sum(-1)
    k3_mean = weights @ np.where(MASK, np.exp(-lr) - 1 + lr, 0).sum(-1)
    full = weights @ exact_tokens.visited_kl(SPACE, LOGITS, REF_LOGITS)
    np.testing.assert_allclose([k1_mean, k3_mean], full, rtol=1e-12)
