"""Frozen weights in fewer bits: int8 and fp8 with a scale per output channel, nf4 with a scale per 64 inputs.

Quantised leaves are qwix QArrays in the place of the arrays; the decoder turns one layer at a time back into the dtype
of the computation, so that the whole model never exists in it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import qwix

from dpojax.models.config import ModelConfig
from dpojax.models.table import ParamRow, layer_rows

QTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn, "nf4": "nf4"}
HERE = jax.memory.Space.Device
TILE = 64  # inputs that share a scale in nf4 (QLoRA, arXiv:2305.14314, section 3)


def in_compute(x: Any, dtype) -> jax.Array:
    """A stored parameter as it is computed with: fetched from the host's memory, dequantised, in `dtype`."""
    fetch = lambda leaf: jax.device_put(leaf, HERE) if jax.typeof(leaf).memory_space == jax.memory.Space.Host else leaf
    x = jax.tree.map(fetch, x)
    return qwix.dequantize(x).astype(dtype) if isinstance(x, qwix.QArray) else x.astype(dtype)


def _quantise(row: ParamRow, x: jax.Array, kind: str) -> qwix.QArray:
    """One stacked parameter of the layers: axes (layers[, experts], inputs..., outputs...)."""
    inputs = range(x.ndim - len(row.shape) + bool(row.experts), x.ndim - len(row.map_shape[1]))
    channels = [a for a in range(x.ndim) if a not in inputs]
    if kind == "nf4":
        tiles = {a: 1.0 for a in inputs}
        last = inputs[-1]
        tiles[last] = TILE if x.shape[last] % TILE == 0 else 1.0
        for a in list(inputs)[:-1]:
            tiles[a] = 1
        return qwix.quantize(x, "nf4", channelwise_axes=channels, tiled_axes=tiles, scale_dtype=jnp.float32)
    return qwix.quantize(x, QTYPES[kind], channelwise_axes=channels, scale_dtype=jnp.float32)


def quantise_params(params: Any, config: ModelConfig, kind: str) -> Any:
    """The tree with the layers' matrices quantised; embeddings, norms, biases and the router stay as they are.

    Args:
      kind: a key of QTYPES.
    """
    layers = dict(params["layers"])
    for row in layer_rows(config):
        if row.in_dims and row.name != "router":
            layers[row.name] = _quantise(row, layers[row.name], kind)
    return {**params, "layers": layers}
