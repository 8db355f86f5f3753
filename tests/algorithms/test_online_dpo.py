"""Online DPO: which pairs its samples make, with which labels, and that runs of it go on."""

import numpy as np
import pytest
from runs import numbers, run, sampled_settings, start, stop_at

from dpojax.algorithms.online import varies
from dpojax.algorithms.online_dpo import labelled_pairs, pairs_of_prompt

NAN = float("nan")


def pairs_of(rewards, *, labels="soft", pairs="all", seed=0):
    draws = np.random.default_rng(seed)
    return labelled_pairs(np.array(rewards, float), pairs=pairs, labels=labels, draws=draws)


def test_soft_labels_are_bradley_terry_probabilities_of_every_pair():
    found = pairs_of([0.5, 2.0, -1.0])
    want = {(1, 0): 1.5, (1, 2): 3.0, (0, 2): 1.5}
    assert {(p.chosen, p.rejected) for p in found} == set(want)
    for pair in found:
        gap = want[pair.chosen, pair.rejected]
        np.testing.assert_allclose(pair.soft_label, 1 / (1 + np.exp(-gap)), rtol=1e-12)
        assert pair.margin == gap
    assert len(found) == pairs_of_prompt(3, "all")


def test_sampled_labels_have_the_soft_labels_as_their_means():
    turned = [pairs_of([0.0, 1.0], labels="sampled", seed=seed)[0].chosen for seed in range(4000)]
    assert abs(np.mean(turned) - 1 / (1 + np.exp(-1.0))) < 0.025


def test_argmax_leaves_ties_out_and_soft_labels_call_them_even():
    assert [p[:2] for p in pairs_of([1.0, 1.0, 0.0], labels="argmax")] == [(0, 2), (1, 2)]
    tie = pairs_of([1.0, 1.0])
    assert [p.soft_label for p in tie] == [0.5]


def test_responses_without_a_reward_are_in_no_pair():
    assert [p[:2] for p in pairs_of([NAN, 1.0, 0.0])] == [(1, 2)]
    assert pairs_of([NAN, 1.0]) == ()


def test_extremes_are_the_best_and_the_worst():
    assert [p[:2] for p in pairs_of([0.1, 3.0, -2.0, 1.0], pairs="extremes")] == [(1, 2)]
    assert pairs_of_prompt(4, "extremes") == 1


def test_only_prompts_whose_rewards_differ_have_something_to_teach():
    rewards = np.array([[1.0, 1.0], [1.0, 0.0], [NAN, 1.0], [NAN, NAN]])
    assert varies(rewards).tolist() == [False, True, False, False]


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits(files, tmp_path):
    settings = sampled_settings("online_dpo", "soft")
    run(files, tmp_path / "whole", **settings)
    stop_at(start(files, tmp_path / "stopped", **settings), "Online DPO 2/")
    run(files, tmp_path / "stopped", **settings)
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
