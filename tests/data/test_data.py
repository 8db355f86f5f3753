"""Rows, groups, token ids and the order of the data."""

import gzip
import json
from typing import Any

import numpy as np
import pytest

from dpojax.data import world
from dpojax.data.batches import PackGroups, step_positions, train_batches
from dpojax.data.dataset import Dataset
from dpojax.data.groups import Dropped, Group
from dpojax.data.index import build_index
from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.data.records import in_memory, open_records
from dpojax.data.rows import RowReader
from dpojax.data.shapes import groups_per_step, make_shape
from dpojax.data.token_groups import TokenPair
from dpojax.data.tokens import Limits, mask_ids, tokenize
from dpojax.errors import ConfigError, DataError

TEXTS = [
    world.make_post(np.random.default_rng(i)).text + " It cost 40 dollars." for i in range(400)
]


@pytest.fixture(scope="module")
def tokenizer():
    return world.train_tokenizer(TEXTS)


def read(row, template=""):
    return RowReader(template).read(row, "file:1")


def test_every_shape_of_row_becomes_the_same_group():
    explicit = read({"prompt": "Hi?", "chosen": " Yes", "rejected": " No"})
    assert (explicit.prompt, explicit.responses) == ("Hi?", (" Yes", " No"))
    transcript = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    found = read(
        {"chosen": transcript + " same start, one", "rejected": transcript + " same start, two"}
    )
    # split by message: a common prefix of the two responses is no part of the prompt
    assert found.prompt == transcript and found.responses == (
        " same start, one",
        " same start, two",
    )

    def message(text):
        return [
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": text},
        ]

    found = read({"chosen": message("Yes"), "rejected": message("No")}, "{prompt} ->")
    assert (found.prompt, found.responses) == ("Hi? ->", ("Yes", "No"))
    ids = read({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]})
    assert ids.prompt == (1, 2) and ids.responses == ((3,), (4,))


def test_k_responses_make_all_pairs_that_differ_and_are_scored_once():
    group = read({"prompt": "x", "responses": ["a", "b", "c", "a"], "scores": [1, 3, 1, 1]})
    assert group.responses == ("a", "b", "c")
    assert sorted((p.chosen, p.rejected, p.margin) for p in group.pairs) == [
        (1, 0, 2.0),
        (1, 2, 2.0),
    ]
    ranked = read({"prompt": "x", "responses": ["a", "b"], "ranks": [2, 1]})
    assert ranked.pairs[0].chosen == 1


def test_one_bad_response_of_k_takes_only_its_own_pairs():
    group = read({"prompt": "x", "responses": ["a", "b", " ", "c"], "scores": [1, 2, 3, 4]})
    assert group.responses == ("a", "b", "c") and group.dropped == ("empty_response",) * 3
    assert sorted((p.chosen, p.rejected) for p in group.pairs) == [(1, 0), (2, 0), (2, 1)]
    # Equal responses with different scores say nothing: the pairs of the others stay.
    group = read({"prompt": "x", "responses": ["a", "b", "a", "c"], "scores": [1, 2, 3, 4]})
    assert group.responses == ("b", "c") and group.dropped == ("conflicting_scores",)
    assert [(p.chosen, p.rejected) for p in group.pairs] == [(1, 0)]


def test_pairs_left_out_of_a_ranked_group_are_named_with_their_line_and_reason(tokenizer):
    rows = [
        {"prompt": "x", "responses": ["a", "b", " ", "c"], "scores": [1, 2, 3, 4]},
        {"prompt": "x", "chosen": "a", "rejected": "a"},
        {"prompt": "x", "chosen": "a", "rejected": "b"},
    ]
    data = Dataset(in_memory("ranked", rows), RowReader(""), tokenizer, Limits(64, 64))
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
    places = [line.partition(": ")[0] for line in index.dropped]
    assert places == [data.records.where(0)] * 3 + [data.records.where(1)]
    assert (
        all("a response is empty" in line for line in index.dropped[:3])
        and "the same" in index.dropped[3]
    )


