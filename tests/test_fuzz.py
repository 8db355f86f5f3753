"""Damaged files and odd command lines, drawn from seeds: each ends in a result or in one sentence
with its exit code.
"""

import contextlib
import gzip
import io
import json
import random
import shutil
import signal

import numpy as np
import pytest

from dpojax import audit, convert, generate, main, plan, score, sweep
from dpojax.config.load import from_config_dict, load_config_file, to_dict
from dpojax.data import dataset, groups, index_cache, open_tokenizer, records, rows, tokens
from dpojax.errors import DpojaxError
from dpojax.weights import huggingface, llama2c, peft, safetensors
from dpojax.weights.open import open_weights

CODES = {0, 2, 3, 4, 5, 6}
SECONDS = 20  # that one input may take
HOSTILE_TEXT = [
    *(
        "",
        " ",
        "\0",
        "nan",
        "inf",
        "-1",
        "0",
        "1e999",
        "9" * 40,
        "-" + "9" * 400,
        "1.5",
        "true",
        "None",
        "[]",
        "{}",
        "{",
    ),
    *(
        "{prompt",
        "{prompt.x}",
        "{prompt!r:>999999999}",
        "x" * 5000,
        "../../x",
        "/",
        "/dev/null",
        "/dev/null/x",
        "é\u2028",
    ),
    *(
        "\ud800",
        "a:b",
        "os:system",
        "x.py:f",
        "hf:",
        "--",
        "=",
        "%s%n",
        "a=b",
        "*",
        "1,2",
        "0x10",
        "1_000",
        "١",
    ),
]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
ROWS = [
    {
        "prompt": "a b",
        "chosen": "c",
        "rejected": "d",
        "weight": 1.5,
        "score_chosen": 2,
        "score_rejected": 1,
    },
    {"prompt": "a", "responses": ["b", "c", "d"], "scores": [1, 2, 3.5]},
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5], "chosen_mask": [1]},
    {"prompt": "a", "completions": ["x", "y"], "labels": [True, False]},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
        "tools": "[]",
    },
]


@contextlib.contextmanager
def within(seconds):
    """Raises TimeoutError in what takes longer."""

    def late(number, frame):
        raise TimeoutError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damage(rng, data):
    """The bytes with one to three faults."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 2, 8, 64]))
        fault = rng.randrange(7)
        if fault == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif fault == 1:
            del data[at:]
        elif fault == 2:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 8]))
        elif fault == 3:
            data[at:at] = data[at:end] * rng.choice([1, 50])
        elif fault == 4:
            data[at:end] = rng.choice([b"\xff", b"\0", b"["]) * (end - at)
        elif fault == 5:
            data[at:end] = rng.choice(
                [b"-1", b"1e400", b"null", b"{}", b"9" * 30, b'"\\ud800"', b"NaN", b"true", b"[]"]
            )
        else:
            del data[at:end]
    return bytes(data)


def tensors_of(config):
    """Random tensors of a model, by name."""
    rng = np.random.default_rng(0)
    rows = [place for rows in huggingface.places(config) for _, place in rows]
    return {
        p.name.format(i=0): rng.standard_normal(p.shape).astype(np.float32) * 0.02 for p in rows
    }


def save_tensors(path, tensors):
    entries = [(name, x.shape, lambda x=x: np.ascontiguousarray(x)) for name, x in tensors.items()]
    safetensors.write_safetensors(path, entries, np.dtype(np.float32), True)


@pytest.fixture(scope="session")
def sound(files, tmp_path_factory):
    """A folder with one sound file of every kind."""
    import pyarrow
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = tmp_path_factory.mktemp("sound")
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    (folder / "rows.jsonl").write_bytes(lines)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "rows.json").write_text(json.dumps(ROWS))
    pairs = [
        {"prompt": f"p{i}", "chosen": "c" * i, "rejected": "d", "weight": float(i)}
        for i in range(1, 50)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), folder / "rows.parquet")
    writer = ArrayRecordWriter(str(folder / "rows.arrayrecord"), "group_size:1")
    for row in ROWS:
        writer.write(json.dumps(row).encode())
    writer.close()
    config = huggingface.model_config(LLAMA, folder / "config.json")
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    save_tensors(model / "model.safetensors", tensors_of(config))
    shutil.copy(files / "tokenizer.model", model)
    (model / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "bos_token": "<s>"})
    )
    adapter = folder / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    pair = {
        f"{name}A.weight": np.ones((2, 8), np.float32),
        f"{name}B.weight": np.ones((8, 2), np.float32),
    }
    save_tensors(adapter / "adapter_model.safetensors", pair)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "../model", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(
        json.dumps({**settings, "alpha_pattern": {"q_proj": 2}, "rank_pattern": {}})
    )
    header = np.asarray([8, 8, 1, 2, 1, 512, 64], np.int32)
    sizes = 512 * 8 + 8 + 64 + 32 + 32 + 64 + 8 + 64 + 64 + 64 + 8 + 64 * 4
    (folder / "model.bin").write_bytes(header.tobytes() + np.zeros(sizes, np.float32).tobytes())
    (folder / "settings.json").write_text(
        json.dumps(to_dict(from_config_dict(load_config_file("configs/tldr.py"))))
    )
    return folder


def read_rows(path):
    opened = records.open_records(str(path))
    reader = rows.RowReader("{prompt}")
    for i in range(min(opened.size, 60)):
        with contextlib.suppress(groups.Dropped, DpojaxError):
            reader.read(opened.get(i), opened.where(i))


def read_weights(path):
    """Names, shapes and numbers of the folder's weights, without a device."""
    weights = open_weights(str(path.parent))
    tensors = safetensors.Directory(path.parent)
    for _, place in huggingface.places(weights.config)[0]:
        tensors.get(place.name, place.shape).sum()


