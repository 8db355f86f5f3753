"""ConfigDict at the edge -> frozen dataclasses inside. Unknown, missing and mistyped keys raise.

A config file is Python and is executed: run only files that you trust. A `.json` file holds the same
keys as plain data and executes nothing, unless the command line says --allow_code. No hyper-parameter has a default here; configs/*.py define them.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import string
import sys
import types
import typing
from collections.abc import Collection
from typing import Any

import ml_collections

from dpojax.errors import ConfigError
from dpojax.flags import did_you_mean, nearest_setting
from dpojax.functions import names_code, run_file
from dpojax.losses import F_DIVERGENCES
from dpojax.objectives import Loss, make_loss, settings_not_taken
from dpojax.plain_data import existing_path, number_fault, read_json

LOGICAL_AXES = (
    *("vocab", "embed", "heads", "kv_heads", "head_dim", "mlp", "norm", "layers", "positions", "experts", "router", "lora"),
)
CODE_SETTINGS = ("loss.name", "sample.reward")  # whose text may name a function of one's own
MAY_BE_INFINITE = ("optim.clip_norm", "optim.spike_factor")  # none
QUANTISED = ("int8", "fp8", "nf4")
SMALLEST_NORMAL = 1.1754944e-38  # of float32
LEAST_TEMPERATURE = 1e-6  # logits divided by less leave float32
STORED = ("", "float32", "bfloat16", *QUANTISED)  # what a frozen tree may be stored in; "": model.param_dtype
# The moments and eps that each optimizer has, as published or as the common implementations set them: what optim.* means unset.
OPTIMIZERS: dict[str, dict[str, float]] = {
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},  # Loshchilov & Hutter 2019
    "rmsprop": {"b2": 0.99, "eps": 1e-8},  # torch.optim.RMSprop, which the DPO authors used; b2 is its alpha
    "adafactor": {},  # Shazeer & Stern 2018
    "lion": {"b1": 0.9, "b2": 0.99},  # Chen et al. 2023
}
SCHEDULES = ("constant", "linear", "cosine")
# What a setting may be, where that is a list; --help shows it.
CHOICES: dict[str, tuple[str, ...]] = {
    "data.layout": ("auto", "shared", "slots", "separate"),
    "data.on_bad_line": ("error", "skip"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "cudnn", "splash", "full"),
    "model.remat": ("none", "dots", "attention", "full", "dots_offload", "full_offload"),
    "reference.mode": ("auto", "live", "cached", "adapter", "none"),
    "reference.dtype": STORED,
    "reference.memory": ("device", "pinned_host"),
    "lora.base_dtype": STORED,
    "optim.name": tuple(OPTIMIZERS),
    "optim.schedule": SCHEDULES,
    "sft.schedule": SCHEDULES,
    "self_check": ("auto", "full", "off"),
    "loss.f_divergence": tuple(F_DIVERGENCES),
    "loss.sft_normalize": ("token", "pair"),
}
REQUIRED_SIZES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
SIZES = (
    *REQUIRED_SIZES,
    *("norm", "norm_eps", "mlp", "activation", "rope_theta", "tie_embeddings", "attention_bias", "mlp_bias"),
    *("max_positions", "init_std"),
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where preferences come from, and how they become rows."""

    train: str  # files, folders and globs of them, hub datasets, comma-separated; "" = the embedded world
    eval: str  # held-out pairs, the same way, or several by name (NAME=FILE,NAME=FILE); "" = eval_share of data.train
    eval_share: float  # of data.train's prompts that are held out where data.eval is ""; 0 = none
    seed: int  # of its order, flipped labels and the embedded world; -1 = the run's seed
    shuffle: bool  # False keeps the file's order
    flip_labels: float  # share of training pairs whose labels are swapped, for noise ablations
    prompt_template: str  # with {prompt}; "" leaves prompts as they are
    text_as_chat: bool  # where there is a chat template, a prompt that is text is a user's message for it
    max_prompt_tokens: int  # BOS included; prompts are cut from the left; 0 = half of the model's positions, 512 at most
    max_response_tokens: int  # EOS included; responses are cut from the right; 0 = half of the model's positions, 512 at most
    layout: str  # of rows: prompts once and packed (shared), by parts of a row (slots; TPU), one response a row (separate, the oracle)
    row_tokens: int  # 0 = derived from the data
    micro_batch_tokens: int  # tokens of a micro-batch on each data shard
    eval_max_pairs: int  # 0 = all
    on_bad_line: str  # what a line that cannot be read does: end the run, or be left out, up to max_bad_share
    max_bad_share: float  # with skip: more than this share of bad lines is an error after all
    chat_template: str  # .jinja file for message lists; "" = the tokenizer's own, where there is no prompt_template
    mask_template: bool  # what a chat template puts around an answer counts in no log-prob of the preference stage
    mask_tokens: str  # comma-separated formatting tokens that count in no log-prob of the preference stage
    workers: int  # processes that tokenise and pack; 0 = threads of this process


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The policy: where it comes from and how it is computed; sizes for random weights only."""

    init: str  # Hugging Face directory, dpojax checkpoint folder, or "" for random weights
    dtype: str  # of the computation; bfloat16 on accelerators
    param_dtype: str  # of the stored parameters; bfloat16 ones lose updates at small learning rates
    attention: str  # splash on TPUs, cudnn on NVIDIA GPUs where it can, xla elsewhere; full is the oracle
    remat: str  # what is kept for the backward pass: matrix products (dots), attention, a layer's input (full)
    logps_chunk_tokens: int  # logits exist for this many tokens at a time
    router_loss_weight: float  # of the load-balancing loss of a mixture of experts; 0 = none
    ignore_fields: str  # comma-separated fields of config.json that are known not to matter
    shape: str  # a config.json, or its folder: the model of random weights, in place of the sizes below
    hidden_size: int | None  # D, the width of the hidden states
    intermediate_size: int | None  # F, of the MLP
    num_layers: int | None  # N, how many
    num_heads: int | None  # H, query heads
    num_kv_heads: int | None  # K, which divides num_heads
    head_dim: int | None  # E, the width of a head
    norm: str | None  # rms, layer
    norm_eps: float | None  # added to a variance before its root
    mlp: str | None  # gated or plain
    activation: str | None  # of the MLP, as config.json names it: silu, gelu
    rope_theta: float | None  # base of the rotary positions
    tie_embeddings: bool | None  # the head is the embedding
    attention_bias: bool | None  # of q, k, v and o
    mlp_bias: bool | None  # of the MLP's maps
    max_positions: int | None  # the longest sequence
    init_std: float | None  # of the normal draws


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """The supervised stage before DPO; num_steps 0 skips it. In a validated Config num_steps is at least 0."""

    num_steps: int  # -1: steps_from_random where model.init is "", none where it brings weights
    steps_from_random: int  # what -1 means for random weights
    data: str  # "" = the chosen responses of data.train (the embedded world has demonstrations of its own)
    batch_size: int  # prompts
    learning_rate: float  # at its peak
    schedule: str  # of the rate after warmup; linear and cosine end at 0
    warmup_steps: int  # over which the rate rises to its peak
    b2: float | None  # in place of optim.b2, where the optimizer has one


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective and its settings; None = unset. One that the objective does not take is an error."""

    name: str  # an objective, a sum like 0.8*sigmoid+0.2*bco_pair, or your own module:function
    beta: float | None  # strength of the pull to the reference; IPO's tau, RSO's gamma
    label_smoothing: float | None  # share of labels that are taken to be wrong
    average: bool | None  # ipo: log-ratios per token
    tau: float | None  # discopop; tr_*: steps between two moves of the reference
    gamma: float | None  # simpo
    alpha: float | None  # r_dpo, odpo, tdpo2, ld_dpo, cpo, tr_*
    dpop_lambda: float | None  # dpop: weight of the penalty on a chosen response that falls
    orpo_lambda: float | None  # orpo: weight of the odds ratio
    desirable_weight: float | None  # kto
    undesirable_weight: float | None  # kto
    f_divergence: str | None  # reverse_kl, forward_kl, js, alpha
    f_alpha: float | None  # of the alpha divergence
    sft_weight: float | None  # of the chosen response's negative log-likelihood, added
    sft_normalize: str | None  # whether the SFT term is a mean over tokens or over pairs
    extra: dict[str, float]  # settings of a user's own function that are not above

    def make(self) -> Loss:
        """The loss. Raises: ValueError naming the setting that is wrong."""
        return make_loss(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters that are trained in the preference stage, in place of the parameters."""

    rank: int  # 0 = none: all parameters are trained
    alpha: float  # an adapter counts alpha / rank
    dropout: float  # of the adapters' input, in training
    targets: str  # comma-separated patterns of the layers' linear maps: q, k, v, o, gate, up, down
    base_dtype: str  # of the frozen base: float32, bfloat16, int8, fp8, nf4 (QLoRA); "" = model.param_dtype


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """Where the reference log-probs come from."""

    init: str  # a model of the policy's architecture; "" = the policy before the preference stage
    mode: str  # live, cached, adapter, none; auto: none where the objective takes none, adapter under LoRA, else live
    dtype: str  # of the live tree: float32, bfloat16, int8, fp8, nf4; "" = model.param_dtype
    memory: str  # where the live tree lies: device or pinned_host
    rules: dict[str, str]  # logical axis -> mesh axis, its own; empty = mesh.rules


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer; b1, b2 and eps None = as published (OPTIMIZERS)."""

    name: str  # of the optimizer
    learning_rate: float  # at its peak
    schedule: str  # of the rate after warmup; linear and cosine end at 0
    warmup_steps: int  # over which the rate rises to its peak
    warmup_ratio: float  # of the run's steps, in place of warmup_steps; 0 = warmup_steps counts
    weight_decay: float  # not on norms and biases
    clip_norm: float  # inf = no clipping
    b1: float | None  # first moment's decay
    b2: float | None  # second moment's decay
    eps: float | None  # added to the second moment's root
    spike_factor: float  # a loss over this many times its running average is a spike: named and warned of
    skip_spikes: bool  # True: a spike is also skipped, like a step that is not finite


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes (-1 = what is left), and which logical axis goes to which."""

    data: int  # devices that share a step's rows; -1: what is left
    fsdp: int  # devices that share rows and parameters
    sequence: int  # devices that share each row's tokens; attention exchanges them for heads
    tensor: int  # devices that share each layer
    num_slices: int  # groups of devices with a fast network inside; the data axis alone crosses them. 0: as TPUs say
    rules: dict[str, str]  # logical axis -> mesh axis, or several, outermost first (fsdp,sequence); '' keeps it whole


CHANGEABLE = ("data", "tokenizer", "model", "dtype", "reference", "layout", "loss", "seed", "batch", "sft", "init", "lora")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept, and what a resumed run may change."""

    keep: int  # how many of the newest stay
    restore_step: int  # -1 = the newest
    allow_changed: str  # comma-separated names of CHANGEABLE

    def allowed(self) -> frozenset[str]:
        """The names in `allow_changed`."""
        return frozenset(name.strip() for name in self.allow_changed.split(",") if name.strip())


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Generations of policy and reference for the report."""

    num_prompts: int  # 0 = none
    kl_prompts: int  # of these, that every evaluation samples for the on-policy KL; 0 = none
    max_new_tokens: int  # of a response
    batch_size: int  # prompts at a time
    temperature: float  # 0 = greedy
    top_k: int  # 0 = off
    top_p: float  # 1 = off
    reward: str  # module:function (prompts, responses) -> scores, for the win rate; "" = the embedded world's, or none


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int  # of weights, order and samples
    batch_size: int  # pairs per step
    batch_groups: int  # groups per step, where the number of pairs per group varies; else 0
    num_steps: int  # of the preference stage; -1 = num_epochs of the data; 0 = none: SFT or evaluation alone
    num_epochs: float  # in place of num_steps; 0 = num_steps counts
    log_every_steps: int  # in metrics.jsonl and on the terminal
    eval_every_steps: int  # on the held-out pairs
    checkpoint_every_steps: int  # and after the last step
    tokenizer: str  # .model, tokenizer.json or its folder; "" = model.init's own, or the embedded world's
    self_check: str  # of loss and log-probs before the first step; auto skips it above 1B parameters
    export: bool  # True writes WORKDIR/export, a Hugging Face directory
    data: DataConfig
    model: ModelSection
    sft: SftConfig
    loss: LossConfig
    reference: ReferenceConfig
    lora: LoraConfig
    optim: OptimConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    sample: SampleConfig

    @property
    def embedded(self) -> bool:
        """Whether the embedded world is the data. An evaluation alone needs no data.train."""
        return not self.data.train and not self.data.eval

    @property
    def data_seed(self) -> int:
        """The seed of everything about the data."""
        return self.seed if self.data.seed < 0 else self.data.seed


# The longest prompt and the longest response where the limits are 0: 1,024 tokens together, as TRL's default is.
MAX_AUTO_TOKENS = 512


def with_limits(config: Config, max_positions: int) -> Config:
    """The config with data.max_prompt_tokens and data.max_response_tokens set, for a model of so many positions."""
    half = min(MAX_AUTO_TOKENS, max(2, max_positions // 2))
    limits = {
        "max_prompt_tokens": config.data.max_prompt_tokens or half,
        "max_response_tokens": config.data.max_response_tokens or half,
    }
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **limits))


def with_steps(config: Config, epoch_steps: float) -> Config:
    """The config with num_steps and optim.warmup_steps set, for training data that lasts `epoch_steps` steps."""
    num_steps = config.num_steps
    if num_steps < 0:
        num_steps = max(1, math.ceil(config.num_epochs * epoch_steps - 1e-6))
    optim = config.optim
    if optim.warmup_ratio:
        optim = dataclasses.replace(optim, warmup_steps=round(optim.warmup_ratio * num_steps), warmup_ratio=0.0)
    return dataclasses.replace(config, num_steps=num_steps, num_epochs=0.0, optim=optim)


def resolved_mode(config: Config) -> str:
    """reference.mode: live, cached, adapter or none; auto is none where the objective takes no reference."""
    if config.reference.mode != "auto":
        return config.reference.mode
    if not config.loss.make().uses_reference:
        return "none"
    return "adapter" if config.lora.rank and not config.reference.init else "live"


def frozen_dtype(config: Config) -> str:
    """What the reference's parameters are stored in."""
    of_base = config.lora.rank and resolved_mode(config) != "live" and not config.reference.init
    return (config.lora.base_dtype if of_base else config.reference.dtype) or config.model.param_dtype


def _convert(value, kind, field: str):
    """`value` as `kind` (a dataclass, a plain type, `T | None` or dict[str, str]); ConfigError otherwise."""
    if dataclasses.is_dataclass(kind):
        return _from_dict(kind, value, field)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if typing.get_origin(kind) is dict:
        of = typing.get_args(kind)[1]
        if not isinstance(value, dict):
            raise ConfigError(f"{field} is {value!r}; it must map names to values of type {of.__name__}")
        return {k: _convert(v, of, f"{field}.{k}") for k, v in value.items()}
    if kind in (int, float):
        fault = number_fault(value, kind, infinite=field in MAY_BE_INFINITE)
        if fault is not None:
            raise ConfigError(f"{field} is {value!r:.60}, of type {type(value).__name__}; {fault}")
        return kind(value)
    if not isinstance(value, kind):
        raise ConfigError(f"{field} is {value!r:.200}, of type {type(value).__name__}; it must be {kind.__name__}")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{field} is {value!r:.200}; it holds a NUL character")
    return value


def _from_dict(cls, values: dict, prefix: str):
    hints = typing.get_type_hints(cls)
    dot = f"{prefix}." if prefix else ""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix} is {values!r}; it must be a section with the keys {', '.join(hints)}")
    for key in values:
        if key not in hints:
            near = nearest_setting(f"{dot}{key}", setting_kinds())
            raise ConfigError(f"{dot}{key} is not a setting; {prefix or 'the config'} has {', '.join(hints)}{near}")
    for key in hints:
        if key not in values:
            raise ConfigError(f"{dot}{key} is missing; every config names it")
    return cls(**{key: _convert(values[key], kind, f"{dot}{key}") for key, kind in hints.items()})