def test_sft_on_ranked_rows_trains_on_the_best_response():
    row = {"prompt": "x", "responses": ["low", "mid", "best"], "scores": [1, 2, 3]}
    assert RowReader("", "sft").read(row, "file:1").responses == ("best",)


def test_labelled_responses_are_read_as_unpaired_examples():
    unpaired = RowReader("", "unpaired")
    group = unpaired.read({"prompt": "x", "completion": "a", "label": True, "weight": 2}, "file:1")
    assert group.responses == ("a",) and group.pairs == (TokenPair(0, 0, 2.0, 1.0, 0.0),)
    several = unpaired.read(
        {"prompt": "x", "completions": ["a", "b", "a"], "labels": [1, 0, 1]}, "file:1"
    )
    assert several.responses == ("a", "b") and [
        (p.chosen, p.soft_label) for p in several.pairs
    ] == [(0, 1), (1, 0), (0, 1)]
    both = unpaired.read({"prompt": "x", "chosen": "a", "rejected": "b"}, "file:1")
    assert [(p.chosen, p.rejected, p.soft_label) for p in both.pairs] == [(0, 0, 1), (1, 1, 0)]
    with pytest.raises(Dropped, match="identical"):
        unpaired.read({"prompt": "x", "chosen": "a", "rejected": "a"}, "file:1")
    for bad in (
        {"completion": "a"},
        {"completion": "a", "completions": None},
        {"chosen": "a", "rejected": "b", "soft_label": 0.2},
        {"completion": "a", "label": "yes"},
        {"completions": ["a", "b"], "labels": [1]},
    ):
        with pytest.raises(DataError, match="label"):
            unpaired.read({"prompt": "x", **bad}, "file:1")
    with pytest.raises(DataError, match="ranked"):
        unpaired.read({"prompt": "x", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}, "file:1")
    # SFT learns the good ones
    sft = RowReader("", "sft")
    assert sft.read(
        {"prompt": "x", "completions": ["a", "b"], "labels": [0, 1]}, "file:1"
    ).responses == ("b",)
    with pytest.raises(DataError, match="weight"):
        unpaired.read({"prompt": "x", "completion": "a", "label": True, "weight": -1}, "file:1")
    with pytest.raises(Dropped, match="undesirable"):
        sft.read({"prompt": "x", "completion": "a", "completions": None, "label": False}, "file:1")
    with pytest.raises(Dropped, match="undesirable"):
        sft.read({"prompt": "x", "completion": "a", "label": False}, "file:1")


