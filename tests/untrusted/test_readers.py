"""What strangers wrote: JSON of every kind, numbers, weights, adapters, packed files.

Each ends in a sentence and its code.
"""

import ast
import dataclasses
import gzip
import itertools
import json
import math
import os
import pathlib
import shutil
import typing
from typing import Any

import pytest

from dpojax import main, plan, sweep
from dpojax.config import schema
from dpojax.config.load import apply_override, from_config_dict, load_config_file, to_dict
from dpojax.data import dialogues, groups, open_tokenizer, records, rows
from dpojax.errors import ConfigError, DataError, DpojaxError, FitError
from dpojax.models import placed
from dpojax.runtime import log
from dpojax.untrusted.plain_data import MAX_DEPTH, MAX_FLOAT32, MAX_INT32, number_fault, parse_json
from dpojax.weights import huggingface, peft, safetensors
from dpojax.weights.open import open_weights, read_shape

ROOT = pathlib.Path(__file__).parents[2]


def deep(opening, closing=b"", levels=2000):
    return opening * levels + closing * levels


# Each is hostile as an object's text; the readers' own fields are tried below.
HOSTILE = [
    *(
        b"",
        b" ",
        b"\n",
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\x1f\x8b\x08\x00",
        b"PK\x03\x04",
        b"\x80\x04\x95",
    ),
    *(
        b"null",
        b"true",
        b"0",
        b"-1",
        b'"text"',
        b"NaN",
        b"Infinity",
        b"1e999",
        b"[]",
        b"[1]",
        b"[{}]",
        b"[[]]",
    ),
    *(
        b"{",
        b"}",
        b"{]",
        b"{}{}",
        b"{} x",
        b"{,}",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b"{a:1}",
        b"{'a':1}",
        b'{"a":1',
    ),
    *(
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":.5}',
        b'{"a":0x1}',
        b'{"a":nan}',
        b'{"a":tru}',
        b'{"a":"\n"}',
        b'{"a":"\\x"}',
    ),
    *(
        b'{"a":1,"a":2}',
        b'{"b":{"a":1,"a":1}}',
        b'{"a":NaN}',
        b'{"a":-Infinity}',
        b'{"a":1e400}',
        b'{"a":[-1e999]}',
    ),
    *(
        b'{"a":1' + b"0" * 400 + b"}",
        b'{"a":1' + b"0" * 5000 + b"}",
        b'{"a":[[-1' + b"0" * 350 + b"]]}",
    ),
    *(
        b'{"a":"\\u0000"}',
        b'{"\\u0000":1}',
        b'{"a":"\\ud800"}',
        b'{"\\udfff":1}',
        b'{"a":["\\ud800x"]}',
    ),
    *(b'{"a":"\0"}', b'{"a":"\xc3\x28"}', b'{"a":"\xed\xa0\x80"}'),
    *(
        deep(b"["),
        deep(b'{"a":'),
        deep(b'{"a":', b"}"),
        deep(b"[", b"]", 101),
        b'{"a":' + deep(b"[", b"]", 5000) + b"}",
    ),
    *(
        b'{"a":' + deep(b"[", b"]", 100_000) + b"}",
        b"//\n{}",
        b"<html></html>",
        b'"' + b"x" * 100_000,
    ),
]


def test_there_are_sixty_hostile_documents():
    assert len(HOSTILE) >= 60 and len(set(HOSTILE)) == len(HOSTILE)


def read_line(path, data):
    """A line of a data file."""
    path.with_suffix(".jsonl").write_bytes(data.replace(b"\n", b"\t") + b"\n")
    opened = records.open_records(str(path.with_suffix(".jsonl")))
    return opened.get(0)


def read_index(path, data):
    (path.parent / safetensors.INDEX).write_bytes(data)
    return safetensors.Directory(path.parent)


def read_header(path, data):
    """A safetensors header."""
    path = path.with_suffix(".safetensors")
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    if not safetensors.open_safetensors(path):
        raise ConfigError(f"{path}: an empty header")


def read_adapter(path, data):
    (path.parent / peft.CONFIG).write_bytes(data)
    return peft.read_settings(path.parent)


