"""What a loss is given: log-probs of B pairs under two models.

And what else is known of the pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

Value = TypeVar("Value")


Values = ArrayLike | Sequence[float] | Sequence[int]  # [B]


class ResponseLogps(NamedTuple):
    """What a model says of one response of every pair; None where no objective asks for it.

    >>> chosen = dpojax.pair_logps([-3.0], [-5.0], [7], [8]).chosen
    >>> isinstance(chosen, dpojax.ResponseLogps), float(chosen.shifted(1.0).logps[0])
    (True, -2.0)
    """

    logps: Float[Array, " B"]  # log pi(y | x), nats
    lengths: Int[Array, " B"]  # response tokens, EOS included, formatting tokens left out
    # the part of `logps` up to token min(|y_w|, |y_l|)
    head: Float[Array, " B"] | None = None
    # sum over the response's tokens of KL(ref(.|prefix) || pi(.|prefix)), nats
    kl: Float[Array, " B"] | None = None
    weight: Float[Array, " B"] | None = None  # WPO's w(y); no gradient

    def shifted(self, nats: Array | float) -> "ResponseLogps":
        """The same responses, likelier by `nats`, all of which lie in their first tokens."""
        logps = self.logps + nats
        if self.head is None:
            return self._replace(logps=logps)
        return self._replace(logps=logps, head=self.head + nats)


class PairLogps(NamedTuple):
    """What one model says of both responses of every pair.

    >>> pairs = dpojax.pair_logps([-3.0], [-5.0], [7], [8])
    >>> isinstance(pairs, dpojax.PairLogps), float(pairs.swapped().chosen.logps[0])
    (True, -5.0)
    """

    chosen: ResponseLogps
    rejected: ResponseLogps

    def swapped(self) -> "PairLogps":
        """The same pairs with the labels reversed."""
        return PairLogps(chosen=self.rejected, rejected=self.chosen)


def pair_logps(
    chosen: Values, rejected: Values, chosen_lengths: Values, rejected_lengths: Values
) -> PairLogps:
    """The log-probs of B pairs under one model, as a loss takes them.

    Args:
      chosen: log pi(y_w | x). [B], nats.
      rejected: log pi(y_l | x). [B], nats.
      chosen_lengths: |y_w|, in tokens. [B].
      rejected_lengths: |y_l|, in tokens. [B].

    >>> pairs = dpojax.pair_logps([-3.0, -4.0], [-5.0, -2.0], [7, 9], [8, 4])
    >>> (pairs.chosen.logps - pairs.rejected.logps).tolist()
    [2.0, -2.0]
    """
    return PairLogps(
        chosen=ResponseLogps(jnp.asarray(chosen), jnp.asarray(chosen_lengths)),
        rejected=ResponseLogps(jnp.asarray(rejected), jnp.asarray(rejected_lengths)),
    )


class PairInfo(NamedTuple):
    """What is known of a pair besides its log-probs; None where the data does not say.

    Unpaired data (KTO) are pairs too: the labelled response stands as chosen, a mismatched one
    (another prompt's answer) as rejected, and `soft_label` is the label, 1 or 0.

    >>> pairs = dpojax.pair_logps([-3.0, -4.0], [-5.0, -2.0], [7, 9], [8, 4])
    >>> info = dpojax.PairInfo(weight=jax.numpy.array([2.0, 0.0]))
    >>> loss = dpojax.make_loss("dpo", beta=0.1)
    >>> losses = loss(pairs, pairs, info).loss.tolist()
    >>> [round(value, 4) for value in losses]  # 2 log 2, and a pair that does not count
    [1.3863, 0.0]
    """

    weight: Float[Array, " B"] | None = None  # multiplies the pair's loss; 0 at padding
    # probability that the chosen one is the better one
    soft_label: Float[Array, " B"] | None = None
    margin: Float[Array, " B"] | None = None  # score of chosen minus score of rejected
    # of the whole step: sum of |y_w| / number of pairs
    mean_chosen_length: Float[Array, ""] | None = None
    valid: Bool[Array, " B"] | None = None  # False at padding
    # running mean of the implicit rewards, for bco_pair_shift
    shift: Float[Array, ""] | None = None


class Pairs(NamedTuple):
    """B pairs as a loss sees them."""

    # log pi/ref of the chosen response, nats; f'(pi/ref) under an f-divergence; log pi without
    # reference
    a: Float[Array, " B"]
    b: Float[Array, " B"]  # of the rejected one
    policy: PairLogps
    ref: PairLogps | None  # without gradient
    info: PairInfo

    @property
    def h(self) -> Float[Array, " B"]:
        """The difference that DPO trains."""
        return self.a - self.b

    @property
    def lengths(self) -> tuple[Array, Array]:
        """|y_w| and |y_l|, at least 1."""
        chosen = jnp.maximum(self.policy.chosen.lengths, 1)
        rejected = jnp.maximum(self.policy.rejected.lengths, 1)
        return chosen, rejected

    @property
    def valid(self) -> Bool[Array, " B"]:
        """False at padding."""
        if self.info.valid is None:
            return jnp.ones(self.a.shape, bool)
        return self.info.valid


def known(value: Value | None) -> Value:
    """The value of an optional field that an objective reads.

    The trainer computes what the objective's row of OBJECTIVES says that it needs, and nothing
    else: an objective that reads another field fails here.
    """
    assert value is not None, "the objective reads what its row of OBJECTIVES does not ask for"
    return value
