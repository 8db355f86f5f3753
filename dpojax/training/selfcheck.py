"""At start-up: does this very run compute its objective?

Real groups go through the run's model -> CheckResult.

The run's packed rows, in the shape and on the kernel that training takes, are compared with plain
sequences: one prompt with one response each, a causal mask, a log-softmax over the vocabulary. The
two share the layers of the model and nothing else. What may differ is in `rounding.py`. README.md
says where the check warns and where it refuses.

Legend: A data shards, T scored tokens of a shard, Q response tokens, B pairs.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.data.batches import PackGroups
from dpojax.data.packing import PackedBatch
from dpojax.errors import NumericsError
from dpojax.models.decoder import Model
from dpojax.objectives.loss import Loss
from dpojax.objectives.pairs import PairLogps
from dpojax.training.rounding import (
    FLOAT32_SLACK,
    Allowed,
    Tokens,
    allowed_by_rounding,
    rms,
    typical_size,
)
from dpojax.training.selfcheck_programs import (
    LossResults,
    Packed,
    PlainModels,
    logps_program,
    loss_program,
    packed_program,
    plain_program,
)
from dpojax.training.selfcheck_rows import (
    CheckedRows,
    by_token,
    checked_rows,
    faults_in_rows,
    of_shards,
    plain_sequences,
    with_other_tokens,
)

# A healthy head differs from a plain log-softmax of the same hidden states by float32's rounding
# alone: less than 1e-6.
HEAD_BOUND = 2.5e-4

LOSS_BOUND = 1e-3  # of the mean loss from its closed form, relative

COUPLING_BOUND = 1e-4  # of a pair's loss alone from its loss among the others, relative

COARSE_NATS = 0.25  # the run's precision moves a token's log-prob by more: a warning


class CheckResult(NamedTuple):
    """What was measured."""

    loss: float
    expected: float | None  # None: the objective has no closed form at policy == reference
    noise_nats: float  # the largest |log-ratio| of a response where policy == reference
    # packed rows against plain sequences: root mean square of the tokens' differences
    layout_nats: float
    allowed_nats: float  # the most of it that rounding explains
    rounding_nats: float  # what the run's precision does to plain sequences; 0 in float32
    num_tokens: int
    warnings: tuple[str, ...]


class CheckedRun(NamedTuple):
    """How the run that is checked computes."""

    depth: int  # layers
    chunk: int  # tokens whose logits exist at a time, as in training
    put: Callable[[PackedBatch], PackedBatch]  # host batch to the devices
    program: Callable[..., Callable[..., Any]]  # (name, function, **jit options) -> jitted function


def self_check(
    model: Model,
    plain: PlainModels,
    params,
    ref_params,
    pack: PackGroups,
    loss: Loss,
    run: CheckedRun,
) -> CheckResult:
    """Checks rows, hidden states, head, reference and objective.

    On the first groups of the data, where policy == reference.

    Args:
      model: the run's, for rows of pack.shape.
      plain: the oracle.
      ref_params: None where the run has no reference.
    Raises: NumericsError naming what disagrees.
    """
    rows = checked_rows(pack)
    faults = faults_in_rows(rows.batch, rows.plan, rows.groups)
    if faults:
        listed = f"{faults[0]} ({len(faults)} such faults)"
        raise NumericsError(f"self-check: the packed rows are not the data's: {listed}")
    batch = _without_weights(rows.batch, loss)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    program = functools.partial(run.program, out_shardings=replicated)
    packed = program("self_check", packed_program(model, loss, chunk=run.chunk))

    def put(batch: PackedBatch) -> PackedBatch:
        return run.put(of_shards(batch, pack.shards, rows.shards))

    def compute(batch: PackedBatch) -> Packed:
        return jax.device_get(packed(params, ref_params, put(batch)))

    first = compute(batch)
    changed, same = with_other_tokens(batch, rows.shards)
    second = compute(changed)
    exact, rounded = _plain_logps(plain, params, rows, program)
    packed_exact = None
    if plain.packed is not None:
        function = program("self_check_packed", logps_program(plain.packed, chunk=run.chunk))
        packed_exact = function(params, put(batch))
    in_order = functools.partial(by_token, rows)
    tokens = Tokens(
        policy=in_order(first.policy),
        ref=jax.tree.map(in_order, first.ref),
        plain=jax.tree.map(in_order, first.plain),
        exact=exact,
        rounded=rounded,
        packed_exact=jax.tree.map(in_order, packed_exact),
    )
    experts = model.routed is not None
    allowed = allowed_by_rounding(tokens, depth=run.depth, experts=experts)
    pairs = _used_pairs(first)
    policy, ref, _ = pairs
    results = jax.device_get(run.program("self_check_loss", loss_program(loss))(*pairs))
    _check_head(tokens, allowed)
    _check_sums("policy", policy, batch, np.asarray(first.policy))
    if ref is not None:
        _check_sums("reference", ref, batch, np.asarray(first.ref))
    warnings = _check_isolation(
        first, second, same, lambda: compute(batch), experts=experts, allowed=allowed
    )
    layout_nats = _check_layout(tokens, allowed, experts=experts)
    noise_nats = _check_reference(tokens, pairs, allowed, experts=experts)
    mean, expected = _check_objective(loss, results, pairs, noise_nats)
    warnings += _coarse_warnings(allowed)
    return CheckResult(
        loss=mean,
        expected=expected,
        noise_nats=noise_nats,
        layout_nats=layout_nats,
        allowed_nats=allowed.layout,
        rounding_nats=allowed.rounding,
        num_tokens=len(tokens.policy),
        warnings=tuple(warnings),
    )


# --- what the programs are given, and what they give ----------------------------------------------


def _without_weights(batch: PackedBatch, loss: Loss) -> PackedBatch:
    """The batch with weight 1 and certain labels, for which the closed forms are stated.

    The labels of unpaired data stay: they say which responses are desirable.
    """
    ones = np.ones_like(batch.pair_weight)
    if loss.unpaired:
        return batch._replace(pair_weight=ones)
    return batch._replace(pair_weight=ones, soft_label=ones)


def _plain_logps(
    plain: PlainModels, params, rows: CheckedRows, program: Callable[..., Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Log-probs of plain sequences, [Q]: in float32, and in the run's precision where it differs."""
    sequences = plain_sequences(rows.groups, multiple=rows.shards)

    def logps(name: str, model: Model) -> np.ndarray:
        function = program(name, plain_program(model, rows=rows.shards))
        return np.asarray(function(params, sequences.tokens, sequences.predictor, sequences.target))

    exact = logps("self_check_exact", plain.exact)
    if plain.rounded is None:
        return exact, None
    return exact, logps("self_check_rounded", plain.rounded)


