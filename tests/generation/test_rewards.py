"""What sampled responses are worth: terms and their sum, functions of the user's, verified answers,
models on disk.
"""

import json
import math
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from jobs import make_job, open_inputs
from model_folders import make_classifier
from runs import ROOT, environment

from dpojax.algorithms.rewards import open_rewards
from dpojax.config.load import apply_override, from_config_dict, load_config_file
from dpojax.config.online import RewardTerm, reward_terms
from dpojax.data.dataset import RowColumns
from dpojax.errors import ConfigError, DataError
from dpojax.evaluation.reward_scale import write_normalisation
from dpojax.generation.rewards import Rewards, Term, UserFunction, weighted_total
from dpojax.generation.verifiable import MAX_DIGITS, Verifier, last_number
from dpojax.objectives.reward import Normalisation

ANSWERS = [
    {"prompt": "2 + 2 =", "answer": 4},
    {"prompt": "3 / 2 =", "answer": "3/2", "source": "book"},
    {"prompt": "a name?", "answer": None},
]


def term(name, scores, weight=1.0):
    return Term(name, weight, lambda prompts, responses, columns: scores, in_thread=True)


def rows_of(count):
    return [{} for _ in range(count)]


def score(rewards, responses, columns=None):
    columns = rows_of(len(responses)) if columns is None else columns
    return rewards(["p"] * len(responses), responses, columns)


def write_rows(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_function(folder, source):
    path = folder / "mine.py"
    path.write_text(source)
    return f"{path}:reward"


def opened(folder, rows, files, **settings):
    own = {
        "data.train": write_rows(folder, rows),
        "tokenizer": files / "tokenizer.model",
        "stages": f"{ROOT}/experiments/own_algorithm/reinforce.py:REINFORCE",
        "sft.num_steps": 0,
    }
    job = make_job(folder / "w", **own, **settings)
    return open_rewards(job, open_inputs(job))


# --- the sum --------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_and_each_term_is_reported():
    rewards = Rewards([term("a", [1.0, 2.0], 0.5), term("b", [10.0, -10.0], 0.1)])
    scored = score(rewards, ["x", "y"])
    assert rewards.names == tuple(scored.terms) == ("a", "b")
    np.testing.assert_allclose(scored.total, [0.5 + 1.0, 1.0 - 1.0], rtol=0, atol=1e-15)
    assert scored.total.dtype == scored.terms["a"].dtype == np.float64


def test_a_term_without_a_number_is_left_out_and_nothing_at_all_is_nan_not_zero():
    scored = score(Rewards([term("a", [None, 2.0, None]), term("b", [3.0, None, None])]), "xyz")
    np.testing.assert_array_equal(scored.total, [3.0, 2.0, math.nan])
    np.testing.assert_array_equal(scored.terms["a"], [math.nan, 2.0, math.nan])


def test_a_sum_with_negative_weights_has_no_other_meaning_for_missing_numbers():
    values = {"a": np.array([1.0, np.nan]), "b": np.array([np.nan, 1.0])}
    np.testing.assert_array_equal(weighted_total([-2.0, 0.0], values), [-2.0, 0.0])


def test_fractional_scores_arrive_exactly():
    values = [0.1, 1 / 3, 1e-17, 2.0**53 + 2]  # float32 holds none of them
    assert score(Rewards([term("a", values)]), "wxyz").total.tolist() == values


def test_numbers_of_other_types_are_numbers():
    values = [np.float32(0.5), np.array(2), True, Fraction(1, 4)]
    assert score(Rewards([term("a", values)]), "wxyz").total.tolist() == [0.5, 2.0, 1.0, 0.25]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([1.0], "gave 1 for 2 responses"),
        ([1.0, 2.0, 3.0], "gave 3 for 2 responses"),
        ("ab", "of type str"),
        (1.0, "of type float"),
        ({"a": 1, "b": 2}, "of type dict"),
        (None, "of type NoneType"),
        ([1.0, "2.0"], "for f.jsonl:7 it gave '2.0', of type str"),
        ([1.0, math.nan], "for f.jsonl:7 it gave nan"),
        ([1.0, math.inf], "for f.jsonl:7 it gave inf"),
        ([1.0, 1j], "of type complex"),
        ([1.0, [2.0]], "of type list"),
    ],
)
def test_wrong_counts_and_types_are_named(scores, said):
    with pytest.raises(ConfigError, match=said) as caught:
        score(Rewards([term("mine.py:f", scores)]), ["x", "y"], [{}, RowColumns({}, "f.jsonl:7")])
    assert "mine.py:f" in str(caught.value)


