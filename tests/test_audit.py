"""The audit counts exactly the faults that were planted."""

import json

import pytest

from dpojax import audit
from dpojax.data import world

GOOD = {"prompt": "I feel sad.", "chosen": " It cost 40 dollars.", "rejected": " I feel sad now."}


@pytest.fixture
def files(tmp_path):
    rows = [
        GOOD,
        GOOD,  # duplicated
        {**GOOD, "chosen": GOOD["rejected"], "rejected": GOOD["chosen"]},  # contradictory
        {**GOOD, "rejected": GOOD["chosen"]},  # identical
        {**GOOD, "chosen": " "},  # empty
        {"prompt": "x"},  # unreadable
        {**GOOD, "chosen": " It cost 40 dollars." * 30},  # cut
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = world.make_world(7, num_posts=2000, num_pairs=64, num_eval=16)
    made.tokenizer.save(tmp_path)
    return tmp_path


def test_planted_faults_are_counted_and_located(files, capsys):
    argv = [
        f"--data={files / 'x.jsonl'}",
        f"--tokenizer={files / 'tokenizer.model'}",
        "--show=1",
        "--color=always",
    ]
    assert audit.main(argv) == 0
    text = capsys.readouterr().out
    expected = [
        "7 rows, 4 usable pairs",
        "1 rows cannot be read: x.jsonl:6",
        "1 dropped, a response is empty, or only white space or formatting tokens: x.jsonl:5",
        "1 dropped, chosen and rejected are the same: x.jsonl:4",
        "1 pairs occur again: x.jsonl:2 repeats x.jsonl:1",
        "1 pairs contradict another (labels reversed): x.jsonl:3 reverses x.jsonl:1",
        "1 responses of 8 would be cut",
        "4 prompts start with their one BOS",
        "7 responses of 8 end in EOS; 0 hold one before their end",
        "0 responses of 8 are glued to their prompt",
        "\x1b[32m",
    ]
    for line in expected:
        assert line in text, line


def test_a_missing_file_exits_2(capsys):
    assert audit.main(["--data=nowhere.jsonl"]) == 2
    assert "nowhere.jsonl" in capsys.readouterr().err


def test_published_dialogues_are_read_with_their_faults(shared_data, capsys):
    data, tokenizer = shared_data / "hh/harmless-base.jsonl.gz", shared_data / "tokenizers/llama2"
    assert audit.main([f"--data={data}", f"--tokenizer={tokenizer}", "--show=0"]) == 0
    text = capsys.readouterr().out
    assert (
        "2,312 rows, 2,303 usable pairs" in text
        and "5 dropped, chosen and rejected answer different prompts" in text
    )


def test_labelled_responses_are_counted_by_their_label(tmp_path, capsys):
    rows = [
        ("a b", "c d e", True),
        ("a b", "f", False),
        ("a b", "c d e", False),
        ("g", "h", True),
        ("g", "h", True),
    ]
    lines = [json.dumps({"prompt": p, "completion": c, "label": v}) + "\n" for p, c, v in rows]
    (tmp_path / "x.jsonl").write_text("".join(lines))
    world.make_world(7, num_posts=2000, num_pairs=4, num_eval=4).tokenizer.save(tmp_path)
    assert (
        audit.main(
            [
                f"--data={tmp_path / 'x.jsonl'}",
                f"--tokenizer={tmp_path / 'tokenizer.model'}",
                "--unpaired",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    for line in (
        "5 usable labelled responses",
        "1 labelled responses occur again: x.jsonl:5",
        "x.jsonl:3 reverses x.jsonl:1",
        "60.0%",
    ):
        assert line in text, line