def read_checksums(path, data):
    (path.parent / safetensors.CHECKSUMS).write_bytes(data)
    safetensors.verify_checksums(path.parent)
    raise ConfigError(f"{path.parent}: no checksum was wrong")


def named(name, reader):
    def read(path, data):
        (path.parent / name).write_bytes(data)
        return reader(path.parent)

    return read


def read_tokenizer(folder):
    """Everything that is read of the files beside a tokenizer."""
    if not (folder / "tokenizer.model").exists():
        shutil.copy(TOKENIZER[0] / "tokenizer.model", folder)
    tokenizer = open_tokenizer.load_tokenizer(str(folder))
    open_tokenizer.stop_ids(tokenizer, open_tokenizer.chat_template(tokenizer))
    (folder / "t.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    open_tokenizer.chat_template(tokenizer, str(folder / "t.jinja"))


TOKENIZER = []  # the folder of one, which the fixture below fills


@pytest.fixture(autouse=True)
def tokenizer_folder(files):
    TOKENIZER[:] = [files]


READERS = {
    "data, .jsonl": (read_line, 3),
    "data, .json": (lambda p, d: read_data(p.with_suffix(".json"), d), 3),
    "data, .jsonl.gz": (
        lambda p, d: read_data(p.with_suffix(".jsonl.gz"), gzip.compress(d.replace(b"\n", b"\t"))),
        3,
    ),
    "data, tools": (lambda p, d: dialogues.read_context({"tools": d.decode("latin-1")}, "x:1"), 3),
    "config": (
        lambda p, d: from_config_dict(load_config_file(str(write(p.with_suffix(".json"), d)))),
        2,
    ),
    "model.shape": (lambda p, d: read_shape(str(write(p, d))), 2),
    "config.json": (named("config.json", lambda f: huggingface.read_config(f)), 2),
    "index of safetensors": (read_index, 2),
    "safetensors": (read_header, 2),
    "checksums": (read_checksums, 2),
    "adapter_config.json": (read_adapter, 2),
    "special_tokens_map.json": (named("special_tokens_map.json", read_tokenizer), 2),
    "tokenizer_config.json": (named("tokenizer_config.json", read_tokenizer), 2),
    "generation_config.json": (named("generation_config.json", read_tokenizer), 2),
    "added_tokens.json": (named("added_tokens.json", read_tokenizer), 2),
    "chat_template.json": (named("chat_template.json", read_tokenizer), 2),
    "tokenizer.json": (
        named("tokenizer.json", lambda f: open_tokenizer.load_tokenizer(str(f / "tokenizer.json"))),
        2,
    ),
}


def write(path, data):
    path.write_bytes(data)
    return path


def read_data(path, data):
    opened = records.open_records(str(write(path, data)))
    return [opened.get(i) for i in range(opened.size)]


@pytest.mark.parametrize("reader", READERS)
def test_every_json_reader_refuses_every_hostile_document_with_its_own_code(reader, tmp_path):
    read, code = READERS[reader]
    for number, document in enumerate(HOSTILE):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            read(folder / "file", document)
        except DpojaxError as error:
            assert error.exit_code == code, (document[:80], error)
            assert len(str(error)) < 2000
        # what is hostile to one may be a list to another, but never a number or a text that cannot
        # be
        else:
            assert reader == "data, tools" or document in (b"[{}]", b"[]"), document[:80]


# --- the shape of what is expected ----------------------------------------------------------------

WRONG = [
    *(
        None,
        True,
        0,
        -1,
        1.5,
        2**31,
        -(2**63),
        10**30,
        1e39,
        1e-60,
        "",
        "x",
        "../x",
        "a\u2028b",
        "x" * 300,
    ),
    *(
        [],
        [[]],
        [None],
        [-1],
        ["x"],
        {},
        {"a": {}},
        {"content": 5},
        {"x": None},
        {"x": -1},
        {"(a+)+": 1},
        {"[": 1},
    ),
]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "layer_types": None,
    "torch_dtype": "float32",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
GEMMA3 = {
    **{k: v for k, v in LLAMA.items() if k not in ("hidden_act", "mlp_bias", "rope_parameters")},
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 10000.0,
}
ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": ".",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "init_lora_weights": True,
    "fan_in_fan_out": False,
    "bias": "none",
}
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>"},
    "pad_token": None,
    "add_bos_token": True,
    "added_tokens_decoder": {"0": {"content": "<unk>"}},
    "chat_template": "{{ eos_token }}",
}
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def read_entry(path, values):
    text = json.dumps({"a": values}).encode()
    path.with_suffix(".safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    return safetensors.open_safetensors(path.with_suffix(".safetensors"))


def read_adapter_whole(path, values):
    read_adapter(path, json.dumps(values).encode())
    loaded = peft.read_settings(path.parent)
    peft.base_folder(path.parent, loaded)
    return peft._scale(loaded, "model.layers.0.self_attn.q_proj", loaded["r"])


def as_file(name, reader):
    return lambda path, values: named(name, reader)(path, json.dumps(values).encode())


SOUND = {
    "config.json": (LLAMA, as_file("config.json", lambda f: huggingface.read_config(f))),
    "config.json, gemma3": (GEMMA3, as_file("config.json", lambda f: huggingface.read_config(f))),
    "rope_parameters": (
        LLAMA3_ROPE,
        lambda p, v: as_file("config.json", lambda f: huggingface.read_config(f))(
            p, {**LLAMA, "rope_parameters": v}
        ),
    ),
    "adapter_config.json": (ADAPTER, read_adapter_whole),
    "tokenizer_config.json": (TOKENIZER_CONFIG, as_file("tokenizer_config.json", read_tokenizer)),
    "special_tokens_map.json": (
        {"eos_token": "</s>", "bos_token": "<s>"},
        as_file("special_tokens_map.json", read_tokenizer),
    ),
    "generation_config.json": (
        {"eos_token_id": [2]},
        as_file("generation_config.json", read_tokenizer),
    ),
    "index of safetensors": (
        {"weight_map": {"a": "b.safetensors"}, "metadata": {}},
        lambda p, v: read_index(p, json.dumps(v).encode()),
    ),
    "checksums": ({"a": "0" * 64}, lambda p, v: read_checksums(p, json.dumps(v).encode())),
    "safetensors": (ENTRY, read_entry),
}


@pytest.mark.parametrize("reader", SOUND)
def test_a_field_of_another_shape_is_a_config_error_that_names_the_file(reader, tmp_path):
    sound, read = SOUND[reader]
    for number, (field, value) in enumerate((f, v) for f in sound for v in WRONG):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            read(folder / "file", {**sound, field: value})
        except ConfigError as error:
            assert len(str(error)) < 2000, (field, value, str(error)[:600])
            assert str(folder) in str(error) or "tokenizer" in str(error), (field, value, error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("rms_norm_eps", v) for v in (0, -1e-6, 1, 1e39)),
        *(("rope_theta", v) for v in (0, -10000.0, 0.5, 1e39, "10000")),
        *(("initializer_range", v) for v in (-1, "x", 1e39)),
        *(("num_hidden_layers", v) for v in (0, -1, 10**6, 2**31, 2.0)),
        *(("vocab_size", v) for v in (0, 2**31, 1e9)),
        *(("rope_scaling", {"rope_type": "linear", "factor": v}) for v in (0, -2, 1e39, "2", None)),
        ("rope_scaling", {**LLAMA3_ROPE, "low_freq_factor": 4.0}),
        ("rope_scaling", {**LLAMA3_ROPE, "original_max_position_embeddings": 0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1.0, "beta_slow": 32.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}),
        ("rope_scaling", {"rope_type": "longrope", "factor": 2.0, "short_factor": [0.0] * 4}),
    ],
)
def test_a_number_that_no_model_can_have_names_its_field(tmp_path, field, value):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, field: value}))
    word = field if not isinstance(value, dict) else r"factor|beta|original"
    with pytest.raises(ConfigError, match=rf"config\.json: .*({word})"):
        huggingface.read_config(tmp_path)