def test_terms_that_wait_run_beside_each_other():
    def slow(prompts, responses, columns):
        time.sleep(0.5)
        return [1.0]

    terms = [Term(name, 1.0, slow, in_thread=True) for name in "abcd"]
    began = time.monotonic()
    assert score(Rewards(terms), ["x"]).total.tolist() == [4.0]
    assert time.monotonic() - began < 1.5  # one after another they take 2 s


# --- settings -------------------------------------------------------------------------------------


def test_terms_are_told_apart():
    terms = reward_terms("world, numeric,model:runs/rm,implicit:a|b,judge:http://h:1/v1,f.py:g,m:f")
    assert [(t.kind, t.place) for t in terms] == [
        ("world", ""),
        ("numeric", ""),
        ("model", "runs/rm"),
        ("implicit", "a|b"),
        ("judge", "http://h:1/v1"),
        ("function", "f.py:g"),
        ("function", "m:f"),
    ]
    assert terms[0] == RewardTerm("world", "world", "")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward.terms": "numerik"}, "did you mean numeric"),
        ({"reward.terms": "model:"}, "model:DIR"),
        ({"reward.terms": "exact,exact"}, "without repetition"),
        ({"reward.terms": "exact,world", "reward.weights": "1"}, "2 numbers"),
        ({"reward.terms": "exact", "reward.weights": "1,b"}, "finite numbers"),
        ({"reward.terms": "exact", "reward.weights": "inf"}, "finite numbers"),
        ({"reward.terms": "exact", "reward.answer_column": ""}, "reward.answer_column"),
        ({"reward.terms": "judge:http://h/v1"}, "reward.judge_model"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, said):
    values = load_config_file("tldr")
    for key, value in settings.items():
        apply_override(values, key, value)
    with pytest.raises(ConfigError, match=said):
        from_config_dict(values)


@pytest.mark.parametrize(
    ("terms", "refused"),
    [("mine.py:f", True), ("judge:http://h/v1", True), ("model:a,numeric", False)],
)
def test_plain_data_names_no_function_and_no_server(tmp_path, terms, refused):
    values = load_config_file("tldr")
    values.reward.terms = terms
    values.reward.judge_model = "m"
    path = tmp_path / "run.json"
    path.write_text(values.to_json_best_effort())
    if not refused:
        assert load_config_file(str(path)).reward.terms == terms
        return
    with pytest.raises(ConfigError, match=r"reward\.terms"):
        load_config_file(str(path))


def test_without_terms_the_world_judges_and_files_say_what_to_set(tmp_path, files):
    job = make_job(tmp_path / "sorting", "sorting")
    rewards = open_rewards(job, open_inputs(job))
    assert rewards.names == ("world",)
    scored = rewards(["sort 312 =", "sort 312 ="], [" 123", " 132"], rows_of(2))
    assert scored.total.tolist() == [1.0, 0.0]
    with pytest.raises(ConfigError, match=r"reward.terms is ''.*column 'answer': try numeric"):
        opened(tmp_path, ANSWERS, files)
    with pytest.raises(ConfigError, match="'world', and the data are files"):
        opened(tmp_path, ANSWERS, files, **{"reward.terms": "world"})


# --- functions ------------------------------------------------------------------------------------


def test_a_function_with_a_third_parameter_gets_the_columns(tmp_path, files):
    source = """
def reward(prompts, responses, columns):
    return [len(row["source"]) if "source" in row else None for row in columns]
"""
    spec = write_function(tmp_path, source)
    rewards = opened(tmp_path, ANSWERS, files, **{"reward.terms": spec, "reward.weights": "0.25"})
    scored = rewards(["p", "q"], ["x", "y"], ANSWERS[:2])
    np.testing.assert_array_equal(scored.total, [math.nan, 1.0])


@pytest.mark.parametrize(
    ("parameters", "takes"),
    [
        ("p, r", False),
        ("p, r, columns", True),
        ("p, r, rows", True),
        ("p, r, columns=None", True),
        ("p, r, scale=2.0", False),
        ("p, r, *, columns=None", False),
        ("*a", False),
    ],
)
def test_a_third_parameter_is_one_that_must_be_given_or_is_called_columns(
    tmp_path, parameters, takes
):
    spec = write_function(tmp_path, f"def reward({parameters}):\n    return [0.0]\n")
    assert UserFunction(spec).takes_columns is takes


