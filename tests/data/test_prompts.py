"""Rows that hold prompts without responses: what is read of them, and who may take them."""

import gzip
import itertools
import json

import numpy as np
import pytest
from jobs import make_job, open_inputs
from runs import ROOT

from dpojax.data import sorting
from dpojax.data.chat import ChatTemplate
from dpojax.data.columns import read_text_column
from dpojax.data.dataset import Dataset
from dpojax.data.groups import Dropped
from dpojax.data.index import build_index
from dpojax.data.records import in_memory
from dpojax.data.rows import RowReader, holds_preferences
from dpojax.data.sorting import make_sorting
from dpojax.data.tokens import Limits
from dpojax.errors import ConfigError, DataError
from dpojax.generation.verifiable import Verifier
from dpojax.weights.tokenizer import tokenizer_of

OWN = f"{ROOT}/experiments/own_algorithm/reinforce.py:REINFORCE"
CHAT = ChatTemplate(
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ROWS = [
    {"prompt": "I feel sad.", "answer": 2, "level": None},
    {"prompt": "I feel sad now.", "answer": 4, "level": "easy"},
    {"prompt": "It cost 40 dollars.", "answer": 6, "level": None},
]


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(folder, path, files, **settings):
    own = {"data.train": path, "tokenizer": files / "tokenizer.model", "sft.num_steps": 0}
    return open_inputs(make_job(folder / "w", **(own | {"stages": OWN} | settings))).data


def prompt_of(row, *, chat=None, template="", text_as_chat=False):
    reader = RowReader(template, "prompts", chat, text_as_chat)
    group = reader.read(row, "f:1")
    assert group.responses == group.pairs == ()
    return group.prompt


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "arrayrecord"])
def test_prompts_open_from_every_format_with_their_columns(tmp_path, files, kind):
    path = tmp_path / f"rows.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in ROWS:
            writer.write(json.dumps(row).encode())
        writer.close()
    data = opened(tmp_path, path, files)
    assert data.has_prompts and not data.has_preferences
    assert data.train_index.rows.tolist() == [0, 1, 2]
    assert (data.train_index.totals() == data.train_index.prompt_lengths).all()
    assert (data.train_index.sequence_lengths() == data.train_index.prompt_lengths).all()
    columns = data.train.columns(1)
    assert columns["answer"] == 4 and columns["level"] == "easy" and columns["prompt"]
    assert "level" not in data.train.columns(0)  # a null column is an absent one
    assert columns.where == f"rows.{kind}:2"
    group, _ = data.train.token_group(2)
    assert data.tokenizer is not None
    assert data.tokenizer.decode(group.prompt.tolist()) == "It cost 40 dollars."


def test_a_second_opening_reads_the_stored_index(tmp_path, files):
    path = write(tmp_path, ROWS)
    own = {"data.train": path, "tokenizer": files / "tokenizer.model", "stages": OWN}
    job = make_job(tmp_path / "w", "tldr", **own, **{"sft.num_steps": 0})
    first = open_inputs(job).data.train_index
    job.commit()
    assert list((tmp_path / "w/cache").iterdir())
    second = open_inputs(job).data.train_index
    for name in ("rows", "prompt_lengths", "response_lengths", "pair_offsets", "prompt_hashes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_preferences_serve_as_prompts_with_their_columns(tmp_path, files):
    rows = [{"prompt": "a b", "chosen": "c", "rejected": "d", "answer": "c"}]
    data = opened(tmp_path, write(tmp_path, rows), files)
    assert data.has_prompts and data.has_preferences
    assert data.train.columns(0)["answer"] == "c"


def test_a_share_of_the_prompts_is_held_out(tmp_path, files):
    rows = [{"prompt": f"What is {i} + {i}?", "answer": 2 * i} for i in range(20)]
    data = opened(tmp_path, write(tmp_path, rows), files, **{"data.eval_share": 0.25})
    assert data.eval_index is not None
    held_out = set(data.eval_index.rows.tolist())
    assert len(held_out) == 5 and not held_out & set(data.train_index.rows.tolist())


def test_an_empty_prompt_is_left_out_and_counted(tmp_path, files):
    data = opened(tmp_path, write(tmp_path, [*ROWS, {"prompt": " ", "answer": 1}]), files)
    assert len(data.train_index.rows) == 3
    assert data.train_index.counts["dropped/empty_prompt"] == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"answer": 3}, "rows.jsonl:4: column 'prompt' is missing; the row has 'answer'"),
        ({"prompt": 3, "answer": 3}, "rows.jsonl:4: column 'prompt' is 3, of type int"),
        ({"prompt_ids": ["a"]}, "rows.jsonl:4: column 'prompt_ids' holds 'a'"),
        ({"prompt": [{"role": "user"}, 3]}, "rows.jsonl:4: column 'prompt' holds 3"),
    ],
)
def test_a_row_without_a_prompt_is_named_by_file_and_line(tmp_path, files, row, said):
    template = {"data.prompt_template": "{prompt}"}
    with pytest.raises(DataError, match=said):
        opened(tmp_path, write(tmp_path, [*ROWS, row]), files, **template)


