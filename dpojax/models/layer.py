"""One decoder layer: hidden states -> hidden states, as pure functions of its parameters.

Legend: R rows, L row length, D model, F mlp, H query heads, K kv heads, E head dim, Z rank of an
adapter, T = R L tokens.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dpojax.models import experts
from dpojax.models.attention.blocks import NO_WINDOW
from dpojax.models.config import ModelConfig
from dpojax.models.experts import Routing, route, routing_sums
from dpojax.models.lora import LORA_A, LORA_B, Adapter
from dpojax.models.params import ParamRow, layer_rows
from dpojax.models.rope import rotate

Params = dict[str, Any]

ACTIVATION = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


class Context(NamedTuple):
    """What a layer needs besides the hidden states; the same for every layer."""

    angles: tuple[Array, Array]  # cosine and sine, [R, L, Z] each
    local_angles: tuple[Array, Array] | None  # of windowed layers, where theirs are others
    # training: what the attention's kernel prepared of attention.Rows; decoding: what `decode`
    # knows of the cache
    where: Any
    real: Bool[Array, "R L"]  # tokens that are not padding


def unconstrained(x: Array) -> Array:
    """The array as it is: what one device asks of its activations."""
    return x


class OnMesh(NamedTuple):
    """What a mesh asks of the decoder; the defaults are those of one device."""

    constrain: Callable[[Array], Array] = unconstrained  # keeps activations [R, L, D] spread
    constrain_final: Callable[[Array], Array] = unconstrained  # the final hidden states [R, L, D]
    constrain_logits: Callable[[Array], Array] = unconstrained  # logits [..., V]
    mix: Callable[..., Array] = experts.mix  # or the same with experts spread over the mesh
    # Projections run on T = R L flat tokens: one large matrix product each, which CPUs need to be
    # fast. False where rows and their tokens are both split over the mesh.
    flat: bool = True


class Parts(NamedTuple):
    """What the decoder is given besides its parameters."""

    attention: Callable  # (q, k, v, where, cache, window, softcap=) -> (out, cache)
    adapter: Adapter | None
    on_mesh: OnMesh


def normalise(x: Float[Array, "*b D"], scale, bias, *, kind: str, eps: float, offset: bool = False):
    """RMSNorm or LayerNorm over the dimensions that `scale` has, in float32, back in x's dtype."""
    axes = tuple(range(-scale.ndim, 0))
    y = x.astype(jnp.float32)
    if kind == "layer":
        y = y - y.mean(axis=axes, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + eps)
    if offset:  # in float32, as Gemma was trained
        return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    # The scale is applied in x's dtype, as Llama checkpoints were trained.
    y = y.astype(x.dtype) * scale
    if bias is None:
        return y
    return y + bias


def linear(w: Params, row: ParamRow, x: Array, adapter: Adapter | None = None, key=None) -> Array:
    """The linear map of a row with its bias, and its adapter where the parameters hold one.

    x W + b + s (x A) B: LoRA, Eq. 3 of Hu et al. 2021 (arXiv:2106.09685).

    Args:
      w: the layer's parameters by name.
      x: its inputs. [..., the row's input dimensions].
      adapter: how the adapter counts; None: there is none.
      key: of the adapter's dropout; None: without.
    """
    name = row.name
    # Not by einsum, which would transpose the matrix to sum over its last input first.
    y = jnp.tensordot(x, w[name], axes=row.in_dims)
    if f"{name}_bias" in w:
        y = y + w[f"{name}_bias"]
    if adapter is None or f"{name}{LORA_A}" not in w:
        return y
    if key is not None:  # inverted dropout of the adapter's input alone
        keep = jax.random.bernoulli(
            jax.random.fold_in(key, zlib.crc32(name.encode())), 1 - adapter.dropout, x.shape
        )
        x = jnp.where(keep, x / (1 - adapter.dropout), 0).astype(x.dtype)
    low = jnp.einsum(row.down_equation, x, w[f"{name}{LORA_A}"])
    return y + adapter.scale * jnp.einsum(row.up_equation, low, w[f"{name}{LORA_B}"])