def test_mismatched_responses_answer_other_prompts_and_are_the_same_in_every_process():
    made = [
        {"prompt_ids": [1, 2 + i // 2], "chosen_ids": [10 + i, 3], "rejected_ids": [40 + i]}
        for i in range(12)
    ]
    index, data = unpaired_index(made)
    found = index.with_mismatched(3)
    assert [found.responses(i)[:2] for i in range(12)] == [index.responses(i) for i in range(12)]
    prompts = [tuple(made[row]["prompt_ids"]) for row in found.rows]
    others = [tuple(made[row]["prompt_ids"]) for row, _ in found.mismatched]
    assert (
        all(a != b for a, b in zip(prompts, others, strict=True))
        and len({row for row, _ in found.mismatched}) == 12
    )
    assert (found.rejected == 2).all() and (found.first(4).rejected == 2).all()
    again = index.with_mismatched(3)
    assert all(
        np.array_equal(a, np.asarray(b))
        for a, b in zip(found, again, strict=True)
        if isinstance(a, np.ndarray)
    )
    another = index.with_mismatched(4).mismatched
    assert found.mismatched is not None and another is not None
    assert not np.array_equal(another, found.mismatched)
    shape = make_shape(
        [found], layout="shared", num_groups=4, num_shards=1, micro_batch_tokens=64, row_tokens=0
    )
    pack = PackGroups(data, found, shape, (0,), 0)
    group = pack.token_group(5)
    row, answer = found.mismatched[5]
    assert group.responses[2].tolist() == made[row][("chosen_ids", "rejected_ids")[answer]]
    assert set(found.mismatched[:, 1]) == {0, 1}  # good ones and bad ones
    assert [(p.chosen, p.rejected, p.soft_label) for p in group.pairs] == [(0, 2, 1), (1, 2, 0)]
    batch, _ = pack(range(4))
    assert int(batch.num_pairs) == 8 and int(batch.valid.sum()) == 8
    same, _ = unpaired_index([{**r, "prompt_ids": [1]} for r in made])
    with pytest.raises(ConfigError, match="all prompts"):
        same.with_mismatched(0)


def unpaired_index(made):
    records = in_memory("made", made)
    data = Dataset(records, RowReader("", "unpaired"), None, Limits(8, 8))
    return build_index(data, on_bad_line="error", max_bad_share=0, progress=lambda n: None), data


def test_masks_of_some_rows_stay_beside_mismatched_responses_of_others():
    made = [
        {"prompt_ids": [1 + i], "chosen_ids": [10 + i, 3, 4], "rejected_ids": [40 + i]}
        for i in range(6)
    ]
    made[0] |= {"chosen_mask": [0, 0, 1], "rejected_mask": [1]}
    index, data = unpaired_index(made)
    found = index.with_mismatched(0)
    shape = make_shape(
        [found], layout="shared", num_groups=6, num_shards=1, micro_batch_tokens=64, row_tokens=0
    )
    batch, _ = PackGroups(data, found, shape, (0,), 0)(range(6))
    lengths, chosen = np.asarray(batch.lengths), np.asarray(batch.chosen)
    lengths = np.take_along_axis(lengths, chosen, axis=2)[batch.valid]
    assert int(batch.num_chosen_tokens) == lengths.sum() == 2 + 5 * 4


def test_formatting_tokens_are_masked_by_column_and_by_name():
    row = {
        "prompt_ids": [1],
        "chosen_ids": [5, 9, 6],
        "rejected_ids": [7, 9],
        "chosen_mask": [0, 1, 1],
    }
    group, _ = tokenize(read(row), None, Limits(8, 8), 0, frozenset([9]))
    assert [c.tolist() for c in group.counted] == [[False, False, True], [True, False]]
    with pytest.raises(Dropped, match="empty_response"):
        tokenize(read({**row, "chosen_mask": [0, 1, 0]}), None, Limits(8, 8), 0, frozenset([9]))
    with pytest.raises(DataError, match="chosen_mask"):
        read({**row, "chosen_mask": [0, 1]})
    with pytest.raises(DataError, match="chosen_mask"):
        read({"prompt": "x", "chosen": "a", "rejected": "b", "chosen_mask": [1]})
    # one masked response of K takes only its own pairs
    ranked = Group(
        (1,),
        ((5,), (9,), (6,)),
        tuple(TokenPair(i, j, 1.0, 1.0, 0.0) for i, j in ((0, 1), (0, 2), (1, 2))),
    )
    kept, cut = tokenize(ranked, None, Limits(8, 8), 0, frozenset([9]))
    assert (
        len(kept.responses) == 2 and len(kept.pairs) == 1 and cut.dropped == ("empty_response",) * 2
    )
    tokenizer = world.make_world(7, num_posts=2000, num_pairs=4, num_eval=4).tokenizer
    assert mask_ids("</s>", tokenizer) == {tokenizer.eos_id}
    with pytest.raises(ConfigError, match="nothing"):
        mask_ids("nothing-such", tokenizer)


def test_null_columns_are_absent_ones():
    row = {
        "prompt": "x",
        "chosen": "a",
        "rejected": "b",
        "responses": None,
        "prompt_ids": None,
        "weight": None,
    }
    assert read(row).responses == ("a", "b")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "x", "chosen": "a", "rejected": "a"}, "identical"),
        ({"prompt": "x", "chosen": " ", "rejected": "a"}, "empty_response"),
        ({"prompt": "", "chosen": "b", "rejected": "a"}, "empty_prompt"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "prompt_mismatch",
        ),
        ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "role_order"),
        ({"prompt": "x", "responses": ["a", "b"], "scores": [1, 1]}, "no_preference"),
    ],
)
def test_rows_without_a_preference_are_dropped_with_a_reason(row, reason):
    with pytest.raises(Dropped) as verdict:
        read(row)
    assert verdict.value.reason == reason


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "x", "chosen": "a"}, "'rejected' is missing"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' is 3"),
        ({"prompt": "x", "chosen": None, "rejected": "b"}, "'chosen' is missing"),
        (
            {"prompt": "x", "chosen": "a", "rejected": "b", "score_chosen": 5},
            "'score_rejected' is missing",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "weight": -1}, "'weight'"),
        ({"prompt_ids": [1.5], "chosen_ids": [1], "rejected_ids": [2]}, "'prompt_ids'"),
    ],
)
def test_rows_that_are_wrong_name_file_line_and_column(row, names):
    with pytest.raises(DataError, match=f"file:1: .*{names}"):
        read(row)