def read_adapter(path):
    weights = open_weights(str(path.parent))
    peft.load_adapters(path.parent, peft.read_settings(path.parent), weights.config)


def read_tokenizer(path):
    tokenizer = open_tokenizer._open_tokenizer(str(path.parent))
    open_tokenizer.stop_ids(tokenizer, None)
    tokenizer.decode(tokenizer.encode_prompt("a b"))


KINDS = {
    "rows.jsonl": read_rows,
    "rows.jsonl.gz": read_rows,
    "rows.json": read_rows,
    "rows.parquet": read_rows,
    "rows.arrayrecord": read_rows,
    "model/config.json": read_weights,
    "model/model.safetensors": read_weights,
    "model/tokenizer_config.json": read_tokenizer,
    "adapter/adapter_config.json": read_adapter,
    "adapter/adapter_model.safetensors": read_adapter,
    "model.bin": lambda path: llama2c.open_checkpoint(path)[1].get("model.norm.weight", (8,)),
    "settings.json": lambda path: from_config_dict(load_config_file(str(path))),
}


def damaged_files(kind, sound, folder, seed, rounds):
    """Reads so many damaged copies of a file; raises what is no sentence."""
    rng = random.Random(f"{seed} {kind}")
    whole = (sound / kind).read_bytes()
    shutil.copytree(sound, folder / "all")
    path = folder / "all" / kind
    for _ in range(rounds):
        path.write_bytes(damage(rng, whole))
        try:
            with within(SECONDS), contextlib.suppress(DpojaxError):
                KINDS[kind](path)
        except BaseException:
            shutil.copy(path, folder / "fault")  # pytest keeps the folder
            raise


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(kind, sound, tmp_path):
    damaged_files(kind, sound, tmp_path, seed=0, rounds=25)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_read_or_refused(kind, sound, tmp_path):
    damaged_files(kind, sound, tmp_path, seed=1, rounds=400)


# --- command lines --------------------------------------------------------------------------------


