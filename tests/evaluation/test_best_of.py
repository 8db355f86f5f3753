"""The best of the samples of a prompt: which are kept, what that was worth, rows for SFT."""

import json
import math

import model_folders
import numpy as np
import pytest

from dpojax.evaluation.best_of import best_places, describe_choice, sft_row
from dpojax.generate import main
from dpojax.score import main as score


def test_the_largest_rewards_are_kept_ties_by_their_draw_and_no_reward_last():
    assert best_places([1.0, 3.0, None, 3.0, -1.0], 2) == [1, 3]
    assert best_places([None, -5.0, None], 2) == [1, 0]
    assert best_places([2.0], 1) == [0]


def test_what_the_choice_is_worth_counts_prompts_whose_samples_all_have_rewards():
    found = describe_choice([[0.0, 2.0], [1.0, None], [4.0, 6.0]])
    assert (found.prompts, found.of_one, found.of_all) == (2, 3.0, 4.0)
    assert found.kl_bound == pytest.approx(math.log(2) - 1 / 2)
    nothing = describe_choice([[None, None]])
    assert nothing.prompts == 0 and math.isnan(nothing.of_all)


def test_a_demonstration_goes_on_with_its_dialogue_or_has_a_completion():
    assert sft_row({"prompt": "p", "id": 3}, "y") == {"prompt": "p", "id": 3, "completion": "y"}
    turn = {"role": "user", "content": "p"}
    found = sft_row({"messages": [turn], "responses": ["old"]}, "y")
    assert found == {"messages": [turn, {"role": "assistant", "content": "y"}]}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, shared_data):
    """A folder with prompts, a policy and a reward model."""
    folder = tmp_path_factory.mktemp("best_of")
    rows = [{"prompt": text} for text in ("Once upon a time", "The cat sat", "A boy")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = shared_data / "models/TinyStories-656K"
    reward = model_folders.make_classifier(policy, folder / "reward")
    common = [f"--prompts={folder}/prompts.jsonl", f"--model={policy}", "--max_new_tokens=8"]
    return folder, reward, common


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_best_of_n_keeps_the_samples_that_score_ranks_first(drawn, capsys):
    folder, reward, common = drawn
    assert main([*common, "--num_samples=4", f"--out={folder}/all.jsonl"]) == 0
    best = ["--best_of=4", "--num_samples=2", f"--reward_model={reward}"]
    assert main([*common, *best, f"--out={folder}/best.jsonl"]) == 0
    assert "best of 4: reward" in capsys.readouterr().out
    scored = [f"--reward_model={reward}", f"--data={folder}/all.jsonl"]
    assert score([*scored, f"--out={folder}/scored.jsonl"]) == 0
    rows = zip(*(read(folder / f"{n}.jsonl") for n in ("all", "best", "scored")), strict=True)
    for everything, kept, scores in rows:
        order = np.argsort(-np.asarray(scores["reward"]), kind="stable")[:2]
        texts = [everything["responses"][k]["text"] for k in order]
        assert [r["text"] for r in kept["responses"]] == texts
        rewards = [r["reward"] for r in kept["responses"]]
        np.testing.assert_allclose(rewards, np.asarray(scores["reward"])[order], atol=1e-5)


def test_rejection_sampling_writes_rows_that_sft_takes(drawn):
    folder, reward, common = drawn
    best = ["--best_of=3", f"--reward_model={reward}", "--demonstrations"]
    assert main([*common, *best, f"--out={folder}/sft.jsonl"]) == 0
    rows = read(folder / "sft.jsonl")
    assert [set(row) for row in rows] == [{"prompt", "completion"}] * 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--best_of=2"], "name both --best_of=N and --reward_model=DIR"),
        (["--reward_model=x"], "name both --best_of=N and --reward_model=DIR"),
        (["--best_of=2", "--num_samples=3", "--reward_model=x"], "at least --num_samples=3"),
        (["--best_of=-1"], "--best_of=-1: it must be at least 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(flags, said, capsys):
    assert main(["--model=nowhere", "--prompt=x", *flags]) == 2
    assert said in capsys.readouterr().err