def _used_pairs(packed: Packed):
    """(policy, ref, info) of the pairs that are no padding."""
    _, _, info = packed.pairs
    used = np.asarray(info.valid)

    def only_used(x):
        if np.ndim(x) == 0:
            return x
        return np.asarray(x)[used]

    return jax.tree.map(only_used, packed.pairs)


def _coarse_warnings(allowed: Allowed) -> list[str]:
    """What to say where rounding drowns small log-ratios."""
    if allowed.rounding <= COARSE_NATS:
        return []
    return [
        f"the precision of the computation moves a token's log-prob by {allowed.rounding:.2f}"
        " nats (root mean square); log-ratios of this size are noise (model.dtype=float32 is"
        " exact)"
    ]


# --- the checks -----------------------------------------------------------------------------------


def _response_sums(batch: PackedBatch, logps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of both responses of every valid pair, summed on the host in float64: [2, B].

    Second, the sums of |log-prob|, which rounding errors are relative to.
    """

    def of_pairs(values):
        terms = np.asarray(values, np.float64) * batch.weight[0]
        sums = np.stack(
            [
                np.bincount(batch.response[0, a], terms[a], batch.lengths.shape[2])
                for a in range(len(terms))
            ]
        )
        return np.stack(
            [
                np.take_along_axis(sums, numbers, axis=1)[batch.valid[0]]
                for numbers in (batch.chosen[0], batch.rejected[0])
            ]
        )

    return of_pairs(logps), of_pairs(np.abs(logps))


def _check_head(tokens: Tokens, allowed: Allowed) -> None:
    """The run's log-probs against a plain log-softmax of the same hidden states."""
    models = [("policy", tokens.policy)]
    if tokens.ref is not None:
        models.append(("reference", tokens.ref))
    # a cached reference has log-probs and no hidden states
    for (name, logps), plain in zip(models, tokens.plain, strict=False):
        off = rms(logps - plain[0])
        bound = HEAD_BOUND * rms(plain[0]) + allowed.float32 / FLOAT32_SLACK
        if not off <= bound:
            raise NumericsError(
                f"self-check: the {name}'s log-probs are not the log-softmax of its hidden states:"
                f" they differ by {off:.1e} nats, and rounding explains {bound:.1e} (root mean"
                f" square of {len(logps)} tokens)"
            )


def _check_sums(name: str, pairs: PairLogps, batch: PackedBatch, logps: np.ndarray) -> None:
    """A pair's log-probs are the sums over the tokens of its responses, the chosen one's first."""
    sums, sizes = _response_sums(batch, logps)
    logps_of_pairs = np.stack([pairs.chosen.logps, pairs.rejected.logps])
    over = np.abs(logps_of_pairs - sums) - HEAD_BOUND * sizes
    if not (over <= 1e-6).all():
        pair = int(np.argmax(over.max(axis=0)))
        raise NumericsError(
            f"self-check: the {name}'s log-probs of a pair are {logps_of_pairs[0, pair]:.4f} and"
            f" {logps_of_pairs[1, pair]:.4f}, the sums over the tokens of its chosen and its rejected"
            f" response {sums[0, pair]:.4f} and {sums[1, pair]:.4f}"
        )


def _check_isolation(
    first: Packed,
    second: Packed,
    same: np.ndarray,
    again: Callable[[], Packed],
    *,
    experts: bool,
    allowed: Allowed,
) -> list[str]:
    """A response whose prompt and tokens are the same has the same log-probs to the bit.

    What stands beside it in its row must not matter. Returns warnings.

    Args:
      first, second: of the same rows, and of rows with other tokens beside.
      same: the scored tokens that cannot change. [A, T].
      again: computes `first` once more.
    """
    off = np.abs(np.asarray(first.policy) - np.asarray(second.policy))[same]
    if off.max(initial=0.0) == 0:
        return []
    # The sums of an expert depend on how many tokens of other responses it takes, and some devices
    # add up in no fixed order.
    varies = experts or np.any(np.asarray(again().policy) != np.asarray(first.policy))
    if varies and typical_size(off, experts=experts) <= allowed.layout:
        return [
            f"the same rows give log-probs that differ by up to {off.max():.1e} nats: this device's"
            " sums have no fixed order"
        ]
    raise NumericsError(
        f"self-check: {np.count_nonzero(off)} of {off.size} tokens change by up to {off.max():.1e}"
        " nats with the padding, another response, another group or a later token: a mask leaks"
    )


def _check_layout(tokens: Tokens, allowed: Allowed, *, experts: bool) -> float:
    """Packed rows on the run's kernel against plain sequences.

    Returns: root mean square of the tokens' differences, nats.
    """
    plain = tokens.exact
    if tokens.rounded is not None:
        plain = tokens.rounded
    pairs = [(tokens.policy, plain, allowed.layout)]
    if tokens.packed_exact is not None:
        pairs.append((tokens.packed_exact, tokens.exact, allowed.float32))
    sizes = []
    for logps, right, bound in pairs:
        off = np.abs(logps - right)
        sizes.append(typical_size(off, experts=experts))
        if not sizes[-1] <= bound:
            raise NumericsError(
                "self-check: packed rows give other log-probs than plain sequences:"
                f" {sizes[-1]:.1e} nats, and rounding explains {bound:.1e} (root mean square of"
                f" {off.size} tokens; largest {off.max():.1e}): a position, a mask or the attention"
                " kernel is wrong (model.attention=full avoids the kernels)"
            )
    return sizes[0]


def _check_reference(tokens: Tokens, pairs, allowed: Allowed, *, experts: bool) -> float:
    """The largest |log-ratio| of a response, nats.

    Policy and reference are the same: their tokens differ by rounding at most.
    """
    policy, ref, _ = pairs
    if ref is None:
        return 0.0
    off = typical_size(tokens.policy - tokens.ref, experts=experts)
    if not off <= allowed.layout:
        raise NumericsError(
            "self-check: policy and reference have the same weights, and the log-probs of a token"
            f" differ by {off:.1e} nats (root mean square; rounding explains {allowed.layout:.1e}):"
            " the reference is computed differently"
        )
    chosen = policy.chosen.logps - ref.chosen.logps
    rejected = policy.rejected.logps - ref.rejected.logps
    return float(np.abs([chosen, rejected]).max())


def _check_objective(
    loss: Loss, results: LossResults, pairs, noise_nats: float
) -> tuple[float, float | None]:
    """(the mean loss at policy == reference, its closed form)."""
    policy, _, info = pairs
    mean = float(np.mean(results.at_reference.loss))
    closed = loss.at_reference(*jax.tree.map(lambda x: np.asarray(x, np.float64), (policy, info)))
    expected = None
    if closed is not None:
        expected = float(np.mean(closed))
    slope = loss.reward_scale * float(np.abs(results.together.pull).max())
    if expected is not None:
        bound = LOSS_BOUND * max(abs(expected), 0.1) + 2 * slope * noise_nats
        if not abs(mean - expected) <= bound:
            raise NumericsError(
                f"self-check: the {loss.name} loss at policy == reference is {mean:.6f}, not"
                f" {expected:.6f} (+- {bound:.1e})"
            )
    together = results.together.loss
    alone = results.alone.loss
    off = np.abs(together - alone) / (1 + np.abs(together))
    if not off.max() <= COUPLING_BOUND:
        raise NumericsError(
            f"self-check: a pair's {loss.name} loss depends on the order of the pairs or on its"
            f" neighbours: {together[off.argmax()]:.6f} among them, {alone[off.argmax()]:.6f}"
            " without (an objective of your own that looks at several pairs is an"
            " Objective(function, coupled=True))"
        )
    if not loss.unpaired and not (results.raised.margin > results.at_reference.margin).all():
        raise NumericsError(
            f"self-check: the margin of the {loss.name} loss does not grow where the chosen"
            " response becomes likelier and the rejected one less likely: they are swapped"
        )
    return mean, expected
