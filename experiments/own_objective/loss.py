"""An objective of one's own: DPO whose pairs count more the less their lengths differ."""

import jax
import jax.numpy as jnp

from dpojax.objectives.pairs import Pairs


def even_dpo(x: Pairs, *, beta: float, sharpness: float):
    """-log s(beta h) exp(-sharpness |log(|y_w| / |y_l|)|)."""
    len_w, len_l = x.lengths
    return -jax.nn.log_sigmoid(beta * x.h) * jnp.exp(-sharpness * jnp.abs(jnp.log(len_w / len_l)))
