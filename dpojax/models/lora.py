"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): rows of the table -> their A and B.

A tree of adapters is shaped like the parameters and holds {"layers": {q_lora_a, q_lora_b, ...}}
alone. The policy is the union of the base's tree and the adapters'; the base's tree alone is the
reference. Legend: Z rank.
"""

import fnmatch
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpojax.models.config import ModelConfig
from dpojax.models.params import ParamRow, layer_rows
from dpojax.models.quantise import in_compute, is_quantised

LORA_A = "_lora_a"
LORA_B = "_lora_b"


class Adapter(NamedTuple):
    """How an adapter counts: W + scale A B."""

    scale: float  # alpha / rank
    dropout: float  # of its input, in training


def target_rows(config: ModelConfig, targets: str) -> list[ParamRow]:
    """The linear maps of a layer that `targets` names.

    Comma-separated patterns, e.g. "q,v" or "*".

    Raises: ValueError for a pattern that matches none.
    """
    rows = [r for r in layer_rows(config) if r.in_dims and r.name != "router" and not r.experts]
    names = ", ".join(r.name for r in rows)
    for pattern in targets.split(","):
        if not any(fnmatch.fnmatch(r.name, pattern.strip()) for r in rows):
            raise ValueError(
                f"lora.targets: {pattern!r} matches none of the layers' linear maps: {names}"
            )
    return [r for r in rows if any(fnmatch.fnmatch(r.name, p.strip()) for p in targets.split(","))]


def adapter_rows(config: ModelConfig, targets: str, rank: int) -> list[ParamRow]:
    """Rows for A [inputs..., Z] and B [Z, outputs...] of every target."""
    rows = []
    for row in target_rows(config, targets):
        inputs, outputs = row.map_shape
        widest = max(math.prod(inputs), math.prod(outputs))
        if rank > widest:
            raise ValueError(
                f"lora.rank is {rank}; it must be at most {widest}, the width of {row.name}, which"
                " no rank exceeds"
            )
        rows.append(
            ParamRow(
                row.name + LORA_A,
                (*inputs, rank),
                (*row.axes[: row.in_dims], "lora"),
                "normal",
                row.in_dims,
            )
        )
        rows.append(
            ParamRow(
                row.name + LORA_B, (rank, *outputs), ("lora", *row.axes[row.in_dims :]), "zeros", 1
            )
        )
    return rows


def adapter_axes(rows: Sequence[ParamRow]) -> dict:
    """The tree of logical axes, shaped like the adapters."""
    return {"layers": {row.name: ("layers", *row.axes) for row in rows}}


def init_adapters(key, rows: Sequence[ParamRow], num_layers: int, dtype) -> dict:
    """A uniform in +-1 / sqrt(inputs), as PEFT draws it; B zero.

    So the policy starts as the base.
    """
    layers = {}
    for i, row in enumerate(rows):
        shape = (num_layers, *row.shape)
        if row.init == "zeros":
            layers[row.name] = jnp.zeros(shape, dtype)
        else:
            bound = math.prod(row.map_shape[0]) ** -0.5
            layers[row.name] = jax.random.uniform(
                jax.random.fold_in(key, i), shape, dtype, -bound, bound
            )
    return {"layers": layers}


def join(base: Any, adapters: Any) -> Any:
    """The policy's tree: the base's and the adapters' leaves, none copied."""
    return {**base, "layers": {**base["layers"], **adapters["layers"]}}


def stack(under: Any, under_scale: float, over: Any, scale: float) -> tuple[Any, float]:
    """Two sets of adapters as one of their summed rank.

    It has the scale of the second: s1 A1 B1 + s2 A2 B2 = s2 A B.
    """
    layers = {}
    for name in sorted({*under["layers"], *over["layers"]}):
        rank_axis = -1 if name.endswith(LORA_A) else 1
        below = under["layers"].get(name)
        above = over["layers"].get(name)
        if below is not None and name.endswith(LORA_B):
            below = below * (under_scale / scale)
        parts = [x for x in (below, above) if x is not None]
        layers[name] = jnp.concatenate(parts, axis=rank_axis) if len(parts) > 1 else parts[0]
    return {"layers": layers}, scale


def merge_row(row: ParamRow, weight: jax.Array, a: jax.Array, b: jax.Array, scale: float):
    """W + scale A B of one stacked map, computed in float32, in W's dtype."""

    def flat(x, rows):
        return x.reshape(x.shape[0], rows, -1).astype(jnp.float32)

    inputs = math.prod(row.map_shape[0])
    delta = jnp.einsum("NIZ,NZO->NIO", flat(a, inputs), flat(b, b.shape[1]))
    merged = weight.astype(jnp.float32) + scale * delta.reshape(weight.shape)
    return merged.astype(weight.dtype)


def merge(params: Any, config: ModelConfig, scale: float) -> Any:
    """The tree without adapters, W + scale A B in the place of W.

    It is computed in float32; quantised maps become float32.
    """
    layers = dict(params["layers"])
    for row in layer_rows(config):
        if is_quantised(layers[row.name]):
            layers[row.name] = in_compute(layers[row.name], jnp.float32)
        if row.name + LORA_A not in layers:
            continue
        a = layers.pop(row.name + LORA_A)
        b = layers.pop(row.name + LORA_B)
        layers[row.name] = merge_row(row, layers[row.name], a, b, scale)
    return {**params, "layers": layers}