def _validate_optimizer(optim: OptimConfig) -> None:
    """Moments and eps in their ranges, and none that the optimizer does not have."""
    for name in ("b1", "b2", "eps"):
        value = getattr(optim, name)
        if value is None:
            continue
        takes = OPTIMIZERS[optim.name]
        has = f"left unset: {optim.name} has {', '.join(takes) or 'no such settings'}"
        _require(name in takes, f"optim.{name}", value, has)
        if name == "eps":  # below it is 0 on most devices, and a moment of 0 divided by it no number
            _require(math.isfinite(value) and value >= SMALLEST_NORMAL, "optim.eps", value, f">= {SMALLEST_NORMAL:g}")
        else:
            _require(0 <= value < 1, f"optim.{name}", value, "in [0, 1)")


def _require(test: bool, field: str, value, must: str) -> None:
    if not test:
        raise ConfigError(f"{field} is {value!r}; it must be {must}")


def _validate(config: Config) -> None:
    """Everything that can be known before a device is touched."""
    for field, allowed in CHOICES.items():
        value = functools.reduce(getattr, field.split("."), config)
        near = did_you_mean(str(value), filter(None, allowed))
        _require(value is None or value in allowed, field, value, f"one of {', '.join(map(repr, allowed))}{near}")
    at_least = {
        "seed": (config.seed, 0),
        "data.seed": (config.data.seed, -1),
        "batch_size": (config.batch_size, 1),
        "batch_groups": (config.batch_groups, 0),
        "num_steps": (config.num_steps, -1),
        "log_every_steps": (config.log_every_steps, 1),
        "eval_every_steps": (config.eval_every_steps, 1),
        "checkpoint_every_steps": (config.checkpoint_every_steps, 1),
        "data.max_prompt_tokens": (config.data.max_prompt_tokens, 0),
        "data.max_response_tokens": (config.data.max_response_tokens, 0),
        "data.row_tokens": (config.data.row_tokens, 0),
        "data.micro_batch_tokens": (config.data.micro_batch_tokens, 1),
        "data.eval_max_pairs": (config.data.eval_max_pairs, 0),
        "data.workers": (config.data.workers, 0),
        "model.logps_chunk_tokens": (config.model.logps_chunk_tokens, 1),
        "lora.rank": (config.lora.rank, 0),
        "mesh.num_slices": (config.mesh.num_slices, 0),
        "sft.num_steps": (config.sft.num_steps, 0),
        "sft.steps_from_random": (config.sft.steps_from_random, 0),
        "sft.batch_size": (config.sft.batch_size, 1),
        "sft.warmup_steps": (config.sft.warmup_steps, 0),
        "optim.warmup_steps": (config.optim.warmup_steps, 0),
        "checkpoint.keep": (config.checkpoint.keep, 1),
        "checkpoint.restore_step": (config.checkpoint.restore_step, -1),
        "sample.num_prompts": (config.sample.num_prompts, 0),
        "sample.kl_prompts": (config.sample.kl_prompts, 0),
        "sample.max_new_tokens": (config.sample.max_new_tokens, 1),
        "sample.batch_size": (config.sample.batch_size, 1),
        "sample.top_k": (config.sample.top_k, 0),
    }
    for field, (value, least) in at_least.items():
        _require(value >= least, field, value, f"at least {least}")
    for field, rate in {"optim": config.optim.learning_rate, "sft": config.sft.learning_rate}.items():
        _require(math.isfinite(rate) and rate > 0, f"{field}.learning_rate", rate, "a finite number > 0")
    decay, clip = config.optim.weight_decay, config.optim.clip_norm
    _require(math.isfinite(decay) and decay >= 0, "optim.weight_decay", decay, "a finite number >= 0")
    _require(clip > 0, "optim.clip_norm", clip, "> 0 (inf for no clipping)")
    _require(config.optim.spike_factor > 1, "optim.spike_factor", config.optim.spike_factor, "> 1 (inf: no loss is a spike)")
    for name in config.checkpoint.allowed():
        near = did_you_mean(name, CHANGEABLE)
        _require(name in CHANGEABLE, "checkpoint.allow_changed", name, f"names out of {', '.join(CHANGEABLE)}{near}")
    _require(0 <= config.data.flip_labels <= 1, "data.flip_labels", config.data.flip_labels, "in [0, 1]")
    prompt_tokens = config.data.max_prompt_tokens
    _require(prompt_tokens != 1, "data.max_prompt_tokens", prompt_tokens, "at least 2, or 0 for the model's own")
    share, ratio, epochs = config.data.eval_share, config.optim.warmup_ratio, config.num_epochs
    _require(0 <= share < 1, "data.eval_share", share, "in [0, 1)")
    _require(0 <= ratio < 1, "optim.warmup_ratio", ratio, "in [0, 1)")
    _require(math.isfinite(epochs) and 0 <= epochs <= 10**6, "num_epochs", epochs, "in [0, 1e6]")
    if config.num_steps < 0:
        _require(epochs > 0, "num_epochs", epochs, "> 0, as num_steps is -1")
    elif epochs:
        raise ConfigError(
            f"num_steps is {config.num_steps} while num_epochs is {epochs:g}; set one of them: num_steps=-1, or num_epochs=0"
        )
    if ratio and config.optim.warmup_steps:
        raise ConfigError(
            f"optim.warmup_steps is {config.optim.warmup_steps} while optim.warmup_ratio is {ratio:g}; set one of them to 0"
        )
    _require(0 <= config.data.max_bad_share <= 1, "data.max_bad_share", config.data.max_bad_share, "in [0, 1]")
    temperature, top_p = config.sample.temperature, config.sample.top_p
    warm = temperature == 0 or temperature >= LEAST_TEMPERATURE
    must = f"0 (the likeliest token) or finite and at least {LEAST_TEMPERATURE:g}"
    _require(math.isfinite(temperature) and warm, "sample.temperature", temperature, must)
    b2 = config.sft.b2
    _require(b2 is None or 0 <= b2 < 1, "sft.b2", b2, "in [0, 1)")
    most = 4 * (os.cpu_count() or 1)
    _require(config.data.workers <= most, "data.workers", config.data.workers, f"at most {most}, 4 for each core here")
    _require(0 < top_p <= 1, "sample.top_p", top_p, "in (0, 1]")
    check_template(config.data.prompt_template)
    for section, rules in {"mesh": config.mesh.rules, "reference": config.reference.rules}.items():
        for axis in rules:
            near = did_you_mean(axis, LOGICAL_AXES)
            must = f"a rule for one of the axes {', '.join(LOGICAL_AXES)}{near}"
            _require(axis in LOGICAL_AXES, f"{section}.rules.{axis}", rules[axis], must)
    _validate_optimizer(config.optim)
    std = config.model.init_std
    _require(std is None or (math.isfinite(std) and std > 0), "model.init_std", std, "a finite number > 0")
    if not config.model.init and not config.model.shape:
        for size in SIZES:
            value = getattr(config.model, size)
            _require(value is not None, f"model.{size}", value, "set, as model.init is '' (random weights)")
    if share and not config.data.train:
        raise ConfigError(f"data.train is '' while data.eval_share is {share:g}; name a file of preferences in data.train")
    if share and config.data.eval:
        raise ConfigError(f"data.eval_share is {share:g} while data.eval is {config.data.eval!r}; set one of the two")
    own = {"tokenizer": config.tokenizer, "model.init": config.model.init, "data.eval": config.data.eval}
    for name, value in {**own, "sft.data": config.sft.data}.items():
        if value and not config.data.train and not (config.data.eval and config.num_steps == 0):
            raise ConfigError(f"{name} is {value!r} but data.train is ''; the embedded world brings its own; set data.train")
    if config.sft.num_steps and not config.data.train and not config.embedded:
        raise ConfigError(f"data.train is '' while sft.num_steps is {config.sft.num_steps}; name a file to train on")
    _validate_loss(config)


