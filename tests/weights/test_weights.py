"""Import and export without torch: what is refused, memory, shardings, llama2.c, and texts that are
known.
"""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import model_folders
import numpy as np
import pytest
import tiny
from runs import ROOT, environment

from dpojax import generate
from dpojax.config.model import SHARDING_RULES
from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.errors import ConfigError
from dpojax.models.config import ModelConfig, RopeScaling
from dpojax.models.families.table import model_config
from dpojax.models.params import logical_axes, num_params
from dpojax.runtime import sharding
from dpojax.runtime.mesh import make_mesh
from dpojax.weights import export, huggingface, safetensors
from dpojax.weights.open import open_weights

# test_all.py of github.com/karpathy/llama2.c: what its C program writes with `-t 0.0 -n 200`.
LILY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    " One day, she saw a big, red ball. She wanted to play with it, but it was too high.\nLily's"
    " mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said,"
    " \"I want to play with your ball, but I can't find it.\"\nLily was sad and didn't know what to"
    " do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\nLily didn't want to help her"
    " mom, so she"
)


@pytest.fixture
def folder(exported, tmp_path):
    """A small Hugging Face directory of the test's own."""
    return shutil.copytree(exported, tmp_path / "hf")


def change(folder: pathlib.Path, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def spread(config=tiny.CONFIG, *, data=-1, fsdp=1, tensor=1):
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
    abstract = jax.eval_shape(tiny.model(config).init, jax.random.key(0))
    return sharding.param_shardings(abstract, logical_axes(config), mesh, SHARDING_RULES)


def test_an_unknown_field_is_named_and_can_be_ignored(folder):
    change(folder, brand_new_gate=True)
    with pytest.raises(ConfigError, match=r"brand_new_gate.*model\.ignore_fields=brand_new_gate"):
        huggingface.read_config(folder)
    assert huggingface.read_config(folder, {"brand_new_gate"}) == tiny.CONFIG


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"attention_dropout": 0.1, "resid_pdrop": 0.1}, None),  # inert
        ({"sliding_window": None, "rope_scaling": None}, None),  # at their neutral values
        (
            {
                "sliding_window": 7,
                "partial_rotary_factor": 0.5,
                "use_bidirectional_attention": True,
            },
            None,
        ),  # Llama's code reads none
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
            "partial_rotary_factor",
        ),
        ({"rope_scaling": {"type": "magic", "factor": 2.0}}, "magic"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "extra": 1}}, "extra"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"hidden_act": "tanh"}, "tanh"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mamba"}, "gpt_neox"),  # says what there is
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_fields_pass_or_fail_by_name(folder, fields, named):
    change(folder, **fields)
    if named is None:
        assert huggingface.read_config(folder) == tiny.CONFIG
    else:
        with pytest.raises(ConfigError, match=named):
            huggingface.read_config(folder)


def test_a_tied_table_may_stand_under_either_name(tmp_path):
    from safetensors.flax import load_file, save_file

    config = ModelConfig(**{**vars(tiny.CONFIG), "tie_embeddings": True})
    params = tiny.params(tiny.model(config))
    fields = export.llama_fields(config, bos_id=1, eos_id=2)
    export.export_params(params, config, tmp_path, fields=fields, dtype="float32", companions=None)
    (tmp_path / safetensors.CHECKSUMS).unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop("model.embed_tokens.weight")
    both = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    for names in (["model.embed_tokens.weight"], ["lm_head.weight"], list(both)):
        save_file(tensors | {n: both[n] for n in names}, tmp_path / "model.safetensors")
        loaded = huggingface.load_params(
            tmp_path, huggingface.read_config(tmp_path), spread(config), jnp.float32
        )
        jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_stored_head_is_used_whatever_the_flag_says_and_an_equal_one_is_the_table(
    tmp_path, files, capsys
):
    def other(tensors):
        table = tensors["model.embed_tokens.weight"]
        return tensors | {
            "lm_head.weight": (
                table + np.float32(0.1) * (np.arange(table.size).reshape(table.shape) % 3)
            )
        }

    def equal(tensors):
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}

    both = model_folders.make_model(tmp_path / "both", files, tensors=other, tie_embeddings=True)
    weights = open_weights(str(both))
    assert not weights.config.tie_embeddings and weights.fields["tie_word_embeddings"] is False
    assert "lm_head.weight" in capsys.readouterr().err
    params = weights.load(spread(weights.config), jnp.float32, lambda done: None)
    assert np.abs(params["unembed"] - params["embed"].T).max() > 0.09
    tied = model_folders.make_model(tmp_path / "tied", files, tensors=equal, tie_embeddings=True)
    assert open_weights(str(tied)).config.tie_embeddings and not capsys.readouterr().err


