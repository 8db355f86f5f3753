"""Hugging Face directories (config.json + safetensors) <-> parameters, without torch or transformers.

Every field of config.json that can change the forward pass is mapped or rejected by name.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors.flax import save_file

from dpojax.errors import ConfigError
from dpojax.models.config import ModelConfig
from dpojax.models.table import ParamRow, layer_rows, model_rows

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "relu": "relu"}  # fmt: skip
# Types of the fields that are read; all others are integers.
KINDS = {"hidden_act": str, "tie_word_embeddings": bool, "attention_bias": bool, "mlp_bias": bool}
KINDS |= dict.fromkeys(("rms_norm_eps", "rope_theta"), (int, float))
# Fields that do not change the forward pass of training.
INERT = {
    *("architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "_name_or_path", "pretraining_tp", "initializer_range", "unk_token_id", "id2label", "label2id"),
    *("output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "chunk_size_feed_forward"),
    *("problem_type", "tokenizer_class", "model_type", "_attn_implementation", "auto_map", "num_labels"),
}
# Fields that must have these values: anything else would change the forward pass.
NEUTRAL = {"rope_scaling": (None,), "attention_dropout": (0, 0.0), "sliding_window": (None,), "partial_rotary_factor": (1, 1.0)}


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The decoder that a directory's config.json describes.

    Raises: ConfigError for a missing or damaged file, another family, or a field that is not known to be harmless.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.init={str(folder)!r}: there is no config.json in it")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    family = fields.get("model_type") if isinstance(fields, dict) else None
    if family != "llama":
        raise ConfigError(f"{path}: model_type is {family!r}; this version reads 'llama'")
    taken = set()

    def take(name, *, default=None):
        taken.add(name)
        value = fields.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{path}: the field {name!r} is missing")
        kind = KINDS.get(name, int)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{path}: {name} is {value!r}, of type {type(value).__name__}")
        return value

    rope = fields.get("rope_parameters")  # the spelling of transformers 5
    taken.add("rope_parameters")
    if rope is not None:
        theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        if not isinstance(theta, int | float):
            raise ConfigError(f"{path}: rope_parameters is {rope!r}; it must hold a number rope_theta")
        unknown = {k: v for k, v in rope.items() if k != "rope_theta" and (k, v) != ("rope_type", "default")}
        if unknown:
            raise ConfigError(f"{path}: rope_parameters has {unknown}, which this version does not compute")
        taken.add("rope_theta")
    else:
        theta = take("rope_theta", default=10000.0)  # the value of transformers' LlamaConfig
    activation = take("hidden_act")
    if activation not in ACTIVATIONS:
        raise ConfigError(f"{path}: hidden_act is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    heads, hidden = take("num_attention_heads"), take("hidden_size")
    try:
        config = ModelConfig(
            vocab_size=take("vocab_size"),
            hidden_size=hidden,
            intermediate_size=take("intermediate_size"),
            num_layers=take("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=take("num_key_value_heads", default=heads),
            head_dim=take("head_dim", default=hidden // heads),
            norm="rms",
            norm_eps=take("rms_norm_eps"),
            mlp="gated",
            activation=ACTIVATIONS[activation],
            rope_theta=float(theta),
            tie_embeddings=take("tie_word_embeddings", default=False),
            attention_bias=take("attention_bias", default=False),
            mlp_bias=take("mlp_bias", default=False),
            max_positions=take("max_position_embeddings"),
            init_std=float(fields.get("initializer_range") or 0.02),  # not used: the weights are loaded
        )
    except ConfigError:
        raise
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for name, value in fields.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise ConfigError(f"{path}: {name} is {value!r}, which this version does not compute")
        if name not in taken and name not in INERT and name not in NEUTRAL:
            raise ConfigError(f"{path}: the field {name!r} ({value!r}) is not known; it might change the forward pass")
    return config


def write_config(config: ModelConfig, *, bos_id: int | None, eos_id: int | None, dtype: str) -> dict[str, Any]:
    """The config.json of an export. Raises ConfigError for a decoder that Llama cannot express."""
    if config.norm != "rms" or config.mlp != "gated":
        raise ConfigError(f"export: Llama has norm='rms' and mlp='gated', not {config.norm!r} and {config.mlp!r}")
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
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
        "hidden_act": names[config.activation],
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
        "torch_dtype": dtype,
    }


def _from_hf(row: ParamRow, tensor: np.ndarray) -> np.ndarray:
    """A checkpoint's tensor in the shape of the table's row (a view)."""
    return (tensor.T if row.in_dims else tensor).reshape(row.shape)


def _to_hf(row: ParamRow, array: np.ndarray) -> np.ndarray:
    if not row.in_dims:
        return array
    inputs = int(np.prod(row.shape[: row.in_dims]))
    return np.ascontiguousarray(array.reshape(inputs, -1).T)


class _Tensors:
    """The tensors of a directory by name: one safetensors file, or several with an index."""

    def __init__(self, folder: pathlib.Path):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{index}: not an index of safetensors files ({error})") from error
            for name in set(names.values()):
                if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
                    raise ConfigError(f"{index}: {name!r} is not the plain name of a safetensors file")
        elif (folder / "model.safetensors").is_file():
            names = None
        else:
            raise ConfigError(f"model.init={str(folder)!r}: it holds no model.safetensors (and no index of several)")
        self.files = {}
        for name in sorted(set(names.values())) if names else ["model.safetensors"]:
            try:
                self.files[name] = safetensors.safe_open(folder / name, framework="flax")
            except (OSError, safetensors.SafetensorError) as error:
                raise ConfigError(f"{folder / name}: not a whole safetensors file ({error})") from error
        self.where = {key: name for name, file in self.files.items() for key in file.keys()}  # noqa: SIM118
        self.folder = folder
        self.read: set[str] = set()
        self.alias: dict[str, str] = {}  # the name that is asked for -> the name in the file

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.where:
            raise ConfigError(f"{self.folder}: the tensor {name!r} is missing")
        self.read.add(name)
        tensor = np.asarray(self.files[self.where[name]].get_tensor(self.alias.get(name, name)))
        if tensor.shape != shape:
            raise ConfigError(f"{self.folder}: {name} has the shape {tensor.shape}; config.json makes it {shape}")
        if tensor.dtype.kind != "f" and tensor.dtype.name != "bfloat16":
            raise ConfigError(f"{self.folder}: {name} is of type {tensor.dtype}; weights are floating point")
        return tensor


def _hf_shape(row: ParamRow) -> tuple[int, ...]:
    if not row.in_dims:
        return (int(np.prod(row.shape)),) if row.hf_name.endswith("bias") else row.shape
    return int(np.prod(row.shape[row.in_dims :])), int(np.prod(row.shape[: row.in_dims]))


def load_params(folder: pathlib.Path, config: ModelConfig, shardings: Any, dtype: Any) -> Any:
    """Reads a directory's weights straight into their sharded arrays, tensor by tensor.

    The host holds one tensor and the local shards of one parameter at a time.

    Args:
      shardings: tree of NamedShardings, shaped like the parameters.
      dtype: of the resulting parameters.
    Raises: ConfigError for missing, extra, misshapen or damaged tensors.
    """
    tensors = _Tensors(folder)
    embed, lm_head = "model.embed_tokens.weight", "lm_head.weight"
    if config.tie_embeddings:  # the one table may stand under either name, or under both
        tensors.read.add(lm_head)
        if embed not in tensors.where and lm_head in tensors.where:
            tensors.where[embed] = tensors.where[lm_head]
            tensors.alias[embed] = lm_head

    def load(row: ParamRow, sharding, layers: int | None):
        shape = row.shape if layers is None else (layers, *row.shape)
        index_of = sharding.addressable_devices_indices_map(shape)
        keys = {device: str(index) for device, index in index_of.items()}
        indexes = {keys[device]: index for device, index in index_of.items()}
        buffers = {}
        for key, index in indexes.items():
            size = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
            buffers[key] = np.empty(size, dtype)
        for i in range(layers or 1):
            tensor = _from_hf(row, tensors.get(row.hf_name.format(i=i), _hf_shape(row)))
            for key, index in indexes.items():
                if layers is None:
                    buffers[key][...] = tensor[index]
                else:
                    own = range(*index[0].indices(layers))
                    if i in own:
                        buffers[key][i - own.start] = tensor[index[1:]]
        return jax.make_array_from_callback(shape, sharding, lambda index: buffers[str(index)])

    params: dict[str, Any] = {row.name: load(row, shardings[row.name], None) for row in model_rows(config)}
    params["layers"] = {row.name: load(row, shardings["layers"][row.name], config.num_layers) for row in layer_rows(config)}
    extra = {n for n in tensors.where if n not in tensors.read and "rotary_emb.inv_freq" not in n}
    if extra:
        raise ConfigError(f"{folder}: the tensors {', '.join(sorted(extra)[:3])} belong to no parameter of this model")
    return params


def export_params(params: Any, config: ModelConfig, folder: pathlib.Path, *, bos_id, eos_id, tokenizer) -> None:
    """Writes a Hugging Face directory that transformers opens: config.json, model.safetensors, tokenizer files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for row in model_rows(config):
        tensors[row.hf_name] = _to_hf(row, np.asarray(jax.device_get(params[row.name])))
    for row in layer_rows(config):
        stacked = np.asarray(jax.device_get(params["layers"][row.name]))
        for i in range(config.num_layers):
            tensor = _to_hf(row, stacked[i])
            tensors[row.hf_name.format(i=i)] = tensor.reshape(_hf_shape(row))
    dtype = params["embed"].dtype.name
    fields = write_config(config, bos_id=bos_id, eos_id=eos_id, dtype=dtype)
    if tokenizer is not None:
        tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
