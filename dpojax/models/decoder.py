"""Token ids -> hidden states: one decoder, in Flax Linen, behind the `Model` seam.

Legend: R rows, L row length, V vocabulary, D model, S cached tokens, Z turned pairs of a head.
Layers are stored stacked on a leading axis and scanned.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, PRNGKeyArray

from dpojax.models import decoding
from dpojax.models.attention.blocks import NO_WINDOW, Kernel, Rows, matmul_precision
from dpojax.models.config import ModelConfig
from dpojax.models.decoding import embed_tokens, final_norm, make_context
from dpojax.models.experts import Routing
from dpojax.models.layer import Block, OnMesh, Params, Parts
from dpojax.models.logits import head_params, make_unembed
from dpojax.models.lora import LORA_A, LORA_B, Adapter
from dpojax.models.params import layer_rows, logical_axes, model_rows
from dpojax.models.quantise import in_compute
from dpojax.models.remat import LAYER_INPUT, REMAT
from dpojax.runtime.sharding import HeadSharding

ONE_DEVICE = OnMesh()


class Model(NamedTuple):
    """A language model as pure functions of its parameters.

    Everything outside models/ sees only this.
    """

    init: Callable[[PRNGKeyArray], Params]
    # (params, tokens, positions, group, branch[, key]), [R, L] each -> final hidden states [R, L,
    # D]; key: of adapters' dropout
    hidden_states: Callable[..., Array]
    # the same -> (hidden states, experts.Routing summed over tokens and layers); None where there
    # are no experts
    routed: Callable[..., tuple[Array, Routing]] | None
    # params -> the subtree that `unembed` needs, so that its gradient can be accumulated alone
    head: Callable[[Params], Any]
    # (head, hidden [..., D]) -> float32 logits [..., V]; ValueError for a scalar head, whose
    # logits.read_scalar takes the same
    unembed: Callable[[Any, Array], Array]
    # (params, tokens, positions, group), [R, L] each -> (hidden [R, L, D], (keys, values)), which
    # are stacked, [N layers, R, L, K, E]
    prefill: Callable[..., tuple[Array, Any]]
    # params -> the parameters as `decode` takes them (models/decoding.py)
    serve: Callable[[Params], Params]
    # (served, token [B], Seen, Cache) -> (hidden [B, D], Cache), of attention/cached.py
    decode: Callable[..., tuple[Array, Any]]
    axes: Params  # logical axes of every parameter, shaped like the parameters
    vocab_size: int
    frozen_head: bool = False  # adapters alone are trained
    head_sharding: HeadSharding | None = None  # how the head lies on a mesh; None: on one device


class _Rows(nn.Module):
    """Base of the modules below: makes parameters from rows of the table."""

    config: ModelConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def rows(self, rows) -> Params:
        """The parameters by name in the dtype of the computation, with the adapters of the tree."""
        if self.is_initializing():
            std = self.config.init_std
            init = {
                "normal": nn.initializers.normal(std),
                "residual": nn.initializers.normal(std / (2 * self.config.num_layers) ** 0.5),
                "ones": nn.initializers.ones,
                "zeros": nn.initializers.zeros,
                "scalar": nn.initializers.normal((self.config.hidden_size + 1) ** -0.5),
            }
            params = {}
            for row in rows:
                value = self.param(row.name, init[row.init], row.shape, self.param_dtype)
                params[row.name] = value.astype(self.dtype)
            return params
        names = [row.name for row in rows]
        for row in rows:
            if self.has_variable("params", f"{row.name}{LORA_A}"):
                names += [f"{row.name}{LORA_A}", f"{row.name}{LORA_B}"]
        return {name: in_compute(self.get_variable("params", name), self.dtype) for name in names}


class _Layer(_Rows):
    parts: Parts

    @nn.compact
    def __call__(self, x, context, key, window, cache):
        w = self.rows(layer_rows(self.config))
        x = checkpoint_name(x, LAYER_INPUT)
        if key is not None:
            key = self.make_rng("dropout")
        block = Block(w, self.config, self.parts, key)
        x, cache, routing = block(x, context, window, cache)
        return self.parts.on_mesh.constrain(x), (cache, routing)


class _Decoder(_Rows):
    parts: Parts
    remat: str

    @nn.compact
    def __call__(self, tokens, positions, where, real, cache, key):
        config = self.config
        w = self.rows(model_rows(config))
        context = make_context(config, positions, where, real)
        windows = None
        if any(config.windows):
            windows = jnp.asarray([w or NO_WINDOW for w in config.windows])
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
        x = embed_tokens(w, config, tokens, positions)
        x = self.parts.on_mesh.constrain(x)
        layers = layers(
            config=config,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            parts=self.parts,
            name="layers",
        )
        x, (cache, routing) = layers(x, context, key, windows, cache)
        x = final_norm(w, config, x)
        return x, cache, jax.tree.map(lambda x: x.sum(axis=0), routing)


# --- attention at each of the decoder's uses: (q, k, v, where, cache, window) -> (out, cache) -----


def _train_attention(kernel: Kernel):
    def attention(q, k, v, where, cache, window, *, softcap):
        return kernel.attend(q, k, v, where, window, softcap=softcap), cache

    return attention


def _prefill_attention(kernel: Kernel):
    """As `_train_attention`; the keys and values are the new cache."""

    def attention(q, k, v, where, cache, window, *, softcap):
        return kernel.attend(q, k, v, where, window, softcap=softcap), (k, v)

    return attention


def _no_attention(q, k, v, where, cache, window, *, softcap):
    """While parameters are made, no rows exist."""
    return q, cache


def with_precision(
    precision: jax.lax.Precision | None, function: Callable[..., Any]
) -> Callable[..., Any]:
    """`function` with matrix products of this precision.

    Products that name a precision keep it. None: the device's default.
    """
    if precision is None:
        return function

    @functools.wraps(function)
    def precise(*args, **options):
        with jax.default_matmul_precision(precision.name.lower()):
            return function(*args, **options)

    return precise


def _make_init(config: ModelConfig, dtype: jnp.dtype, param_dtype: jnp.dtype):
    """The function key -> random parameters."""

    def init(key):
        token = jnp.zeros((1, 1), jnp.int32)
        parts = Parts(_no_attention, None, ONE_DEVICE)
        decoder = _Decoder(config, dtype, param_dtype, parts, "none")
        return decoder.init(key, token, token, None, token > 0, None, None)["params"]

    return init


def make_decoder(
    config: ModelConfig,
    *,
    attention: Kernel,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
    remat: str,
    adapter: Adapter | None = None,
    on_mesh: OnMesh = ONE_DEVICE,
) -> Model:
    """Builds the decoder that `config` describes.

    Args:
      config: sizes and choices.
      attention: how the rule is computed; from attention/blocks.py for any rows, or from
        attention/kernels.py.
      dtype: of the computation; softmax, norms, rotations and log-probs are float32 throughout.
      param_dtype: of the stored (master) parameters.
      remat: what the backward pass finds kept, a key of remat.REMAT.
      adapter: how adapters count that the parameters hold (models/lora.py); None: they hold none.
      on_mesh: what a mesh asks of activations and experts.
    """
    if remat not in REMAT:
        raise ValueError(f"model.remat is {remat!r}; it must be one of {', '.join(REMAT)}")

    def apply(  # noqa: PLR0913  # of training, prefill and decoding
        params, tokens, positions, where, real, cache, attention, key=None
    ):
        rngs = None
        if key is not None:
            rngs = {"dropout": key}
        decoder = _Decoder(config, dtype, param_dtype, Parts(attention, adapter, on_mesh), remat)
        outputs: Any = decoder.apply(
            {"params": params}, tokens, positions, where, real, cache, key, rngs=rngs
        )
        return outputs

    def routed(params, tokens, positions, group, branch, key=None):
        where = attention.prepare(Rows(group, branch, positions))
        train = _train_attention(attention)
        x, _, routing = apply(params, tokens, positions, where, group > 0, None, train, key)
        return on_mesh.constrain_final(x), routing

    def hidden_states(params, tokens, positions, group, branch, key=None):
        return routed(params, tokens, positions, group, branch, key)[0]

    def prefill(params, tokens, positions, group):
        where = attention.prepare(Rows(group, jnp.zeros_like(group), positions))
        fill = _prefill_attention(attention)
        x, cache, _ = apply(params, tokens, positions, where, group > 0, None, fill)
        return on_mesh.constrain_final(x), cache

    def serve(params):
        return decoding.serve(params, config, adapter, dtype)

    decode = functools.partial(
        decoding.decode, config=config, adapter=adapter, on_mesh=on_mesh, dtype=dtype
    )

    def head(params):
        return {name: params[name] for name in head_params(config)}

    exact = functools.partial(with_precision, matmul_precision(dtype))
    routed_model = None
    if config.num_experts:
        routed_model = exact(routed)
    return Model(
        init=_make_init(config, dtype, param_dtype),
        hidden_states=exact(hidden_states),
        routed=routed_model,
        head=head,
        unembed=exact(make_unembed(config, dtype, on_mesh.constrain_logits)),
        prefill=exact(prefill),
        serve=exact(serve),
        decode=exact(decode),
        axes=logical_axes(config),
        vocab_size=config.vocab_size,
        frozen_head=adapter is not None,
    )