# --- numbers --------------------------------------------------------------------------------------


def test_the_number_check_knows_what_arrays_hold():
    for value in (0, MAX_INT32, -MAX_INT32):
        assert number_fault(value, int) is None
    for value in (MAX_INT32 + 1, -(2**63), 1.0, True, "1", None, math.nan):
        assert number_fault(value, int) is not None
    for value in (0, 0.0, -MAX_FLOAT32, MAX_FLOAT32, 1e-45, 5):
        assert number_fault(value, float) is None
    for value in (math.nan, math.inf, -math.inf, 1e39, 1e-60, 10**400, True, "1", None):
        assert number_fault(value, float) is not None, value
    assert number_fault(math.inf, float, infinite=True) is None


def numeric_settings(kind: Any = schema.Config, prefix=""):
    """(dotted name, int or float) of every setting that is a number."""
    for name, of in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(of):
            yield from numeric_settings(of, f"{prefix}{name}.")
        options = typing.get_args(of) or (of,)
        if options[0] in (int, float) and typing.get_origin(of) is not dict:
            yield prefix + name, options[0]


@pytest.mark.parametrize(("name", "kind"), list(numeric_settings()))
def test_a_setting_is_a_number_that_arrays_hold_or_a_config_error_with_its_name(name, kind):
    values = load_config_file("configs/tldr.py")
    beyond = (
        ["9" * 30, str(2**63), str(2**31), str(-(2**31) - 1), "9" * 5000] if kind is int else []
    )
    for text in (
        *beyond,
        *(("nan", "1e39", "-1e39", "1e-60", "-inf") if kind is float else ("1.5", "nan", "x")),
    ):
        changed = values.copy_and_resolve_references()
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            apply_override(changed, name, text)
            from_config_dict(changed)


