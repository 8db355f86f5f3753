"""The load-balancing loss of a mixture of experts, over a whole step."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpojax.data.packing import PackedBatch
from dpojax.models.decoder import Model
from dpojax.models.experts import Routing, load_balancing_loss
from dpojax.training.micro_batches import micro_batch
from dpojax.training.scores import hidden_by_shard


@dataclasses.dataclass(frozen=True)
class Balance:
    """The routers' load-balancing loss of a whole step, with a gradient that is the same for every
    cut (models/experts.py).

    X sum_e f_e P_e with the shares f and the mean probabilities P over the step's real tokens, a
    shared prompt once, and all layers. f has no gradient, so that a first pass that counts makes
    the second one a sum over micro-batches.
    """

    weight: float
    num_layers: int

    def counts(self, model: Model, params, batch: PackedBatch, keys) -> Float[Array, " X"]:
        """How often each expert was chosen in the step; zeros for a step of one micro-batch, which
        counts for itself.
        """

        def of_part(i):
            routing = hidden_by_shard(model, params, micro_batch(batch, i), keys(i))[1]
            assert routing is not None  # the model has experts
            return routing.counts

        def body(i, total):
            return total + of_part(i)

        zero = jnp.zeros(jax.eval_shape(of_part, 0).shape, jnp.float32)
        several = jnp.where(batch.num_micro > 1, batch.num_micro, 0)
        return jax.lax.stop_gradient(jax.lax.fori_loop(0, several, body, zero))

    def part(self, routing: Routing, counts, batch: PackedBatch) -> Float[Array, ""]:
        """The part of a micro-batch; the parts sum to weight x loss."""
        tokens = self.num_layers * batch.num_tokens.astype(jnp.float32)
        counts = jnp.where(batch.num_micro > 1, counts, routing.counts)
        return self.weight * load_balancing_loss(Routing(routing.probabilities, counts), tokens)
