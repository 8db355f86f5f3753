"""One new token a row: parameters laid out for it, and the layers one after another.

Legend: R prompts, B rows (samples), D model, N layers, L packed row length, P prompt columns.

Layers are not scanned here: a scan copies each layer's weights and cache out of their stacks at
every token, which takes as long as the products themselves.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpojax.models.attention.blocks import NO_WINDOW
from dpojax.models.attention.cached import (
    Cache,
    KeyValues,
    Seen,
    attend_cached,
    seen_columns,
    write_column,
)
from dpojax.models.config import ModelConfig
from dpojax.models.layer import Block, Context, OnMesh, Params, Parts, normalise
from dpojax.models.lora import LORA_A, LORA_B, Adapter, merge_row
from dpojax.models.params import layer_rows
from dpojax.models.quantise import in_compute, is_quantised
from dpojax.models.rope import rope_angles


def embed_tokens(
    w: Params, config: ModelConfig, tokens: Int[Array, "R L"], positions: Int[Array, "R L"]
) -> Float[Array, "R L D"]:
    """The first hidden states of tokens at their positions."""
    # A padding id may lie past the table; "fill" would make it NaN, which masks of 0 do not stop.
    x = jnp.take(w["embed"], tokens, axis=0, mode="clip")
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    if config.positions == "learned":
        # padding may stand past the table
        x = x + jnp.take(w["positions"], positions, axis=0, mode="clip")
    return x


def make_context(config: ModelConfig, positions: Int[Array, "R L"], where: Any, real) -> Context:
    """What all layers need of tokens at these positions."""
    angles = functools.partial(rope_angles, positions, pairs=config.turned // 2)
    local_angles = None
    if config.local_rope_theta is not None:
        local_angles = angles(theta=config.local_rope_theta, scaling=None)
    return Context(
        angles=angles(theta=config.rope_theta, scaling=config.rope_scaling),
        local_angles=local_angles,
        where=where,
        real=real,
    )


def final_norm(w: Params, config: ModelConfig, x: Array) -> Array:
    """The hidden states that the head reads."""
    return normalise(
        x,
        w["final_norm"],
        w.get("final_norm_bias"),
        kind=config.norm,
        eps=config.norm_eps,
        offset=config.norm_offset,
    )


def is_served(params: Params) -> bool:
    """Whether parameters are laid out for decoding, as `serve` does."""
    return isinstance(params["layers"], tuple)


def serve(params: Params, config: ModelConfig, adapter: Adapter | None, dtype: jnp.dtype) -> Params:
    """The parameters for decoding: in the dtype of the computation, adapters merged, each layer on
    its own.

    Quantised maps stay as they are, with their adapters beside them: they were quantised for want
    of memory.
    """
    if is_served(params):
        return params
    stacked = dict(params["layers"])
    for row in layer_rows(config):
        if row.name + LORA_A not in stacked or is_quantised(stacked[row.name]):
            continue
        assert adapter is not None  # the tree holds one
        a = stacked.pop(row.name + LORA_A)
        b = stacked.pop(row.name + LORA_B)
        weight = in_compute(stacked[row.name], jnp.float32)
        stacked[row.name] = merge_row(row, weight, a, b, adapter.scale)

    def cast(x):
        if is_quantised(x):
            return x
        return in_compute(x, dtype)

    stacked = {name: cast(x) for name, x in stacked.items()}
    served = {name: cast(x) for name, x in params.items() if name != "layers"}
    layers = [jax.tree.map(operator.itemgetter(i), stacked) for i in range(config.num_layers)]
    return {**served, "layers": tuple(layers)}


def prompt_caches(filled: tuple[Array, Array], places: Int[Array, "R P"]) -> tuple[KeyValues, ...]:
    """The caches of prompts out of the packed rows that were prefilled.

    Args:
      filled: keys and values [N, A, L, K, E] of all layers.
      places: where a prompt's tokens stand in its row; R / A prompts stand in each row.
    """

    def columns(packed):
        """[A, L, K, E] -> [R, P, K, E]."""
        by_row = places.reshape(packed.shape[0], -1)
        taken = jax.vmap(functools.partial(jnp.take, axis=0, mode="clip"))(packed, by_row)
        return taken.reshape(*places.shape, *taken.shape[2:])

    return tuple(
        KeyValues(columns(k).transpose(0, 2, 3, 1), columns(v).transpose(0, 2, 1, 3))
        for k, v in zip(*filled, strict=True)
    )


def empty_caches(prompts: tuple[KeyValues, ...], rows: int, columns: int) -> tuple[KeyValues, ...]:
    """Room for the samples' keys and values: `rows` of `columns`."""

    def room(layer):
        _, heads, size, _ = layer.k.shape
        return KeyValues(
            jnp.zeros((rows, heads, size, columns), layer.k.dtype),
            jnp.zeros((rows, heads, columns, size), layer.v.dtype),
        )

    return tuple(map(room, prompts))


def decode(  # noqa: PLR0913  # what a decoder is made of, and one token
    params: Params,
    token: Int[Array, " B"],
    seen: Seen,
    cache: Cache,
    *,
    config: ModelConfig,
    adapter: Adapter | None,
    on_mesh: OnMesh,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "B D"], Cache]:
    """The hidden states of one new token a row, whose keys and values join the samples' cache.

    Args:
      params: as `serve` lays them out.
      seen: where the rows stand; all have drawn `seen.step` tokens before this one.
    """
    rows = token.shape[0]
    columns = cache.samples[0].v.shape[2]
    samples = rows // seen.is_key.shape[0]
    position = jnp.repeat(seen.prompt_lengths, samples)[:, None] + seen.step
    # The embedding and the head lie in the dtype of the computation already.
    w = {name: x for name, x in params.items() if name != "layers"}
    context = make_context(config, position, None, jnp.ones((rows, 1), bool))
    windows = config.windows
    if not any(windows):
        windows = (0,) * config.num_layers
    visible = {w or None: seen_columns(seen, rows, columns, w or None) for w in set(windows)}

    def attention(q, k, v, where, cache, window, *, softcap):
        del where
        prompts, kept = cache
        kept = write_column(kept, k[:, 0], v[:, 0], seen.step)
        mask = visible[window if window != NO_WINDOW else None]
        return attend_cached(q[:, 0], prompts, kept, mask, softcap=softcap)[:, None], kept

    x = embed_tokens(w, config, token[:, None], position)
    parts = Parts(attention, adapter, on_mesh)
    kept = []
    for number, layer in enumerate(params["layers"]):
        weights = {name: in_compute(value, dtype) for name, value in layer.items()}
        block = Block(weights, config, parts, None)
        pair = (cache.prompts[number], cache.samples[number])
        x, new, _ = block(on_mesh.constrain_final(x), context, windows[number] or NO_WINDOW, pair)
        kept.append(new)
    return final_norm(w, config, x)[:, 0], Cache(cache.prompts, tuple(kept))