def test_every_setting_of_another_type_is_a_config_error():
    plain = to_dict(from_config_dict(load_config_file("configs/tldr.py")))

    def leaves(tree, place=()):
        for key, value in tree.items():
            yield (*place, key)
            if isinstance(value, dict):
                yield from leaves(value, (*place, key))

    for number, place in enumerate(leaves(plain)):
        for wrong in WRONG[number % 3 :: 3]:  # each setting a third of them: they are many
            tree = json.loads(json.dumps(plain))
            node = tree
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = wrong
            try:
                from_config_dict(tree)
            except ConfigError as error:
                assert len(str(error)) < 3000


# --- rows -----------------------------------------------------------------------------------------

SHAPES = {
    "pair": {"chosen": "c", "rejected": "d"},
    "ids": {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
    "ranked": {"responses": ["e", "f"], "scores": [1, 2]},
    "labelled": {"completion": "g", "label": True},
    "labelled list": {"completions": ["h", "i"], "labels": [True, False]},
    "SFT": {"response": "j"},
}


@pytest.mark.parametrize("kind", ["pairs", "sft", "unpaired", "score"])
def test_a_row_of_two_shapes_is_an_error_that_names_both(kind):
    reader = rows.RowReader("", kind)
    for (a, first), (b, second) in itertools.combinations(SHAPES.items(), 2):
        row = {"prompt": "p", **first, **second}
        with pytest.raises(DataError) as error:
            reader.read(row, "x.jsonl:7")
        assert "x.jsonl:7" in str(error.value), (a, b)
        assert any(repr(k) in str(error.value) for k in first), (a, b)
        assert any(repr(k) in str(error.value) for k in second), (a, b)
        # A null column is an absent one.
        absent = {k: None for k in second}
        if a == "pair" and kind != "unpaired":
            assert reader.read({"prompt": "p", **first, **absent}, "x.jsonl:7").responses
    with pytest.raises(DataError, match="'scores' and 'ranks'"):
        reader.read(
            {"prompt": "p", "responses": ["e", "f"], "scores": [1, 2], "ranks": [1, 2]}, "x:1"
        )


def test_a_half_of_a_shape_beside_another_is_ambiguous_too():
    for extra in ({"chosen": "c"}, {"rejected": "c"}, {"chosen_ids": [1]}, {"responses": ["a"]}):
        with pytest.raises(DataError, match="two shapes"):
            rows.RowReader("").read({"prompt": "p", "completion": "x", **extra}, "x:1")


@pytest.mark.parametrize("column", ["weight", "soft_label", "margin", "score_chosen"])
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, "1", True, [], 10**400, 1e39, -1e300], ids=range(8)
)
def test_a_number_of_a_column_is_one_that_float32_holds(column, value):
    row = {
        "prompt": "p",
        "chosen": "c",
        "rejected": "d",
        "score_rejected": 0.0,
        "score_chosen": 1.0,
        column: value,
    }
    with pytest.raises((DataError, groups.Dropped)) as error:
        rows.RowReader("").read(row, "x:1")
    large = value in (10**400, 1e39, -1e300)
    if isinstance(error.value, DataError):
        assert "x:1" in str(error.value) and repr(column) in str(error.value)
    else:
        assert large and error.value.reason == "too_large"


