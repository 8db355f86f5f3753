"""Token ids -> hidden states: one decoder, in Flax Linen, behind the `Model` seam.

Legend: R rows, L row length, V vocabulary, D model, F mlp, H query heads, K kv heads, E head dim,
N layers, S cached tokens, T = R L tokens. Layers are stored stacked on a leading axis and scanned.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from dpojax.models import experts
from dpojax.models.attention import NO_WINDOW, SAVED, Kernel, Rows, attend, matmul_precision
from dpojax.models.config import ModelConfig
from dpojax.models.experts import Routing, route, routing_sums
from dpojax.models.lora import LORA_A, LORA_B, Adapter
from dpojax.models.quantise import in_compute
from dpojax.models.rope import rope_angles, rotate
from dpojax.models.table import layer_rows, logical_axes, model_rows

Params = dict[str, Any]

_SAVE = jax.checkpoint_policies
LAYER_INPUT = "layer_input"


def _offload(names: list[str]):
    """Keeps what goes by these names, in the host's memory until the backward pass."""
    return _SAVE.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=names, offload_src="device", offload_dst="pinned_host"
    )


_named = _SAVE.save_only_these_names(SAVED)
_dots_in_host = _SAVE.offload_dot_with_no_batch_dims("device", "pinned_host")


def _attention(prim, *args, **params):
    """What attention's backward pass needs of its forward pass: by name, or from cuDNN, whose results jax gives no name."""
    return prim.name.startswith("dot_product_attention_fwd") or _named(prim, *args, **params)


def _attention_and_offloaded_dots(prim, *args, **params):
    return _attention(prim, *args, **params) or _dots_in_host(prim, *args, **params)


REMAT = {
    "none": None,
    "full": _SAVE.nothing_saveable,
    "full_offload": _offload([LAYER_INPUT]),
    # attention alone is kept besides a layer's input: the projections are computed again, the scores are not
    "attention": _attention,
    # matrix products of the projections, and attention: what is left is cheap to compute again
    "dots": _SAVE.save_from_both_policies(_SAVE.dots_with_no_batch_dims_saveable, _attention),
    "dots_offload": _attention_and_offloaded_dots,  # attention stays on the device
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
    # (params, tokens, positions, group, branch[, key]), [R, L] each -> final hidden states [R, L, D]; key: of adapters' dropout
    hidden_states: Callable[..., Array]
    # the same -> (hidden states, experts.Routing summed over tokens and layers); None where there are no experts
    routed: Callable[..., tuple[Array, Routing]] | None
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
    frozen_head: bool = False  # adapters alone are trained
    spread: Any = None  # logps.Spread: how the head lies on a mesh; None: on one device


class Context(NamedTuple):
    """What a layer needs besides the hidden states; the same for every layer."""

    angles: tuple[Array, Array]  # cosine and sine, [R, L, Z] each
    local_angles: tuple[Array, Array] | None  # of windowed layers, where theirs are others
    where: Any  # training: what the attention's kernel prepared of attention.Rows; decoding: what `decode` knows of the cache
    real: Bool[Array, "R L"]  # tokens that are not padding


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
    return y if bias is None else y + bias


def _map(w: Params, equation: str, x, name: str, adapter: Adapter | None, key):
    """A linear map with its bias, and its adapter where there is one: x W + s (x A) B (LoRA, arXiv:2106.09685, Eq. 3)."""
    y = jnp.einsum(equation, x, w[name])
    if f"{name}_bias" in w:
        y = y + w[f"{name}_bias"]
    if adapter is None or f"{name}{LORA_A}" not in w:
        return y
    inputs, out = equation.split("->")
    inputs, matrix = inputs.split(",")
    into = "".join(c for c in matrix if c in inputs)
    if key is not None:  # inverted dropout of the adapter's input alone
        keep = jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(name.encode())), 1 - adapter.dropout, x.shape)
        x = jnp.where(keep, x / (1 - adapter.dropout), 0).astype(x.dtype)
    rest = "".join(c for c in inputs if c not in into)
    low = jnp.einsum(f"{inputs},{into}Z->{rest}Z", x, w[f"{name}{LORA_A}"])
    return y + adapter.scale * jnp.einsum(f"{rest}Z,Z{matrix.replace(into, '', 1)}->{out}", low, w[f"{name}{LORA_B}"])


