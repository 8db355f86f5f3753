"""Gradients -> the next state: clipped, skipped where they are not finite, and counted."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from dpojax.data.packing import PackedBatch
from dpojax.training.gradients import Gradients
from dpojax.training.state import TrainState

SPIKE_AFTER_STEPS = 10  # an average of fewer losses says little


class StepMetrics(NamedTuple):
    """What a step reports; every process and device has the same."""

    scalars: dict[str, Float[Array, ""]]  # means over the whole step
    losses: Float[Array, "M A X"]  # of each pair or response, to name a bad step's rows; 0: padding
    row_id: Int[Array, "M A X"]  # -1 at padding
    finite: Bool[Array, ""]  # loss, gradient and what the step makes of the state are
    spike: Bool[Array, ""]  # the loss is far above its average
    skipped: Int[Array, ""]  # steps skipped before this one, which the optimizer has not seen


class Spikes(NamedTuple):
    """What is done about a loss that jumps."""

    factor: float  # a loss over this many times the average of |loss| is a spike
    skip: bool  # whether a spike is skipped like a step that is not finite


# (memory, new parameters by role, steps taken, whether this one counts) -> what is remembered
Remember = Callable[..., dict[str, Any]]


def make_train_step(
    gradients: Callable[..., Gradients],
    optimizers: Mapping[str, optax.GradientTransformation],
    constrain_params: Callable[[Any], Any],
    *,
    spikes: Spikes,
    remember: Remember | None = None,
):
    """The step (state, frozen, batch, details) -> (state, StepMetrics).

    frozen: trees by role that no step changes: "reference", and "base" under adapters (LoRA).
    A step whose loss, gradient or update is not finite changes nothing but the counters, to the
    bit.

    Args:
      gradients: (state, frozen, batch, details, constrain_params) -> Gradients.
      optimizers: optax transformations by role.
      constrain_params: keeps trees shaped like `state.params` in the parameters' shardings.
      remember: what becomes of the state's memory after a step; None: what the gradients say.
    """
    update = make_update(optimizers, spikes=spikes, remember=remember)

    def step(state: TrainState, frozen, batch: PackedBatch, details):
        return update(state, gradients(state, frozen, batch, details, constrain_params))

    return step


def make_update(
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    spikes: Spikes,
    remember: Remember | None = None,
):
    """(state, gradients, rate=) -> (state, StepMetrics): the half of a step after the gradients.

    The arguments are `make_train_step`'s; `rate` multiplies the optimizers' updates, and is None
    where they hold their own.
    """

    def moved(role: str, state: TrainState, grads: Any, rate) -> tuple[Any, Any]:
        """(parameters, optimizer state) of a role after its update."""
        params = state.params[role]
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        updates, opt_state = optimizers[role].update(grads, state.opt_state[role], params)
        if rate is not None:
            updates = jax.tree.map(lambda u: (rate * u).astype(u.dtype), updates)
        return optax.apply_updates(params, updates), opt_state

    def update(
        state: TrainState, gradients: Gradients, *, rate=None
    ) -> tuple[TrainState, StepMetrics]:
        loss = gradients.loss
        grad_norm = optax.tree.norm({role: gradients.grads[role] for role in optimizers})
        params = dict(state.params)
        opt_state = dict(state.opt_state)
        for role in optimizers:
            params[role], opt_state[role] = moved(role, state, gradients.grads[role], rate)

        # A finite gradient can still leave the numbers: a rate that is too large, a moment that
        # overflows.
        results = (params, opt_state, gradients.memory)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & _all_finite(results)
        taken = state.step - state.skipped
        size = jnp.abs(loss)
        spike = (taken >= SPIKE_AFTER_STEPS) & (size > spikes.factor * state.loss_average)
        good = finite & ~spike if spikes.skip else finite
        average = jnp.where(taken == 0, size, 0.9 * state.loss_average + 0.1 * size)

        def keep(new, old):
            return jnp.where(good, new, old)

        params = jax.tree.map(keep, params, state.params)
        memory = state.memory | jax.tree.map(
            keep, gradients.memory, {name: state.memory[name] for name in gradients.memory}
        )
        if remember is not None:
            memory = remember(memory, params, taken, good)
        new_state = TrainState(
            params=params,
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            step=state.step + 1,
            skipped=state.skipped + (1 - good.astype(jnp.int32)),
            loss_average=keep(average, state.loss_average),
            memory=memory,
        )
        metrics = StepMetrics(
            scalars={"loss": loss, "grad_norm": grad_norm, **gradients.scalars},
            losses=gradients.losses,
            row_id=gradients.row_id,
            finite=finite,
            spike=spike,
            skipped=state.skipped,
        )
        return new_state, metrics

    return update


def _all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every floating-point number of a tree is finite."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def moving_reference(alpha: float, tau: int) -> Remember:
    """TR-DPO: every tau steps that count, ref <- alpha params + (1 - alpha) ref, in its dtype.

    Source: Gorbatovski et al. 2024 (arXiv:2404.09656). The reference is the memory's "reference".
    """

    def remember(memory: dict[str, Any], params: dict[str, Any], taken, good) -> dict[str, Any]:
        ref = memory["reference"]
        due = good & ((taken + 1) % tau == 0)

        def mixed(r, p):
            mean = alpha * p.astype(jnp.float32) + (1 - alpha) * r.astype(jnp.float32)
            return mean.astype(r.dtype)

        moved = jax.lax.cond(due, lambda: jax.tree.map(mixed, ref, params["policy"]), lambda: ref)
        return {**memory, "reference": moved}

    return remember