@pytest.mark.parametrize("value", [2**31, 2**70, -1, 1.0, True, "1", None])
def test_a_token_id_is_one_that_int32_holds(value):
    with pytest.raises(DataError, match="x:1: column 'chosen_ids'"):
        rows.RowReader("").read(
            {"prompt_ids": [1], "chosen_ids": [value], "rejected_ids": [2]}, "x:1"
        )


@pytest.mark.parametrize("blank", [b"", b" " * 5000, b"\t\t\r", "\u00a0\u2003".encode(), b" " * 17])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_line_of_white_space_is_blank_whatever_its_length(tmp_path, blank, ending):
    row = b'{"prompt":"p","chosen":"c","rejected":"d"}'
    text = b"\n".join([blank, row, blank, b"  " + row, blank])
    path = write(tmp_path / f"x{ending}", gzip.compress(text) if ending.endswith("gz") else text)
    opened = records.open_records(str(path))
    assert [opened.where(i).rpartition(":")[2] for i in range(opened.size)] == ["2", "4"]
    assert opened.get(0) == opened.get(1) == json.loads(row)


def test_json_lines_under_the_name_json_and_the_other_way_round_say_what_to_do(tmp_path):
    row = b'{"prompt":"p","chosen":"c","rejected":"d"}\n'
    for content in (row * 3, b"\n" + row * 2, b"\xef\xbb\xbf" + row):
        with pytest.raises(DataError, match=r"name it \.jsonl"):
            read_data(tmp_path / "x.json", content)
    with pytest.raises(DataError, match=r"is a \.json file"):
        read_data(tmp_path / "x.jsonl", b"[" + row.strip() + b"]\n")


def test_a_packed_file_that_unpacks_to_far_more_is_refused_before_it_does(tmp_path, monkeypatch):
    bomb = gzip.compress(b"\n" * (80 * 2**20), 1)
    with pytest.raises(DataError, match="times as many"):
        read_data(tmp_path / "x.jsonl.gz", bomb)
    monkeypatch.setattr(records, "memory_bytes", lambda: 3 * 2**20)
    lines = b"".join(json.dumps({"prompt": str(i) * 9}).encode() + b"\n" for i in range(40_000))
    with pytest.raises(DataError, match="third of the memory"):
        read_data(tmp_path / "y.jsonl.gz", gzip.compress(lines, 1))
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["x" * 1000] * 5000})
    pyarrow.parquet.write_table(table, tmp_path / "z.parquet")
    assert (tmp_path / "z.parquet").stat().st_size < 10_000
    with pytest.raises(DataError, match="third of the memory"):
        records.open_records(str(tmp_path / "z.parquet"))
    twice = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"]
    )
    pyarrow.parquet.write_table(twice, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="two columns 'prompt'"):
        records.open_records(str(tmp_path / "t.parquet"))


# --- weights --------------------------------------------------------------------------------------


def save_header(path, header, size):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


