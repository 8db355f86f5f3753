"""Every parameter of the decoder is one row here: shape, logical axes, init.

Initialisation, sharding, the weight-decay mask, adapters, quantisation, import and export all derive from these rows;
what a family calls them on disk is in hf.py.
Dimension letters: V vocabulary, D model, F mlp, H query heads, K kv heads, E head dim, N layers, X experts.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dpojax.models.config import ModelConfig


class ParamRow(NamedTuple):
    """One parameter. Rows of a layer are stored stacked, with a leading `layers` axis."""

    name: str  # the key in the parameter tree
    shape: tuple[int, ...]  # without the layers axis
    axes: tuple[str, ...]  # logical axis of each dimension, without `layers`
    init: Literal["normal", "ones", "zeros", "residual"]  # residual: std / sqrt(2 N)
    in_dims: int  # dimensions that are a linear map's input, after an axis of experts; 0: not a linear map

    @property
    def experts(self) -> int:
        """How many maps there are, one for each expert; 0: one map, without such an axis."""
        return self.shape[0] if self.axes[:1] == ("experts",) else 0

    @property
    def map_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(input dimensions, output dimensions) of the linear map."""
        own = self.shape[1:] if self.experts else self.shape
        return own[: self.in_dims], own[self.in_dims :]


def _linear(name, inputs, outputs, *, bias=False, init="normal", experts=()):
    """The rows of a linear map from `inputs` to `outputs`, tuples of (size, logical axis)."""
    shape, axes = zip(*experts, *inputs, *outputs, strict=True)
    rows = [ParamRow(name, shape, axes, init, len(inputs))]
    if bias:
        shape, axes = zip(*outputs, strict=True)
        rows.append(ParamRow(f"{name}_bias", shape, axes, "zeros", 0))
    return rows


def _norm(name, config, sizes=None, *, bias=None):
    shape, axes = zip(*(sizes or [(config.hidden_size, "norm")]), strict=True)
    # A scale that is stored minus 1 starts at 0.
    rows = [ParamRow(name, shape, axes, "zeros" if config.norm_offset else "ones", 0)]
    if config.norm == "layer" if bias is None else bias:
        rows.append(ParamRow(f"{name}_bias", shape, axes, "zeros", 0))
    return rows


def layer_rows(config: ModelConfig) -> list[ParamRow]:
    """The parameters of one decoder layer."""
    d = (config.hidden_size, "embed")
    f = (config.intermediate_size, "mlp")
    h = (config.num_heads, "heads")
    k = (config.num_kv_heads, "kv_heads")
    e = (config.head_dim, "head_dim")
    before, after = config.norm_placement != "post", config.norm_placement != "pre"
    rows = _norm("attention_norm", config) if before else []
    rows += _linear("q", [d], [h, e], bias=config.attention_bias)
    rows += _linear("k", [d], [k, e], bias=config.attention_bias)
    rows += _linear("v", [d], [k, e], bias=config.attention_bias)
    if config.qk_norm != "none":
        full = config.qk_norm == "full"
        rows += _norm("q_norm", config, [h, e] if full else [e], bias=False)
        rows += _norm("k_norm", config, [k, e] if full else [e], bias=False)
    rows += _linear("o", [h, e], [d], bias=config.out_bias, init="residual")
    rows += _norm("attention_post_norm", config) if after else []
    rows += _norm("mlp_norm", config) if before and config.residual != "parallel_shared" else []
    experts = []
    if config.num_experts:
        experts = [(config.num_experts, "experts")]
        # Replicated over the experts' mesh axis: every device routes all of its tokens.
        rows += _linear("router", [d], [(config.num_experts, "router")])
    if config.mlp == "gated":
        rows += _linear("gate", [d], [f], bias=config.mlp_bias, experts=experts)
    rows += _linear("up", [d], [f], bias=config.mlp_bias, experts=experts)
    rows += _linear("down", [f], [d], bias=config.mlp_bias, init="residual", experts=experts)
    rows += _norm("mlp_post_norm", config) if after else []
    return rows


def model_rows(config: ModelConfig) -> list[ParamRow]:
    """The parameters outside the layers."""
    v, d = (config.vocab_size, "vocab"), (config.hidden_size, "embed")
    rows = [ParamRow("embed", (v[0], d[0]), ("vocab", "embed"), "normal", 0)]
    if config.positions == "learned":
        rows.append(ParamRow("positions", (config.max_positions, d[0]), ("positions", "embed"), "normal", 0))
    rows += _norm("final_norm", config)
    if not config.tie_embeddings:
        rows += _linear("unembed", [d], [v], bias=config.head_bias)
    return rows


def logical_axes(config: ModelConfig) -> dict:
    """The tree of logical axes, shaped like the parameters: {name: axes, "layers": {name: axes}}."""
    axes: dict = {row.name: row.axes for row in model_rows(config)}
    axes["layers"] = {row.name: ("layers", *row.axes) for row in layer_rows(config)}
    return axes


def param_shapes(config: ModelConfig, dtype: Any = jnp.float32) -> dict:
    """The tree of ShapeDtypeStructs of the parameters."""
    tree: dict = {row.name: jax.ShapeDtypeStruct(row.shape, dtype) for row in model_rows(config)}
    stacked = {row.name: jax.ShapeDtypeStruct((config.num_layers, *row.shape), dtype) for row in layer_rows(config)}
    return {**tree, "layers": stacked}


def num_params(config: ModelConfig) -> int:
    """The number of parameters."""
    layer = sum(math.prod(row.shape) for row in layer_rows(config))
    return sum(math.prod(row.shape) for row in model_rows(config)) + config.num_layers * layer
