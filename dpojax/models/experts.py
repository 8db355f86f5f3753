"""A mixture of experts: tokens -> their experts' mlps, none dropped.

Mixtral, arXiv:2401.04088, section 2.1.

Every token gets what computing all experts would give it, for the work of k experts, where the
device has a ragged matrix product.

Legend: T tokens, D model, F mlp, X experts, k experts per token.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Routing(NamedTuple):
    """What the router decided, summed over tokens: what the load-balancing loss is made of."""

    probabilities: Float[Array, "*N X"]
    counts: Float[Array, "*N X"]  # how often each expert was taken


def route(logits: Float[Array, "T X"], *, per_token: int, renormalise: bool):
    """(probabilities [T, X], weights [T, k], experts [T, k]) of the k likeliest, in float32."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, ids = jax.lax.top_k(probabilities, per_token)
    if renormalise:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities, weights, ids


def routing_sums(probabilities: Float[Array, "T X"], ids: Int[Array, "T k"], real) -> Routing:
    """The sums over the tokens that are `real` [T]."""
    real = real.astype(jnp.float32)
    taken = jax.nn.one_hot(ids, probabilities.shape[1]).sum(axis=1)
    return Routing(real @ probabilities, jax.lax.stop_gradient(real @ taken))


def load_balancing_loss(routing: Routing, count) -> Float[Array, ""]:
    """X sum_e f_e P_e, Eq. 4-6 of Fedus et al. 2021 (arXiv:2101.03961).

    Taken over all layers together, as transformers does.

    Args:
      routing: sums over tokens and layers. [X]
      count: how many tokens they are sums over, times layers.
    """
    return routing.counts.shape[-1] * jnp.sum(
        routing.counts / count * routing.probabilities / count
    )


class Maps(NamedTuple):
    """The gated mlps of the experts that a device holds."""

    gate: Float[Array, "X D F"]
    up: Float[Array, "X D F"]
    down: Float[Array, "X F D"]


def mix(
    x: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    ids: Int[Array, "T k"],
    maps: Maps,
    *,
    activation: Callable[[Array], Array],
    axis: str | None = None,
) -> Float[Array, "T D"]:
    """sum_k weight_k expert_k(x) of every token.

    Tokens are sorted by expert, multiplied in groups, and put back.

    Args:
      weights, ids: of each token's experts.
      maps: the experts.
      axis: the mesh axis over which the experts are spread (inside shard_map); each device computes
        those it holds.
    """
    count, per_token = ids.shape
    num_held = maps.gate.shape[0]
    first = 0
    if axis is not None:
        # Said outright: the gradient of a gather whose indices alone vary over the axis lacks the
        # sum over it (jax 0.10).
        x = jax.lax.pcast(x, axis, to="varying")
        weights = jax.lax.pcast(weights, axis, to="varying")
        first = jax.lax.axis_index(axis) * num_held
    local = ids.reshape(-1) - first
    held = (local >= 0) & (local < num_held)
    # what other devices hold is sorted behind, where no group reaches
    local = jnp.where(held, local, num_held)
    order = jnp.argsort(local, stable=True)
    token = order // per_token
    sizes = jnp.bincount(local, length=num_held + 1)[:num_held].astype(jnp.int32)

    def dot(a, w):
        return jax.lax.ragged_dot(a, w, sizes)

    # A ragged product leaves rows past its groups, and their gradients, undefined: both are cut
    # off.
    in_group = held[order][:, None]
    rows = jnp.where(in_group, x[token], 0)
    hidden = activation(dot(rows, maps.gate)) * dot(rows, maps.up)
    out = jnp.where(in_group, dot(hidden, maps.down), 0)
    out = out * weights.reshape(-1)[order].astype(out.dtype)[:, None]
    out = jnp.zeros((count, x.shape[1]), out.dtype).at[token].add(out)
    if axis is None:
        return out
    return jax.lax.psum(out, axis)