def entry(start, end, shape: Any = None, dtype: Any = "F32"):
    return {
        "dtype": dtype,
        "shape": [(end - start) // 4] if shape is None else shape,
        "data_offsets": [start, end],
    }


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8),  # the same bytes twice
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12),  # they overlap
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16),  # a gap
        ({"a": entry(4, 8)}, 8),
        ({"a": entry(0, 8)}, 12),  # bytes that belong to nothing
        ({"a": entry(0, 8)}, 4),
        ({"a": entry(-8, 0)}, 8),
        ({"a": entry(8, 0, [2])}, 8),
        ({"a": entry(0, 8, [-2])}, 8),
        ({"a": entry(0, 8, [2.0])}, 8),
        ({"a": entry(0, 8, [1] * 100 + [2])}, 8),
        ({"a": entry(0, 8, [2**40, 2**40])}, 8),
        ({"a": entry(0, 8, "2")}, 8),
        ({"a": entry(0, 8, dtype="I32")}, 8),
        ({"a": entry(0, 8, dtype=None)}, 8),
        ({"a": {**entry(0, 8), "more": 1}}, 8),
        ({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, 8),
        ({"a": [0, 8]}, 8),
        ({"a": entry(0, 8), "__metadata__": {"x": 1}}, 8),
    ],
)
def test_a_header_that_does_not_describe_its_file_is_a_config_error_that_names_it(
    tmp_path, header, size
):
    path = save_header(tmp_path / "m.safetensors", header, size)
    with pytest.raises(ConfigError, match=r"m\.safetensors: "):
        safetensors.open_safetensors(path)