def _validate_loss(config: Config) -> None:
    """The objective with its settings, and the reference that it asks for."""
    try:
        loss = config.loss.make()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    flips = config.data.flip_labels
    if loss.needs("scores"):
        _require(flips == 0, "data.flip_labels", flips, f"0: a flipped pair has no score margin for {loss.name}")
    _validate_lora(config, moving=loss.moving is not None)
    if loss.moving is not None:
        own = config.reference
        _require(
            own.dtype not in QUANTISED, "reference.dtype", own.dtype, f"float32 or bfloat16: {loss.name} moves its reference"
        )
        _require(own.memory == "device", "reference.memory", own.memory, f"'device': {loss.name} moves its reference")
    mode = config.reference.mode
    if loss.needs_live_reference:
        _require(
            mode in ("auto", "live", "adapter"),
            "reference.mode",
            mode,
            f"'live' or 'auto': {loss.name} needs the reference's parameters",
        )
    if loss.uses_reference:
        _require(mode != "none", "reference.mode", mode, f"'live', 'cached' or 'auto': {loss.name} needs a reference")


def _validate_lora(config: Config, *, moving: bool) -> None:
    """Adapters and what they leave to the reference."""
    lora, reference = config.lora, config.reference
    if reference.init:
        mode = resolved_mode(config)
        _require(mode in ("live", "cached"), "reference.init", reference.init, f"'': reference.mode is {mode!r}")
    weight = config.model.router_loss_weight
    _require(math.isfinite(weight) and weight >= 0, "model.router_loss_weight", weight, "a finite number >= 0")
    if not lora.rank:
        _require(reference.mode != "adapter", "reference.mode", "adapter", "another one: lora.rank is 0, there is no base")
        _require(not lora.base_dtype, "lora.base_dtype", lora.base_dtype, "'': lora.rank is 0, there is no frozen base")
        return
    _require(math.isfinite(lora.alpha) and lora.alpha > 0, "lora.alpha", lora.alpha, "a finite number > 0")
    _require(0 <= lora.dropout < 1, "lora.dropout", lora.dropout, "in [0, 1)")
    _require(not moving, "lora.rank", lora.rank, f"0: {config.loss.name} moves its reference, and the base is frozen")
    if resolved_mode(config) != "live" and not reference.init:
        _require(not reference.dtype, "reference.dtype", reference.dtype, "'': the reference is the base, in lora.base_dtype")
        _require(reference.memory == "device", "reference.memory", reference.memory, "'device': the reference is the base")
        _require(not reference.rules, "reference.rules", reference.rules, "empty: the reference is the base")


