"""Intervals, tests and sample sizes against scipy, enumeration and simulation."""

import itertools

import numpy as np
import pytest
import scipy.stats

from dpojax.evaluation import statistics


def test_wilson_interval_and_win_rate():
    rate = statistics.wilson(50, 100)
    np.testing.assert_allclose(rate, (0.5, 0.4038315, 0.5961685), atol=1e-6)  # textbook values
    assert statistics.win_rate([1, 2, 3], [0, 2, 4]).value == 0.5  # a win, a tie, a loss


def test_length_control_takes_away_what_length_explains():
    rng = np.random.default_rng(0)
    difference = rng.normal(10, 10, 4000)
    wins = rng.random(4000) < 1 / (1 + np.exp(-1.5 * np.tanh(difference / difference.std())))
    assert wins.mean() > 0.65
    assert statistics.length_controlled_win_rate(
        wins, np.full(4000, 0.5), difference
    ) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 17), (250, 1000)])
def test_wilson_is_scipys(successes, trials):
    interval = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    rate = statistics.wilson(successes, trials)
    np.testing.assert_allclose((rate.low, rate.high), (interval.low, interval.high), atol=1e-12)


def test_bootstrap_intervals_hold_the_true_difference_in_95_of_100():
    """Skewed outcomes of correlated policies; 400 experiments of 80 prompts, whose share is known
    to 2.2 points.
    """
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        prompts = rng.exponential(size=80)
        first, second = prompts + rng.exponential(0.5, 80), prompts + rng.exponential(0.3, 80)
        interval = statistics.paired_difference(first, second, resamples=399, seed=trial)
        held += interval.low <= 0.2 <= interval.high
    assert 0.91 < held / 400 < 0.99


def test_pairing_is_kept_in_every_resample():
    """What both policies share on a prompt cancels: the interval does not see it."""
    rng = np.random.default_rng(1)
    prompts, gain = 100 * rng.normal(size=50), rng.normal(0.5, 0.1, 50)
    interval = statistics.paired_difference(prompts + gain, prompts)
    assert interval.high - interval.low < 0.1
    assert statistics.paired_difference(prompts, prompts) == (0, 0, 0)


def test_mcnemar_looks_at_discordant_prompts_alone():
    first = [True] * 8 + [False] * 2 + [True] * 50
    second = [False] * 8 + [True] * 2 + [True] * 50
    counts = np.arange(11)
    binomial = scipy.stats.binom.pmf(counts, 10, 0.5)
    exact = binomial[binomial <= binomial[8] * (1 + 1e-9)].sum()
    assert statistics.mcnemar(first, second) == pytest.approx(exact, rel=1e-9)
    assert statistics.mcnemar([True, False], [True, False]) == 1.0


def test_sign_flips_are_enumerated():
    first, second = np.array([1.0, 2.0, 0.5, 3.0, 1.0]), np.array([0.2, 2.5, 0.1, 1.0, 0.7])
    difference = first - second
    flips = np.array(list(itertools.product([-1, 1], repeat=5)))
    means = (flips * difference).mean(axis=1)
    exact = 2 * min((means >= difference.mean() - 1e-12).mean(), 0.5)
    assert statistics.sign_flip_test(first, second) == pytest.approx(exact, abs=1e-9)


def test_prompts_for_a_gap_give_its_power():
    """The paper's 61.7 against 57.0: 1,710 prompts of each, and half as many where outcomes
    correlate by a half.
    """
    assert statistics.prompts_for_gap(0.617, 0.570) == pytest.approx(1710, abs=2)
    assert statistics.prompts_for_gap(0.617, 0.570, correlation=0.5) == pytest.approx(855, abs=3)
    count = statistics.prompts_for_gap(0.6, 0.45)
    rng = np.random.default_rng(2)
    first, second = (
        rng.binomial(count, 0.6, 20_000) / count,
        rng.binomial(count, 0.45, 20_000) / count,
    )
    error = np.sqrt((first * (1 - first) + second * (1 - second)) / count)
    seen = np.abs(first - second) > statistics.Z95 * error
    assert seen.mean() == pytest.approx(0.8, abs=0.02)


def test_holm_rejects_what_the_stepwise_procedure_rejects():
    rng = np.random.default_rng(3)
    for _ in range(50):
        p = rng.random(6) ** 3
        level, rejected = 0.05, set()
        for rank, index in enumerate(np.argsort(p)):
            if p[index] > level / (6 - rank):
                break
            rejected.add(int(index))
        assert set(np.flatnonzero(statistics.holm(p) <= level).tolist()) == rejected


def test_outcomes_that_are_not_of_the_same_prompts_are_refused():
    for first, second in (([1.0], [1.0, 2.0]), ([], []), ([np.nan], [1.0])):
        with pytest.raises(ValueError, match="prompt"):
            statistics.paired_difference(first, second)
    with pytest.raises(ValueError, match="must be in"):
        statistics.prompts_for_gap(0.5, 0.5)
