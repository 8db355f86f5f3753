"""What strangers wrote runs in a child process that the kernel bounds: it neither hangs, nor takes
the memory, nor crashes.
"""

import io
import json
import operator
import os
import pickle
import signal
import time
from typing import Any

import pytest

from dpojax.data.chat import ChatTemplate
from dpojax.data.dataset import Dataset
from dpojax.data.index import build_index
from dpojax.data.open_tokenizer import load_tokenizer, stop_ids
from dpojax.data.records import in_memory
from dpojax.data.rows import RowReader
from dpojax.data.tokens import Limits
from dpojax.errors import ConfigError, DataError
from dpojax.untrusted import sandbox

USER = {"role": "user", "content": "What is it?"}
SIDES = {side: [USER, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt"
    " %}assistant: {% endif %}"
)
# 2^60 items in some kilobytes: what walks through them in C never comes back.
TREE = (
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{%"
    " set ns.b = [ns.b, ns.b] %}{% endfor %}"
)
HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "compares in C": TREE + "{{ ns.a == ns.b }}",
    "writes in C": TREE + "{{ ns.a }}",
    "hashes in C": TREE.replace("[", "(").replace("]", ",)") + "{{ {ns.a: 1}|length }}",
}


def tiny_tokenizer(folder, **change):
    """A tokenizer.json of single characters, with EOS."""
    words = {w: i for i, w in enumerate(["<unk>", "</s>", *map(chr, range(9, 127))])}
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": words, "merges": [], "unk_token": "<unk>"},
        **dict.fromkeys(
            ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
        ),
    }
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec | change))
    return folder


def dataset(tokenizer, source, rows):
    return Dataset(
        in_memory("rows", rows),
        RowReader("", "pairs", ChatTemplate(source)),
        tokenizer,
        Limits(99, 99),
    )


def verdicts(data):
    return [found for _, found in data.read_groups(range(data.records.size))]


def test_relative_paths_mean_what_they_mean_to_the_caller_wherever_an_older_child_started(
    tmp_path, monkeypatch
):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        tiny_tokenizer(tmp_path / name / "tokenizer")
        monkeypatch.chdir(tmp_path / name)
        assert load_tokenizer("tokenizer").eos_id == 1
        (tmp_path / name / "tokenizer" / "tokenizer.json").unlink()
        with pytest.raises(ConfigError):
            load_tokenizer("tokenizer")


# --- rows -----------------------------------------------------------------------------------------


def test_rows_are_read_as_in_this_process(tmp_path):
    rows: list[Any] = [
        {k: [USER, {"role": "assistant", "content": f"{k} {i}"}] for k in SIDES} for i in range(700)
    ]
    rows[3] = {"chosen": "no dialogue", "rejected": 1}
    rows[5] = {**rows[5], "rejected": rows[5]["chosen"]}
    data = dataset(load_tokenizer(str(tiny_tokenizer(tmp_path))), PLAIN, rows)
    for i, found in enumerate(verdicts(data)):
        if isinstance(found, Exception):
            with pytest.raises(type(found)) as here:
                data.token_group(i)
            assert str(here.value) == str(found) and i in (3, 5)
        else:
            group, cut = data.token_group(i)
            assert (
                found.text == data.text_group(i)._replace(answers=None, dialogue=None)
                and found.cut == cut
                and found.tokens.pairs == group.pairs
            )
            assert found.tokens.prompt.tolist() == group.prompt.tolist() and found.tokens.row == i


