"""What the start-up check runs on the devices.

The run's packed rows, the plain oracle, and the objective on pairs.

Legend: A data shards, T scored tokens and U tokens of a shard, Q response tokens, B pairs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data.packing import PackedBatch
from dpojax.models.decoder import Model
from dpojax.objectives.loss import Loss
from dpojax.objectives.pairs import PairInfo, PairLogps
from dpojax.training.micro_batches import micro_batch
from dpojax.training.pairs import PairResults, pair_results, pairs_of
from dpojax.training.scores import batch_scores, both_scores


class PlainModels(NamedTuple):
    """The decoders that the run's is compared with.

    The oracle's have plain causal attention over rows of one sequence.
    """

    exact: Model  # the oracle in float32
    rounded: Model | None  # the oracle as the run rounds; None where that is float32
    # packed rows in float32, so that rounding hides no fault of theirs; None where the run's are
    packed: Model | None


def plain_logps(model: Model, head: Any, hidden, predictor, target, count, *, chunk: int = 128):
    """(log-probs, log-sum-exp of the logits) of the targets.

    A log-softmax over the vocabulary, some tokens at a time.

    Args:
      hidden: [A, U, D]; predictor, target: [A, Q].
      count: most targets in use on any shard; those past it are 0.
    """
    size = predictor.shape[1]

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, -size % chunk)))

    predictor = pad(predictor)
    target = pad(target)

    def part(i, done):
        index = jax.lax.dynamic_slice_in_dim(predictor, i * chunk, chunk, axis=1)
        ids = jax.lax.dynamic_slice_in_dim(target, i * chunk, chunk, axis=1)
        states = jnp.take_along_axis(hidden, index[..., None], axis=1)
        logits = model.unembed(head, states.reshape(-1, states.shape[-1])).reshape(*index.shape, -1)
        target_logit = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(logits, axis=-1)

        def put(x, values):
            return jax.lax.dynamic_update_slice_in_dim(x, values, i * chunk, axis=1)

        logps, totals = done
        return put(logps, target_logit - total), put(totals, total)

    zero = jnp.zeros(predictor.shape, jnp.float32)
    logps, totals = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, part, (zero, zero))
    return logps[:, :size], totals[:, :size]


def _watched(model: Model, seen: list) -> Model:
    """The model; its final hidden states are appended to `seen` while it is traced."""

    def hidden_states(*rows, **key):
        hidden = model.hidden_states(*rows, **key)
        seen.append(hidden)
        return hidden

    inner = model.routed
    if inner is None:
        return model._replace(hidden_states=hidden_states)

    def routed(*rows, **key):
        hidden, routing = inner(*rows, **key)
        seen.append(hidden)
        return hidden, routing

    return model._replace(hidden_states=hidden_states, routed=routed)


class Packed(NamedTuple):
    """What one micro-batch gives, through the functions that training calls."""

    policy: Any  # [A, T] log-probs, nats
    ref: Any  # the same, or None
    # (log-probs, log-sum-exp) of the same hidden states without the run's head: policy, then
    # reference
    plain: list
    pairs: tuple[PairLogps, PairLogps | None, PairInfo]  # [A P]


def packed_program(model: Model, loss: Loss, *, chunk: int):
    """The function (params, ref_params, batch) -> Packed."""

    def packed(params, ref_params, batch: PackedBatch) -> Packed:
        mb = micro_batch(batch, 0)
        seen = []
        scores = both_scores(
            _watched(model, seen), loss, params, ref_params, mb, chunk=chunk, details=True
        )
        flat = [h.reshape(mb.predictor.shape[0], -1, h.shape[-1]) for h in seen]
        trees = (params, ref_params)[: len(seen)]
        plain = [
            plain_logps(model, model.head(tree), hidden, mb.predictor, mb.target, mb.num_scored)
            for tree, hidden in zip(trees, flat, strict=True)
        ]
        return Packed(scores.policy.logps, scores.ref_logps, plain, pairs_of(loss, mb, scores))

    return packed


def logps_program(model: Model, *, chunk: int):
    """The function (params, batch) -> log-probs of the packed tokens, [A, T]."""

    def logps(params, batch: PackedBatch):
        return batch_scores(model, params, micro_batch(batch, 0), chunk=chunk).logps

    return logps


def plain_program(model: Model, *, rows: int):
    """The function (params, tokens, predictor, target) -> log-probs of plain sequences, [Q].

    Args:
      rows: sequences that are computed at a time.
    """

    def plain(params, tokens, predictor, target):
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), (rows, tokens.shape[1]))
        group = jnp.ones_like(position)

        def hidden_states(ids):
            return model.hidden_states(params, ids, position, group, jnp.zeros_like(position))

        hidden = jax.lax.map(hidden_states, tokens.reshape(-1, rows, tokens.shape[1]))
        hidden = hidden.reshape(1, tokens.size, -1)
        logps, _ = plain_logps(
            model, model.head(params), hidden, predictor[None], target[None], target.size
        )
        return logps[0]

    return plain


class LossResults(NamedTuple):
    """The objective on the checked pairs, [B] each."""

    at_reference: PairResults
    together: PairResults  # of a policy that has moved
    alone: PairResults  # the same, each pair for itself; of coupled pairs, in the opposite order
    raised: PairResults  # the chosen response 1 nat likelier, the rejected one 1 nat less


def loss_program(loss: Loss):
    """The function (policy, ref, info) -> LossResults."""

    def check(policy: PairLogps, ref: PairLogps | None, info: PairInfo) -> LossResults:
        if loss.coupled:
            info = info._replace(shift=np.float32(0))
        count = policy.chosen.logps.shape[0]
        number = jnp.arange(count)

        def moved(chosen, rejected) -> PairLogps:
            return PairLogps(
                chosen=policy.chosen.shifted(chosen), rejected=policy.rejected.shifted(rejected)
            )

        step = 0.3 * jnp.sin(12.9898 * number)
        far = moved(step * jnp.sqrt(policy.chosen.lengths), -step)
        given = (far, ref, info, number)
        if loss.coupled:

            def turn(x):
                if jnp.ndim(x) == 0:
                    return x
                return x[::-1]

            alone = jax.tree.map(turn, pair_results(loss, *jax.tree.map(turn, given)))
        else:
            axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, given)
            split = jax.tree.map(lambda x: x[:, None] if jnp.ndim(x) else x, given)
            alone = jax.vmap(lambda *pair: pair_results(loss, *pair), in_axes=axes)(*split)
            alone = jax.tree.map(lambda x: x[:, 0], alone)
        results = [
            pair_results(loss, p, ref, info, number) for p in (policy, far, moved(1.0, -1.0))
        ]
        return LossResults(results[0], results[1], alone, results[2])

    return check
