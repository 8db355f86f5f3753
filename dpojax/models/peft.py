"""PEFT adapters (adapter_config.json + adapter_model.safetensors) <-> trees of A and B.

Where a family keeps several of our maps in one tensor (qkv_proj), PEFT adapts that tensor: its A serves all of them and
its B is cut; ours are joined block by block into an adapter of their summed rank.
"""

import json
import math
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpojax import sandbox
from dpojax.errors import ConfigError
from dpojax.models import hf
from dpojax.models.config import ModelConfig
from dpojax.models.families import FAMILIES
from dpojax.models.lora import LORA_A, LORA_B
from dpojax.models.table import layer_rows
from dpojax.plain_data import existing_path, first_match, number_fault, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_PATTERN_CHARS, MAX_REPEATS = 500, 3  # of a regular expression that an adapter's config names modules with
# Fields of adapter_config.json that change nothing here.
INERT = {
    *("peft_type", "base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "lora_dropout", "r"),
    *("lora_alpha", "target_modules", "init_lora_weights", "fan_in_fan_out", "peft_version", "use_rslora", "rank_pattern"),
    *("parent_library", "alpha_pattern", "exclude_modules", "megatron_config", "megatron_core", "runtime_config", "eva_config"),
    *("corda_config", "qalora_group_size", "layers_pattern", "ensure_weight_tying"),
}


def read_settings(folder: pathlib.Path) -> dict[str, Any]:
    """adapter_config.json. Raises ConfigError for what is no plain LoRA."""
    path = folder / CONFIG
    settings = read_json(path)
    init = settings.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal"):
        raise ConfigError(
            f"{path}: init_lora_weights is {init!r}: it changed the base's weights, which the adapter alone does not tell"
        )
    _check_numbers(path, settings)
    if settings.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type is {settings.get('peft_type')!r}; it must be 'LORA'")
    neutral = (None, False, "none", [], {}, 0)
    for name, value in settings.items():
        if name not in INERT and value not in neutral:
            raise ConfigError(f"{path}: {name} is {value!r:.80}, which this version does not compute")
    return settings


def _check_numbers(path: pathlib.Path, settings: dict[str, Any]) -> None:
    """Raises ConfigError for ranks and scales that no adapter can have."""
    for field, patterns_field, kind in (("r", "rank_pattern", int), ("lora_alpha", "alpha_pattern", float)):
        patterns = {} if settings.get(patterns_field) is None else settings[patterns_field]
        if not isinstance(patterns, dict):
            raise ConfigError(f"{path}: {patterns_field} is {patterns!r:.80}; it must map names of modules to numbers")
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
    """Raises ConfigError for a regular expression that is none, or whose time grows too fast with the text."""
    fault = None
    repeats = len(re.findall(r"(?<!\\)[*+?{]", pattern))
    if len(pattern) > MAX_PATTERN_CHARS or repeats > MAX_REPEATS or re.search(r"\)[*+?{]|\(\?|\\[1-9]", pattern):
        fault = f"it must be short, with at most {MAX_REPEATS} repeats, and none of a group"
    try:
        re.compile(f"(.*\\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        fault = str(error)
    if fault is not None:
        raise ConfigError(f"{path}: {name} holds the pattern {pattern!r:.80}: {fault}")


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT reads rank_pattern and alpha_pattern."""
    pattern = _first_match(tuple(patterns or ()), module)
    return default if pattern is None else (patterns or {})[pattern]


def base_folder(folder: pathlib.Path, settings: dict[str, Any]) -> pathlib.Path:
    """The base model's folder: base_model_name_or_path, as it is or beside the adapter. Raises ConfigError otherwise."""
    name = settings.get("base_model_name_or_path") or ""
    if not isinstance(name, str):
        raise ConfigError(f"{folder / CONFIG}: base_model_name_or_path is {name!r:.80}; it must be the name of a folder")
    for place in (name, str(folder / name)):
        if name and existing_path(place):
            return pathlib.Path(place)
    raise ConfigError(f"{folder / CONFIG}: base_model_name_or_path is {name!r:.300}; there is no such folder here")


def _by_tensor(config: ModelConfig, names: set[str]) -> dict[str, list]:
    """The linear maps out of `names`, by the tensor that holds them: (row, place) in the tensor's order."""
    rows = {r.name: r for r in layer_rows(config)}
    found: dict[str, list] = {}
    for name in rows:
        if name in names and rows[name].in_dims:
            at = hf.place(rows[name], rows, FAMILIES[config.family])
            found.setdefault(at.name, []).append((rows[name], at))
    return {name: sorted(members, key=lambda m: m[1].start) for name, members in found.items()}


def load_adapters(folder: pathlib.Path, settings: dict[str, Any], config: ModelConfig) -> tuple[dict, float]:
    """(the tree of adapters in float32, their scale). Raises ConfigError for tensors that fit no map of the model."""
    path = folder / WEIGHTS
    tensors = hf.open_safetensors(path)
    plain = {r.name for r in layer_rows(config) if r.in_dims and not r.experts and r.name != "router"}
    scale = _scale(settings, "", settings["r"])
    layers: dict[str, np.ndarray] = {}
    read: set[str] = set()
    for pattern, members in _by_tensor(config, plain).items():
        module = pattern.removesuffix(".weight")
        own = [f"{PREFIX}{module.format(i=i)}" for i in range(config.num_layers)]
        there = [f"{n}.lora_A.weight" in tensors for n in own]
        if not any(there):
            continue
        if not all(there):
            raise ConfigError(
                f"{path}: {module} is adapted in some layers and not in others, which this version does not compute"
            )
        for row, at in members:
            inputs, outputs = row.map_shape
            a, b = [], []
            for name in own:
                wanted = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
                lacks = next((n for n in wanted if n not in tensors), None)
                if lacks is not None:
                    raise ConfigError(f"{path}: the tensor {lacks!r} is missing")
                read |= set(wanted)
                low, high = (np.asarray(tensors[n], np.float32) for n in wanted)
                rank = _by_pattern(settings.get("rank_pattern"), name.removeprefix(PREFIX), settings["r"])
                if low.shape != (rank, math.prod(inputs)) or high.shape != (at.of * at.groups, rank):
                    raise ConfigError(
                        f"{path}: {name} has the shapes {low.shape} and {high.shape}; the model and the rank "
                        f"{rank} of {CONFIG} make them {(rank, math.prod(inputs))} and {(at.of * at.groups, rank)}"
                    )
                bad = next((n for n, x in zip(wanted, (low, high), strict=True) if not np.isfinite(x).all()), None)
                if bad is not None:
                    raise ConfigError(f"{path}: the tensor {bad!r} holds numbers that are not finite")
                a.append(low.T.reshape(*inputs, -1))
                grouped = high.reshape(at.groups, at.of, -1)[:, at.start : at.stop].reshape(-1, len(low))
                b.append(grouped.T.reshape(-1, *outputs) * (_scale(settings, name.removeprefix(PREFIX), len(low)) / scale))
            rank = max(x.shape[-1] for x in a)  # layers may differ; zeros fill up
            grow = lambda x, axis, rank=rank: np.concatenate(
                [x, np.zeros_like(x.take([0] * (rank - x.shape[axis]), axis))], axis
            )
            layers[row.name + LORA_A] = np.stack([grow(x, x.ndim - 1) for x in a])
            layers[row.name + LORA_B] = np.stack([grow(x, 0) for x in b])
    if set(tensors) - read:
        raise ConfigError(
            f"{path}: {', '.join(sorted(set(tensors) - read)[:3])} belong to no linear map of this model's layers"
        )
    return {"layers": {k: jnp.asarray(v) for k, v in layers.items()}}, scale


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank of a module (alpha / sqrt(rank) with use_rslora)."""
    alpha = _by_pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _first_match(patterns: tuple[str, ...], module: str) -> str | None:
    """The first pattern that a module's name ends with, as PEFT looks for it.

    Raises: ConfigError where a pattern, which is a regular expression of the file's, goes past the limits of `dpojax.sandbox`.
    """
    if all(re.fullmatch(r"[\w.]*", p) for p in patterns):
        return first_match((patterns, module))
    try:
        return sandbox.call(first_match, (patterns, module))
    except sandbox.SandboxError as error:
        raise ConfigError(
            f"{CONFIG}: a regular expression of its rank_pattern or alpha_pattern, {patterns!r:.80}, {error}"
        ) from error


def export_adapters(adapters: Any, config: ModelConfig, folder: pathlib.Path, *, scale: float, base: str) -> None:
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
            low, high, first = [], [], 0
            total = sum(layers[row.name + LORA_A].shape[-1] for row, _ in members)
            for row, at in members:
                a, b = layers[row.name + LORA_A][i], layers[row.name + LORA_B][i]
                rank = a.shape[-1]
                low.append(a.reshape(-1, rank).T)
                block = np.zeros((at.groups, at.of, total), np.float32)
                block[:, at.start : at.stop, first : first + rank] = b.reshape(rank, -1).T.reshape(at.groups, -1, rank)
                high.append(block.reshape(-1, total))
                first += rank
            name = f"{PREFIX}{module.format(i=i)}"
            ranks[module.split("{i}.")[-1]] = total
            for end, x in (("A", np.concatenate(low)), ("B", np.sum(high, axis=0))):
                tensors.append((f"{name}.lora_{end}.weight", x.shape, lambda x=x: np.ascontiguousarray(x)))
    hf.write_safetensors(folder / WEIGHTS, tensors, np.dtype(np.float32), True)
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