@pytest.mark.parametrize(
    ("stages", "settings"),
    [
        ("dpo", {}),
        ("reward_model", {}),
        (f"reward_model,{OWN}", {}),
        (f"sft,{OWN}", {"sft.num_steps": 2}),
    ],
)
def test_stages_that_want_responses_refuse_prompts(tmp_path, files, stages, settings):
    with pytest.raises(DataError, match=r"rows.jsonl:1: column 'chosen' .* a prompt without"):
        opened(tmp_path, write(tmp_path, ROWS), files, stages=stages, **settings)


# --- rows -----------------------------------------------------------------------------------------


def test_the_prompt_of_every_shape_of_row_is_read():
    text = "\n\nHuman: a\n\nAssistant:"
    assert prompt_of({"prompt": "a b"}) == "a b"
    assert prompt_of({"prompt": "a b"}, template="Q: {prompt}") == "Q: a b"
    assert prompt_of({"prompt_ids": [3, 4]}) == (3, 4)
    assert prompt_of({"chosen": f"{text} x", "rejected": f"{text} x"}) == text
    assert prompt_of({"prompt": "a", "responses": ["b", "b"], "scores": [1, 1]}) == "a"
    assert prompt_of({"prompt": "a", "completion": "b", "label": True}) == "a"
    dialogue = [{"role": "user", "content": "a"}]
    assert prompt_of({"prompt": dialogue}, chat=CHAT) == "user: a\nassistant: "
    assert prompt_of({"messages": dialogue}, chat=CHAT) == "user: a\nassistant: "
    assert prompt_of({"prompt": "a"}, chat=CHAT, text_as_chat=True) == "user: a\nassistant: "
    answer = [*dialogue, {"role": "assistant", "content": "b"}]
    row = {"chosen": answer, "rejected": answer}
    assert prompt_of(row, chat=CHAT) == "user: a\nassistant: "


def test_a_dialogue_that_is_answered_already_is_no_prompt():
    with pytest.raises(Dropped, match="role_order"):
        prompt_of({"prompt": [{"role": "assistant", "content": "b"}]}, chat=CHAT)
    with pytest.raises(ConfigError, match="chat template"):
        prompt_of({"prompt": [{"role": "user", "content": "b"}]})


def test_the_prompt_of_a_pair_is_the_one_that_preference_training_reads():
    dialogue = [{"role": "user", "content": "a"}]
    rows = [
        {"prompt": "a b", "chosen": "c", "rejected": "d"},
        {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: a\n\nAssistant: y"},
        {
            "prompt": dialogue,
            "chosen": [{"role": "assistant", "content": "x"}],
            "rejected": [{"role": "assistant", "content": "y"}],
        },
    ]
    for row in rows:
        pair = RowReader("", "pairs", CHAT).read(row, "f:1")
        assert RowReader("", "prompts", CHAT).read(row, "f:1").prompt == pair.prompt


def test_long_dialogues_lose_turns_as_they_do_in_training(files):
    from dpojax.data.open_tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_of(str(files)) or str(files))
    turns = [{"role": "user", "content": f"I feel sad {i}."} for i in range(6)]
    rows = [{"prompt": turns}]
    reader = RowReader("", "prompts", CHAT)
    data = Dataset(in_memory("rows", rows), reader, tokenizer, Limits(24, 8))
    group, cut = data.token_group(0)
    assert len(group.prompt) <= 24 and cut.turns > 0
    assert "sad 5" in tokenizer.decode(group.prompt.tolist())
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
    assert index.counts["cut/prompt"] == 1


