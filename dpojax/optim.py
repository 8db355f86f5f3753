"""config.optim -> an optax transformation with its learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from dpojax.config import OptimConfig
from dpojax.errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine")
# b1, b2 and eps as published or as the common implementations set them, where config.optim leaves them None.
PUBLISHED = {
    "adamw": (0.9, 0.999, 1e-8),  # Loshchilov & Hutter 2019
    "rmsprop": (0.0, 0.99, 1e-8),  # torch.optim.RMSprop, which the DPO authors used; b2 is its alpha
    "adafactor": (None, None, None),  # Shazeer & Stern 2018
    "lion": (0.9, 0.99, None),  # Chen et al. 2023
}


def make_schedule(name: str, *, learning_rate: float, warmup_steps: int, num_steps: int) -> optax.Schedule:
    """Linear warmup, then constant, or linear or cosine decay to 0 at `num_steps`. The first step has rate > 0."""
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
    # Step k of the warmup trains at (k + 1) / warmup_steps of the rate, so that no step is wasted at rate 0.
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, after[name]()], [warmup_steps])


def decay_mask(axes: Any) -> Any:
    """True for the parameters that weight decay applies to: matrices, not norms and biases."""
    return jax.tree.map(
        lambda a: len([x for x in a if x not in ("layers", "head_dim")]) > 1, axes, is_leaf=lambda x: isinstance(x, tuple)
    )


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, axes: Any) -> optax.GradientTransformation:
    """Clips by global norm, then `config.name`, then decoupled weight decay, times the schedule.

    Args:
      config: optim section.
      schedule: step -> learning rate.
      axes: logical axes of the parameters, for the weight-decay mask.
    """
    b1, b2, eps = (
        given if given is not None else published
        for given, published in zip((config.b1, config.b2, config.eps), PUBLISHED[config.name], strict=True)
    )
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        "rmsprop": lambda: optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        ),
        "lion": lambda: optax.scale_by_lion(b1=b1, b2=b2),
    }
    steps = [optax.clip_by_global_norm(config.clip_norm)] if math.isfinite(config.clip_norm) else []
    steps.append(makers[config.name]())
    if config.weight_decay:
        steps.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask(axes)))
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule))