def test_a_function_that_fails_is_named_with_its_row(tmp_path, files):
    source = """
def reward(prompts, responses):
    return [1 / (prompt != "3 / 2 =") for prompt in prompts]
"""
    spec = write_function(tmp_path, source)
    with pytest.raises(ConfigError, match=r"fails on rows.jsonl:2 .*ZeroDivisionError"):
        opened(tmp_path, ANSWERS, files, **{"reward.terms": spec})


def test_a_function_that_is_not_there_is_named(tmp_path, files):
    with pytest.raises(ConfigError, match=r"reward.terms=.*module:function expected"):
        opened(tmp_path, ANSWERS, files, **{"reward.terms": "dpojax.errors:nothing"})


# --- verified answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 1,000 it is", 1000),
        ("-3.50", Fraction(-7, 2)),
        ("x = 1/2.", Fraction(1, 2)),
        ("1 / 2", Fraction(1, 2)),
        ("2e-3", Fraction(1, 500)),
        ("1.5E+2", 150),
        ("\u22127", -7),  # a minus sign
        ("= \u2212\u00a07", 7),  # a sign that stands apart belongs to no number
        ("5-3", 3),
        ("(5)-3", 3),
        ("+4", 4),
        (".5", Fraction(1, 2)),
        ("first 12, then 7", 7),
        ("1,2,3", 3),
        ("12,34", 34),
        ("1,0000", 0),
        ("$1,234,567.89!", Fraction(123456789, 100)),
        ("0.1", Fraction(1, 10)),
        ("0.30", Fraction(3, 10)),
        ("50%", 50),
        ("1/0", None),
        ("no number", None),
        ("", None),
        ("9e999999999", None),
        ("1" * (MAX_DIGITS + 1), None),
        ("1" * 5000, None),  # Python itself refuses to read it
    ],
)
def test_the_last_number_is_read_exactly(text, value):
    assert last_number(text) == value


def test_a_long_text_of_digits_is_read_in_a_moment():
    began = time.monotonic()
    last_number("1,234" * 100_000)
    last_number("9" * 500_000 + "x")
    assert time.monotonic() - began < 5


def verified(kind, pairs):
    answers = [{"answer": answer} for _, answer in pairs]
    return Verifier(kind, "answer")([""] * len(pairs), [text for text, _ in pairs], answers)


def test_exact_compares_texts_but_for_white_space_at_the_ends():
    pairs = [(" 13 \n", "13"), ("1 3", "13"), ("13.0", 13), ("13", 13), ("x", None)]
    assert verified("exact", pairs) == [1.0, 0.0, 0.0, 1.0, None]


def test_numeric_compares_values_exactly():
    pairs = [
        ("it is 1,000.0", 1000),
        ("0.1", "1/10"),
        ("0.1", 0.1),
        ("0.30000000000000004", "0.3"),  # equal as float32, not as numbers
        ("none", 1),
        ("-3.5", "\u22123.50"),
        ("x", None),
    ]
    assert verified("numeric", pairs) == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0, None]


@pytest.mark.parametrize(
    ("kind", "answer", "said"),
    [
        ("numeric", "many", "'many', which holds no number"),
        ("exact", [1], "of type list"),
        ("exact", True, "of type bool"),
        ("regex", "(", "which is no regular expression"),
        ("regex", "a" * 3000, "which has more than 2000 characters"),
    ],
)
def test_an_answer_that_cannot_be_compared_is_named_with_its_row(kind, answer, said):
    row = RowColumns({"answer": answer}, "f.jsonl:3")
    with pytest.raises(DataError, match=rf"f.jsonl:3: column 'answer' .*{said}"):
        Verifier(kind, "answer")([""], ["x"], [row])


def test_patterns_are_found_and_a_hostile_one_neither_hangs_nor_stops_the_others():
    hostile = r"^(a+)+$"
    began = time.monotonic()
    pairs = [("abc", "b"), ("abc", "^b"), ("a" * 40 + "!", hostile), ("x42y", r"\d{2}"), ("x", "x")]
    assert verified("regex", pairs) == [1.0, 0.0, None, 1.0, 1.0]
    assert time.monotonic() - began < 60


def test_an_answer_column_that_no_row_has_is_said_before_the_training(tmp_path, files):
    settings = {"reward.terms": "exact", "reward.answer_column": "anser"}
    with pytest.raises(ConfigError, match=r"'anser', which none .* they have 'prompt', 'answer'"):
        opened(tmp_path, ANSWERS, files, **settings)


