"""Token ids -> hidden states: one decoder, in Flax Linen, behind the `Model` seam.

Legend: R rows, L row length, V vocabulary, D model, F mlp, H query heads, K kv heads, E head dim,
N layers, S cached tokens, T = R L tokens. Layers are stored stacked on a leading axis and scanned.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dpojax.models.attention import SAVED, attend
from dpojax.models.config import ModelConfig
from dpojax.models.table import layer_rows, logical_axes, model_rows

Params = dict[str, Any]

_SAVE = jax.checkpoint_policies
REMAT = {
    "none": None,
    "full": _SAVE.nothing_saveable,
    # matrix products of the projections, and attention: what is left is cheap to compute again
    "dots": _SAVE.save_from_both_policies(_SAVE.dots_with_no_batch_dims_saveable, _SAVE.save_only_these_names(SAVED)),
}

ACTIVATION = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class Model(NamedTuple):
    """A language model as pure functions of its parameters. Everything outside models/ sees only this."""

    init: Callable[[PRNGKeyArray], Params]
    # (params, tokens, positions, group, branch), [R, L] each -> final hidden states [R, L, D]
    hidden_states: Callable[..., Array]
    # params -> the subtree that `unembed` needs, so that its gradient can be accumulated alone
    head: Callable[[Params], Any]
    # (head, hidden [..., D]) -> float32 logits [..., V]
    unembed: Callable[[Any, Array], Array]
    # (params, tokens [R, L], valid [R, L]) -> (hidden [R, L, D], cache); padding on the left
    prefill: Callable[..., tuple[Array, Any]]
    # (params, token [R], position [R], index [], valid [R, S], cache) -> (hidden [R, D], cache)
    decode: Callable[..., tuple[Array, Any]]
    axes: Params  # logical axes of every parameter, shaped like the parameters
    vocab_size: int


class Context(NamedTuple):
    """What attention needs besides the hidden states; the same for every layer."""

    cos: Float[Array, "R L E/2"]
    sin: Float[Array, "R L E/2"]
    where: tuple[Array, ...]  # training: group and branch; decoding: index and valid


def rope_angles(positions: Int[Array, "R L"], *, head_dim: int, theta: float):
    """Cosine and sine of the rotary angles, [R, L, E/2] each, in float32 (Su et al. 2021)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "R L H E"], cos, sin):
    """Turns the pairs (x_i, x_{i + E/2}), as Hugging Face checkpoints expect, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def normalise(x: Float[Array, "*b D"], scale, bias, *, kind: str, eps: float):
    """RMSNorm or LayerNorm in float32, back in x's dtype."""
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    # The scale is applied in x's dtype, as Llama checkpoints were trained.
    y = y.astype(x.dtype) * scale
    return y if bias is None else y + bias


def block(w: Params, x: Float[Array, "R L D"], context: Context, cache, *, config: ModelConfig, attention):
    """One pre-norm decoder layer. Returns the new hidden states and what `attention` keeps of (k, v)."""
    norm = functools.partial(normalise, kind=config.norm, eps=config.norm_eps)

    def project(equation, x, name):
        y = jnp.einsum(equation, x, w[name])
        return y + w[f"{name}_bias"] if f"{name}_bias" in w else y

    # Projections run on T = R L flat tokens: one large matrix product each, which CPUs need to be fast.
    rows = x.shape[:2]
    x = x.reshape(-1, config.hidden_size)
    y = norm(x, w["attention_norm"], w.get("attention_norm_bias"))
    q, k, v = (project(f"TD,D{h}E->T{h}E", y, n) for h, n in (("H", "q"), ("K", "k"), ("K", "v")))
    q, k, v = (y.reshape(*rows, *y.shape[1:]) for y in (q, k, v))
    q, k = (rotate(y, context.cos, context.sin) for y in (q, k))
    y, cache = attention(q, k, v, context.where, cache)
    x = x + project("THE,HED->TD", y.reshape(-1, *y.shape[2:]), "o")
    y = norm(x, w["mlp_norm"], w.get("mlp_norm_bias"))
    hidden = ACTIVATION[config.activation](project("TD,DF->TF", y, "gate" if config.mlp == "gated" else "up"))
    if config.mlp == "gated":
        hidden = hidden * project("TD,DF->TF", y, "up")
    return (x + project("TF,FD->TD", hidden, "down")).reshape(*rows, -1), cache