@pytest.mark.parametrize(
    "what",
    [pytest.param(w, marks=[] if w == "compares in C" else pytest.mark.slow) for w in HOSTILE],
)
def test_a_template_that_never_comes_back_is_a_bad_row_and_the_others_are_read(
    tmp_path, what, monkeypatch
):
    monkeypatch.setattr(sandbox, "MAX_BYTES", 2**30)
    source = "{% if messages[0].content == 'stop' %}" + HOSTILE[what] + "{% endif %}" + PLAIN
    hostile = {k: [{"role": "user", "content": "stop"}, v[1]] for k, v in SIDES.items()}
    start = time.monotonic()
    data = dataset(
        load_tokenizer(str(tiny_tokenizer(tmp_path))), source, [SIDES, SIDES, hostile, SIDES]
    )
    first, second, third, last = verdicts(data)
    assert isinstance(third, DataError) and "rows:3: the chat template or tokenizer" in str(third)
    assert not any(isinstance(found, Exception) for found in (first, second, last))
    assert time.monotonic() - start < 60  # 7 s on an idle core


def test_a_damaged_row_that_cannot_be_parsed_keeps_its_place(tmp_path):
    records = in_memory("rows", [SIDES] * 5)

    def get(i):
        if i in (0, 3, 4):
            raise DataError(f"rows:{i + 1}: damaged")
        return SIDES

    data = dataset(load_tokenizer(str(tiny_tokenizer(tmp_path))), PLAIN, [])
    data = Dataset(records._replace(get=get), data.reader, data.tokenizer, data.limits)
    assert [isinstance(found, DataError) for found in verdicts(data)] == [
        True,
        False,
        False,
        True,
        True,
    ]


# --- tokenizers -----------------------------------------------------------------------------------


def split_by(pattern):
    return {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
    }


def replace(count, times, kind="normalizer"):
    node = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * times}
    return {kind: {"type": "Sequence", f"{kind}s": [node] * count}}


def test_a_tokenizer_of_any_kind_of_harm_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_BYTES", 2**30)
    kinds = {
        "bomb": replace(5, 1000),
        "regular expression that decodes": {
            "decoder": {"type": "Replace", "pattern": {"Regex": "(a|aa)+b"}, "content": ""}
        },
        "decoder that grows": replace(4, 1000, "decoder"),
    }
    for name, change in kinds.items():
        with pytest.raises(ConfigError, match="tokenizer"):
            load_tokenizer(str(tiny_tokenizer(tmp_path / name, **change)))
    tokenizer = load_tokenizer(str(tiny_tokenizer(tmp_path / "slow", **split_by("(a|aa)+b"))))
    row = {"prompt": "a" * 60, "chosen": "b", "rejected": "a"}
    data = Dataset(in_memory("rows", [row]), RowReader(""), tokenizer, Limits(99, 99))
    with pytest.raises(DataError, match=r"rows:1: the chat template or tokenizer"):
        build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda n: None)


@pytest.mark.slow
def test_what_ends_a_response_is_asked_of_a_template_in_the_sandbox(tmp_path):
    tokenizer = load_tokenizer(str(tiny_tokenizer(tmp_path)))
    with pytest.raises(ConfigError, match="takes more than 2 s"):
        stop_ids(tokenizer, ChatTemplate(HOSTILE["loops"]))


# --- the child ------------------------------------------------------------------------------------


def test_a_child_that_is_killed_or_stopped_costs_no_item(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SILENT_SECONDS", 1.0)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        work = sandbox._Work(divmod, 7)
        os.kill(work.child.process.pid, number)
        work.fill(iter([2, 3, 4]))
        found = []
        while work.sent or work.again:
            found += work.receive()
            work.fill(iter([]))
        work.close()
        assert found == [divmod(7, n) for n in (2, 3, 4)]


def test_a_result_names_no_function_that_this_process_would_call():
    with pytest.raises(pickle.UnpicklingError, match="system"):
        sandbox._Results(io.BytesIO(pickle.dumps(os.system))).load()


@pytest.mark.parametrize("count", [1, 64, 65, 128, 300])
def test_several_children_give_the_results_in_order(count):
    found = list(sandbox.spread(operator.truediv, 12.0, [i % 5 for i in range(count)], children=2))
    assert len(found) == count
    for i, result in enumerate(found):
        assert isinstance(result, ZeroDivisionError) if i % 5 == 0 else result == 12.0 / (i % 5)