def test_pipes_and_folders_in_the_place_of_files_are_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in (safetensors.SINGLE, safetensors.INDEX, "config.json", "data.jsonl", "t.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "adapter").mkdir()
    os.mkfifo(tmp_path / "adapter" / peft.CONFIG)
    calls = [
        lambda: safetensors.open_safetensors(tmp_path / safetensors.SINGLE),
        lambda: safetensors.Directory(tmp_path),
        lambda: huggingface.read_config(tmp_path),
        lambda: records.open_records(str(tmp_path / "data.jsonl")),
        lambda: open_weights(str(tmp_path / "pipe")),
        lambda: read_shape(str(tmp_path / "pipe")),
        lambda: load_config_file(str(tmp_path / "t.json")),
        lambda: peft.read_settings(tmp_path / "adapter"),
    ]
    for call in calls:
        with pytest.raises(DpojaxError):
            call()


def test_an_index_and_its_files_must_agree(tmp_path):
    for name in ("a", "b"):
        save_header(tmp_path / f"{name}.safetensors", {"x": entry(0, 8)}, 8)
    for where, words in (
        ({"x": "a.safetensors", "y": "a.safetensors"}, "'y'.*missing"),
        ({"x": "a.safetensors", "z": "b.safetensors"}, "'x' too|'z'.*missing"),
        ({"x": "../a.safetensors"}, "plain name"),
        ({"x": "c.safetensors"}, "c.safetensors"),
    ):
        (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": where}))
        with pytest.raises(ConfigError, match=words):
            safetensors.Directory(tmp_path)


def write_adapter(folder, base, **values):
    folder.mkdir(exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "base_model_name_or_path": base,
        **values,
    }
    (folder / peft.CONFIG).write_text(json.dumps(settings))
    return folder


def test_adapters_that_stand_on_one_another_are_an_error(tmp_path):
    write_adapter(tmp_path / "a", "../b")
    write_adapter(tmp_path / "b", str(tmp_path / "a"))
    write_adapter(tmp_path / "self", "../self")
    for number in range(40):
        write_adapter(tmp_path / f"c{number}", f"../c{number + 1}")
    for name in ("a", "self", "c0"):
        with pytest.raises(ConfigError, match="stand on one another"):
            open_weights(str(tmp_path / name))


@pytest.mark.parametrize(
    "values",
    [
        *({"r": v} for v in (0, -1, 1.5, True, "4", 2**31, None)),
        *({"lora_alpha": v} for v in (0, "8", 1e39, None, True)),
        *({"rank_pattern": v} for v in ({"q_proj": 0}, {"q_proj": "4"}, [1])),
        *(
            {"alpha_pattern": v}
            for v in (
                {"q": "x"},
                {"(a+)+": 1},
                {r"((\w|\.)+)+!": 1},
                {"[": 1},
                {".*" * 9: 1},
                {"a" * 999: 1},
            )
        ),
        {"use_rslora": "yes"},
        {"base_model_name_or_path": 5},
        {"base_model_name_or_path": "x" * 5000},
    ],
)
def test_an_adapter_that_cannot_be_names_its_field(tmp_path, values):
    folder = write_adapter(tmp_path / "a", "../base", **values)
    (tmp_path / "base").mkdir()
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: .*{next(iter(values))}"):
        peft.base_folder(folder, peft.read_settings(folder))


# --- code -----------------------------------------------------------------------------------------


def test_a_plain_config_runs_code_only_where_the_command_line_allows_it(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"open({str(tmp_path / 'RAN')!r}, 'w').write('x')\ndef f(x, *, beta): return -x.h * beta\n"
    )
    plain = to_dict(from_config_dict(load_config_file("configs/tldr.py")))
    spec, path = f"{tmp_path}/mine.py:f", tmp_path / "run.json"
    for setting, text in (
        ("loss.name", spec),
        ("loss.name", f"0.5*sigmoid+0.5*{spec}"),
        ("sample.reward", spec),
    ):
        section, name = setting.split(".")
        path.write_text(json.dumps({**plain, section: {**plain[section], name: text}}))
        for module in (main, plan, sweep):
            place = "--topology=v5e:1" if module is plan else "--workdir=/dev/null/x"
            grid = ["--sweep.seed=1,2"] if module is sweep else []
            assert module.main([f"--config={path}", place, *grid]) == 2
        with pytest.raises(ConfigError, match=f"{setting}.*--allow_code"):
            load_config_file(str(path))
        load_config_file(str(path), overridden=[setting])  # the command line says something else
        assert not (tmp_path / "RAN").exists()
    path.write_text(json.dumps({**plain, "loss": {**plain["loss"], "name": spec}}))
    from_config_dict(load_config_file(str(path), allow_code=True))
    assert (tmp_path / "RAN").exists()


def test_every_loader_of_code_is_behind_the_gate():
    """Whoever reads a function's name from a setting names that setting, and it is one that plain
    data is searched for.
    """
    loaders = []
    for path in (ROOT / "dpojax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            name = getattr(called, "id", getattr(called, "attr", None))
            if name == "load_function":
                loaders.append(ast.literal_eval(node.args[1]))
            if (
                name in ("exec_module", "exec", "eval", "__import__")
                and path.name != "user_function.py"
            ):
                assert isinstance(called, ast.Attribute) and name == "eval", f"{path}: {name}"
    assert loaders and set(loaders) == set(schema.CODE_SETTINGS)


# --- what a workdir holds -------------------------------------------------------------------------


def test_logs_of_hostile_lines_keep_the_sound_rows(tmp_path):
    lines = [
        b'{"step": 1, "loss": 0.5}',
        *(d.replace(b"\n", b"\t") for d in HOSTILE),
        b'{"loss": 1}',
        b'{"step": 2}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    rows = log.MetricsLog(tmp_path, enabled=False).rows()
    assert [r["step"] for r in rows] == [1, 2]


def test_depth_is_bounded_and_what_lies_within_is_read():
    assert parse_json(b'{"a":' + deep(b"[", b"]", MAX_DEPTH - 1) + b"}")
    with pytest.raises(ValueError, match="levels deep"):
        parse_json(b'{"a":' + deep(b"[", b"]", MAX_DEPTH) + b"}")
    # tokenizer_config.json of many models holds this as "no limit".
    assert parse_json(b'{"model_max_length": 1000000000000000019884624838656}')
    assert parse_json('{"a":"\\ud83d\\ude00 \\\\u0000"}') == {"a": "\U0001f600 \\u0000"}


def test_parameters_that_no_memory_holds_are_refused_before_any_is_made():
    config = huggingface.model_config(
        {**LLAMA, "intermediate_size": 10**9}, pathlib.Path("config.json")
    )
    with pytest.raises(FitError, match=r"parameters, .* GiB"):
        placed.check_memory(config, "float32")
    placed.check_memory(huggingface.model_config(LLAMA, pathlib.Path("config.json")), "float32")