def from_config_dict(values: ml_collections.ConfigDict, *, overridden: frozenset[str] = frozenset()) -> Config:
    """The run's frozen settings.

    Args:
      values: from a config file, command-line overrides applied.
      overridden: dotted keys that the command line set: a size given together with model.init is an error.
    Raises: ConfigError naming the key, its value and the fix.
    """
    tree = json.loads(values.to_json_best_effort()) if isinstance(values, ml_collections.ConfigDict) else values
    model = tree.get("model") if isinstance(tree, dict) else None
    defines = next((k for k in ("init", "shape") if isinstance(model, dict) and model.get(k)), None)
    if isinstance(model, dict) and defines:
        if defines == "init" and "model.shape" in overridden and model.get("shape"):
            raise ConfigError(f"model.shape is {model['shape']!r} while model.init is {model['init']!r}; drop one of the two")
        for size in SIZES:
            if f"model.{size}" in overridden:
                raise ConfigError(
                    f"model.{size} is {model.get(size)!r} while model.{defines} is {model[defines]!r}, "
                    "which defines it; drop one of the two"
                )
            model[size] = None
        if defines == "init":
            model["shape"] = ""
    if isinstance(tree, dict):
        _drop_defaults(tree, overridden)
    config = _from_dict(Config, tree, "")
    if config.sft.num_steps == -1:
        steps = 0 if config.model.init else config.sft.steps_from_random
        config = dataclasses.replace(config, sft=dataclasses.replace(config.sft, num_steps=steps))
    _validate(config)
    return config


