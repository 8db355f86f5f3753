"""What a step changes: parameters and optimizer states by role, and what is remembered."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

POLICY = "policy"  # the role whose parameters an algorithm trains towards


class TrainState(NamedTuple):
    """What training changes.

    Frozen trees (a fixed reference, the base of adapters) are arguments of the step and no part of
    it: an optimizer cannot move them, and a checkpoint does not hold them.
    """

    params: dict[str, Any]  # by role: the policy; a critic beside it is one more entry
    opt_state: dict[str, Any]  # by role, of the roles that are trained
    step: Int[Array, ""]  # batches taken, skipped ones included: the position in the data
    skipped: Int[Array, ""]  # steps that changed nothing else
    loss_average: Float[Array, ""]  # exponential average of |loss| over the steps that counted
    # What an algorithm carries from step to step, by name: a running mean, a moving reference.
    memory: dict[str, Any]

    @property
    def policy(self) -> Any:
        """The policy's trained parameters."""
        return self.params[POLICY]


def new_state(
    optimizers: Mapping[str, optax.GradientTransformation],
    params: Mapping[str, Any],
    memory: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state at step 0.

    Args:
      optimizers: by role; the other roles are carried and not trained.
      params: by role.
      memory: what the algorithm remembers; None: nothing.
    """
    zero = functools.partial(jnp.zeros, ())  # each field gets a buffer: the state is donated
    return TrainState(
        params=dict(params),
        opt_state={role: optimizers[role].init(params[role]) for role in optimizers},
        step=zero(jnp.int32),
        skipped=zero(jnp.int32),
        loss_average=zero(jnp.float32),
        memory=dict(memory or {}),
    )
