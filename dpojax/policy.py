"""config.model -> the policy's model, and its parameters before training, in their shardings."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpojax import sharding
from dpojax.config import SIZES, Config
from dpojax.data.packing import PackShape
from dpojax.datasets import Data, check_shared_tokenizer
from dpojax.errors import ConfigError, FitError
from dpojax.job import Job
from dpojax.models import Model, ModelConfig, hf, kernels, lora, make_decoder
from dpojax.models.decoder import head_params
from dpojax.models.quantise import in_compute, store_as
from dpojax.models.table import ParamRow, model_rows, num_params
from dpojax.plain_data import memory_bytes
from dpojax.weights import Weights, ignored_fields, open_weights, read_shape

MOST_CONTEXTS = 8  # of a sample's length: no rotation reaches that far, and memory is reserved for all of it


class Policy(NamedTuple):
    """The model of a run, and where its trained parameters lie: all of them, or adapters (`adapted`)."""

    model: Model  # for rows of any shape; `fitted` makes the faster one for a given shape
    config: ModelConfig
    abstract: Any  # ShapeDtypeStructs of the trained parameters
    shardings: Any
    axes: Any  # their logical axes
    weights: Weights | None  # what they start from; None: random


def starting_weights(config: Config) -> Weights | None:
    """What the policy starts from, before any of it is read; None: random weights. Raises: ConfigError if it is not there."""
    section = config.model
    return open_weights(section.init, ignore=ignored_fields(section.ignore_fields)) if section.init else None


def random_model(config: Config, vocab_size: int) -> ModelConfig:
    """The decoder of random weights: model.shape, or the sizes of the config. Raises: ConfigError for sizes that do not fit."""
    section = config.model
    if section.shape:
        return read_shape(section.shape, ignore=ignored_fields(section.ignore_fields))
    try:
        return ModelConfig(vocab_size=vocab_size, **{s: getattr(section, s) for s in SIZES})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def open_policy(job: Job, data: Data, weights: Weights | None) -> Policy:
    """The policy's model, before any of its parameters is read; `weights` are what it starts from.

    Raises: ConfigError if it does not belong to the tokenizer or the token ids.
    """
    section = job.config.model
    if weights is None and not section.shape and data.tokenizer is None:
        raise ConfigError("model.init and tokenizer are ''; random weights take the size of their vocabulary from a tokenizer")
    vocab_size = data.tokenizer.vocab_size if data.tokenizer is not None else 0
    config = random_model(job.config, vocab_size) if weights is None else weights.config
    indexes = [i for i in (data.train_index, data.eval_index, data.sft_index) if i is not None]
    largest = max(i.largest_id for i in indexes)
    if largest >= config.vocab_size:  # pieces past the embedding that no row holds are no reason to refuse
        pieces = "" if data.tokenizer is None else f"; the tokenizer has {data.tokenizer.vocab_size} pieces"
        raise ConfigError(
            f"the data holds the token id {largest}, the model's embedding has {config.vocab_size} rows{pieces}: they do not "
            "belong together"
        )
    if job.config.reference.init:
        sets = [(data.train, data.train_index)]
        if data.eval is not None and data.eval_index is not None:
            sets.append((data.eval, data.eval_index))
        check_shared_tokenizer(data.tokenizer, job.config.reference.init, sets, setting="reference.init")
    longest = max(int(i.sequence_lengths().max()) for i in indexes)
    check_positions(config, longest, "data.max_prompt_tokens or data.max_response_tokens")
    if longest > config.max_positions:
        job.say(f"warning: prompt and response reach {longest} tokens, the model was made for {config.max_positions} positions")
    kind = config.family if weights is not None else "random weights"
    job.say(
        f"model: {num_params(config) / 1e6:,.2f}M parameters ({kind}), {section.dtype} compute, {section.param_dtype} stored"
    )
    check_memory(config, section.param_dtype)
    _check_mesh(job, config)
    if job.config.lora.rank:
        _adapter_rows(job, config)  # what cannot be adapted is known before anything is trained
    new_tokens, most = job.config.sample.max_new_tokens, MOST_CONTEXTS * config.max_positions
    if job.config.sample.num_prompts and new_tokens > most:
        raise ConfigError(
            f"sample.max_new_tokens={new_tokens}: over {most}, {MOST_CONTEXTS} times the positions that the model was made for"
        )
    if section.router_loss_weight and not config.num_experts:
        raise ConfigError(f"model.router_loss_weight is {section.router_loss_weight}; the model has no experts")
    return describe(job, config, weights)


def _check_mesh(job: Job, config: ModelConfig) -> None:
    """Raises ConfigError for a mesh on which XLA cannot partition the gradient.

    Its partitioner fails where key-value heads are more thinly spread than they are, beside a vocabulary that is spread over the
    same axis (jax 0.10: "Cross-partition allreduce must be in (partial) manual partitioning mode").
    """
    rules, mesh = job.config.mesh.rules, job.mesh
    axes = [a for a in sharding.mesh_axes(rules.get("kv_heads", "")) if a not in sharding.ROW_AXES]
    size = math.prod(mesh.shape[a] for a in axes)
    shared = [a for a in sharding.mesh_axes(rules.get("vocab", "")) if a in axes and config.vocab_size % mesh.shape[a] == 0]
    # Seen on one data shard alone; elsewhere `Program.compile` says what XLA could not do.
    one_shard = sharding.num_shards(mesh) == 1
    if one_shard and config.num_kv_heads % size and config.num_heads % size == 0 and shared:
        raise ConfigError(
            f"mesh.{axes[0]}={size}: the model has {config.num_kv_heads} key-value heads, which it does not divide; take a size that "
            f"divides {config.num_heads} heads and {config.num_kv_heads} key-value heads, or leave the vocabulary whole "
            "(--config.mesh.rules.vocab=)"
        )


def describe(job: Job, config: ModelConfig, weights: Weights | None = None) -> Policy:
    """The policy of this architecture, on the job's mesh."""
    model = build_model(job, config)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    shardings = sharding.param_shardings(abstract, model.axes, job.mesh, job.config.mesh.rules)
    return Policy(model, config, abstract, shardings, model.axes, weights)