# Settings that say the same in two ways: what the command line sets turns the other one, a config's default, off.
ALTERNATIVES = (
    ("num_steps", -1, "num_epochs", 0.0),
    ("optim.warmup_steps", 0, "optim.warmup_ratio", 0.0),
    ("data.eval", "", "data.eval_share", 0.0),
)


def _section(tree: dict, key: str) -> tuple[dict, str]:
    """The section of plain settings that holds a dotted key, {} if there is none, and the key's last part."""
    *sections, last = key.split(".")
    node = tree
    for name in sections:
        inner = node.get(name)
        node = inner if isinstance(inner, dict) else {}
    return node, last


def _drop_defaults(tree: dict, overridden: frozenset[str]) -> None:
    """Turns off the config's defaults that stand against what the command line sets, in place."""
    for first, first_off, second, second_off in ALTERNATIVES:
        for given, given_off, key, off in ((first, first_off, second, second_off), (second, second_off, first, first_off)):
            node, last = _section(tree, key)
            given_node, given_last = _section(tree, given)
            is_set = given in overridden and given_node.get(given_last) != given_off
            if is_set and key not in overridden and last in node:
                node[last] = off
    loss = tree.get("loss")
    if "loss.name" in overridden and isinstance(loss, dict) and isinstance(loss.get("name"), str):
        for key in settings_not_taken(loss["name"], loss):
            if f"loss.{key}" not in overridden:
                loss[key] = None


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain data: what `config.json` holds, and what a later `--config=config.json` reads."""
    return dataclasses.asdict(config)


def doubts(config: Config) -> list[str]:
    """Settings that are legal and cannot do what they say, one sentence each."""
    c, found = config, []
    stages = [("optim", c.num_steps, c.optim.warmup_steps), ("sft", c.sft.num_steps, c.sft.warmup_steps)]
    for section, steps, warmup in stages:
        if steps and warmup >= steps and warmup > 1:
            field = "num_steps" if section == "optim" else "sft.num_steps"
            found.append(f"{section}.warmup_steps={warmup} of {field}={steps}: the rate is still rising at the last step")
    if c.sample.kl_prompts > c.sample.num_prompts > 0:
        found.append(f"sample.kl_prompts={c.sample.kl_prompts}: it takes sample.num_prompts={c.sample.num_prompts} at most")
    if c.sample.num_prompts and c.sample.temperature == 0 and (c.sample.top_k or c.sample.top_p < 1):
        found.append("sample.top_k and sample.top_p do nothing: sample.temperature=0 takes the likeliest token")
    if not c.sft.num_steps:
        if c.sft.data:
            found.append(f"sft.data={c.sft.data!r} is not read: sft.num_steps=0")
    elif c.sft.b2 is not None and "b2" not in OPTIMIZERS[c.optim.name]:
        found.append(f"sft.b2={c.sft.b2} does nothing: {c.optim.name} has no b2")
    if c.lora.dropout and not c.lora.rank:
        found.append(f"lora.dropout={c.lora.dropout} does nothing: lora.rank=0")
    if c.optim.skip_spikes and math.isinf(c.optim.spike_factor):
        found.append("optim.skip_spikes=True does nothing: optim.spike_factor=inf calls no loss a spike")
    if resolved_mode(c) in ("none", "adapter") and c.reference.rules:
        found.append("reference.rules do nothing: there is no reference tree of its own")
    if resolved_mode(c) == "none" and (c.reference.dtype or c.reference.memory != "device"):
        found.append("reference.dtype and reference.memory do nothing: there is no reference")
    return found


def changed_settings(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configs as plain data, one text per setting."""
    found = []
    for key in {**saved, **now}:
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changed_settings(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} {old!r} -> {new!r}")
    return found


