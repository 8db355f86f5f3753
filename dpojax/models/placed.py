"""A decoder on a mesh: its abstract parameters and their shardings.

And the model that is made for rows of one shape.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpojax.data.packing import PackShape
from dpojax.errors import ConfigError, FitError
from dpojax.models import experts, lora, placed
from dpojax.models.attention import kernels
from dpojax.models.config import ModelConfig
from dpojax.models.decoder import Model, make_decoder
from dpojax.models.layer import OnMesh
from dpojax.models.logits import head_params
from dpojax.models.params import ParamRow, model_rows, num_params
from dpojax.models.quantise import in_compute, store_as
from dpojax.runtime import sharding
from dpojax.runtime.context import Job
from dpojax.runtime.mesh import MESH_AXES, ROW_AXES, mesh_axes, num_shards
from dpojax.runtime.sharding import HeadSharding, partition_spec
from dpojax.untrusted.plain_data import memory_bytes


class Policy(NamedTuple):
    """The model of a run, and where its trained parameters lie.

    They are all of them, or adapters (`adapted`).
    """

    model: Model  # for rows of any shape; `fitted` makes the faster one for a given shape
    config: ModelConfig
    abstract: Any  # ShapeDtypeStructs of the trained parameters
    shardings: Any
    axes: Any  # their logical axes


def check_mesh(job: Job, config: ModelConfig) -> None:
    """Raises ConfigError for a mesh on which XLA cannot partition the gradient.

    Its partitioner fails where key-value heads are more thinly spread than they are, beside a
    vocabulary that is spread over the same axis (jax 0.10: "Cross-partition allreduce must be in
    (partial) manual partitioning mode").
    """
    rules = job.config.mesh.rules
    mesh = job.mesh
    axes = [a for a in mesh_axes(rules.get("kv_heads", "")) if a not in ROW_AXES]
    size = math.prod(mesh.shape[a] for a in axes)
    shared = [
        a
        for a in mesh_axes(rules.get("vocab", ""))
        if a in axes and config.vocab_size % mesh.shape[a] == 0
    ]
    # Seen on one data shard alone; elsewhere `Program.compile` says what XLA could not do.
    one_shard = num_shards(mesh) == 1
    if one_shard and config.num_kv_heads % size and config.num_heads % size == 0 and shared:
        raise ConfigError(
            f"mesh.{axes[0]}={size}: the model has {config.num_kv_heads} key-value heads, which it"
            f" does not divide; take a size that divides {config.num_heads} heads and"
            f" {config.num_kv_heads} key-value heads, or leave the vocabulary whole"
            " (--config.mesh.rules.vocab=)"
        )


def describe(job: Job, config: ModelConfig) -> Policy:
    """The policy of this architecture, on the job's mesh."""
    model = build_model(job, config)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    shardings = sharding.param_shardings(abstract, model.axes, job.mesh, job.config.mesh.rules)
    return Policy(model, config, abstract, shardings, model.axes)


def check_memory(config: ModelConfig, dtype: str) -> None:
    """Raises FitError where a host's memory cannot hold the parameters.

    Before any of it is asked for.

    On CPUs the kernel gives out memory that it does not have, and kills who uses it; accelerators
    say no themselves.
    """
    needed = num_params(config) * jnp.dtype(dtype).itemsize
    there = memory_bytes() * jax.process_count()
    if jax.default_backend() == "cpu" and needed > there:
        raise FitError(
            f"the model has {num_params(config):,} parameters, {needed / 2**30:,.1f} GiB in"
            f" {dtype}, and there are {there / 2**30:,.1f} GiB of memory: take a smaller model or"
            " more machines"
        )


def check_positions(config: ModelConfig, longest: int, settings: str) -> None:
    """Raises ConfigError where the model cannot place `longest` tokens.

    `settings` are the names of what bounds them.
    """
    if config.hard_max_positions and longest > config.max_positions:
        raise ConfigError(
            f"prompt and response reach {longest} tokens, and the model can place"
            f" {config.max_positions} alone: lower {settings}"
        )


def build_model(
    job: Job,
    config: ModelConfig,
    shape: PackShape | None = None,
    kernel: str = "xla",
    dtype: str = "",
) -> Model:
    """The decoder of a run, on its mesh; for rows of `shape` alone where that is given.

    Args:
      dtype: of the computation; "": model.dtype.
    """
    section = job.config.model
    adapters = job.config.lora
    return place_decoder(
        config,
        job.mesh,
        job.config.mesh.rules,
        kernel="full" if section.attention == "full" and kernel == "xla" else kernel,
        shape=shape,
        dtype=dtype or section.dtype,
        param_dtype=section.param_dtype,
        remat=section.remat,
        adapter=(
            lora.Adapter(adapters.alpha / adapters.rank, adapters.dropout)
            if adapters.rank
            else None
        ),
    )


def kernel_name(job: Job, config: ModelConfig, layout: str) -> tuple[str, str]:
    """(the attention kernel of a run on rows of this layout, the reason).

    The reason is said where there is a choice.
    """
    section = job.config.model
    platform = kernels.device_platform(job.mesh.devices.flat[0])
    return kernels.choose(
        section.attention, config, dtype=section.dtype, layout=layout, platform=platform
    )


def fitted(job: Job, policy: Policy, shape: PackShape) -> Policy:
    """The policy with the model for rows of this shape alone.

    It runs on the kernel that model.attention asks for.
    """
    return policy._replace(
        model=build_model(
            job, policy.config, shape, kernel_name(job, policy.config, shape.layout)[0]
        )
    )


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
        raise ConfigError(
            f"mesh.sequence={mesh.shape['sequence']}: a mixture of experts takes whole sequences;"
            " set it to 1"
        )
    compute = jnp.dtype(dtype)
    head = {
        row.name: (row.shape, row.axes)
        for row in model_rows(config)
        if row.name in head_params(config)
    }

    def cast(tree):
        return {name: in_compute(x, compute) for name, x in tree.items()}

    attention = kernels.make_kernel(kernel, config, shape, platform=mesh.devices.flat[0].platform)
    model = make_decoder(
        config,
        attention=kernels.on_mesh(attention, mesh, ROW_AXES, sharding.attention_axes(mesh, rules)),
        dtype=compute,
        param_dtype=jnp.dtype(param_dtype),
        on_mesh=OnMesh(
            constrain=sharding.constrain_rows(mesh),
            constrain_final=sharding.constrain_rows(mesh, split_tokens=False),
            constrain_logits=sharding.constrain_logits(mesh, rules),
            mix=placed.spread_experts(mesh, rules),
            flat=not split,
        ),
        **options,
    )
    return model._replace(
        head_sharding=placed.head_sharding(mesh, head, rules, cast),
        serve=placed.serve_on_mesh(model.serve, model.axes, mesh, rules),
    )


def serve_on_mesh(
    serve: Callable[[Any], Any], axes: Any, mesh: Mesh, rules: Mapping[str, str]
) -> Callable[[Any], Any]:
    """`serve`, with its result where decoding reads it.

    Maps are split over the devices that share a layer alone. Over those that hold different rows
    they are whole: FSDP's parts would be gathered at every token.
    """
    if mesh.size == 1:
        return serve
    layer_axes = {name: of[1:] for name, of in axes["layers"].items()}
    split = {
        axis: ",".join(a for a in mesh_axes(rule) if a not in ROW_AXES)
        for axis, rule in rules.items()
    }

    def place(x, of):
        shardings = sharding.param_shardings(x, of, mesh, split)
        return jax.lax.with_sharding_constraint(x, shardings)

    def place_all(tree, tree_axes):
        # adapters stand beside quantised maps alone, and are small
        return {
            name: place(x, tree_axes[name]) if name in tree_axes else x for name, x in tree.items()
        }

    def served(params):
        tree = serve(params)
        layers = tuple(place_all(layer, layer_axes) for layer in tree["layers"])
        others = {name: x for name, x in tree.items() if name != "layers"}
        return {**place_all(others, axes), "layers": layers}

    return served


def checked_adapter_rows(job: Job, config: ModelConfig) -> list[ParamRow]:
    """The adapters' rows.

    Raises ConfigError for targets that match nothing, and a rank that no map has.
    """
    try:
        return lora.adapter_rows(config, job.config.lora.targets, job.config.lora.rank)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def adapted(job: Job, policy: Policy) -> Policy:
    """The policy with its adapters as what is trained.

    Raises ConfigError for targets that match nothing.
    """
    c = job.config
    rows = checked_adapter_rows(job, policy.config)
    axes = lora.adapter_axes(rows)
    dtype = jnp.dtype(c.model.param_dtype)
    abstract = jax.eval_shape(
        lambda: lora.init_adapters(jax.random.key(0), rows, policy.config.num_layers, dtype)
    )
    shardings = sharding.param_shardings(abstract, axes, job.mesh, c.mesh.rules)
    return policy._replace(abstract=abstract, shardings=shardings, axes=axes)


def frozen_layout(
    job: Job, policy: Policy, dtype: str, rules: dict[str, str], memory: str = "device"
) -> tuple[Any, Any]:
    """(ShapeDtypeStructs, shardings) of a frozen tree of all parameters.

    It is a reference, or a base under adapters.

    Args:
      dtype: as it is stored; one of config.STORED.
      rules: logical axis -> mesh axis; empty: mesh.rules.
    """
    abstract = jax.eval_shape(
        lambda tree: store_as(tree, policy.config, dtype or job.config.model.param_dtype),
        policy.abstract,
    )
    return abstract, sharding.param_shardings(
        abstract, policy.axes, job.mesh, rules or job.config.mesh.rules, memory
    )


def head_sharding(
    mesh: Mesh,
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]],
    rules: Mapping[str, str],
    cast,
):
    """How the head lies on the mesh, for `logps.scores_by_shard`; None on one device.

    Args:
      shapes: name -> (shape, logical axes) of every parameter of the head.
      cast: the head in the dtype of the computation.
    """
    if mesh.size == 1:
        return None

    def row_axes(axes):
        if not isinstance(axes, tuple):
            axes = (axes,)
        return tuple(axis for axis in axes if axis in ROW_AXES)

    specs = {
        name: [row_axes(a) if a else None for a in partition_spec(*of, mesh, rules)]
        for name, of in shapes.items()
    }
    return HeadSharding(
        mesh,
        ROW_AXES,
        tuple((name, P(*(a or None for a in spec))) for name, spec in specs.items()),
        cast,
    )


def spread_experts(mesh: Mesh, rules: Mapping[str, str]):
    """`experts.mix` over the mesh.

    Tokens stay on their data shard, experts on the devices of their mesh axis.
    """
    axis = rules.get("experts", "")
    if mesh.size == 1:
        return experts.mix
    if axis and axis not in MESH_AXES[2:]:
        raise ConfigError(
            f"mesh.rules.experts={axis!r}: the rows are spread over {', '.join(ROW_AXES)}; take"
            " 'tensor', or ''"
        )

    def mix(x, weights, ids, maps, *, activation):
        split_over = None
        if axis and maps.gate.shape[0] % mesh.shape[axis] == 0:
            split_over = axis
        function = functools.partial(experts.mix, activation=activation, axis=split_over)
        rows = P(ROW_AXES)
        held = P(split_over)
        return jax.shard_map(
            function, mesh=mesh, in_specs=(rows, rows, rows, held), out_specs=rows
        )(x, weights, ids, maps)

    return mix
