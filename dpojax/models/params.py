"""Every parameter of the decoder is one row here: shape, logical axes, init.

Initialisation, sharding, the weight-decay mask, adapters, quantisation, import and export all
derive from these rows; what a family calls them on disk is in families/names.py.
Dimension letters: V vocabulary, D model, F mlp, H query heads, K kv heads, E head dim, N layers, X
experts.
"""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from dpojax.models.config import ModelConfig

# Dimension letters of logical axes, of the maps that a layer has.
LETTERS = {"embed": "D", "mlp": "F", "heads": "H", "kv_heads": "K", "head_dim": "E"}


# The map from a final hidden state to one number, as Hugging Face calls it.
SCALAR_HEAD = "score"


class ParamRow(NamedTuple):
    """One parameter. Rows of a layer are stored stacked, with a leading `layers` axis."""

    name: str  # the key in the parameter tree
    shape: tuple[int, ...]  # without the layers axis
    axes: tuple[str, ...]  # logical axis of each dimension, without `layers`
    # residual: std / sqrt(2 N); scalar: 1 / sqrt(D + 1)
    init: Literal["normal", "ones", "zeros", "residual", "scalar"]
    # dimensions that are a linear map's input, after an axis of experts; 0: not a linear map
    in_dims: int

    @property
    def experts(self) -> int:
        """How many maps there are, one for each expert; 0: one map, without such an axis."""
        if self.axes[:1] == ("experts",):
            return self.shape[0]
        return 0

    @property
    def map_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(input dimensions, output dimensions) of the linear map."""
        sizes = self.shape
        if self.experts:
            sizes = sizes[1:]
        return sizes[: self.in_dims], sizes[self.in_dims :]

    @property
    def down_equation(self) -> str:
        """The adapter's map to its rank Z, of (inputs, A), e.g. `...D,DZ->...Z`."""
        inputs, _ = self._letters
        return f"...{inputs},{inputs}Z->...Z"

    @property
    def up_equation(self) -> str:
        """The adapter's map from its rank Z, of (inputs A, B), e.g. `...Z,ZHE->...HE`."""
        _, outputs = self._letters
        return f"...Z,Z{outputs}->...{outputs}"

    @property
    def _letters(self) -> tuple[str, str]:
        """Dimension letters of the inputs and of the outputs."""
        letters = "".join(LETTERS[axis] for axis in self.axes)
        return letters[: self.in_dims], letters[self.in_dims :]


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
    init = "ones"
    if config.norm_offset:  # a scale that is stored minus 1 starts at 0
        init = "zeros"
    if bias is None:
        bias = config.norm == "layer"
    rows = [ParamRow(name, shape, axes, init, 0)]
    if bias:
        rows.append(ParamRow(f"{name}_bias", shape, axes, "zeros", 0))
    return rows


def layer_rows(config: ModelConfig) -> list[ParamRow]:
    """The parameters of one decoder layer."""
    d = (config.hidden_size, "embed")
    f = (config.intermediate_size, "mlp")
    h = (config.num_heads, "heads")
    k = (config.num_kv_heads, "kv_heads")
    e = (config.head_dim, "head_dim")
    before = config.norm_placement != "post"
    after = config.norm_placement != "pre"
    rows = []
    if before:
        rows += _norm("attention_norm", config)
    rows += _linear("q", [d], [h, e], bias=config.attention_bias)
    rows += _linear("k", [d], [k, e], bias=config.attention_bias)
    rows += _linear("v", [d], [k, e], bias=config.attention_bias)
    if config.qk_norm != "none":
        q_sizes = [e]
        k_sizes = [e]
        if config.qk_norm == "full":
            q_sizes = [h, e]
            k_sizes = [k, e]
        rows += _norm("q_norm", config, q_sizes, bias=False)
        rows += _norm("k_norm", config, k_sizes, bias=False)
    rows += _linear("o", [h, e], [d], bias=config.out_bias, init="residual")
    if after:
        rows += _norm("attention_post_norm", config)
    if before and config.residual != "parallel_shared":
        rows += _norm("mlp_norm", config)
    experts = []
    if config.num_experts:
        experts = [(config.num_experts, "experts")]
        # Replicated over the experts' mesh axis: every device routes all of its tokens.
        rows += _linear("router", [d], [(config.num_experts, "router")])
    if config.mlp == "gated":
        rows += _linear("gate", [d], [f], bias=config.mlp_bias, experts=experts)
    rows += _linear("up", [d], [f], bias=config.mlp_bias, experts=experts)
    rows += _linear("down", [f], [d], bias=config.mlp_bias, init="residual", experts=experts)
    if after:
        rows += _norm("mlp_post_norm", config)
    return rows


def model_rows(config: ModelConfig) -> list[ParamRow]:
    """The parameters outside the layers."""
    v = (config.vocab_size, "vocab")
    d = (config.hidden_size, "embed")
    rows = [ParamRow("embed", (v[0], d[0]), ("vocab", "embed"), "normal", 0)]
    if config.positions == "learned":
        rows.append(
            ParamRow("positions", (config.max_positions, d[0]), ("positions", "embed"), "normal", 0)
        )
    rows += _norm("final_norm", config)
    if config.scalar_head:
        rows += _linear(SCALAR_HEAD, [d], [], init="scalar")
    elif not config.tie_embeddings:
        rows += _linear("unembed", [d], [v], bias=config.head_bias)
    return rows


def logical_axes(config: ModelConfig) -> dict:
    """The tree of logical axes: {name: axes, "layers": {name: axes}}."""
    axes: dict = {row.name: row.axes for row in model_rows(config)}
    axes["layers"] = {row.name: ("layers", *row.axes) for row in layer_rows(config)}
    return axes


def param_shapes(config: ModelConfig, dtype: Any = jnp.float32) -> dict:
    """The tree of ShapeDtypeStructs of the parameters."""
    tree: dict = {row.name: jax.ShapeDtypeStruct(row.shape, dtype) for row in model_rows(config)}
    stacked = {
        row.name: jax.ShapeDtypeStruct((config.num_layers, *row.shape), dtype)
        for row in layer_rows(config)
    }
    return {**tree, "layers": stacked}


def num_params(config: ModelConfig) -> int:
    """The number of parameters."""
    layer = sum(math.prod(row.shape) for row in layer_rows(config))
    return sum(math.prod(row.shape) for row in model_rows(config)) + config.num_layers * layer