def load_config_file(spec: str, *, allow_code: bool = False, overridden: Collection[str] = ()) -> ml_collections.ConfigDict:
    """`FILE.py[:argument]` (calls its get_config) or `FILE.json` -> ConfigDict.

    Args:
      allow_code: a .json file may name functions of modules and files, which are executed.
      overridden: dotted keys that the command line sets: what the file says of them does not matter.
    Raises: ConfigError if the file does not exist, does not load, names code that is not allowed, or refuses the argument.
    """
    path, _, argument = spec.partition(":")
    file = existing_path(path)
    if file is None or not file.is_file():
        what = "is a folder; name a file in it" if file is not None and file.is_dir() else "there is no such file"
        raise ConfigError(f"--config={spec!r:.300}: {path!r:.300}: {what}{_nearest_file(path)}")
    if file.suffix == ".json":
        values = _load_plain(file)
        if not allow_code:
            _refuse_code(file, values, overridden)
        return values
    root = str(file.resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)  # a config may start from a sibling: `from configs import tldr`
    try:
        module = run_file(str(file), file.stat().st_mtime_ns, f"dpojax_config_{file.stem}")
        return module.get_config(argument) if argument else module.get_config()
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's file raises is theirs to read
        raise ConfigError(f"--config={spec}: {type(error).__name__}: {error}") from error