def _attend(w: Params, y, context: Context, window, cache, *, config: ModelConfig, attention, project, norm):
    """Attention of normalised tokens: [..., D] -> [..., D], and what `attention` keeps of (k, v)."""
    tokens = y.shape[:-1]
    q, k, v = (project(f"...D,D{h}E->...{h}E", y, n) for h, n in (("H", "q"), ("K", "k"), ("K", "v")))
    if config.qk_norm != "none":
        q, k = norm(q, "q_norm"), norm(k, "k_norm")
    rows = context.real.shape
    q, k, v = (y.reshape(*rows, *y.shape[-2:]) for y in (q, k, v))
    if config.positions == "rotary":
        cos, sin = context.angles
        if context.local_angles is not None:
            cos, sin = (jnp.where(window < NO_WINDOW, a, b) for a, b in zip(context.local_angles, (cos, sin), strict=True))
        q, k = (rotate(y, cos, sin, interleaved=config.rope_interleaved) for y in (q, k))
    y, cache = attention(q * config.scale, k, v, context.where, cache, window, softcap=config.attention_softcap)
    return project("...HE,HED->...D", y.reshape(*tokens, *y.shape[-2:]), "o"), cache


def _mlp(w: Params, y, context: Context, *, config: ModelConfig, project, mix) -> tuple[Array, Routing | None]:
    """The mlp of normalised tokens [..., D], or the experts of [T, D]; with what the router decided."""
    activation = ACTIVATION[config.activation]
    if config.num_experts:
        probabilities, weights, ids = route(
            jnp.einsum("TD,DX->TX", y, w["router"]), per_token=config.experts_per_token, renormalise=config.renormalise_experts
        )
        out = mix(y, weights, ids, w["gate"], w["up"], w["down"], activation=activation)
        return out.astype(y.dtype), routing_sums(probabilities, ids, context.real.reshape(-1))
    hidden = activation(project("...D,DF->...F", y, "gate" if config.mlp == "gated" else "up"))
    if config.mlp == "gated":
        hidden = hidden * project("...D,DF->...F", y, "up")
    return project("...F,FD->...D", hidden, "down"), None


def block(w: Params, x: Float[Array, "R L D"], context: Context, window, cache, key, *, config: ModelConfig, parts: "Parts"):
    """One decoder layer. Returns the new hidden states, what attention keeps of (k, v), and what the router decided.

    Args:
      window: of this layer's attention; None where no layer has one.
      key: of the adapters' dropout, or None.
    """

    def norm(x, name):
        kind = "rms" if name in ("q_norm", "k_norm") else config.norm
        return normalise(x, w[name], w.get(f"{name}_bias"), kind=kind, eps=config.norm_eps, offset=config.norm_offset)

    project = lambda equation, x, name: _map(w, equation, x, name, parts.adapter, key)
    attend = functools.partial(_attend, w, config=config, attention=parts.attention, project=project, norm=norm)
    mlp = functools.partial(_mlp, w, context=context, config=config, project=project, mix=parts.mix)
    rows = x.shape[:2]
    if parts.flat:
        # Projections run on T = R L flat tokens: one large matrix product each, which CPUs need to be fast.
        x = x.reshape(-1, config.hidden_size)
    before, after = config.norm_placement != "post", config.norm_placement != "pre"
    normed = norm(x, "attention_norm") if before else x
    y, cache = attend(normed, context, window, cache)
    if config.residual != "sequential":
        z, routing = mlp(normed if config.residual == "parallel_shared" else norm(x, "mlp_norm"))
        return (x + y + z).reshape(*rows, -1), cache, routing
    x = x + (norm(y, "attention_post_norm") if after else y)
    y, routing = mlp(norm(x, "mlp_norm") if before else x)
    x = x + (norm(y, "mlp_post_norm") if after else y)
    return x.reshape(*rows, -1), cache, routing


class Parts(NamedTuple):
    """What the decoder is given: how it attends, spreads and adapts."""

    attention: Callable  # (q, k, v, where, cache, window, softcap=) -> (out, cache)
    mix: Callable  # of experts
    constrain: Callable
    adapter: Adapter | None
    flat: bool = True  # False: rows and their tokens are dimensions of their own, where both are split over a mesh


class _Rows(nn.Module):
    """Base of the modules below: makes parameters from rows of the table."""

    config: ModelConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def rows(self, rows) -> Params:
        """The parameters in the dtype of the computation; adapters are there where the tree holds them."""
        if self.is_initializing():
            std = self.config.init_std
            init = {
                "normal": nn.initializers.normal(std),
                "residual": nn.initializers.normal(std / (2 * self.config.num_layers) ** 0.5),
                "ones": nn.initializers.ones,
                "zeros": nn.initializers.zeros,
            }
            return {r.name: self.param(r.name, init[r.init], r.shape, self.param_dtype).astype(self.dtype) for r in rows}
        names = [r.name for r in rows]
        names += [
            f"{r.name}{end}" for r in rows if self.has_variable("params", f"{r.name}{LORA_A}") for end in (LORA_A, LORA_B)
        ]
        return {name: in_compute(self.get_variable("params", name), self.dtype) for name in names}


