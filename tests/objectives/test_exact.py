"""The closed forms against each other, and a transformer that training takes to them."""

import dataclasses
import itertools

import jax
import marks
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from dpojax.algorithms.preference import preference_gradients
from dpojax.data.token_groups import TokenGroup, TokenPair
from dpojax.objectives import exact
from dpojax.objectives.loss import make_loss
from dpojax.training.scores import make_token_logps_step
from dpojax.training.update import Spikes, make_train_step

RNG = np.random.default_rng(0)
REF = np.log(RNG.dirichlet(np.ones(6), 3))  # [prompts, responses]
REWARD = RNG.normal(0, 1, (3, 6))
BETA = st.floats(0.05, 5)


@settings(deadline=None)
@given(BETA)
def test_the_optimum_is_normalised_and_its_value_is_beta_log_z(beta):
    star = exact.optimal_logps(REF, REWARD, beta)
    np.testing.assert_allclose(np.exp(star).sum(-1), 1, rtol=1e-12)
    value = exact.regularised_value(star, REF, REWARD, beta)
    np.testing.assert_allclose(value, beta * exact.log_partition(REF, REWARD, beta), rtol=1e-9)


@settings(deadline=None)
@given(BETA, st.integers(0, 10**6))
def test_no_policy_has_a_larger_value(beta, seed):
    other = np.log(np.random.default_rng(seed).dirichlet(np.ones(6), 3))
    best = beta * exact.log_partition(REF, REWARD, beta)
    assert np.all(exact.regularised_value(other, REF, REWARD, beta) <= best + 1e-12)
    # what is lost is the KL to the optimum
    lost = best - exact.regularised_value(other, REF, REWARD, beta)
    np.testing.assert_allclose(
        lost, beta * exact.kl(other, exact.optimal_logps(REF, REWARD, beta)), rtol=1e-9, atol=1e-12
    )


@settings(deadline=None)
@given(BETA, st.floats(-3, 3))
def test_implicit_rewards_of_the_optimum_are_the_rewards_up_to_a_constant(beta, shift):
    star = exact.optimal_logps(REF, REWARD + shift, beta)  # a constant of x changes nothing
    np.testing.assert_allclose(star, exact.optimal_logps(REF, REWARD, beta), atol=1e-9)
    difference = exact.implicit_rewards(star, REF, beta) - REWARD
    np.testing.assert_allclose(difference, difference[:, :1] * np.ones(6), atol=1e-9)
    np.testing.assert_allclose(
        exact.bradley_terry(exact.implicit_rewards(star, REF, beta)),
        exact.bradley_terry(REWARD),
        atol=1e-12,
    )


def test_bradley_terry_and_kl_are_what_they_say():
    p = exact.bradley_terry(REWARD)
    np.testing.assert_allclose(p + np.swapaxes(p, -1, -2), 1)
    np.testing.assert_allclose(p[0, 1, 2], 1 / (1 + np.exp(REWARD[0, 2] - REWARD[0, 1])))
    by_hand = [
        sum(np.exp(a) * (a - b) for a, b in zip(x, y, strict=True))
        for x, y in zip(REF, np.roll(REF, 1, 0), strict=True)
    ]
    np.testing.assert_allclose(exact.kl(REF, np.roll(REF, 1, 0)), by_hand)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_dpo_on_population_labels_has_the_rlhf_optimum_as_its_minimiser(beta):
    loss, preferences = make_loss("sigmoid", beta=beta), exact.bradley_terry(REWARD)
    star = exact.optimal_logps(REF, REWARD, beta)
    found = exact.minimise_simplex(loss, REF, preferences)
    assert np.abs(np.exp(found) - np.exp(star)).sum(-1).max() / 2 < 1e-5
    free = exact.minimise_free(loss, REF, preferences)
    np.testing.assert_allclose(np.diff(free), np.diff(star - REF), atol=1e-4)
    # its value there is the entropy of the labels
    i, j = np.triu_indices(6, 1)
    p = preferences[:, i, j]
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    np.testing.assert_allclose(
        exact.population_loss(loss, star, REF, preferences), entropy, rtol=1e-9
    )


def test_ipos_bandit_stays_finite_where_dpo_collapses():
    """Azar et al. 2023, section 5.2: y1 always beats y2, uniform reference."""
    ref, always = np.log([0.5, 0.5]), np.array([[0.5, 1.0], [0.0, 0.5]])
    for tau in (0.1, 0.5, 1.0):
        ipo = exact.minimise_simplex(make_loss("ipo", beta=tau, average=False), ref, always)
        np.testing.assert_allclose(np.exp(ipo[0]), 1 / (1 + np.exp(-1 / (2 * tau))), atol=1e-6)
        dpo = exact.minimise_simplex(make_loss("sigmoid", beta=tau), ref, always)
        assert np.exp(dpo[0]) > 1 - 1e-6