def _nearest_file(path: str) -> str:
    """The file beside a missing one that is spelt most like it."""
    file = pathlib.Path(path)
    try:
        beside = sorted(p.name for p in file.parent.iterdir() if p.suffix in (".py", ".json"))
    except (OSError, ValueError):
        return ""
    near = did_you_mean(file.name, beside).removeprefix("; did you mean ")
    return f"; did you mean {file.with_name(near.removesuffix('?'))}?" if near else ""


def _load_plain(file: pathlib.Path) -> ml_collections.ConfigDict:
    """The settings of a .json file. Raises ConfigError for a file that holds none."""
    values = read_json(file, infinite=True)
    try:
        return ml_collections.ConfigDict(values)
    except (ValueError, TypeError, AttributeError) as error:  # a key with a dot, or that is a method's name
        raise ConfigError(f"{file}: not settings: {error}") from error


def _refuse_code(file: pathlib.Path, values: ml_collections.ConfigDict, overridden: Collection[str]) -> None:
    """Raises ConfigError where plain data names a function: to call it, its module or file would be executed."""
    for setting in CODE_SETTINGS:
        section, name = setting.split(".")
        part: Any = values.get(section)
        text = part.get(name) if isinstance(part, ml_collections.ConfigDict) else None
        if setting not in overridden and isinstance(text, str) and names_code(text):
            raise ConfigError(
                f"{file}: {setting} is {text!r:.200}, which names code, and plain data executes none; if you trust that "
                "code, add --allow_code"
            )