def test_messages_without_a_template_are_a_config_error():
    message = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ConfigError, match="prompt_template"):
        read({"chosen": message, "rejected": message})


@pytest.mark.parametrize(
    ("line", "names"),
    [
        (b'{"a": 1', "bad.jsonl:2"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"a": "\xff"}', "bad.jsonl:2"),
        (b'{"a": "\x00"}', "NUL"),
        (b"[1]", "not an object"),
    ],
)
def test_damaged_lines_name_file_and_line(tmp_path, line, names):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 0}\n' + line + b"\n")
    records = open_records(str(path))
    assert records.get(0) == {"a": 0}  # a BOM is no damage
    with pytest.raises(DataError, match=names):
        records.get(1)


def test_every_file_format_holds_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(5)]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "x.jsonl").write_text(lines + "\n")
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    writer = ArrayRecordWriter(str(tmp_path / "x.arrayrecord"), "group_size:1")
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()
    for name in ("x.jsonl", "x.jsonl.gz", "x.parquet", "x.arrayrecord"):
        records = open_records(str(tmp_path / name))
        assert [records.get(i) for i in range(records.size)] == rows, name


def test_bos_eos_truncation_and_continuation(tokenizer):
    group = Group("I feel sad.", (" It cost 40 dollars.", " I feel sad now."), ())
    found, cut = tokenize(group, tokenizer, Limits(100, 100), 0)
    assert found.prompt[0] == tokenizer.bos_id and cut.prompt == 0
    assert all(r[-1] == tokenizer.eos_id for r in found.responses)
    whole = tokenizer.decode([*found.prompt[1:].tolist(), *found.responses[0][:-1].tolist()])
    assert whole == "I feel sad. It cost 40 dollars."  # nothing is put between prompt and response
    short, cut = tokenize(group, tokenizer, Limits(3, 4), 0)
    # cut from the left, BOS kept
    assert short.prompt.tolist() == [tokenizer.bos_id, *found.prompt[-2:].tolist()]
    # cut from the right, no EOS
    assert short.responses[0].tolist() == found.responses[0][:4].tolist()
    assert (
        tokenizer.eos_id not in short.responses[0]
        and cut.responses[0] == len(found.responses[0]) - 4
    )