def check_memory(config: ModelConfig, dtype: str) -> None:
    """Raises FitError where the parameters alone are more than a host's memory holds, before any of it is asked for.

    On CPUs the kernel gives out memory that it does not have, and kills who uses it; accelerators say no themselves.
    """
    needed = num_params(config) * jnp.dtype(dtype).itemsize
    there = memory_bytes() * jax.process_count()
    if jax.default_backend() == "cpu" and needed > there:
        raise FitError(
            f"the model has {num_params(config):,} parameters, {needed / 2**30:,.1f} GiB in {dtype}, and there are "
            f"{there / 2**30:,.1f} GiB of memory: take a smaller model or more machines"
        )


def check_positions(config: ModelConfig, longest: int, settings: str) -> None:
    """Raises ConfigError where `longest` tokens are more than the model can place; `settings` are what bounds them."""
    if config.hard_max_positions and longest > config.max_positions:
        raise ConfigError(
            f"prompt and response reach {longest} tokens, and the model can place {config.max_positions} alone: lower {settings}"
        )


def build_model(job: Job, config: ModelConfig, shape: PackShape | None = None, kernel: str = "xla", dtype: str = "") -> Model:
    """The decoder of a run, on its mesh; for rows of `shape` alone where that is given.

    Args:
      dtype: of the computation; "": model.dtype.
    """
    section, adapters = job.config.model, job.config.lora
    return place_decoder(
        config,
        job.mesh,
        job.config.mesh.rules,
        kernel="full" if section.attention == "full" and kernel == "xla" else kernel,
        shape=shape,
        dtype=dtype or section.dtype,
        param_dtype=section.param_dtype,
        remat=section.remat,
        adapter=lora.Adapter(adapters.alpha / adapters.rank, adapters.dropout) if adapters.rank else None,
    )


def kernel_name(job: Job, config: ModelConfig, layout: str) -> tuple[str, str]:
    """The attention kernel of a run on rows of this layout, and why it is that one where it is a choice."""
    section = job.config.model
    platform = kernels.device_platform(job.mesh.devices.flat[0])
    return kernels.choose(section.attention, config, dtype=section.dtype, layout=layout, platform=platform)


def fitted(job: Job, policy: Policy, shape: PackShape) -> Policy:
    """The policy with the model for rows of this shape alone, on the kernel that model.attention asks for."""
    return policy._replace(model=build_model(job, policy.config, shape, kernel_name(job, policy.config, shape.layout)[0]))