class _Layer(_Rows):
    parts: Parts

    @nn.compact
    def __call__(self, x, context, key, window, cache):
        w = self.rows(layer_rows(self.config))
        x = checkpoint_name(x, LAYER_INPUT)
        key = None if key is None else self.make_rng("dropout")
        x, cache, routing = block(w, x, context, window, cache, key, config=self.config, parts=self.parts)
        return self.parts.constrain(x), (cache, routing)


class _Decoder(_Rows):
    parts: Parts
    remat: str

    @nn.compact
    def __call__(self, tokens, positions, where, real, cache, key):
        config = self.config
        w = self.rows(model_rows(config))
        angles = functools.partial(rope_angles, positions, pairs=config.turned // 2)
        own = angles(theta=config.rope_theta, scaling=config.rope_scaling)
        local = None if config.local_rope_theta is None else angles(theta=config.local_rope_theta, scaling=None)
        windows = jnp.asarray([w or NO_WINDOW for w in config.windows]) if any(config.windows) else None
        layer: Any = _Layer
        if self.remat != "none":
            layer = nn.remat(_Layer, policy=REMAT[self.remat], prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, nn.broadcast, 0, 0),
            out_axes=0,
            length=config.num_layers,
        )
        # A padding id may lie past the table; "fill" would make it NaN, which masks of 0 do not stop.
        x = jnp.take(w["embed"], tokens, axis=0, mode="clip")
        if config.embed_scale != 1:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        if config.positions == "learned":
            x = x + jnp.take(w["positions"], positions, axis=0, mode="clip")  # padding may stand past the table
        x = self.parts.constrain(x)
        layers = layers(config=config, dtype=self.dtype, param_dtype=self.param_dtype, parts=self.parts, name="layers")
        x, (cache, routing) = layers(x, Context(own, local, where, real), key, windows, cache)
        x = normalise(
            x, w["final_norm"], w.get("final_norm_bias"), kind=config.norm, eps=config.norm_eps, offset=config.norm_offset
        )
        return x, cache, jax.tree.map(lambda x: x.sum(axis=0), routing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logits_product(equation: str, hidden: Array, matrix: Array) -> Float[Array, "*T V"]:
    """einsum(equation, hidden, matrix), float32 out of operands in the dtype of the computation.

    The backward pass has its products in that dtype too, with float32 sums: JAX would take float32 operands, since the
    cotangent is one.
    """
    return jnp.einsum(equation, hidden, matrix, preferred_element_type=jnp.float32)


def _logits_product_fwd(equation, hidden, matrix):
    return logits_product(equation, hidden, matrix), (hidden, matrix)


def _logits_product_bwd(equation, kept, cotangent):
    hidden, matrix = kept
    inputs, out = equation.split("->")
    of_hidden, of_matrix = inputs.split(",")
    cotangent = cotangent.astype(matrix.dtype)
    product = functools.partial(jnp.einsum, precision=matmul_precision(matrix.dtype), preferred_element_type=jnp.float32)
    d_hidden = product(f"{out},{of_matrix}->{of_hidden}", cotangent, matrix)
    flat = {of_hidden[-1]: hidden.reshape(-1, hidden.shape[-1]), out[-1]: cotangent.reshape(-1, cotangent.shape[-1])}
    first, second = of_matrix  # in the order of the result, which then needs no transpose
    d_matrix = product(f"T{first},T{second}->{of_matrix}", flat[first], flat[second])
    return d_hidden.astype(hidden.dtype), d_matrix.astype(matrix.dtype)


logits_product.defvjp(_logits_product_fwd, _logits_product_bwd)


def with_precision(precision: jax.lax.Precision | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with matrix products of this precision where they name none; None: the device's default."""
    if precision is None:
        return function

    @functools.wraps(function)
    def precise(*args, **options):
        with jax.default_matmul_precision(precision.name.lower()):
            return function(*args, **options)

    return precise


def head_params(config: ModelConfig) -> tuple[str, ...]:
    """The names of the parameters that make logits of hidden states."""
    return ("embed",) if config.tie_embeddings else ("unembed", "unembed_bias") if config.head_bias else ("unembed",)


def make_decoder(
    config: ModelConfig,
    *,
    attention: Kernel,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
    remat: str,
    constrain: Callable[[Array], Array],
    mix: Callable[..., Array] = experts.mix,
    adapter: Adapter | None = None,
    flat: bool = True,
    constrain_final: Callable[[Array], Array] = lambda x: x,
    constrain_logits: Callable[[Array], Array] = lambda x: x,
) -> Model:
    """Builds the decoder that `config` describes.

    Args:
      config: sizes and choices.
      attention: how the rule is computed; one from models/attention.py for any rows, or from models/kernels.py.
      dtype: of the computation; softmax, norms, rotations and log-probs are float32 throughout.
      param_dtype: of the stored (master) parameters.
      remat: what the backward pass finds: "none" (everything is kept), "dots" (matrix products and attention), "attention",
        "full" (a layer's input alone); "dots_offload" and "full_offload" keep it in the host's memory.
      constrain: applied to [R, L, D] activations, to keep their rows spread over the mesh.
      mix: `experts.mix`, or the same spread over a mesh.
      adapter: how adapters count that the parameters hold (models/lora.py); None: they hold none.
      flat: False where a row's tokens are split over the mesh.
      constrain_final: applied to the final hidden states [R, L, D].
      constrain_logits: applied to logits [..., V].
    """
    if remat not in REMAT:
        raise ValueError(f"model.remat is {remat!r}; it must be one of {', '.join(REMAT)}")

    def apply(params, tokens, positions, where, real, cache, attention, key=None):
        parts = Parts(attention, mix, constrain, adapter, flat)
        rngs = None if key is None else {"dropout": key}
        decoder = _Decoder(config, dtype, param_dtype, parts, remat)
        found: Any = decoder.apply({"params": params}, tokens, positions, where, real, cache, key, rngs=rngs)
        return found

    def train_attention(q, k, v, where, cache, window, *, softcap):
        return attention.attend(q, k, v, where, window, softcap=softcap), cache

    def prefill_attention(q, k, v, where, cache, window, *, softcap):
        return attention.attend(q, k, v, where, window, softcap=softcap), (k, v)

    def no_attention(q, k, v, where, cache, window, *, softcap):  # while parameters are made
        return q, cache

    def decode_attention(q, k, v, where, cache, window, *, softcap):
        index, valid, position = where
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=1)
        cache = (update(cache[0], k), update(cache[1], v))
        seen = valid
        if window is not None:  # the cache holds one sequence a row, so that counting gives its positions
            seen = valid & (position[:, None] - (jnp.cumsum(valid, axis=1) - 1) < window)
        return attend(q, *cache, seen[:, None, :], softcap=softcap), cache

    def init(key):
        one = jnp.zeros((1, 1), jnp.int32)
        decoder = _Decoder(config, dtype, param_dtype, Parts(no_attention, experts.mix, lambda x: x, None), "none")
        return decoder.init(key, one, one, None, one > 0, None, None)["params"]

    def routed(params, tokens, positions, group, branch, key=None):
        where = attention.prepare(Rows(group, branch, positions))
        x, _, routing = apply(params, tokens, positions, where, group > 0, None, train_attention, key)
        return constrain_final(x), routing

    def prefill(params, tokens, valid):
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        group = valid.astype(jnp.int32)
        where = attention.prepare(Rows(group, jnp.zeros_like(group), positions))
        return apply(params, tokens, positions, where, valid, None, prefill_attention)[:2]

    def decode(params, token, position, index, valid, cache):
        where = (index, valid, position)
        x, cache, _ = apply(
            params, token[:, None], position[:, None], where, jnp.ones_like(valid[:, :1]), cache, decode_attention
        )
        return x[:, 0], cache

    head_names = head_params(config)

    def head(params):
        return {name: params[name] for name in head_names}

    def unembed(head, hidden):
        equation = "...D,VD->...V" if config.tie_embeddings else "...D,DV->...V"
        matrix = in_compute(head[head_names[0]], dtype)
        # float32 out: a log-sum-exp over the vocabulary loses too much in bf16
        logits = constrain_logits(logits_product(equation, hidden, matrix))
        if config.head_bias:
            logits = logits + head["unembed_bias"].astype(jnp.float32)
        cap = config.logits_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    exact = functools.partial(with_precision, matmul_precision(dtype))
    return Model(
        init=init,
        hidden_states=exact(lambda *rows, **key: routed(*rows, **key)[0]),
        routed=exact(routed) if config.num_experts else None,
        head=head,
        unembed=exact(unembed),
        prefill=exact(prefill),
        decode=exact(decode),
        axes=logical_axes(config),
        vocab_size=config.vocab_size,
        frozen_head=adapter is not None,
    )