def test_real_tokenizers_encode_continuations_without_a_prefix(shared_data):
    for name in (
        "tokenizers/llama2",
        "tokenizers/tinyllama",
        "tokenizers/gpt2",
        "models/TinyStories-656K",
    ):
        tokenizer = load_tokenizer(str(shared_data / name))
        for text in ("Hello you", " Hello", "\n\nyes", "né 日本 🙂", ""):
            prompt = tokenizer.encode_prompt("A story:")
            joined = tokenizer.decode([*prompt, *tokenizer.encode_continuation(text)])
            if "656K" not in name:  # its vocabulary lacks most characters
                assert joined == "A story:" + text, (name, text)
        # text stays text
        assert tokenizer.eos_id not in tokenizer.encode_prompt(
            "a </s> <|endoftext|> <|end_story|> b"
        )


def make_pack(tokenizer, count=40):
    rows = [
        {"prompt": t, "chosen": f" I feel sad {i}.", "rejected": " It cost 40 dollars."}
        for i, t in enumerate(TEXTS[:count])
    ]
    data = Dataset(in_memory("test", rows), RowReader(""), tokenizer, Limits(512, 64))
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
    assert not index.bad and not index.dropped
    shape = make_shape(
        [index], layout="shared", num_groups=8, num_shards=2, micro_batch_tokens=1024, row_tokens=0
    )
    return PackGroups(data, index, shape, (0, 1), tokenizer.pad_id)


def test_the_order_is_a_pure_function_of_seed_and_step(tokenizer):
    pack = make_pack(tokenizer)
    steps = step_positions(pack.index, num_groups=8, seed=3, shuffle=True)
    epochs = [sorted(g for i in range(e * 5, e * 5 + 5) for g in steps[i]) for e in range(2)]
    assert epochs[0] == epochs[1] == list(range(40))  # every group once an epoch
    assert steps[0] != steps[5]  # in a new order
    options: dict[str, Any] = dict(num_groups=8, seed=3, shuffle=True, stop=7, workers=0)
    whole = [b.row_id for b, _ in train_batches(pack, start=0, **options)]
    late = [b.row_id for b, _ in train_batches(pack, start=4, **options)]
    np.testing.assert_array_equal(whole[4:], late)


@pytest.mark.parametrize("groups", [1, 2, 39, 100])
def test_a_step_takes_any_number_of_groups(tokenizer, groups):
    pack = make_pack(tokenizer, count=3)
    for shuffle in (False, True):
        steps = step_positions(pack.index, num_groups=groups, seed=3, shuffle=shuffle)[0:6]
        taken = [g for i in range(6) for g in steps[i]]
        assert len(taken) == 6 * groups
        assert sorted(taken[:3]) == [0, 1, 2]  # every group once before any comes again


@pytest.mark.slow
def test_worker_processes_give_the_batches_of_threads(tokenizer):
    pack = make_pack(tokenizer)
    options: dict[str, Any] = dict(num_groups=8, seed=3, shuffle=True, start=0, stop=4)
    threads = [b for b, _ in train_batches(pack, workers=0, **options)]
    workers = [b for b, _ in train_batches(pack, workers=2, **options)]
    for a, b in zip(threads, workers, strict=True):
        for name, x, y in zip(a._fields, a, b, strict=True):
            if x is not None:
                np.testing.assert_array_equal(x, y, err_msg=name)


