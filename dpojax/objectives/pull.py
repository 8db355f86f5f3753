"""Which way a loss pulls: its gradient at the log-probs of pairs, without any model."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.objectives.loss import Loss
from dpojax.objectives.pairs import PairInfo, PairLogps


class LossGradients(NamedTuple):
    """The derivatives of a loss, summed over the pairs; without unit (nats per nat)."""

    chosen: Float[Array, " B"]  # d loss / d log pi(y_w | x); negative: it is pushed up
    rejected: Float[Array, " B"]  # d loss / d log pi(y_l | x); positive: it is pushed down


def loss_gradients(
    loss: Loss, policy: PairLogps, ref: PairLogps | None, info: PairInfo | None = None
) -> LossGradients:
    """How a loss changes with the policy's log-probs of both responses of every pair.

    For DPO these are -beta s(-beta h) and beta s(-beta h) (Rafailov et al. 2023, Eq. 8).

    Args:
      loss: from `make_loss`.
      policy: log-probs under the policy, from `pair_logps`.
      ref: under the reference; None where the objective takes none.
      info: weights, labels, score margins; None: there are none.

    >>> loss = dpojax.make_loss("dpo", beta=0.1)
    >>> ref = dpojax.pair_logps([-3.0], [-5.0], [7], [8])
    >>> dpojax.loss_gradients(loss, ref, ref).chosen.tolist()  # -0.1 s(0)
    [-0.05000000074505806]
    """

    def total(policy: PairLogps) -> Array:
        return jnp.sum(loss(policy, ref, info).loss)

    gradient = jax.grad(total, allow_int=True)(policy)  # lengths are whole numbers
    return LossGradients(gradient.chosen.logps, gradient.rejected.logps)
