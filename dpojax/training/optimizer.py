"""config.optim -> an optax transformation with its learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from dpojax.config.training import OPTIMIZERS, SCHEDULES, OptimConfig
from dpojax.errors import ConfigError


def make_schedule(
    name: str, *, learning_rate: float, warmup_steps: int, num_steps: int
) -> optax.Schedule:
    """Linear warmup, then constant, or linear or cosine decay to 0 at `num_steps`.

    The first step has rate > 0.
    """
    decay_steps = max(1, num_steps - warmup_steps)
    after = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "linear": lambda: optax.linear_schedule(learning_rate, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, decay_steps),
    }
    if name not in after:
        raise ConfigError(f"optim.schedule is {name!r}; it must be one of {', '.join(SCHEDULES)}")
    if not warmup_steps:
        return after[name]()
    # Step k of the warmup trains at (k + 1) / warmup_steps of the rate, so that no step is wasted
    # at rate 0.
    warmup = optax.linear_schedule(
        learning_rate / warmup_steps, learning_rate, max(1, warmup_steps - 1)
    )
    return optax.join_schedules([warmup, after[name]()], [warmup_steps])


def decay_mask(axes: Any) -> Any:
    """True for the parameters that weight decay applies to: matrices, not norms and biases."""
    return jax.tree.map(
        lambda a: len([x for x in a if x not in ("layers", "head_dim")]) > 1,
        axes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, axes: Any
) -> optax.GradientTransformation:
    """Clips by global norm, then `config.name`, then decoupled weight decay, times the schedule.

    Args:
      config: optim section.
      schedule: step -> learning rate.
      axes: logical axes of the parameters, for the weight-decay mask.
    """
    settings = dict(OPTIMIZERS[config.name])
    asked = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    settings |= {name: value for name, value in asked.items() if value is not None}
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.scale_by_adam(
            b1=settings["b1"], b2=settings["b2"], eps=settings["eps"]
        ),
        "rmsprop": lambda: optax.scale_by_rms(
            decay=settings["b2"], eps=settings["eps"], eps_in_sqrt=False
        ),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        ),
        "lion": lambda: optax.scale_by_lion(b1=settings["b1"], b2=settings["b2"]),
    }
    steps = []
    if math.isfinite(config.clip_norm):
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    steps.append(makers[config.name]())
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask(axes)))
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule))