class _Rows(nn.Module):
    """Base of the modules below: makes parameters from rows of the table."""

    config: ModelConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def rows(self, rows) -> Params:
        std = self.config.init_std
        init = {
            "normal": nn.initializers.normal(std),
            "residual": nn.initializers.normal(std / (2 * self.config.num_layers) ** 0.5),
            "ones": nn.initializers.ones,
            "zeros": nn.initializers.zeros,
        }
        return {r.name: self.param(r.name, init[r.init], r.shape, self.param_dtype).astype(self.dtype) for r in rows}


class _Layer(_Rows):
    attention: Callable
    constrain: Callable

    @nn.compact
    def __call__(self, x, context, cache):
        w = self.rows(layer_rows(self.config))
        x, cache = block(w, x, context, cache, config=self.config, attention=self.attention)
        return self.constrain(x), cache


class _Decoder(_Rows):
    attention: Callable  # (q, k, v, where, cache) -> (out, cache)
    constrain: Callable
    remat: str

    @nn.compact
    def __call__(self, tokens, positions, where, cache):
        config = self.config
        w = self.rows(model_rows(config))
        cos, sin = rope_angles(positions, head_dim=config.head_dim, theta=config.rope_theta)
        layer: Any = _Layer
        if self.remat != "none":
            layer = nn.remat(_Layer, policy=REMAT[self.remat], prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            out_axes=0,
            length=config.num_layers,
        )
        x = self.constrain(jnp.take(w["embed"], tokens, axis=0))
        kinds = dict(config=config, dtype=self.dtype, param_dtype=self.param_dtype)
        layers = layers(**kinds, attention=self.attention, constrain=self.constrain, name="layers")
        x, cache = layers(x, Context(cos, sin, where), cache)
        x = normalise(x, w["final_norm"], w.get("final_norm_bias"), kind=config.norm, eps=config.norm_eps)
        return x, cache


def make_decoder(
    config: ModelConfig,
    *,
    attention: Callable[..., Array],
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
    remat: str,
    constrain: Callable[[Array], Array],
) -> Model:
    """Builds the decoder that `config` describes.

    Args:
      config: sizes and choices.
      attention: (q, k, v, group, branch) -> out, from `attention.make_attention`.
      dtype: of the computation; softmax, norms, rotations and log-probs are float32 throughout.
      param_dtype: of the stored (master) parameters.
      remat: "none", "full" (recompute each layer) or "dots" (keep matrix products and attention).
      constrain: applied to [R, L, D] activations, to keep their rows spread over the mesh.
    """
    if remat not in REMAT:
        raise ValueError(f"model.remat is {remat!r}; it must be one of {', '.join(REMAT)}")

    def module(attention):
        return _Decoder(config, dtype, param_dtype, attention, constrain, remat)

    def apply(params, tokens, positions, where, cache, attention):
        return module(attention).apply({"params": params}, tokens, positions, where, cache)

    def train_attention(q, k, v, where, cache):
        return attention(q, k, v, *where), cache

    def prefill_attention(q, k, v, where, cache):
        return attention(q, k, v, *where), (k, v)

    def decode_attention(q, k, v, where, cache):
        index, valid = where
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=1)
        cache = (update(cache[0], k), update(cache[1], v))
        return attend(q, *cache, valid[:, None, :]), cache

    def init(key):
        one = jnp.zeros((1, 1), jnp.int32)
        return module(train_attention).init(key, one, one, (one, one), None)["params"]

    def hidden_states(params, tokens, positions, group, branch):
        return apply(params, tokens, positions, (group, branch), None, train_attention)[0]

    def prefill(params, tokens, valid):
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        group = valid.astype(jnp.int32)
        return apply(params, tokens, positions, (group, jnp.zeros_like(group)), None, prefill_attention)

    def decode(params, token, position, index, valid, cache):
        x, cache = apply(params, token[:, None], position[:, None], (index, valid), cache, decode_attention)
        return x[:, 0], cache

    def head(params):
        return params["embed"] if config.tie_embeddings else params["unembed"]

    def unembed(head, hidden):
        equation = "...D,VD->...V" if config.tie_embeddings else "...D,DV->...V"
        # float32 out: a log-sum-exp over the vocabulary loses too much in bf16
        return jnp.einsum(equation, hidden, head.astype(dtype), preferred_element_type=jnp.float32)

    return Model(
        init=init,
        hidden_states=hidden_states,
        head=head,
        unembed=unembed,
        prefill=prefill,
        decode=decode,
        axes=logical_axes(config),
        vocab_size=config.vocab_size,
    )
