"""PEFT adapters (adapter_config.json + adapter_model.safetensors) <-> trees of A and B.

A family may keep several maps of dpojax in one tensor (qkv_proj). PEFT adapts that tensor: its A
serves all of these maps, and each has a part of its B. An export joins their adapters block by
block into one, whose rank is the sum of theirs.
"""

import json
import math
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpojax.errors import ConfigError
from dpojax.models.config import ModelConfig
from dpojax.models.families.table import FAMILIES
from dpojax.models.lora import LORA_A, LORA_B
from dpojax.models.params import ParamRow, layer_rows
from dpojax.untrusted import sandbox
from dpojax.untrusted.plain_data import existing_path, first_match, number_fault, read_json
from dpojax.weights import huggingface, safetensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."

# Limits of a regular expression that names modules in an adapter's config: a longer one may take
# for ever.
MAX_PATTERN_CHARS = 500
MAX_REPEATS = 3

# Fields of adapter_config.json that do not change what is computed, and those that are read.
INERT = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "lora_alpha",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "parent_library",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
}


def read_settings(folder: pathlib.Path) -> dict[str, Any]:
    """adapter_config.json. Raises ConfigError for what is no plain LoRA."""
    path = folder / CONFIG
    settings = read_json(path)
    init = settings.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise ConfigError(
            f"{path}: init_lora_weights is {init!r}: it changed the base's weights, which the"
            " adapter alone does not tell"
        )
    _check_numbers(path, settings)
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {settings.get('peft_type')!r}; it must be 'LORA'")
    neutral = (None, False, "none", [], {}, 0)
    for name, value in settings.items():
        if name not in INERT and value not in neutral:
            raise ConfigError(
                f"{path}: {name} is {value!r:.80}, which this version does not compute"
            )
    return settings