class Block(NamedTuple):
    """A layer's parameters with what applies them."""

    weights: Params  # in the dtype of the computation
    config: ModelConfig
    parts: Parts
    key: Any  # of the adapters' dropout, or None

    def __call__(
        self, x: Float[Array, "R L D"], context: Context, window, cache
    ) -> tuple[Array, Any, Routing | None]:
        """(new hidden states, what attention keeps of (k, v), what the router decided).

        Args:
          window: of this layer's attention; None where no layer has one.
          cache: of keys and values, while decoding.
        """
        config = self.config
        rows = x.shape[:2]
        if self.parts.on_mesh.flat:
            x = x.reshape(-1, config.hidden_size)
        norm_before = config.norm_placement != "post"
        norm_after = config.norm_placement != "pre"
        normed = x
        if norm_before:
            normed = self.norm(x, "attention_norm")
        y, cache = self.attention(normed, context, window, cache)
        if config.residual != "sequential":
            if config.residual != "parallel_shared":
                normed = self.norm(x, "mlp_norm")
            z, routing = self.mlp(normed, context)
            return (x + y + z).reshape(*rows, -1), cache, routing
        if norm_after:
            y = self.norm(y, "attention_post_norm")
        x = x + y
        normed = x
        if norm_before:
            normed = self.norm(x, "mlp_norm")
        y, routing = self.mlp(normed, context)
        if norm_after:
            y = self.norm(y, "mlp_post_norm")
        return (x + y).reshape(*rows, -1), cache, routing

    def norm(self, x: Array, name: str) -> Array:
        """The norm of this name."""
        kind = self.config.norm
        if name in ("q_norm", "k_norm"):
            kind = "rms"
        return normalise(
            x,
            self.weights[name],
            self.weights.get(f"{name}_bias"),
            kind=kind,
            eps=self.config.norm_eps,
            offset=self.config.norm_offset,
        )

    def project(self, x: Array, name: str) -> Array:
        """The linear map of this name."""
        row = next(row for row in layer_rows(self.config) if row.name == name)
        return linear(self.weights, row, x, self.parts.adapter, self.key)

    def attention(self, y: Array, context: Context, window, cache) -> tuple[Array, Any]:
        """Attention of normalised tokens, [..., D] -> [..., D]; and what it keeps of (k, v)."""
        config = self.config
        tokens = y.shape[:-1]
        q, k, v = (self.project(y, name) for name in ("q", "k", "v"))
        if config.qk_norm != "none":
            q = self.norm(q, "q_norm")
            k = self.norm(k, "k_norm")
        rows = context.real.shape
        q, k, v = (z.reshape(*rows, *z.shape[-2:]) for z in (q, k, v))
        if config.positions == "rotary":
            cos, sin = context.angles
            if context.local_angles is not None:
                local_cos, local_sin = context.local_angles
                cos = jnp.where(window < NO_WINDOW, local_cos, cos)
                sin = jnp.where(window < NO_WINDOW, local_sin, sin)
            q, k = (rotate(z, cos, sin, interleaved=config.rope_interleaved) for z in (q, k))
        y, cache = self.parts.attention(
            q * config.scale, k, v, context.where, cache, window, softcap=config.attention_softcap
        )
        return self.project(y.reshape(*tokens, *y.shape[-2:]), "o"), cache

    def mlp(self, y: Array, context: Context) -> tuple[Array, Routing | None]:
        """The mlp of normalised tokens [..., D], or the experts of [T, D].

        Second, what the router decided; None without experts.
        """
        config = self.config
        activation = ACTIVATION[config.activation]
        if config.num_experts:
            w = self.weights
            probabilities, weights, ids = route(
                jnp.einsum("TD,DX->TX", y, w["router"]),
                per_token=config.experts_per_token,
                renormalise=config.renormalise_experts,
            )
            maps = experts.Maps(gate=w["gate"], up=w["up"], down=w["down"])
            out = self.parts.on_mesh.mix(y, weights, ids, maps, activation=activation)
            return out.astype(y.dtype), routing_sums(probabilities, ids, context.real.reshape(-1))
        if config.mlp == "gated":
            hidden = activation(self.project(y, "gate")) * self.project(y, "up")
        else:
            hidden = activation(self.project(y, "up"))
        return self.project(hidden, "down"), None