def test_answers_of_rows_are_verified_by_file(tmp_path, files):
    rewards = opened(tmp_path, ANSWERS, files, **{"reward.terms": "numeric,exact"})
    scored = rewards(["p"] * 3, ["so 4.0", "1.5", "x"], ANSWERS)
    np.testing.assert_array_equal(scored.terms["numeric"], [1.0, 1.0, math.nan])
    np.testing.assert_array_equal(scored.terms["exact"], [0.0, 0.0, math.nan])
    np.testing.assert_array_equal(scored.total, [1.0, 1.0, math.nan])


# --- models ---------------------------------------------------------------------------------------

TEXTS = [
    ("Once upon a time", " there was a small dog."),
    ("The cat", " sat on the mat and was happy all day long, until night came."),
    ("A boy", " ran."),
]


def scores_of_the_command(folder, *flags):
    rows = [{"prompt": prompt, "completions": [response]} for prompt, response in TEXTS]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "scores.jsonl"
    argv = [sys.executable, "-m", "dpojax.score", f"--data={path}", f"--out={out}", *flags]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line)["reward"][0] for line in out.read_text().splitlines()]


def test_a_reward_models_folder_gives_what_the_score_command_gives(shared_data, tmp_path):
    classifier = make_classifier(shared_data / "models/TinyStories-656K", tmp_path / "classifier")
    write_normalisation(classifier, Normalisation(0.25, 2.0))
    rows = [{"prompt": prompt, "answer": "x"} for prompt, _ in TEXTS]
    settings = {
        "reward.terms": f"model:{classifier}",
        "model.init": shared_data / "models/TinyStories-656K",
    }
    rewards = opened_with_model(tmp_path, rows, settings)
    scored = rewards([p for p, _ in TEXTS], [r for _, r in TEXTS], rows)
    want = scores_of_the_command(tmp_path, f"--reward_model={classifier}")
    np.testing.assert_allclose(scored.total, want, rtol=0, atol=1e-5)
    assert np.ptp(scored.total) > 1e-3
    assert np.isnan(rewards(["The cat"], [" "], rows[:1]).total).all()  # nothing to judge


def opened_with_model(folder, rows, settings):
    own = {
        "data.train": write_rows(folder, rows),
        "stages": f"{ROOT}/experiments/own_algorithm/reinforce.py:REINFORCE",
        "sft.num_steps": 0,
        "data.prompt_template": "",
    }
    job = make_job(folder / "w", "base", **own, **settings)
    return open_rewards(job, open_inputs(job))


def test_an_implicit_reward_is_beta_times_the_log_ratio(shared_data, tmp_path, exported_variant):
    base = shared_data / "models/TinyStories-656K"
    rows = [{"prompt": prompt, "answer": "x"} for prompt, _ in TEXTS]
    settings = {
        "reward.terms": f"implicit:{exported_variant}",
        "reward.beta": 0.5,
        "model.init": base,
    }
    rewards = opened_with_model(tmp_path, rows, settings)
    scored = rewards([p for p, _ in TEXTS], [r for _, r in TEXTS], rows)
    flags = (f"--model={exported_variant}", f"--ref={base}", "--beta=0.5")
    want = scores_of_the_command(tmp_path, *flags)
    np.testing.assert_allclose(scored.total, want, rtol=0, atol=1e-4)
    assert np.abs(scored.total).min() > 1e-3
    with pytest.raises(ConfigError, match=r"implicit:DIR\|REFDIR"):
        settings = {"reward.terms": f"implicit:{exported_variant}", "tokenizer": base}
        opened_with_model(tmp_path, rows, settings)


@pytest.fixture
def exported_variant(shared_data, tmp_path):
    """The same language model with its last norm scaled: other log-probs."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "variant"
    shutil.copytree(shared_data / "models/TinyStories-656K", folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("norm.weight") and "layers" not in key)
    tensors[name] = tensors[name] * 0.8
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_a_language_model_is_no_reward_model(shared_data, tmp_path):
    base = shared_data / "models/TinyStories-656K"
    rows = [{"prompt": "a", "answer": "b"}]
    with pytest.raises(ConfigError, match="a reward model is wanted"):
        opened_with_model(tmp_path, rows, {"reward.terms": f"model:{base}", "model.init": base})