def _check_numbers(path: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises ConfigError for ranks and scales that no adapter can have."""
    for field, patterns_field, kind in (
        ("r", "rank_pattern", int),
        ("lora_alpha", "alpha_pattern", float),
    ):
        patterns = settings.get(patterns_field)
        if patterns is None:
            patterns = {}
        if not isinstance(patterns, dict):
            raise ConfigError(
                f"{path}: {patterns_field} is {patterns!r:.80}; it must map names of modules to"
                " numbers"
            )
        for pattern in patterns:
            _check_pattern(path, patterns_field, pattern)
        values: dict[str, Any] = {field: settings.get(field)}
        values |= {f"{patterns_field}[{k!r}]": v for k, v in patterns.items()}
        for name, value in values.items():
            fault = number_fault(value, kind)
            if fault is None and kind is int and value < 1:
                fault = "it must be at least 1"
            if fault is None and name == "lora_alpha" and value == 0:
                fault = "an adapter would count nothing"
            if fault is not None:
                raise ConfigError(f"{path}: {name:.80} is {value!r:.80}; {fault}")
    for name in ("use_rslora", "fan_in_fan_out"):
        if not isinstance(settings.get(name, False), bool | None):
            raise ConfigError(f"{path}: {name} is {settings[name]!r:.80}; it must be true or false")


def _check_pattern(path: pathlib.Path, name: str, pattern: str) -> None:
    """Raises ConfigError for a regular expression that is none, or whose time grows too fast with
    the text.
    """
    fault = None
    repeats = len(re.findall(r"(?<!\\)[*+?{]", pattern))
    if (
        len(pattern) > MAX_PATTERN_CHARS
        or repeats > MAX_REPEATS
        or re.search(r"\)[*+?{]|\(\?|\\[1-9]", pattern)
    ):
        fault = f"it must be short, with at most {MAX_REPEATS} repeats, and none of a group"
    try:
        re.compile(f"(.*\\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        fault = str(error)
    if fault is not None:
        raise ConfigError(f"{path}: {name} holds the pattern {pattern!r:.80}: {fault}")


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT reads rank_pattern and
    alpha_pattern.
    """
    patterns = patterns or {}
    pattern = _first_match(tuple(patterns), module)
    if pattern is None:
        return default
    return patterns[pattern]


def base_folder(folder: pathlib.Path, settings: dict[str, Any]) -> pathlib.Path:
    """The base model's folder: base_model_name_or_path, as it is or beside the adapter.

    Raises ConfigError otherwise.
    """
    name = settings.get("base_model_name_or_path") or ""
    if not isinstance(name, str):
        raise ConfigError(
            f"{folder / CONFIG}: base_model_name_or_path is {name!r:.80}; it must be the name of a"
            " folder"
        )
    for place in (name, str(folder / name)):
        if name and existing_path(place):
            return pathlib.Path(place)
    raise ConfigError(
        f"{folder / CONFIG}: base_model_name_or_path is {name!r:.300}; there is no such folder here"
    )


def _by_tensor(
    config: ModelConfig, names: set[str]
) -> dict[str, list[tuple[ParamRow, huggingface.Place]]]:
    """The linear maps out of `names` with their places, by the tensor that holds them, in its
    order.
    """
    rows = {row.name: row for row in layer_rows(config)}
    grouped: dict[str, list[tuple[ParamRow, huggingface.Place]]] = {}
    for name, row in rows.items():
        if name in names and row.in_dims:
            place = huggingface.place(row, rows, FAMILIES[config.family])
            grouped.setdefault(place.name, []).append((row, place))
    return {
        name: sorted(members, key=lambda member: member[1].start)
        for name, members in grouped.items()
    }


def load_adapters(
    folder: pathlib.Path, settings: dict[str, Any], config: ModelConfig
) -> tuple[dict, float]:
    """(the tree of adapters in float32, their scale).

    Raises ConfigError for tensors that fit no map of the model.
    """
    path = folder / WEIGHTS
    tensors = safetensors.open_safetensors(path)
    adaptable = {
        row.name
        for row in layer_rows(config)
        if row.in_dims and not row.experts and row.name != "router"
    }
    scale = _scale(settings, "", settings["r"])
    layers: dict[str, np.ndarray] = {}
    read: set[str] = set()
    for pattern, members in _by_tensor(config, adaptable).items():
        module = pattern.removesuffix(".weight")
        modules = [module.format(i=i) for i in range(config.num_layers)]
        is_adapted = [f"{PREFIX}{name}.lora_A.weight" in tensors for name in modules]
        if not any(is_adapted):
            continue
        if not all(is_adapted):
            raise ConfigError(
                f"{path}: {module} is adapted in some layers and not in others, which this version"
                " does not compute"
            )
        for name in modules:
            read |= {f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"}
        for row, place in members:
            adapters = [
                _read_adapter(path, tensors, settings, name, row, place) for name in modules
            ]
            rank = max(low.shape[-1] for low, _ in adapters)
            layers[row.name + LORA_A] = np.stack(
                [_with_rank(low, rank, axis=low.ndim - 1) for low, _ in adapters]
            )
            layers[row.name + LORA_B] = np.stack(
                [_with_rank(high, rank, axis=0) for _, high in adapters]
            )
    if set(tensors) - read:
        raise ConfigError(
            f"{path}: {', '.join(sorted(set(tensors) - read)[:3])} belong to no linear map of this"
            " model's layers"
        )
    return {"layers": {k: jnp.asarray(v) for k, v in layers.items()}}, scale


def _read_adapter(
    path: pathlib.Path,
    tensors: dict[str, np.ndarray],
    settings: dict[str, Any],
    module: str,
    row: ParamRow,
    place: huggingface.Place,
) -> tuple[np.ndarray, np.ndarray]:
    """The A [inputs..., rank] and B [rank, outputs...] of one map in one layer.

    B holds the module's scale over that of the adapter, so that one scale serves all.
    """
    inputs, outputs = row.map_shape
    for side in ("A", "B"):
        name = f"{PREFIX}{module}.lora_{side}.weight"
        if name not in tensors:
            raise ConfigError(f"{path}: the tensor {name!r} is missing")
    low = np.asarray(tensors[f"{PREFIX}{module}.lora_A.weight"], np.float32)
    high = np.asarray(tensors[f"{PREFIX}{module}.lora_B.weight"], np.float32)
    rank = _by_pattern(settings.get("rank_pattern"), module, settings["r"])
    shapes = (rank, math.prod(inputs)), (place.of * place.groups, rank)
    if (low.shape, high.shape) != shapes:
        raise ConfigError(
            f"{path}: {PREFIX}{module} has the shapes {low.shape} and {high.shape}; the model and"
            f" the rank {rank} of {CONFIG} make them {shapes[0]} and {shapes[1]}"
        )
    for side, values in {"A": low, "B": high}.items():
        if not np.isfinite(values).all():
            raise ConfigError(
                f"{path}: the tensor '{PREFIX}{module}.lora_{side}.weight' holds numbers that are"
                " not finite"
            )
    grouped = high.reshape(place.groups, place.of, -1)[:, place.start : place.stop]
    high = grouped.reshape(-1, len(low)).T.reshape(-1, *outputs)
    scale = _scale(settings, "", settings["r"])
    return low.T.reshape(*inputs, -1), high * (_scale(settings, module, len(low)) / scale)


def _with_rank(values: np.ndarray, rank: int, *, axis: int) -> np.ndarray:
    """Fills the rank's axis up with zeros: layers of one tree have one rank."""
    missing = values.take([0] * (rank - values.shape[axis]), axis)
    return np.concatenate([values, np.zeros_like(missing)], axis)


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank of a module (alpha / sqrt(rank) with use_rslora)."""
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    if settings.get("use_rslora"):
        return alpha / rank**0.5
    return alpha / rank


def _first_match(patterns: tuple[str, ...], module: str) -> str | None:
    """The first pattern that a module's name ends with, as PEFT looks for it.

    Raises: ConfigError where a pattern, which is a regular expression out of the file, goes past
      the sandbox's limits.
    """
    if all(re.fullmatch(r"[\w.]*", p) for p in patterns):
        return first_match((patterns, module))
    try:
        return sandbox.call(first_match, (patterns, module))
    except sandbox.SandboxError as error:
        raise ConfigError(
            f"{CONFIG}: a regular expression of its rank_pattern or alpha_pattern,"
            f" {patterns!r:.80}, {error}"
        ) from error


def export_adapters(
    adapters: Any, config: ModelConfig, folder: pathlib.Path, *, scale: float, base: str
) -> None:
    """Writes adapters as PEFT reads them.

    Args:
      adapters: tree of A and B.
      scale: alpha / rank.
      base: base_model_name_or_path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = {k: np.asarray(v, np.float32) for k, v in adapters["layers"].items()}
    names = {k.removesuffix(LORA_A) for k in layers if k.endswith(LORA_A)}
    tensors: list = []
    ranks: dict[str, int] = {}
    for pattern, members in _by_tensor(config, names).items():
        module = pattern.removesuffix(".weight")
        for i in range(config.num_layers):
            low = []
            high = []
            first = 0
            total = sum(layers[row.name + LORA_A].shape[-1] for row, _ in members)
            for row, place in members:
                a = layers[row.name + LORA_A][i]
                b = layers[row.name + LORA_B][i]
                rank = a.shape[-1]
                low.append(a.reshape(-1, rank).T)
                block = np.zeros((place.groups, place.of, total), np.float32)
                outputs = b.reshape(rank, -1).T.reshape(place.groups, -1, rank)
                block[:, place.start : place.stop, first : first + rank] = outputs
                high.append(block.reshape(-1, total))
                first += rank
            name = f"{PREFIX}{module.format(i=i)}"
            ranks[module.split("{i}.")[-1]] = total
            for end, x in (("A", np.concatenate(low)), ("B", np.sum(high, axis=0))):
                tensors.append(
                    (f"{name}.lora_{end}.weight", x.shape, lambda x=x: np.ascontiguousarray(x))
                )
    safetensors.write_safetensors(folder / WEIGHTS, tensors, np.dtype(np.float32), True)
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {k: v for k, v in ranks.items() if v != rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": others,
        "alpha_pattern": {k: scale * v for k, v in others.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": config.family == "gpt2",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
