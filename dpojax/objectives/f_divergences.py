"""f-divergences in place of the KL divergence, Wang et al. 2023 (arXiv:2309.16240)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

LARGEST_EXPONENT = 80.0  # exp of it is a float32; TRL clamps the alpha divergence there


def _exp(x: Array) -> Array:
    return jnp.exp(jnp.minimum(x, LARGEST_EXPONENT))


# f'(u) as a function of log u, u = pi/ref, minus its value at u = 1 (Wang et al. 2023,
# arXiv:2309.16240).
F_DIVERGENCES: dict[str, Callable[[Array, float], Array]] = {
    "reverse_kl": lambda x, c: x,
    "forward_kl": lambda x, c: 1 - _exp(-x),
    "js": lambda x, c: math.log(2) + jax.nn.log_sigmoid(x),
    "alpha": lambda x, c: x if abs(c - 1) < 1e-6 else (_exp((c - 1) * x) - 1) / (c - 1),
}