@pytest.mark.parametrize("mesh", [{}, dict(data=1, fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_weights_are_the_same_in_every_sharding(folder, mesh):
    loaded = huggingface.load_params(folder, tiny.CONFIG, spread(**mesh), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, loaded, tiny.params(tiny.model()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_export_and_import_round_trip_in_every_dtype_and_many_files(tmp_path, dtype):
    params = tiny.params(tiny.model())
    fields = export.llama_fields(tiny.CONFIG, bos_id=1, eos_id=2)
    common: dict[str, Any] = dict(fields=fields, dtype=dtype, companions=None)
    export.export_params(params, tiny.CONFIG, tmp_path, max_shard_bytes=9000, **common)
    index = json.loads((tmp_path / safetensors.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    loaded = huggingface.load_params(
        tmp_path, huggingface.read_config(tmp_path), spread(), jnp.float32
    )
    rounded = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    jax.tree.map(np.testing.assert_array_equal, loaded, rounded)


def test_an_export_over_an_older_one_leaves_nothing_of_it(tmp_path):
    fields = export.llama_fields(tiny.CONFIG, bos_id=1, eos_id=2)
    for seed, most in ((0, 9000), (1, 1 << 30)):
        params = tiny.params(tiny.model(), seed)
        export.export_params(
            params,
            tiny.CONFIG,
            tmp_path,
            fields=fields,
            dtype="float32",
            companions=None,
            max_shard_bytes=most,
        )
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    jax.tree.map(
        np.testing.assert_array_equal,
        huggingface.load_params(tmp_path, tiny.CONFIG, spread(), jnp.float32),
        params,
    )
    (tmp_path / safetensors.INDEX).write_text(
        json.dumps({"weight_map": {"a": "model.safetensors"}})
    )
    with pytest.raises(ConfigError, match="remove the one that is old"):
        huggingface.load_params(tmp_path, tiny.CONFIG, spread(), jnp.float32)


def test_a_changed_byte_of_an_export_is_found(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="not those that were exported"):
        huggingface.load_params(folder, tiny.CONFIG, spread(), jnp.float32)


def test_a_model_config_survives_json():
    config = ModelConfig(
        **{
            **vars(tiny.CONFIG),
            "windows": (4, 0),
            "rope_scaling": RopeScaling("longrope", 2.0, 16, short_factors=(1.0, 2.0, 3.0, 4.0)),
        }
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


# --- real models ----------------------------------------------------------------------------------


def test_stories260k_writes_the_text_of_its_c_program(shared_data, tmp_path):
    folder = shared_data / "models/stories260K"
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(json.dumps({"prompt_ids": [1]}))  # BOS alone, as its program starts
    argv = [
        f"--model={folder / 'stories260K.bin'}",
        f"--tokenizer={folder / 'tok512.bin'}",
        f"--prompts={prompts}",
        f"--out={out}",
    ]
    assert generate.main([*argv, "--temperature=0", "--max_new_tokens=200"]) == 0
    (response,) = json.loads(out.read_text())["responses"]
    assert response["text"] == LILY


def test_a_llama2c_tokenizer_reads_what_it_writes(shared_data):
    file = shared_data / "models/stories260K/tok512.bin"
    tokenizer = load_tokenizer(str(file))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    for text in (LILY, "naïve 🙂", "  two  spaces", ""):
        ids = tokenizer.encode_prompt(text)
        assert tokenizer.decode(ids) == text and len(ids) <= 2 + len(text.encode())


@pytest.mark.parametrize("cut", [3, 100, 1001])
def test_a_damaged_llama2c_tokenizer_is_a_config_error(shared_data, tmp_path, cut):
    data = (shared_data / "models/stories260K/tok512.bin").read_bytes()
    (tmp_path / "tok.bin").write_bytes(data[:cut])
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(str(tmp_path / "tok.bin"))


@pytest.mark.parametrize("fault", ["truncated", "header", "empty"])
def test_a_damaged_llama2c_file_is_a_config_error(shared_data, tmp_path, fault):
    file = tmp_path / "model.bin"
    shutil.copy(shared_data / "models/stories260K/stories260K.bin", file)
    data = file.read_bytes()
    file.write_bytes(
        {"truncated": data[:-100], "header": b"\xff" * 28 + data[28:], "empty": b""}[fault]
    )
    with pytest.raises(ConfigError, match=r"llama2\.c checkpoint"):
        open_weights(str(file))


MEMORY = """
import json, pathlib, sys, threading, time
import jax, jax.numpy as jnp
import tiny
from dpojax.weights import export, huggingface
from dpojax.models.config import ModelConfig
def anonymous_mib():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) / 1024
folder = pathlib.Path(sys.argv[1])
fields = dict(model_type="llama", vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=13,
              num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=512, rms_norm_eps=1e-5)
folder.mkdir(exist_ok=True)
(folder / "config.json").write_text(json.dumps(fields))
config = huggingface.read_config(folder)
model = tiny.model(config)
if sys.argv[2] == "write":
    export.export_params(tiny.params(model), config, folder, fields=fields, dtype="float32",
                         companions=None, max_shard_bytes=200 << 20)
    sys.exit()
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shardings = jax.tree.map(lambda x: device, jax.eval_shape(model.init, jax.random.key(0)))
jax.block_until_ready(jnp.ones(3) + 1)
before, peak, done = anonymous_mib(), [0.0], []
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous_mib())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
params = jax.block_until_ready(huggingface.load_params(folder, config, shardings, jnp.float32))
done.append(1)
thread.join()
arrays = sum(x.nbytes for x in jax.tree.leaves(params)) / 2**20
largest = 32000 * 1024 * 4 / 2**20
print(json.dumps(dict(arrays_mib=arrays, beyond_mib=peak[0] - before - arrays, largest_tensor_mib=largest)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_the_host_holds_little_besides_the_arrays_while_a_gibibyte_is_imported(tmp_path):
    own = environment(1) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}

    def run(what):
        return subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / "big"), what],
            env=own,
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        ).stdout

    run("write")
    found = json.loads(run("read"))
    print(found)
    assert found["arrays_mib"] > 1000
    assert found["beyond_mib"] < 1.5 * found["largest_tensor_mib"]


PUBLISHED = json.loads((ROOT / "tests/oracles/frozen/published_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_models_of_their_published_size(name):
    """Fields as their config.json spells them; the number of parameters is that of the model's page
    on the hub.
    """
    entry = PUBLISHED[name]
    assert num_params(model_config(entry["config"], pathlib.Path(name))) == entry["parameters"]
