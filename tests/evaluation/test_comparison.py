"""Runs side by side: what differs, tests on the same prompts, and a page that is safe to open."""

import html.parser
import json
from typing import Any

import numpy as np
import pytest
import scipy.stats

from dpojax import compare
from dpojax.errors import ConfigError
from dpojax.evaluation.comparison import read_runs, versus
from dpojax.evaluation.on_policy import read_on_policy

HOSTILE = "<script>alert(1)</script> & <img src=x onerror=alert(2)>"
SETTINGS = {"stages": "sft,dpo", "loss": {"name": "sigmoid", "beta": 0.1}, "sample": {"reward": ""}}


def write_run(folder, scores, *, beta=0.1, reward="", prompts=None, **summary):
    """A workdir as a finished run leaves it, with one sample to each prompt."""
    folder.mkdir()
    settings = SETTINGS | {"loss": {"name": "sigmoid", "beta": beta}, "sample": {"reward": reward}}
    (folder / "run.json").write_text(json.dumps(settings))
    (folder / "summary.json").write_text(json.dumps({"kl": 1.5, "mean_length": 9.0, **summary}))
    metrics = [{"step": step, "eval_loss": 0.7 - 0.01 * step} for step in (0, 5, 10)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    names = prompts or [f"prompt {i}" for i in range(len(scores))]
    rows = [
        {"prompt": name, "policy": HOSTILE, "policy_tokens": 3 + i % 2, "policy_score": score}
        for i, (name, score) in enumerate(zip(names, scores, strict=True))
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluations = [
        {"stage": "", "step": 10, "log_ratio": [1.0, 3.0], "length": [3, 4], "reward": [0.5, 1.5]},
        {"stage": "", "step": 0, "log_ratio": [0.0, 0.0], "length": [3, 4], "reward": [0.0, 1.0]},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in evaluations)
    (folder / "on_policy.jsonl").write_text(lines)
    return folder


def test_a_run_is_tested_against_the_first_on_the_prompts_that_both_answered(tmp_path):
    rng = np.random.default_rng(0)
    first = rng.normal(size=40)
    second = first + rng.normal(0.4, 1, size=40)
    shared = [f"p{i}" for i in range(40)]
    one = write_run(tmp_path / "one", first.tolist(), prompts=shared)
    order = rng.permutation(40)  # another run's prompts may come in another order, and more of them
    two = write_run(
        tmp_path / "two",
        [*second[order].tolist(), 99.0],
        prompts=[*(shared[i] for i in order), "asked of this run alone"],
    )
    (found,), reasons = versus(read_runs([str(one), str(two)]))
    assert not reasons and found.prompts == 40
    assert found.wins.value == np.mean(second > first)
    assert found.reward.value == pytest.approx(np.mean(second - first))
    assert found.reward.low < found.reward.value < found.reward.high
    theirs = scipy.stats.ttest_rel(second, first).pvalue  # normal differences: nearly the same
    assert abs(found.p_value - theirs) < 0.02 and found.adjusted == found.p_value


def test_several_comparisons_are_adjusted_together(tmp_path):
    rng = np.random.default_rng(1)
    folders = [
        str(write_run(tmp_path / str(i), rng.normal(0.3 * i, 1, 30).tolist())) for i in range(4)
    ]
    found, _ = versus(read_runs(folders))
    smallest = min(found, key=lambda c: c.p_value)
    assert smallest.adjusted == pytest.approx(min(1.0, 3 * smallest.p_value))
    assert all(c.adjusted >= c.p_value for c in found)


def test_what_cannot_be_compared_says_why(tmp_path):
    one = write_run(tmp_path / "one", [1.0, 2.0, 3.0])
    other = write_run(tmp_path / "other", [1.0, 2.0, 3.0], reward="judge.py:score")
    strange = write_run(tmp_path / "strange", [1.0, 2.0], prompts=["a", "b"])
    bare = write_run(tmp_path / "bare", [1.0, 2.0])
    (bare / "samples.jsonl").unlink()
    found, reasons = versus(read_runs(list(map(str, (one, other, strange, bare)))))
    assert not found
    assert "judged by" in reasons[0] and "judge.py:score" in reasons[0]
    assert "no two prompts that are the same" in reasons[1]
    assert "bare has no samples.jsonl" in reasons[2]


def test_a_folder_that_is_no_finished_run_is_named(tmp_path):
    one = str(write_run(tmp_path / "one", [1.0]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: there is no summary\.json"):
        read_runs([one, str(tmp_path / "empty")])
    with pytest.raises(ConfigError, match="named twice"):
        read_runs([one, one])


def test_names_are_as_long_as_they_must_be_to_differ(tmp_path):
    for arm in ("dpo", "ipo"):
        (tmp_path / arm).mkdir()
        write_run(tmp_path / arm / "0", [1.0, 2.0])
    runs = read_runs([str(tmp_path / "dpo/0"), str(tmp_path / "ipo/0")])
    assert [run.name for run in runs] == ["dpo/0", "ipo/0"]


class Page(html.parser.HTMLParser):
    """The tags of a page, and its text outside style and script."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.text += data


def test_the_command_prints_what_differs_and_its_page_holds_no_markup_of_the_data(tmp_path, capsys):
    accuracy: Any = {"eval_objective/accuracy": 0.625}
    one = write_run(tmp_path / "one", [1.0, 2.0, 3.0], win_rate=0.5, **accuracy)
    two = write_run(tmp_path / "two", [2.0, 2.5, 3.5], beta=0.5, win_rate=0.75)
    page = tmp_path / "out" / "compare.html"
    assert compare.main([str(one), str(two), f"--out={page}"]) == 0
    printed = capsys.readouterr().out
    assert "| loss.beta | 0.1 | 0.5 |" in printed and "loss.name" not in printed
    assert "| win rate over its reference | 50.0% | 75.0% |" in printed
    assert "| held-out accuracy | 62.5% |  |" in printed
    assert "| two - one | 3 | 100.0%" in printed
    parsed = Page(page.read_text())
    assert HOSTILE in parsed.text and "two - one" in parsed.text
    lines = parsed.text.splitlines()
    assert "loss.beta0.10.5" in lines  # a row's cells, one after another
    assert "win rate over its reference50.0%75.0%" in lines
    assert [tag for tag, _ in parsed.tags].count("script") == 1  # the page's own search
    sources = [a["src"] for tag, a in parsed.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/png") for source in sources)
    assert not any(name.startswith("on") for _, a in parsed.tags for name in a)


@pytest.mark.parametrize("argv", [[], ["one"], ["one", "two", "--shwon=3"], ["one", "--out"]])
def test_a_command_line_that_makes_no_sense_is_refused(argv, capsys):
    assert compare.main(argv) == 2
    assert capsys.readouterr().err.startswith("error:")


def test_a_resumed_runs_last_evaluation_of_a_step_counts_and_a_cut_line_does_not(tmp_path):
    folder = write_run(tmp_path / "one", [1.0])
    again = {"stage": "", "step": 10, "log_ratio": [7.0], "length": [2]}
    with (folder / "on_policy.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n" + '{"stage": "", "step": 20, "log_ra')
    rows = read_on_policy(folder)
    assert [row["step"] for row in rows] == [0, 10] and rows[1]["log_ratio"] == [7.0]
    assert read_on_policy(tmp_path) == []


def test_an_answer_may_hold_any_character_that_text_can(tmp_path):
    folder = write_run(tmp_path / "one", [1.0, 2.0])
    odd = "a\u2028b\u0085c\x1cd"
    rows = read_runs([str(folder)])[0].samples
    lines = [json.dumps(row | {"policy": odd}, ensure_ascii=False) + "\n" for row in rows]
    (folder / "samples.jsonl").write_text("".join(lines))
    assert [row["policy"] for row in read_runs([str(folder)])[0].samples] == [odd, odd]
