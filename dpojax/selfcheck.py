"""At start-up: does this very run compute its objective? A few real groups, through the real model, in three arrangements."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data.packing import PackedBatch, PackShape, Segment, StepPlan, by_response, pack_step, plan_step
from dpojax.data.pipeline import PackGroups, make_shape
from dpojax.errors import NumericsError
from dpojax.losses import PairInfo, PairLogps
from dpojax.models import Model
from dpojax.objectives import Loss
from dpojax.train import (
    PairResults,
    StepScores,
    each_micro_batch,
    pair_results,
    pairs_of,
    step_pairs,
    step_results,
    step_scores,
)

# |log-ratio| over the sum of |token log-probs| of a response, where policy == reference.
RATIO_BOUND = {"float32": 1e-6, "bfloat16": 1e-2}
# Largest difference of a token's log-prob between the layouts, nats.
LAYOUT_BOUND = {"float32": 2e-5, "bfloat16": 0.25}
# Relative difference of the mean loss from its closed form.
LOSS_BOUND = {"float32": 1e-3, "bfloat16": 0.2}


class CheckResult(NamedTuple):
    """What was measured."""

    loss: float
    expected: float | None  # None: the objective has no closed form at policy == reference
    worst_ratio: float  # |log-ratio| / sum |token log-probs|
    noise_nats: float  # the largest |log-ratio|: what differs between two computations of the same thing
    worst_layout: float  # nats, of a token's log-prob between the arrangements
    worst_loss: float  # of a pair's loss between the arrangements, over what the noise explains (bound 1)


class _Arrangement(NamedTuple):
    """One way to lay the same groups out."""

    plan: StepPlan
    shape: PackShape
    junk: bool  # other token ids at padding


def _arrangements(
    prompts: list[int], responses: list[list[int]], packed: PackShape, separate: PackShape
) -> dict[str, _Arrangement]:
    """Packed together; in reverse order, a micro-batch each, with other padding; and one padded row per response."""
    count, shards = len(prompts), packed.num_shards
    cells: list[list[list[list[Segment]]]] = [[[] for _ in range(shards)] for _ in range(count)]
    for i, g in enumerate(reversed(range(count))):
        cells[i][i % shards] = [[Segment(g, tuple(range(len(responses[g]))))]]
    together = plan_step(prompts, responses, packed)
    return {
        "packed": _Arrangement(together, packed, False),
        "split": _Arrangement(StepPlan(cells, count, together.ideal_tokens), packed, True),
        "separate": _Arrangement(plan_step(prompts, responses, separate), separate, False),
    }


def _pack(pack: PackGroups, arrangement: _Arrangement, prompts, responses, *, unpaired: bool) -> PackedBatch:
    """The batch of an arrangement. The closed form is that of one pair: weights and soft labels are left out."""
    groups = [pack.token_group(i) for i in range(len(prompts))]
    batch = pack_step(
        arrangement.plan,
        arrangement.shape,
        lambda g: groups[g],
        prompt_lengths=prompts,
        response_lengths=responses,
        counted_lengths=[pack.index.counted(i) for i in range(len(prompts))],
        pairs=[pack.index.pairs(i) for i in range(len(prompts))],
        shards=pack.shards,
        pad_id=pack.pad_id,
        with_ref=False,
    )
    if arrangement.junk:
        ids = np.concatenate([g.prompt for g in groups])  # any other tokens
        noise = np.resize(ids, batch.tokens.shape)
        batch = batch._replace(tokens=np.where(batch.group == 0, noise, batch.tokens))
    ones = np.ones_like(batch.pair_weight)
    return batch._replace(pair_weight=ones, soft_label=batch.soft_label if unpaired else ones)


def _by_row(results: PairResults) -> dict[tuple[int, int], tuple[float, float]]:
    """(row, number of the pair in it) -> loss and |d loss / d log-prob|: comparable between arrangements."""
    found: dict[tuple[int, int], tuple[float, float]] = {}
    numbers: dict[int, int] = {}
    used = results.row_id >= 0
    for row, loss, pull in zip(results.row_id[used].tolist(), results.loss[used], results.pull[used], strict=True):
        numbers[row] = numbers.get(row, -1) + 1
        found[row, numbers[row]] = float(loss), abs(float(pull))
    return found


def _by_micro_batch(loss: Loss, batch: PackedBatch, scores: StepScores) -> PairResults:
    """The results as a step finds them that sees one micro-batch at a time."""

    def one(mb: PackedBatch, own: StepScores) -> PairResults:
        return pair_results(loss, *pairs_of(loss, mb, own), mb.row_id.reshape(-1))

    results = each_micro_batch(one, batch, scores)
    return jax.tree.map(lambda x: x.reshape(batch.valid.shape), results)


def self_check(
    model_for: Callable[[PackShape], Model],
    params,
    ref_params,
    pack: PackGroups,
    loss: Loss,
    *,
    dtype: str,
    num_shards: int,
    put: Callable[[PackedBatch], PackedBatch],
    program: Callable[..., Callable[..., Any]],
    max_groups: int = 4,
) -> CheckResult:
    """Checks the loss, the rewards and the packing on the first groups of the data, where policy == reference.

    - The loss has its closed-form value (log 2 for DPO), in LOSS_BOUND.
    - The rewards are 0, in RATIO_BOUND: that is the noise floor of the log-ratios in this dtype.
    - Neither order, nor padding, nor the cut into micro-batches, nor the layout changes a token's log-prob by more than
      LAYOUT_BOUND, or a pair's loss by more than that noise explains.

    Args:
      model_for: the model for rows of a shape.
      ref_params: None where the run has no reference.
      pack: the first groups of its index are used.
      put: host batch to the devices.
      program: (name, function, **jit options) -> the jitted function.
    Raises: NumericsError naming what disagrees.
    """
    count = min(max_groups, len(pack.index.rows))
    index = pack.index.first(count)
    replicated = jax.sharding.NamedSharding(next(iter(jax.tree.leaves(params))).sharding.mesh, jax.sharding.PartitionSpec())
    prompts, responses = index.prompt_lengths.tolist(), [index.responses(i) for i in range(count)]
    shape = lambda layout: make_shape(
        [index], layout=layout, num_groups=count, num_shards=num_shards, micro_batch_tokens=4096, row_tokens=0
    )
    packed = shape(pack.shape.layout if pack.shape.layout == "slots" else "shared")
    # Room for all rows in one micro-batch, and for a micro-batch each.
    packed = dataclasses.replace(packed, num_micro=count, shard_rows=count, num_shards=num_shards, row_groups=count)
    separate, chunk = shape("separate"), 128

    def check(model, params, ref_params, batch):
        scores = step_scores(model, loss, params, ref_params, batch, chunk=chunk, details=True)
        policy, _, info = step_pairs(loss, batch, scores)
        # Where all log-ratios are 0 much cancels: the arrangements are compared with a policy that has moved, by token.
        moved = scores.policy.logps + 0.3 * jnp.sin(12.9898 * batch.target)
        moved = scores._replace(policy=scores.policy._replace(logps=moved))
        results = [
            step_results(loss, batch, s, np.float32(0)) if loss.coupled else _by_micro_batch(loss, batch, s)
            for s in (scores, moved)
        ]
        return scores.policy.logps, policy, info, tuple(results)

    programs = {
        own.layout: program(f"self_check_{own.layout}", functools.partial(check, model_for(own)), out_shardings=replicated)
        for own in (packed, separate)
    }
    tokens, pairs, first = {}, {}, None
    for name, arrangement in _arrangements(prompts, responses, packed, separate).items():
        batch = put(_pack(pack, arrangement, prompts, responses, unpaired=loss.unpaired))
        logps, policy, info, (results, moved) = jax.device_get(programs[arrangement.shape.layout](params, ref_params, batch))
        tokens[name] = dict(by_response(arrangement.plan, responses, np.asarray(logps)))
        pairs[name] = _by_row(moved)
        first = (policy, info, results) if first is None else first
    assert first is not None
    found = _measure(loss, first, tokens, pairs, dtype)
    _judge(loss, found, dtype)
    return found


def _measure(loss: Loss, packed: tuple[PairLogps, PairInfo, PairResults], tokens: dict, pairs: dict, dtype: str) -> CheckResult:
    """What the arrangements say; `packed` is the first of them."""
    policy, info, results = packed
    valid = results.row_id.reshape(-1) >= 0
    flat = lambda x: x if np.ndim(x) == 0 else np.asarray(x, np.float64).reshape(-1)[valid]
    policy, info = jax.tree.map(flat, (policy, info))
    expected = loss.at_reference(policy, info)
    mean = float(flat(results.loss).mean())
    scale = np.maximum(np.abs([policy.chosen, policy.rejected]), 1e-9)
    ratio = np.zeros_like(scale)
    if results.ref_chosen is not None:
        ratio = np.abs([policy.chosen - flat(results.ref_chosen), policy.rejected - flat(results.ref_rejected)])
    a = tokens["packed"]
    layout = max(float(np.abs(a[k] - other[k]).max()) for other in tokens.values() for k in a)
    # The floor: policy against reference, and the same response computed in two arrangements.
    moved = [(abs(float((a[k] - other[k]).sum())), float(np.abs(a[k]).sum())) for other in tokens.values() for k in a]
    noise_nats = max(float(ratio.max()), *(m for m, _ in moved))
    worst_ratio = max(float((ratio / scale).max()), *(m / max(s, 1e-9) for m, s in moved))
    # A loss may move by its slope times the noise of the log-probs that it reads; where pairs are coupled, of all of them.
    slope = loss.reward_scale * max(pull for _, pull in pairs["packed"].values())
    noise = 4 * RATIO_BOUND[dtype] * (float(scale.max()) * slope + max(abs(x) for x, _ in pairs["packed"].values()) + 1)
    worst = max(abs(pairs["packed"][k][0] - other[k][0]) for other in pairs.values() for k in pairs["packed"])
    return CheckResult(
        loss=mean,
        expected=None if expected is None else float(expected.mean()),
        worst_ratio=worst_ratio,
        noise_nats=noise_nats,
        worst_layout=layout,
        worst_loss=worst / noise,
    )


def _judge(loss: Loss, found: CheckResult, dtype: str) -> None:
    if not found.worst_ratio <= RATIO_BOUND[dtype]:
        raise NumericsError(
            f"self-check: at policy == reference a log-ratio is {found.worst_ratio:.1e} of its log-prob, over "
            f"{RATIO_BOUND[dtype]:.0e}: the reference, or another arrangement, is computed differently (see reference.dtype)"
        )
    if found.expected is not None and not abs(found.loss - found.expected) <= LOSS_BOUND[dtype] * max(abs(found.expected), 0.1):
        raise NumericsError(
            f"self-check: the {loss.name} loss at policy == reference is {found.loss:.6f}, not {found.expected:.6f}"
        )
    if not found.worst_layout <= LAYOUT_BOUND[dtype]:
        raise NumericsError(
            f"self-check: a token's log-prob differs by {found.worst_layout:.1e} nats with the order of the rows, the padding, "
            "the micro-batches or the layout"
        )
    if not found.worst_loss <= 1:
        raise NumericsError(
            f"self-check: a pair's {loss.name} loss depends on the order of the rows, the padding or the micro-batches: it "
            f"moves {found.worst_loss:.1f} times as far as the noise of {dtype} explains (an objective of your own that looks at "
            "several pairs is an Objective(function, coupled=True))"
        )