def settings_of(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from settings_of(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def flags_of(parser):
    return [
        name
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--") and name != "--help"
    ]


def odd_command_lines(sound, rng):
    """(main, argv): nothing that would train, sample or score for long."""
    tools = {
        audit: [f"--data={sound}/rows.jsonl", "--tokenizer", f"{sound}/model"],
        convert: [f"--model={sound}/model", f"--out={sound}/out"],
        generate: [f"--model={sound}/nothing", "--prompt=a"],
        score: [f"--model={sound}/nothing", f"--data={sound}/rows.jsonl"],
        plan: [f"--config={sound}/settings.json", "--topology=v5e:3x5x7"],
        sweep: [
            f"--config={sound}/settings.json",
            "--workdir=/dev/null/x",
            "--sweep.loss.beta=0.1",
        ],
        main: [f"--config={sound}/settings.json", "--workdir=/dev/null/x"],
    }
    names = list(settings_of(json.loads((sound / "settings.json").read_text())))
    while True:
        tool = rng.choice(list(tools))
        argv = list(tools[tool])
        flags = ["--config", "--profile", "--together", "--data", "--x", "-x", "--", "x"]
        if hasattr(tool, "parser"):
            flags += flags_of(tool.parser())
        if tool in (main, plan, sweep):
            flags += [f"--config.{rng.choice(names)}" for _ in range(40)]
        for _ in range(rng.randint(1, 3)):
            flag, value = rng.choice(flags), rng.choice(HOSTILE_TEXT)
            argv.append(rng.choice([flag, f"{flag}={value}", f"{flag}={value}", f"{flag}={value}"]))
        if (
            "--out=" not in " ".join(argv[2:])
            and "--json" not in " ".join(argv)
            and "--hlo" not in " ".join(argv)
        ):
            yield tool, argv


def exit_code(tool, argv):
    """The exit code, with streams as a process has them: stderr
    writes what is no UTF-8 as escapes.
    """
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return tool.main(argv)
        except SystemExit as error:
            return error.code


def odd_flags(sound, folder, monkeypatch, seed, rounds):
    monkeypatch.chdir(folder)
    drawn = odd_command_lines(sound, random.Random(seed))
    for _, (tool, argv) in zip(range(rounds), drawn, strict=False):
        with within(60):
            code = exit_code(tool, argv)
        assert code in CODES, (tool.__name__, argv, code)


def test_an_odd_command_line_ends_with_a_code_of_the_list(sound, tmp_path, monkeypatch):
    odd_flags(sound, tmp_path, monkeypatch, seed=0, rounds=15)


@pytest.mark.slow
def test_many_odd_command_lines_end_with_a_code_of_the_list(sound, tmp_path, monkeypatch):
    odd_flags(sound, tmp_path, monkeypatch, seed=1, rounds=400)


def test_a_damaged_index_of_the_data_is_made_anew(sound, tmp_path):
    """The cache of verdicts and lengths in a workdir."""
    pairs = b"".join(
        json.dumps({"prompt": f"p{i}", "chosen": "c" * i, "rejected": "d"}).encode() + b"\n"
        for i in range(1, 9)
    )
    (tmp_path / "x.jsonl").write_bytes(pairs)
    reader, limits = rows.RowReader(""), tokens.Limits(16, 16)
    opened = records.open_records(str(tmp_path / "x.jsonl"))
    data = dataset.Dataset(
        opened, reader, open_tokenizer._open_tokenizer(str(sound / "model")), limits
    )
    rng = random.Random(0)

    def load():
        return index_cache.load_or_build_index(
            data,
            tmp_path,
            on_bad_line="error",
            max_bad_share=0.0,
            write=lambda store: store(),
            progress=lambda done: None,
        )

    expected = load()
    (path,) = tmp_path.glob("index-*.npz")
    whole = path.read_bytes()
    for _ in range(25):
        path.write_bytes(damage(rng, whole))
        with within(SECONDS):
            found = load()
        assert len(found.rows) == len(expected.rows)
        np.testing.assert_array_equal(found.prompt_lengths, expected.prompt_lengths)
