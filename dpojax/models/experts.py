"""A mixture of experts: tokens -> their experts' mlps, without dropping any (Mixtral, arXiv:2401.04088, section 2.1).

Legend: T tokens, D model, F mlp, X experts, k experts per token. The result is that of computing every expert for every
token; the work is that of k experts per token, where the device has a ragged matrix product.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Routing(NamedTuple):
    """What the router decided, summed over tokens: what the load-balancing loss is made of."""

    probabilities: Float[Array, "*N X"]
    counts: Float[Array, "*N X"]  # how often each expert was chosen


def route(logits: Float[Array, "T X"], *, per_token: int, renormalise: bool):
    """(probabilities [T, X], chosen weights [T, k], chosen experts [T, k]), in float32."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, ids = jax.lax.top_k(probabilities, per_token)
    return probabilities, weights / weights.sum(axis=-1, keepdims=True) if renormalise else weights, ids


def routing_sums(probabilities: Float[Array, "T X"], ids: Int[Array, "T k"], real) -> Routing:
    """The sums over the tokens that are `real` [T]."""
    real = real.astype(jnp.float32)
    chosen = jax.nn.one_hot(ids, probabilities.shape[1]).sum(axis=1)
    return Routing(real @ probabilities, jax.lax.stop_gradient(real @ chosen))


def load_balancing_loss(routing: Routing, count) -> Float[Array, ""]:
    """X sum_e f_e P_e, Eq. 4-6 of Fedus et al. 2021 (arXiv:2101.03961), over all layers together as transformers takes it.

    Args:
      routing: sums over tokens and layers. [X]
      count: how many tokens they are sums over, times layers.
    """
    return routing.counts.shape[-1] * jnp.sum(routing.counts / count * routing.probabilities / count)


def mix(
    x: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    ids: Int[Array, "T k"],
    gate: Float[Array, "X D F"],
    up: Float[Array, "X D F"],
    down: Float[Array, "X F D"],
    *,
    activation: Callable[[Array], Array],
    axis: str | None = None,
) -> Float[Array, "T D"]:
    """sum_k weight_k expert_k(x) of every token: tokens are sorted by expert, multiplied in groups, and put back.

    Args:
      axis: the mesh axis over which the experts are spread (inside shard_map); each device computes those it holds.
    """
    count, per_token = ids.shape
    if axis is not None:
        # Said outright: the gradient of a gather whose indices alone vary over the axis lacks the sum over it (jax 0.10).
        x, weights = (jax.lax.pcast(a, axis, to="varying") for a in (x, weights))
    own = gate.shape[0]
    first = 0 if axis is None else jax.lax.axis_index(axis) * own
    local = ids.reshape(-1) - first
    held = (local >= 0) & (local < own)
    local = jnp.where(held, local, own)  # what others hold is sorted behind, where no group reaches
    order = jnp.argsort(local, stable=True)
    token = order // per_token
    sizes = jnp.bincount(local, length=own + 1)[:own].astype(jnp.int32)
    dot = lambda a, w: jax.lax.ragged_dot(a, w, sizes)
    own_row = held[order][:, None]
    # What a ragged product gives for rows past its groups, and their gradients, is not defined: both are cut off.
    rows = jnp.where(own_row, x[token], 0)
    out = jnp.where(own_row, dot(activation(dot(rows, gate)) * dot(rows, up), down), 0)
    out = out * weights.reshape(-1)[order].astype(out.dtype)[:, None]
    out = jnp.zeros((count, x.shape[1]), out.dtype).at[token].add(out)
    return out if axis is None else jax.lax.psum(out, axis)
