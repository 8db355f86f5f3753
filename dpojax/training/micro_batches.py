"""A step's batch, micro-batch after micro-batch.

Sums and gradients are added up, so that memory holds one micro-batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpojax.data.packing import PackedBatch

# --- from a micro-batch to its pairs --------------------------------------------------------------


def micro_batch(batch: PackedBatch, i) -> PackedBatch:
    """Micro-batch i: fields [M, ...] lose their first axis; the plan's scalars stay."""

    def part(x):
        if x.ndim == 0:
            return x
        return jax.lax.dynamic_index_in_dim(x, i, 0, False)

    return jax.tree.map(part, batch)


def each_micro_batch(function: Callable[..., Any], batch: PackedBatch, *others: Any) -> Any:
    """function(micro-batch, ...) of every micro-batch at once.

    `others` and the results are [M, ...].
    """
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, batch)
    return jax.vmap(function, in_axes=(axes, *[0] * len(others)))(batch, *others)


def stacked(function: Callable[[PackedBatch, Any], Any], batch: PackedBatch) -> Any:
    """function(micro-batch, its number) of the micro-batches in use, one after another; [M, ...].

    Zeros stand for the micro-batches out of use.
    """

    def body(i, stack):
        return put_part(stack, function(micro_batch(batch, i), i), i)

    start = empty_stack(jax.eval_shape(function, micro_batch(batch, 0), 0), batch)
    return jax.lax.fori_loop(0, batch.num_micro, body, start)


# --- gradients of a whole step --------------------------------------------------------------------


def empty_stack(shapes: Any, batch: PackedBatch) -> Any:
    """Zeros for what every micro-batch returns, stacked."""
    return jax.tree.map(lambda x: jnp.zeros((batch.tokens.shape[0], *x.shape), x.dtype), shapes)


def put_part(stack: Any, part: Any, i) -> Any:
    return jax.tree.map(lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, i, 0), stack, part)


def accumulate(
    function: Callable[..., Any], params, batch: PackedBatch, count, constrain_params
) -> tuple[Any, Any, Any]:
    """(sum, its gradient / count in float32, what else was returned, stacked).

    Over the micro-batches in use.

    Args:
      function: (params, micro-batch, i) -> (its sum, anything).
      constrain_params: keeps a tree shaped like the parameters in the parameters' sharding.
    """
    return accumulate_gradient(
        jax.value_and_grad(function, has_aux=True), params, batch, count, constrain_params
    )


def accumulate_gradient(
    gradient: Callable[..., Any], params, batch: PackedBatch, count, constrain_params
) -> tuple[Any, Any, Any]:
    """As `accumulate`, of a function that returns its gradient.

    (params, micro-batch, i) -> ((its sum, anything), its gradient).
    """

    def body(i, carry):
        total, grads, stack = carry
        (part, details), g = gradient(params, micro_batch(batch, i), i)
        grads = constrain_params(
            jax.tree.map(lambda a, b: a + b.astype(jnp.float32) / count, grads, g)
        )
        return total + part, grads, put_part(stack, details, i)

    # The first carry has the results' structure without running them.
    (total, details), _ = jax.eval_shape(gradient, params, micro_batch(batch, 0), 0)
    zeros = constrain_params(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params))
    return jax.lax.fori_loop(
        0,
        batch.num_micro,
        body,
        (jnp.zeros(total.shape, jnp.float32), zeros, empty_stack(details, batch)),
    )