def place_decoder(
    config: ModelConfig,
    mesh: Mesh,
    rules: dict[str, str],
    *,
    dtype: str,
    param_dtype: str,
    kernel: str = "xla",
    shape: PackShape | None = None,
    **options: Any,
) -> Model:
    """The decoder on a mesh.

    Args:
      kernel, shape: of attention, as `kernels.make_kernel`'s.
      dtype, param_dtype: by name; `options` are as `make_decoder`'s.
    """
    split = mesh.shape["sequence"] > 1
    if split and config.num_experts:
        raise ConfigError(f"mesh.sequence={mesh.shape['sequence']}: a mixture of experts takes whole sequences; set it to 1")
    compute = jnp.dtype(dtype)
    head = {row.name: (row.shape, row.axes) for row in model_rows(config) if row.name in head_params(config)}
    cast = lambda tree: {name: in_compute(x, compute) for name, x in tree.items()}
    own = kernels.make_kernel(kernel, config, shape, platform=mesh.devices.flat[0].platform)
    model = make_decoder(
        config,
        attention=kernels.on_mesh(own, mesh, sharding.ROW_AXES, sharding.attention_axes(mesh, rules)),
        dtype=compute,
        param_dtype=jnp.dtype(param_dtype),
        constrain=sharding.constrain_rows(mesh),
        constrain_final=sharding.constrain_rows(mesh, whole=True),
        constrain_logits=sharding.constrain_logits(mesh, rules),
        mix=sharding.spread_experts(mesh, rules),
        flat=not split,
        **options,
    )
    return model._replace(spread=sharding.head_spread(mesh, head, rules, cast))


def _adapter_rows(job: Job, config: ModelConfig) -> list[ParamRow]:
    """The adapters' rows. Raises ConfigError for targets that match nothing, and a rank that no map has."""
    try:
        return lora.adapter_rows(config, job.config.lora.targets, job.config.lora.rank)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def adapted(job: Job, policy: Policy) -> Policy:
    """The policy with its adapters as what is trained. Raises ConfigError for targets that match nothing."""
    c = job.config
    rows = _adapter_rows(job, policy.config)
    axes, dtype = lora.adapter_axes(rows), jnp.dtype(c.model.param_dtype)
    abstract = jax.eval_shape(lambda: lora.init_adapters(jax.random.key(0), rows, policy.config.num_layers, dtype))
    shardings = sharding.param_shardings(abstract, axes, job.mesh, c.mesh.rules)
    return policy._replace(abstract=abstract, shardings=shardings, axes=axes)


def initial_adapters(job: Job, policy: Policy) -> Any:
    """Fresh adapters in their shardings; `policy` is an `adapted` one."""
    c = job.config
    rows = lora.adapter_rows(policy.config, c.lora.targets, c.lora.rank)
    init = lambda key: lora.init_adapters(key, rows, policy.config.num_layers, jnp.dtype(c.model.param_dtype))
    key = jax.random.fold_in(jax.random.key(c.seed), 1)  # not the key of random weights
    return jax.jit(init, out_shardings=policy.shardings)(key)


def frozen_layout(job: Job, policy: Policy, dtype: str, rules: dict[str, str], memory: str = "device") -> tuple[Any, Any]:
    """(ShapeDtypeStructs, shardings) of a frozen tree of all parameters: a reference, or a base under adapters.

    Args:
      dtype: as it is stored; one of config.STORED.
      rules: logical axis -> mesh axis; empty: mesh.rules.
    """
    abstract = jax.eval_shape(
        lambda tree: store_as(tree, policy.config, dtype or job.config.model.param_dtype), policy.abstract
    )
    return abstract, sharding.param_shardings(abstract, policy.axes, job.mesh, rules or job.config.mesh.rules, memory)


def initial_params(job: Job, policy: Policy) -> Any:
    """The policy's parameters before any training of this run, in their shardings."""
    if policy.weights is None:
        return jax.jit(policy.model.init, out_shardings=policy.shardings)(jax.random.key(job.config.seed))
    return _read(job, policy, policy.weights)


def reference_params(job: Job, policy: Policy) -> Any:
    """The parameters of reference.init, as the policy's. Raises ConfigError for another architecture."""
    c = job.config
    found = open_weights(c.reference.init, ignore=ignored_fields(c.model.ignore_fields), setting="reference.init")
    ours, theirs = dataclasses.asdict(policy.config), dataclasses.asdict(found.config)
    differ = [k for k in ours if ours[k] != theirs[k] and k not in ("init_std", "max_positions")]
    if differ:
        raise ConfigError(
            f"reference.init={c.reference.init!r}: {differ[0]} is {theirs[differ[0]]!r}, the policy's is {ours[differ[0]]!r}; "
            "the reference must have the policy's architecture"
        )
    return _read(job, policy, found)


def _read(job: Job, policy: Policy, weights: Weights) -> Any:
    progress = job.progress("reading weights", hf.num_tensors(policy.config), "tensors")
    params = weights.load(policy.shardings, jnp.dtype(job.config.model.param_dtype), progress)
    progress.clear()
    return params
