"""Small Hugging Face directories with the small world's tokenizer, for tests of what is done with
models on disk.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import runs
import tiny
import tokenizers
from safetensors.numpy import load_file, save_file
from sentencepiece import sentencepiece_model_pb2

from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.weights import export, huggingface, safetensors

ROWS = [
    (
        "The dog ran to the park.",
        " He saw a cat and they played all day.",
        " He was sad and went home alone.",
    ),
    ("Lily had a red ball.", " She gave it to her friend Tom.", " It was lost in the big tree."),
    ("Once there was a bird.", " It could sing a happy song.", " It did not like the rain at all."),
    (
        "Mom said it was time for bed.",
        " Ben put on his blue hat.",
        " Ben said he was not tired yet, and he ran.",
    ),
    ("Tom found a box.", " In the box was a small toy car.", " He did not open it."),
    ("The sun was hot.", " They drank cold water.", " They went to sleep under a tree."),
]


def make_model(
    folder: pathlib.Path, files: pathlib.Path, *, seed: int = 0, tensors=None, **changes
) -> pathlib.Path:
    """A Llama of tiny's size in `folder`.

    Args:
      files: the folder of the tokenizer.
      tensors: what becomes of the tensors on disk, by name.
      changes: fields of ModelConfig.
    """
    shutil.rmtree(folder, ignore_errors=True)
    vocab_size = load_tokenizer(str(files)).vocab_size
    config = dataclasses.replace(tiny.CONFIG, **{"vocab_size": vocab_size, **changes})
    params = tiny.params(tiny.model(config), seed)
    fields = export.llama_fields(config, bos_id=None, eos_id=None)
    export.export_params(params, config, folder, fields=fields, dtype=jnp.float32, companions=files)
    if tensors is not None:
        change_tensors(folder, tensors)
    return folder


def change_tensors(folder: pathlib.Path, change) -> None:
    """Writes what `change` makes of the tensors of a folder, by name."""
    before = {name: np.array(x) for name, x in load_file(folder / safetensors.SINGLE).items()}
    save_file(change(before), folder / safetensors.SINGLE, metadata={"format": "pt"})
    (folder / safetensors.CHECKSUMS).unlink(missing_ok=True)


def change_fields(folder: pathlib.Path, **fields) -> None:
    """Writes fields of a folder's config.json; None removes one."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def make_classifier(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A reward model on the weights of a language model with a tied head: its own is drawn by a
    seed. Padding is a token that no text holds: transformers trains no embedding of it.
    """
    shutil.copytree(source, folder)
    fields = json.loads((folder / "config.json").read_text())
    width = fields["hidden_size"]
    head = np.random.default_rng(0).normal(size=(1, width)) * (width + 1) ** -0.5

    def changed(tensors):
        tensors = dict(tensors)
        # A tied table may stand under the head's name, under which no classifier looks for it.
        table = tensors.pop("lm_head.weight", None)
        tensors.setdefault("model.embed_tokens.weight", table)
        return {**tensors, "score.weight": head.astype(np.float32)}

    change_tensors(folder, changed)
    change_fields(
        folder,
        architectures=["LlamaForSequenceClassification"],
        id2label={"0": "LABEL_0"},
        label2id={"LABEL_0": 0},
        pad_token_id=0,
    )
    return folder


def write_pairs(path: pathlib.Path, rows=ROWS) -> pathlib.Path:
    """The pairs as JSONL."""
    lines = [json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in rows]
    path.write_text("".join(lines))
    return path


def training(
    files: pathlib.Path, workdir: pathlib.Path, pairs: pathlib.Path, **settings
) -> list[str]:
    """The arguments of a run of two steps on `pairs`, to which `settings` add a model.init."""
    no_sizes = {f"model.{name}": None for name in ("hidden_size", "intermediate_size", "head_dim")}
    few = {
        "batch_size": 4,
        "num_steps": 2,
        "data.train": pairs,
        "data.eval": pairs,
        "data.row_tokens": 0,
        "tokenizer": "",
    }
    return runs.command(files, workdir, **no_sizes, **{**few, **settings})[3:]


def renumber(folder: pathlib.Path, pieces) -> None:
    """Exchanges the places of pieces, two by two, in a folder's sentencepiece model; the weights
    stay.
    """
    path = folder / "tokenizer.model"
    spec = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    spec.ParseFromString(path.read_bytes())
    for i, j in pieces:
        texts = spec.pieces[j].piece, spec.pieces[i].piece
        spec.pieces[i].piece, spec.pieces[j].piece = texts
    path.write_bytes(spec.SerializeToString())


def as_json(folder: pathlib.Path) -> None:
    """Writes a folder's sentencepiece model as the tokenizer.json of
    the same pieces, in its place.
    """
    path = folder / "tokenizer.model"
    spec = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    spec.ParseFromString(path.read_bytes())
    model = tokenizers.models.Unigram(
        [(p.piece, p.score) for p in spec.pieces], unk_id=0, byte_fallback=True
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    path.unlink()


def opened(folder: pathlib.Path):
    """The config, the model and the float32 parameters of a folder in Hugging Face's layout."""
    config = huggingface.read_config(folder)
    model = tiny.model(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    shardings = jax.tree.map(
        lambda x: jax.sharding.SingleDeviceSharding(jax.devices()[0]), abstract
    )
    return config, model, huggingface.load_params(folder, config, shardings, jnp.dtype("float32"))
