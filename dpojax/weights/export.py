"""Parameters -> a Hugging Face directory: config.json, safetensors and the tokenizer's files."""

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.data.tokenizer_files import copy_companions
from dpojax.data.tokenizers import TOKENIZER_NAMES
from dpojax.errors import ConfigError
from dpojax.models.config import ModelConfig
from dpojax.models.families.table import CLASSIFIER
from dpojax.models.params import ParamRow
from dpojax.untrusted.plain_data import check_output
from dpojax.weights.huggingface import Place, linear_sizes, places
from dpojax.weights.safetensors import CHECKSUMS, INDEX, SINGLE, write_safetensors

# How a config.json names the activations of `models.config`; Hugging Face has several names for
# some.
ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}


def special_ids(folder: pathlib.Path | None) -> tuple[int | None, int | None]:
    """(BOS, EOS) of the tokenizer in a folder; None where there is none."""
    if folder is None or not any((folder / name).is_file() for name in TOKENIZER_NAMES):
        return None, None
    tokenizer = load_tokenizer(str(folder))
    return tokenizer.bos_id, tokenizer.eos_id


def llama_fields(config: ModelConfig, *, bos_id: int | None, eos_id: int | None) -> dict[str, Any]:
    """A config.json for a decoder that no checkpoint describes.

    Raises ConfigError for one that Llama cannot express.
    """
    if config.norm != "rms" or config.mlp != "gated" or config.family != "llama":
        raise ConfigError(
            f"export: Llama has norm='rms' and mlp='gated', not {config.norm!r} and {config.mlp!r}"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def reward_model_fields(
    fields: dict[str, Any], *, pad_id: int | None, eos_id: int | None
) -> dict[str, Any]:
    """A language model's config.json as that of the reward model which was made from it:
    AutoModelForSequenceClassification opens it, with one label.

    Args:
      pad_id: of the tokenizer. Where it is EOS none is written: transformers would then read the
        reward before the EOS, at the last token that is no padding.
    """
    named = (fields.get("architectures") or [""])[0]
    stem = named.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    if fields.get("model_type") == "gemma3_text":
        stem = "Gemma3Text"
    padding = None
    if pad_id != eos_id:
        padding = pad_id
    return {
        **fields,
        "architectures": [f"{stem}{CLASSIFIER}"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": padding,
    }


def _fetch(array: jax.Array, index: tuple[int, ...], dtype) -> np.ndarray:
    """array[index] on the host, of an array that is spread over devices and processes."""
    part = array
    if index:
        part = _at(array, index)
    if not part.is_fully_addressable:
        from jax.experimental import multihost_utils

        part = multihost_utils.process_allgather(part, tiled=True)
    return np.asarray(part).astype(dtype)


@jax.jit
def _at(array, index):
    return array[tuple(index)]


class Tensor(NamedTuple):
    """A tensor of an export."""

    name: str
    shape: tuple[int, ...]
    get: Callable[[], np.ndarray]  # fetches it; every process takes part

    def size(self, dtype: np.dtype) -> int:
        """Its bytes on disk."""
        return math.prod(self.shape) * dtype.itemsize


Member = tuple[ParamRow, Place]  # a parameter, and where it lies in its tensor


def _by_tensor(members: Iterable[Member]) -> list[list[Member]]:
    """The parameters of each tensor, in its order."""
    grouped: dict[str, list[Member]] = {}
    for row, place in members:
        grouped.setdefault(place.name, []).append((row, place))
    return [sorted(parts, key=lambda member: member[1].start) for parts in grouped.values()]


def _flat(row: ParamRow, place: Place, value: np.ndarray) -> np.ndarray:
    """A parameter as [outputs, inputs], or [outputs], or as a table's tensor has it."""
    if row.in_dims:
        inputs, outputs = linear_sizes(row)
        return value.reshape(inputs, outputs).T
    if place.inputs:
        return value.reshape(place.shape)
    return value.reshape(-1)


def _joined(members: list[Member], tree: Any, lead: tuple[int, ...], dtype) -> np.ndarray:
    """A tensor out of the parameters that lie in it.

    Args:
      lead: the layer, and the expert, whose tensor it is.
    """
    place = members[0][1]
    parts = []
    for row, _ in members:
        flat = _flat(row, place, _fetch(tree[row.name], lead, dtype))
        parts.append(flat.reshape(place.groups, -1, *flat.shape[1:]))
    joined = np.concatenate(parts, axis=1)
    joined = joined.reshape(-1, *joined.shape[2:])
    if place.inputs and not place.transposed:
        joined = joined.T
    return np.ascontiguousarray(joined).reshape(place.shape)


def _tensors_of(params: Any, config: ModelConfig, dtype) -> Iterator[Tensor]:
    """Every tensor of an export, in the order of the table of parameters."""
    outside, layer = places(config)
    for members in _by_tensor(outside):
        place = members[0][1]
        get = functools.partial(_joined, members, params, (), dtype)
        yield Tensor(place.name, place.shape, get)
    for i in range(config.num_layers):
        for members in _by_tensor(layer):
            row, place = members[0]
            for e in range(row.experts or 1):
                lead: tuple[int, ...] = (i,)
                if row.experts:
                    lead = (i, e)
                get = functools.partial(_joined, members, params["layers"], lead, dtype)
                yield Tensor(place.name.format(i=i, e=e), place.shape, get)


def export_params(  # noqa: PLR0913  # what one folder holds, by keyword
    params: Any,
    config: ModelConfig,
    folder: pathlib.Path,
    *,
    fields: dict[str, Any],
    dtype: Any,
    companions: pathlib.Path | None,
    write: bool = True,
    max_shard_bytes: int = 5 << 30,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes a Hugging Face directory that transformers opens: config.json, safetensors, and what
    lies beside them.

    Args:
      fields: of config.json: those of the checkpoint that the model came from, or `llama_fields`.
      dtype: of the weights on disk.
      companions: directory whose tokenizer files and generation_config.json go with it, or None.
      write: whether this process writes (one does; all take part in fetching).
      max_shard_bytes: a larger model gets several files and an index.
      progress: called with the number of tensors written so far.
    Raises: ConfigError if the folder cannot be written.
    """
    dtype = np.dtype(dtype)
    try:
        if write:
            _clear(folder)
        tensors = _counted(_tensors_of(params, config, dtype), progress)
        shards = _shards(tensors, dtype, max_shard_bytes)
        checksums: dict[str, str] = {}
        for name, shard in shards.items():
            checksums |= write_safetensors(folder / name, shard, dtype, write)
        if write:
            _write_json(folder, shards, fields, dtype, checksums)
            if companions is not None:
                copy_companions(companions, folder)
    except OSError as error:
        raise ConfigError(
            f"{folder}: the export cannot be written: {error.strerror or error}"
        ) from error


def _clear(folder: pathlib.Path) -> None:
    """Makes the folder, and removes what an older export left in it: a reader would take it for a
    part of this one.

    Raises: OSError for a pipe or a device in it, which would be waited for or replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for place in folder.iterdir():
        if not place.is_dir():
            check_output(place)
    for old in (*folder.glob("model*.safetensors"), folder / INDEX, folder / CHECKSUMS):
        old.unlink(missing_ok=True)


def _counted(tensors: Iterable[Tensor], progress: Callable[[int], None]) -> Iterator[Tensor]:
    """The tensors, of which each tells `progress` when it is fetched."""
    numbers = itertools.count(1)

    def fetch(get: Callable[[], np.ndarray]) -> np.ndarray:
        progress(next(numbers))
        return get()

    for tensor in tensors:
        yield tensor._replace(get=functools.partial(fetch, tensor.get))


def _shards(tensors: Iterable[Tensor], dtype: np.dtype, max_bytes: int) -> dict[str, list[Tensor]]:
    """The tensors of each file, by its name."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size(dtype) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size(dtype)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {
        f"model-{i + 1:05d}-of-{count:05d}.safetensors": shard for i, shard in enumerate(shards)
    }


def _write_json(
    folder: pathlib.Path,
    shards: dict[str, list[Tensor]],
    fields: dict[str, Any],
    dtype: np.dtype,
    checksums: dict[str, str],
) -> None:
    """Writes the index of several files, config.json and the checksums."""

    def write(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")

    if len(shards) > 1:
        files = {tensor.name: file for file, shard in shards.items() for tensor in shard}
        total = sum(tensor.size(dtype) for shard in shards.values() for tensor in shard)
        write(INDEX, {"metadata": {"total_size": total}, "weight_map": files})
    fields = {k: v for k, v in fields.items() if k not in ("torch_dtype", "dtype")}
    write("config.json", fields | {"torch_dtype": dtype.name})
    write(CHECKSUMS, checksums)