def apply_override(values: ml_collections.ConfigDict, key: str, text: str, *, flag: str = "config") -> None:
    """Sets `values.key` from the text of a command-line flag, read as the type that the key has.

    Args:
      flag: what stands before the key on the command line, for messages.
    Raises: ConfigError for an unknown key or text of another type.
    """
    flag = f"--{flag}.{key}={text}"
    *parents, last = key.split(".")
    node: Any = values
    for depth, part in enumerate(parents):
        if not isinstance(node, ml_collections.ConfigDict) or part not in node:
            raise ConfigError(f"{flag}: {_unknown(node, '.'.join(parents[:depth]), part, key)}")
        node = node[part]
    if not isinstance(node, ml_collections.ConfigDict) or (last not in node and not (last and _is_mapping(".".join(parents)))):
        raise ConfigError(f"{flag}: {_unknown(node, '.'.join(parents), last, key)}")
    if last in node and isinstance(node[last], ml_collections.ConfigDict):
        keys = ", ".join(f"{key}.{k}" for k in map(str, node[last])) or f"{key}.NAME"
        raise ConfigError(f"{flag}: it is a section; set {'one of ' if ', ' in keys else ''}{keys}")
    kind, optional = _kind_of(key)
    readers = {bool: _read_bool, int: int, float: float, str: str}
    try:
        value = None if optional and text == "None" else readers[kind](text)
    except ValueError as error:
        raise ConfigError(f"{flag}: it must be of type {kind.__name__}") from error
    if key == "data.prompt_template":
        value = unescape(value)
    with node.unlocked(), node.ignore_type():
        node[last] = value


def _unknown(node: Any, section: str, part: str, key: str) -> str:
    """Why `part` of the dotted `key` is no setting of `section`, and what is."""
    near = nearest_setting(key, setting_kinds())
    if not isinstance(node, ml_collections.ConfigDict):
        return f"{section} is a setting, not a section; set {section} itself"
    return f"there is no setting {part!r}; {section or 'the config'} has {', '.join(map(str, node))}{near}"


def setting_kinds(section: Any = None, prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, with the type that its field declares."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(Config if section is None else section).items():
        deeper = dataclasses.is_dataclass(kind)
        found |= setting_kinds(kind, f"{prefix}{name}.") if deeper else {prefix + name: kind}
    return found


def _is_mapping(key: str) -> bool:
    """Whether a section maps names of the user's choice: mesh.rules, reference.rules, loss.extra."""
    kind: Any = Config
    for part in filter(None, key.split(".")):
        kind = typing.get_type_hints(kind).get(part) if dataclasses.is_dataclass(kind) else None
    return typing.get_origin(kind) is dict


def _kind_of(key: str) -> tuple[type, bool]:
    """The type of a setting, and whether it may be None. A config file's extra keys, which fail later, are text."""
    kind: Any = Config
    for part in key.split("."):
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(part, str)
        else:  # a mapping: rules to names, loss.extra to numbers
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else str
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return options[0], type(None) in options


def unescape(template: Any) -> Any:
    """A template from a command line: `\\n` and `\\t`, which shells pass on as they are, become what they mean."""
    return template.replace("\\n", "\n").replace("\\t", "\t")


def check_template(template: str) -> None:
    """Raises ConfigError for a prompt template without {prompt}, or with another field."""
    try:
        fields = [
            (name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template) if name is not None
        ]
    except ValueError:  # a brace alone
        fields = [(None, None, None)]
    usable = not template or (fields and all(field == ("prompt", "", None) for field in fields))
    must = "a template with {prompt} and no other field (double other braces)"
    _require(bool(usable), "data.prompt_template", template, must)


def _read_bool(text: str) -> bool:
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    except KeyError as error:
        raise ValueError(text) from error
