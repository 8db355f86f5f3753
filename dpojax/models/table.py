"""Every parameter of the decoder is one row here: shape, logical axes, init, Hugging Face name.

Initialisation, sharding, the weight-decay mask, import and export all derive from these rows.
Dimension letters: V vocabulary, D model, F mlp, H query heads, K kv heads, E head dim, N layers.
"""

import math
from typing import Literal, NamedTuple

from dpojax.models.config import ModelConfig


class ParamRow(NamedTuple):
    """One parameter. Rows of a layer are stored stacked, with a leading `layers` axis."""

    name: str  # the key in the parameter tree
    shape: tuple[int, ...]  # without the layers axis
    axes: tuple[str, ...]  # logical axis of each dimension, without `layers`
    init: Literal["normal", "ones", "zeros", "residual"]  # residual: std / sqrt(2 N)
    hf_name: str  # with {i} for the layer's number
    in_dims: int  # leading dimensions that are a Linear's input: stored transposed as [out, in]; 0: stored as is


def _linear(name, inputs, outputs, hf_name, *, bias, init="normal"):
    """The rows of a linear map from `inputs` to `outputs`, tuples of (size, logical axis)."""
    shape, axes = zip(*inputs, *outputs, strict=True)
    rows = [ParamRow(name, shape, axes, init, f"{hf_name}.weight", len(inputs))]
    if bias:
        shape, axes = zip(*outputs, strict=True)
        rows.append(ParamRow(f"{name}_bias", shape, axes, "zeros", f"{hf_name}.bias", 0))
    return rows


def _norm(name, config, hf_name):
    rows = [ParamRow(name, (config.hidden_size,), ("norm",), "ones", f"{hf_name}.weight", 0)]
    if config.norm == "layer":
        rows.append(ParamRow(f"{name}_bias", (config.hidden_size,), ("norm",), "zeros", f"{hf_name}.bias", 0))
    return rows


def layer_rows(config: ModelConfig) -> list[ParamRow]:
    """The parameters of one decoder layer."""
    d = (config.hidden_size, "embed")
    f = (config.intermediate_size, "mlp")
    h = (config.num_heads, "heads")
    k = (config.num_kv_heads, "kv_heads")
    e = (config.head_dim, "head_dim")
    attn, mlp = "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
    rows = _norm("attention_norm", config, "model.layers.{i}.input_layernorm")
    rows += _linear("q", [d], [h, e], f"{attn}.q_proj", bias=config.attention_bias)
    rows += _linear("k", [d], [k, e], f"{attn}.k_proj", bias=config.attention_bias)
    rows += _linear("v", [d], [k, e], f"{attn}.v_proj", bias=config.attention_bias)
    rows += _linear("o", [h, e], [d], f"{attn}.o_proj", bias=config.attention_bias, init="residual")
    rows += _norm("mlp_norm", config, "model.layers.{i}.post_attention_layernorm")
    if config.mlp == "gated":
        rows += _linear("gate", [d], [f], f"{mlp}.gate_proj", bias=config.mlp_bias)
    rows += _linear("up", [d], [f], f"{mlp}.up_proj", bias=config.mlp_bias)
    rows += _linear("down", [f], [d], f"{mlp}.down_proj", bias=config.mlp_bias, init="residual")
    return rows


def model_rows(config: ModelConfig) -> list[ParamRow]:
    """The parameters outside the layers."""
    table = (config.vocab_size, config.hidden_size)
    rows = [ParamRow("embed", table, ("vocab", "embed"), "normal", "model.embed_tokens.weight", 0)]
    rows += _norm("final_norm", config, "model.norm")
    if not config.tie_embeddings:
        rows.append(ParamRow("unembed", table[::-1], ("embed", "vocab"), "normal", "lm_head.weight", 1))
    return rows


def logical_axes(config: ModelConfig) -> dict:
    """The tree of logical axes, shaped like the parameters: {name: axes, "layers": {name: axes}}."""
    axes: dict = {row.name: row.axes for row in model_rows(config)}
    axes["layers"] = {row.name: ("layers", *row.axes) for row in layer_rows(config)}
    return axes


def num_params(config: ModelConfig) -> int:
    """The number of parameters."""
    layer = sum(math.prod(row.shape) for row in layer_rows(config))
    return sum(math.prod(row.shape) for row in model_rows(config)) + config.num_layers * layer
