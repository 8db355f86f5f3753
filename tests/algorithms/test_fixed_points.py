"""Every algorithm that trains on its own samples, against exact gradients and the exact optimum."""

import numpy as np
import policy_cases as cases
import pytest

PROMISED = [name for name, case in cases.CASES.items() if case.reaches]
OTHERS = [name for name in cases.CASES if name not in PROMISED]


@pytest.mark.parametrize(
    "name", [name for name, case in cases.CASES.items() if case.exact_share is not None]
)
def test_the_expected_gradient_is_the_promised_share_of_the_exact_one(name):
    assert cases.gradient_error(cases.CASES[name]).relative < 1e-12


@pytest.mark.parametrize("name", PROMISED)
def test_the_optimum_is_a_fixed_point(name):
    assert cases.slope_at_optimum(cases.CASES[name]) < 1e-9


@pytest.mark.parametrize("name", OTHERS)
def test_what_promises_no_optimum_moves_away_from_it(name):
    assert cases.slope_at_optimum(cases.CASES[name]) > 0.1


def test_the_table_of_the_optimum_is_the_optimum():
    assert cases.variation(cases.optimal_table()) < 1e-12
    assert cases.variation(cases.REF_TABLE) > 0.2


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, pytest.mark.exhaustive] * (name != "ppo"))
        for name in PROMISED
    ],
)
def test_sampled_training_takes_a_table_to_the_optimum(name):
    assert cases.variation(cases.train_table(cases.CASES[name])) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] * (name != "rloo")) for name in PROMISED],
)
def test_the_trainers_step_takes_a_transformer_to_the_optimum(name):
    before, after = cases.train_transformer(cases.CASES[name])
    assert before > 0.2
    assert after < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.exhaustive] * (n != "ppo")) for n in cases.CASES],
)
def test_an_update_is_the_same_on_eight_devices_and_in_any_micro_batches(name):
    np.testing.assert_array_less(cases.split_differences(cases.CASES[name]), 1e-5)