def test_the_simplex_cannot_reach_what_is_optimal_for_free_log_ratios():
    """nca_pair, bco_pair and sppo_hard fix both log-ratios; a normalised policy has one number to
    give.
    """
    ref, preferences = np.log([0.5, 0.5]), np.array([[0.5, 0.75], [0.25, 0.5]])
    for name, beta in (("nca_pair", 0.5), ("bco_pair", 0.5), ("sppo_hard", 0.5)):
        loss = make_loss(name, beta=beta)
        free = ref + exact.minimise_free(loss, ref, preferences)
        on = exact.minimise_simplex(loss, ref, preferences)
        assert abs(np.exp(free).sum() - 1) > 1e-2 and abs(np.exp(on).sum() - 1) < 1e-9
        grid = np.log(
            np.stack(
                [np.linspace(1e-4, 1 - 1e-4, 20001), 1 - np.linspace(1e-4, 1 - 1e-4, 20001)], -1
            )
        )
        value = exact.make_population_loss(loss, ref, preferences)
        coarse = min((value(g)[0], tuple(g)) for g in grid[::40])[1]
        np.testing.assert_allclose(np.exp(on), np.exp(coarse), atol=3e-3)
        assert value(free)[0] < value(on)[0]


# --- a transformer --------------------------------------------------------------------------------

VOCABULARY, LENGTH = 4, 2
# all of them: the model's probabilities add up to 1
RESPONSES = list(itertools.product(range(VOCABULARY), repeat=LENGTH))
PROMPTS = ([1, 0], [2, 3, 3])


def _population(preferences: np.ndarray):
    """Every prompt once with all responses; every two of them a pair, with its probability as soft
    label.
    """
    made = []
    for row, prompt in enumerate(PROMPTS):
        pairs = tuple(
            TokenPair(i, j, 1.0, float(preferences[row, i, j]), 0.0)
            for i, j in itertools.combinations(range(len(RESPONSES)), 2)
        )
        responses = tuple(np.array(r, np.int32) for r in RESPONSES)
        made.append(TokenGroup(np.array(prompt, np.int32), responses, pairs, row))
    return tiny.pack(made, row_tokens=64, shard_rows=2)[0]


@pytest.mark.parametrize("beta", marks.cases([0.1], [0.5, 1.0]))
def test_dpo_takes_a_transformer_to_the_exact_optimum(beta):
    """The trainer's own step on population labels: total variation to pi* under 0.01 for every
    prompt.
    """
    config = dataclasses.replace(tiny.CONFIG, vocab_size=VOCABULARY, num_layers=2, init_std=0.15)
    model = tiny.model(config, full=True)
    rewards = np.random.default_rng(3).normal(0, 0.5, (len(PROMPTS), len(RESPONSES)))
    batch = _population(exact.bradley_terry(rewards))
    ref, params = tiny.params(model, 0), tiny.params(model, 0)
    token_logps = jax.jit(make_token_logps_step(model, chunk=64))

    def logps(p):
        found = np.zeros((len(PROMPTS), len(RESPONSES)))
        values = np.asarray(token_logps(p, batch))
        for m, s in np.ndindex(batch.response_row.shape[0], batch.response_row.shape[2]):
            if (row := int(batch.response_row[m, 0, s])) >= 0:
                own = (batch.response[m, 0] == s) & (batch.weight[m, 0] > 0)
                found[row, RESPONSES.index(tuple(batch.target[m, 0][own].tolist()))] = values[m, 0][
                    own
                ].sum()
        return found

    reference = logps(ref)
    np.testing.assert_allclose(np.exp(reference).sum(-1), 1, rtol=1e-5)
    star = exact.optimal_logps(reference, rewards, beta)

    def variation(p):
        return np.abs(np.exp(logps(p)) - np.exp(star)).sum(-1).max() / 2

    assert variation(params) > 0.1
    steps = 3000
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    loss = make_loss("sigmoid", beta=beta)
    step = make_train_step(
        preference_gradients(model, loss, chunk=64),
        {"policy": optimizer},
        lambda x: x,
        spikes=Spikes(np.inf, False),
    )
    step, state = jax.jit(step, donate_argnums=0), tiny.policy_state(optimizer, params)
    for i in range(steps):
        state, _ = step(state, tiny.frozen(ref), batch, np.bool_(False))
        if i % 250 == 249 and variation(state.policy) < 5e-3:
            break
    assert variation(state.policy) < 0.01
    found = exact.regularised_value(logps(state.policy), reference, rewards, beta)
    np.testing.assert_allclose(
        found, beta * exact.log_partition(reference, rewards, beta), atol=2e-3
    )
