"""What strangers wrote: JSON of every kind, numbers, weights, adapters, packed files. Each ends in a sentence and its code."""

import dataclasses
import gzip
import json
import math
import pathlib
import shutil
import typing

import pytest

from dpojax import config as settings
from dpojax.config import apply_override, from_config_dict, load_config_file, to_dict
from dpojax.data import records, tokens, triples
from dpojax.errors import ConfigError, DpojaxError
from dpojax.models import hf, peft
from dpojax.plain_data import MAX_FLOAT32, MAX_INT32, number_fault
from dpojax.weights import read_shape

ROOT = pathlib.Path(__file__).parents[1]


def deep(opening, closing=b"", levels=2000):
    return opening * levels + closing * levels


# Each is hostile as an object's text; the readers' own fields are tried below.
HOSTILE = [
    *(b"", b" ", b"\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\x80\x04\x95"),
    *(b"null", b"true", b"0", b"-1", b'"text"', b"NaN", b"Infinity", b"1e999", b"[]", b"[1]", b"[{}]", b"[[]]"),
    *(b"{", b"}", b"{]", b"{}{}", b"{} x", b"{,}", b'{"a"}', b'{"a":}', b'{"a":1,}', b"{a:1}", b"{'a':1}", b'{"a":1'),
    *(b'{"a":01}', b'{"a":+1}', b'{"a":.5}', b'{"a":0x1}', b'{"a":nan}', b'{"a":tru}', b'{"a":"\n"}', b'{"a":"\\x"}'),
    *(b'{"a":1,"a":2}', b'{"b":{"a":1,"a":1}}', b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1e400}', b'{"a":[-1e999]}'),
    *(b'{"a":1' + b"0" * 400 + b"}", b'{"a":1' + b"0" * 5000 + b"}", b'{"a":[[-1' + b"0" * 350 + b"]]}"),
    *(b'{"a":"\\u0000"}', b'{"\\u0000":1}', b'{"a":"\\ud800"}', b'{"\\udfff":1}', b'{"a":["\\ud800x"]}'),
    *(b'{"a":"\0"}', b'{"a":"\xc3\x28"}', b'{"a":"\xed\xa0\x80"}'),
    *(deep(b"["), deep(b'{"a":'), deep(b'{"a":', b"}"), deep(b"[", b"]", 101), b'{"a":' + deep(b"[", b"]", 5000) + b"}"),
    *(b'{"a":' + deep(b"[", b"]", 100_000) + b"}", b"//\n{}", b"<html></html>", b'"' + b"x" * 100_000),
]


def test_there_are_sixty_hostile_documents():
    assert len(HOSTILE) >= 60 and len(set(HOSTILE)) == len(HOSTILE)


def read_line(path, data):
    """A line of a data file."""
    path.with_suffix(".jsonl").write_bytes(data.replace(b"\n", b"\t") + b"\n")
    opened = records.open_records(str(path.with_suffix(".jsonl")))
    return opened.get(0)


def read_index(path, data):
    (path.parent / hf.INDEX).write_bytes(data)
    return hf.Directory(path.parent)


def read_header(path, data):
    """A safetensors header."""
    path = path.with_suffix(".safetensors")
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    if not hf.open_safetensors(path):
        raise ConfigError(f"{path}: an empty header")


def read_adapter(path, data):
    (path.parent / peft.CONFIG).write_bytes(data)
    return peft.read_settings(path.parent)


def read_checksums(path, data):
    (path.parent / hf.CHECKSUMS).write_bytes(data)
    hf.verify_checksums(path.parent)
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
    tokenizer = tokens.load_tokenizer(str(folder))
    tokens.stop_ids(tokenizer, tokens.chat_template(tokenizer))
    (folder / "t.jinja").write_text("{{ messages[0].content }}{{ eos_token }}")
    tokens.chat_template(tokenizer, str(folder / "t.jinja"))


TOKENIZER = []  # the folder of one, which the fixture below fills


@pytest.fixture(autouse=True)
def tokenizer_folder(files):
    TOKENIZER[:] = [files]


