"""Sampled responses -> PackedBatch: a prompt with its K samples is one group, the prompt once.

Policy gradients take each response as a pair of itself, whose margin is its reward and whose weight
what it is worth: an advantage may be negative. Online DPO takes pairs of two responses. No other
format is needed for algorithms that sample between two steps.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.data.packing import PackedBatch, PackShape
from dpojax.data.row_filling import StepLengths, pack_step
from dpojax.data.row_plan import RowShape, StepPlan, plan_step, step_shape, waste
from dpojax.data.shapes import StepSizes
from dpojax.data.token_groups import TokenGroup, TokenPair

# Arrays of a step have a place for so many prompts of every row.
ROW_GROUPS = 2


class Rollout(NamedTuple):
    """A prompt with its sampled responses, and the pairs that are trained on."""

    prompt: list[int]
    responses: list[list[int]]  # EOS included where one ended so
    pairs: tuple[TokenPair, ...]
    row: int  # of the source, to name it later


def own_pairs(weights: Iterable[float], rewards: Iterable[float]) -> tuple[TokenPair, ...]:
    """Each response as a pair of itself: its weight is what it is worth, its margin its reward."""
    values = zip(weights, rewards, strict=True)
    return tuple(
        TokenPair(k, k, weight=float(weight), soft_label=1.0, margin=float(reward))
        for k, (weight, reward) in enumerate(values)
    )


def rollout_shape(
    *,
    prompt_tokens: int,
    response_tokens: int,
    num_prompts: int,
    num_samples: int,
    num_pairs: int,
    num_shards: int,
    micro_batch_tokens: int = 0,
) -> PackShape:
    """The static shape that holds every rollout of so many prompts and samples.

    A row holds the longest prompt with the longest responses, or ROW_GROUPS shorter ones.

    Args:
      prompt_tokens, response_tokens: of the longest ones.
      num_pairs: of a prompt, at most.
      micro_batch_tokens: most tokens of a micro-batch on a data shard (one row at least); 0: a step
        is one micro-batch.
    """
    row_tokens = prompt_tokens + num_samples * response_tokens
    shard_rows = -(-num_prompts // num_shards)
    row_groups = 0
    if micro_batch_tokens:
        shard_rows = min(shard_rows, max(1, micro_batch_tokens // row_tokens))
        row_groups = ROW_GROUPS
    rows = RowShape(
        layout="shared", row_tokens=row_tokens, shard_rows=shard_rows, row_groups=row_groups
    )
    return step_shape(
        rows,
        num_shards=num_shards,
        num_groups=num_prompts,
        max_responses=num_samples,
        max_pairs=num_pairs,
        longest=[row_tokens] * num_prompts,
        longest_sequence=prompt_tokens + response_tokens,
    )


def lone(prompt: list[int], response: list[int], row: int) -> Rollout:
    """A prompt with one response, to be scored."""
    return Rollout(prompt, [response], own_pairs([0.0], [0.0]), row)


def lone_shape(
    rollouts: Sequence[Rollout], *, count: int, num_shards: int, multiple: int = 1
) -> PackShape:
    """The static shape of a batch of `count` of these rollouts of one response each.

    Args:
      multiple: of tokens, that lengths are rounded up to, so that one program serves similar ones.
    """
    prompt = max(len(rollout.prompt) for rollout in rollouts)
    response = max(len(rollout.responses[0]) for rollout in rollouts)
    return rollout_shape(
        prompt_tokens=-(-prompt // multiple) * multiple,
        response_tokens=-(-response // multiple) * multiple,
        num_prompts=count,
        num_samples=1,
        num_pairs=1,
        num_shards=num_shards,
    )


class LoneBatch(NamedTuple):
    """A batch of rollouts of one response each."""

    first: int  # the number of its first one
    batch: PackedBatch  # as far as this process holds it
    sizes: StepSizes
    plan: StepPlan


def lone_batches(
    rollouts: Sequence[Rollout],
    shape: PackShape,
    *,
    count: int,
    shards: Sequence[int],
    pad_id: int = 0,
) -> Iterator[LoneBatch]:
    """Rollouts of one response each, `count` at a time."""
    for first in range(0, len(rollouts), count):
        part = rollouts[first : first + count]
        batch, sizes = pack_rollouts(part, shape, shards=shards, pad_id=pad_id)
        plan = plan_step(sizes.prompts, sizes.responses, shape)
        yield LoneBatch(first, batch, sizes, plan)


def pack_rollouts(
    rollouts: Sequence[Rollout], shape: PackShape, *, shards: Sequence[int], pad_id: int
) -> tuple[PackedBatch, StepSizes]:
    """A step's batch, as far as this process holds it, and its sizes.

    Args:
      shape: from `rollout_shape`.
      shards: the data shards that this process holds.
    """
    groups = [
        TokenGroup(
            prompt=np.asarray(rollout.prompt, np.int32),
            responses=tuple(np.asarray(ids, np.int32) for ids in rollout.responses),
            pairs=rollout.pairs,
            row=rollout.row,
        )
        for rollout in rollouts
    ]
    prompts = [len(group.prompt) for group in groups]
    responses = [[len(ids) for ids in group.responses] for group in groups]
    plan = plan_step(prompts, responses, shape)
    lengths = StepLengths(prompts, responses, responses, [group.pairs for group in groups])
    batch = pack_step(
        plan,
        shape,
        groups.__getitem__,
        lengths,
        shards=shards,
        pad_id=pad_id,
        with_ref=False,
    )
    packing, rounding = waste(plan, shape)
    return batch, StepSizes(packing, rounding, prompts, responses)