@pytest.mark.parametrize(
    ("row", "holds"),
    [
        ({"prompt": "a", "answer": "b"}, False),
        ({"prompt": "a", "completion": "b"}, False),
        ({"prompt": "a", "responses": ["b"]}, False),
        ({"prompt": "a", "chosen": None, "rejected": None}, False),
        ({"prompt": "a", "label": "easy"}, False),
        ({"prompt": "a", "chosen": "b"}, True),
        ({"chosen_ids": [1], "rejected_ids": [2]}, True),
        ({"prompt": "a", "responses": ["b", "c"], "scores": [1, 2]}, True),
        ({"prompt": "a", "completion": "b", "label": True}, True),
    ],
)
def test_a_rows_columns_say_whether_it_holds_preferences(row, holds):
    assert holds_preferences(row) is holds


# --- the world of sorting -------------------------------------------------------------------------


def all_rows(records):
    return [records.get(i) for i in range(records.size)]


def test_the_world_of_sorting_is_the_same_for_a_seed_and_another_for_another():
    make_sorting.cache_clear()
    first = make_sorting(3)
    make_sorting.cache_clear()
    again = make_sorting(3)
    other = make_sorting(4)
    assert first.train.fingerprint == again.train.fingerprint != other.train.fingerprint
    assert first.tokenizer.fingerprint == again.tokenizer.fingerprint


def test_no_prompt_stands_in_two_of_its_datasets():
    made = make_sorting(0)
    parts = [
        [read_text_column(row, "prompt", "") for row in all_rows(records)]
        for records in (made.demonstrations, made.train, made.eval)
    ]
    together = list(itertools.chain.from_iterable(parts))
    assert len(set(together)) == len(together) == 8192 + 8192 + 512


def test_its_answers_are_exact_and_its_demonstrations_slip_as_often_as_it_says():
    made = make_sorting(0)
    for row in all_rows(made.eval):
        digits = [int(c) for c in row["prompt"] if c.isdigit()]
        assert [int(c) for c in row["answer"]] == sorted(digits)
        assert sorting.true_reward([row["prompt"]], [f" {row['answer']} "]) == [1.0]
    rows = all_rows(made.demonstrations)
    right = sorting.true_reward([r["prompt"] for r in rows], [r["completion"] for r in rows])
    error = (0.6 * 0.4 / len(rows)) ** 0.5
    assert abs(np.mean(right) - (1 - sorting.SLIPS)) < 4 * error


def test_a_slip_is_never_right():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        answer = sorting.sorted_digits(sorting.make_prompt(rng))
        assert sorting.slip(rng, answer) != answer


def test_its_tokenizer_reads_a_character_at_a_time_and_gives_the_text_back():
    made = make_sorting(0)
    ids = made.tokenizer.encode_continuation(" 0123456789")
    assert len(ids) == 11
    assert made.tokenizer.decode(ids).strip() == "0123456789"


def test_the_verifier_and_the_worlds_reward_agree():
    made = make_sorting(0)
    rows = [made.eval.get(i) for i in range(50)]
    texts = [row["answer"][:: 1 if i % 2 else -1] for i, row in enumerate(rows)]
    prompts = [row["prompt"] for row in rows]
    assert Verifier("exact", "answer")(prompts, texts, rows) == sorting.true_reward(prompts, texts)


def test_a_world_brings_its_own_data(tmp_path):
    for settings in (
        {"tokenizer": "x.model"},
        {"data.eval": "x.jsonl"},
        {"sft.data": "x.jsonl"},
        {"data.eval_share": 0.1},
        {"data.train": "world:chess"},
    ):
        with pytest.raises(ConfigError):
            make_job(tmp_path, "sorting", **settings)


def test_preference_training_in_the_world_of_sorting_is_refused(tmp_path):
    job = make_job(tmp_path, "sorting", stages="sft,dpo")
    with pytest.raises(DataError, match=r"world:sorting/train:1: .*a prompt without responses"):
        open_inputs(job)