def test_bad_lines_are_tolerated_as_far_as_the_settings_say_also_from_a_stored_index(
    tokenizer, tmp_path
):
    from dpojax.data.index_cache import load_or_build_index

    rows = [{"prompt": TEXTS[i], "chosen": " a", "rejected": " b"} for i in range(10)]
    rows[3] = {"prompt": "x"}
    rows[5] = {"prompt": "half a character: \ud800", "chosen": "a", "rejected": "b"}
    data = Dataset(in_memory("test", rows), RowReader(""), tokenizer, Limits(512, 64))

    def open_it(on, share):
        return load_or_build_index(
            data,
            tmp_path,
            on_bad_line=on,
            max_bad_share=share,
            write=lambda change: change(),
            progress=lambda row: None,
        )

    index = open_it("skip", 0.2)
    assert index.counts["bad_line"] == 2 and len(index.rows) == 8 and "test:6" in index.bad[1]
    for on, share in (("error", 0.2), ("skip", 0.1)):
        with pytest.raises(DataError, match="test:"):
            open_it(on, share)
    assert open_it("skip", 0.2).bad == index.bad


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_fewer_groups_than_a_step_takes_still_fit_its_shape(tokenizer, count):
    rows = [{"prompt": TEXTS[i], "chosen": " a", "rejected": " b"} for i in range(count)]
    data = Dataset(in_memory("few", rows), RowReader(""), tokenizer, Limits(512, 64))
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
    shape = make_shape(
        [index], layout="shared", num_groups=32, num_shards=1, micro_batch_tokens=4096, row_tokens=0
    )
    pack = PackGroups(data, index, shape, (0,), tokenizer.pad_id)
    options: dict[str, Any] = dict(num_groups=32, seed=0, shuffle=True, start=0, stop=3, workers=0)
    for batch, _ in train_batches(pack, **options):
        assert int(batch.num_pairs) == 32 == int(batch.valid.sum())


def test_an_evaluation_stops_before_it_exceeds_its_pairs(tokenizer):
    rows = [
        {"prompt": f"{i}", "responses": ["a", "b", "c", "d"], "scores": [1, 2, 3, 4]}
        for i in range(4)
    ]
    data = Dataset(in_memory("k", rows), RowReader(""), tokenizer, Limits(64, 64))
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
    assert [index.groups_within(n) for n in (0, 1, 6, 8, 12, 100)] == [4, 1, 1, 1, 2, 4]


def test_a_batch_size_that_is_no_multiple_of_the_pairs_per_group_says_the_fix():
    rows = [{"prompt": f"{i}", "responses": ["a", "b", "c"], "scores": [1, 2, 3]} for i in range(4)]
    tokenizer = world.train_tokenizer(TEXTS)
    data = Dataset(in_memory("k", rows), RowReader(""), tokenizer, Limits(64, 64))
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
    assert groups_per_step(index, batch_size=6, batch_groups=0) == 2
    with pytest.raises(ConfigError, match=r"batch_size=8: .*e\.g\. 9"):
        groups_per_step(index, batch_size=8, batch_groups=0)


def test_the_world_is_as_large_as_it_says():
    made = world.make_world(0)
    rows = [made.train.get(i) for i in range(0, 6144, 4)]
    posts = [1 + len(made.tokenizer.encode_prompt(r["prompt"])) for r in rows]  # with BOS
    # with EOS
    summaries = [
        1 + len(made.tokenizer.encode_continuation(r[k]))
        for r in rows
        for k in ("chosen", "rejected")
    ]
    assert made.tokenizer.vocab_size >= 1000 and made.eval.size >= 500
    assert min(posts) >= 60 and max(posts) <= 250 and max(posts) > 2 * min(posts)
    assert min(summaries) >= 10 and max(summaries) <= 40 and max(summaries) > 3 * min(summaries)


def test_the_world_reads_its_own_facts_and_rewards_the_truth():
    rng = np.random.default_rng(0)
    for _ in range(100):
        post = world.make_post(rng)
        assert {k: world.read_facts(post.text)[k] for k in world.FACTS} == {
            k: post.facts[k] for k in world.FACTS
        }
        f = post.facts
        best = (
            f" My {f['relation']} {f['name']} {f['verb']} my {f['object']} in {f['place']}. It cost"
            f" {f['amount']} dollars."
        )
        best += f" I feel {f['feeling']}. Should I {f['question']}?"
        assert world.reward(post.text, best) == 6
        assert world.reward(post.text, best + " " + world.PADDING[0]) == 5
        assert world.reward(post.text, best.replace(f["place"], "Nowhere")) < 5