READERS = {
    "data, .jsonl": (read_line, 3),
    "data, .json": (lambda p, d: read_data(p.with_suffix(".json"), d), 3),
    "data, .jsonl.gz": (lambda p, d: read_data(p.with_suffix(".jsonl.gz"), gzip.compress(d.replace(b"\n", b"\t"))), 3),
    "data, tools": (lambda p, d: triples.read_context({"tools": d.decode("latin-1")}, "x:1"), 3),
    "config": (lambda p, d: from_config_dict(load_config_file(str(write(p.with_suffix(".json"), d)))), 2),
    "model.shape": (lambda p, d: read_shape(str(write(p, d))), 2),
    "config.json": (named("config.json", lambda f: hf.read_config(f)), 2),
    "index of safetensors": (read_index, 2),
    "safetensors": (read_header, 2),
    "checksums": (read_checksums, 2),
    "adapter_config.json": (read_adapter, 2),
    "special_tokens_map.json": (named("special_tokens_map.json", read_tokenizer), 2),
    "tokenizer_config.json": (named("tokenizer_config.json", read_tokenizer), 2),
    "generation_config.json": (named("generation_config.json", read_tokenizer), 2),
    "added_tokens.json": (named("added_tokens.json", read_tokenizer), 2),
    "chat_template.json": (named("chat_template.json", read_tokenizer), 2),
    "tokenizer.json": (named("tokenizer.json", lambda f: tokens.load_tokenizer(str(f / "tokenizer.json"))), 2),
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
        else:  # what is hostile to one may be a list to another, but never a number or a text that cannot be
            assert reader == "data, tools" or document in (b"[{}]", b"[]"), document[:80]


# --- the shape of what is expected ------------------------------------------------------------------------------------

WRONG = [
    *(None, True, 0, -1, 1.5, 2**31, -(2**63), 10**30, 1e39, 1e-60, "", "x", "../x", "a\u2028b", "x" * 300),
    *([], [[]], [None], [-1], ["x"], {}, {"a": {}}, {"content": 5}, {"x": None}, {"x": -1}, {"(a+)+": 1}, {"[": 1}),
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
    return hf.open_safetensors(path.with_suffix(".safetensors"))


def read_adapter_whole(path, values):
    read_adapter(path, json.dumps(values).encode())
    loaded = peft.read_settings(path.parent)
    peft.base_folder(path.parent, loaded)
    return peft._scale(loaded, "model.layers.0.self_attn.q_proj", loaded["r"])


def as_file(name, reader):
    return lambda path, values: named(name, reader)(path, json.dumps(values).encode())


SOUND = {
    "config.json": (LLAMA, as_file("config.json", lambda f: hf.read_config(f))),
    "config.json, gemma3": (GEMMA3, as_file("config.json", lambda f: hf.read_config(f))),
    "rope_parameters": (
        LLAMA3_ROPE,
        lambda p, v: as_file("config.json", lambda f: hf.read_config(f))(p, {**LLAMA, "rope_parameters": v}),
    ),
    "adapter_config.json": (ADAPTER, read_adapter_whole),
    "tokenizer_config.json": (TOKENIZER_CONFIG, as_file("tokenizer_config.json", read_tokenizer)),
    "special_tokens_map.json": (
        {"eos_token": "</s>", "bos_token": "<s>"},
        as_file("special_tokens_map.json", read_tokenizer),
    ),
    "generation_config.json": ({"eos_token_id": [2]}, as_file("generation_config.json", read_tokenizer)),
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
        hf.read_config(tmp_path)


# --- numbers ----------------------------------------------------------------------------------------------------------


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


def numeric_settings(kind=settings.Config, prefix=""):
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
    beyond = ["9" * 30, str(2**63), str(2**31), str(-(2**31) - 1), "9" * 5000] if kind is int else []
    for text in (*beyond, *(("nan", "1e39", "-1e39", "1e-60", "-inf") if kind is float else ("1.5", "nan", "x"))):
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

    for place in leaves(plain):
        for wrong in WRONG:
            tree = json.loads(json.dumps(plain))
            node = tree
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = wrong
            try:
                from_config_dict(tree)
            except ConfigError as error:
                assert len(str(error)) < 3000
