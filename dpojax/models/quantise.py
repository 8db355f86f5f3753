"""Frozen weights in fewer bits.

int8 and fp8 with a scale per output channel, nf4 with a scale per 64 inputs.

Quantised leaves are qwix QArrays in the place of the arrays; the decoder turns one layer at a time
back into the dtype of the computation, so that the whole model never exists in it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import qwix

from dpojax.errors import ConfigError
from dpojax.models.config import ModelConfig
from dpojax.models.params import ParamRow, layer_rows

QTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "nf4": "nf4"}

HERE = jax.memory.Space.Device

TILE = 64  # inputs that share a scale in nf4 (QLoRA, arXiv:2305.14314, section 3)


class Packed(NamedTuple):
    """An nf4 array, two values in a byte.

    XLA's 4-bit arrays have no stable layout as arguments of a compiled program.
    """

    pairs: jax.Array  # uint8, the last dimension half as long
    scale: jax.Array


def in_compute(x: Any, dtype) -> jax.Array:
    """A stored parameter as it is computed with, in `dtype`.

    It is fetched from the host's memory and dequantised.
    """

    def fetch(leaf):
        return (
            jax.device_put(leaf, HERE)
            if jax.typeof(leaf).memory_space == jax.memory.Space.Host
            else leaf
        )

    x = jax.tree.map(fetch, x)
    if isinstance(x, Packed):
        halves = jnp.stack([x.pairs & 15, x.pairs >> 4], axis=-1).astype(jnp.uint4)
        x = qwix.QArray(halves.reshape(*x.pairs.shape[:-1], -1), x.scale, qtype="nf4")
    if isinstance(x, qwix.QArray):
        x = qwix.dequantize(x)
    return x.astype(dtype)


def is_quantised(x: Any) -> bool:
    """Whether a leaf of the parameters is a quantised one."""
    return isinstance(x, Packed | qwix.QArray)


def _quantise(row: ParamRow, x: jax.Array, kind: str) -> "qwix.QArray | Packed":
    """One stacked parameter of the layers: axes (layers[, experts], inputs..., outputs...)."""
    inputs = range(x.ndim - len(row.shape) + bool(row.experts), x.ndim - len(row.map_shape[1]))
    channels = [a for a in range(x.ndim) if a not in inputs]
    if kind == "nf4":
        tiles = {a: 1.0 for a in inputs}
        last = inputs[-1]
        tiles[last] = TILE if x.shape[last] % TILE == 0 else 1.0
        for a in list(inputs)[:-1]:
            tiles[a] = 1
        quantised = qwix.quantize(
            x, "nf4", channelwise_axes=channels, tiled_axes=tiles, scale_dtype=jnp.float32
        )
        if x.shape[-1] % 2:
            raise ConfigError(
                f"nf4 keeps two values in a byte, and the last dimension of {row.name}, {x.shape},"
                " is odd; take int8"
            )
        halves = quantised.qvalue.astype(jnp.uint8).reshape(*x.shape[:-1], -1, 2)
        return Packed(halves[..., 0] | (halves[..., 1] << 4), quantised.scale)
    return qwix.quantize(x, QTYPES[kind], channelwise_axes=channels, scale_dtype=jnp.float32)


def store_as(params: Any, config: ModelConfig, dtype: str) -> Any:
    """A tree of parameters in another dtype, or its matrices quantised."""
    if dtype in QTYPES:
        return quantise_params(params, config, dtype)
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)


def quantise_params(params: Any, config: ModelConfig, kind: str) -> Any:
    """The tree with the layers' matrices quantised.

    Embeddings, norms, biases and the router stay as they are.

    Args:
      kind: a key of QTYPES.
    """
    layers = dict(params["layers"])
    for row in layer_rows(config):
        if row.in_dims and row.name != "router":
            layers[row.name] = _quantise(row, layers[row.name], kind)
    return {**params, "layers": layers}
