"""A plan of rows and the tokens of its groups -> PackedBatch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.data.packing import PackedBatch, PackShape, abstract_batch
from dpojax.data.row_plan import Segment, StepPlan
from dpojax.data.token_groups import TokenGroup, TokenPair

GetGroup = Callable[[int], TokenGroup]  # position in the step -> the group's tokens


class StepLengths(NamedTuple):
    """What every process knows of every group of a step: the denominators come from it."""

    prompts: Sequence[int]  # |x|
    responses: Sequence[Sequence[int]]  # |y_k|, formatting tokens included
    counted: Sequence[Sequence[int]]  # |y_k| without them
    pairs: Sequence[Sequence[TokenPair]]


def pack_step(
    plan: StepPlan,
    shape: PackShape,
    get_group: GetGroup,
    lengths: StepLengths,
    *,
    shards: Sequence[int],
    pad_id: int,
    with_ref: bool,
) -> PackedBatch:
    """Fills a plan with tokens.

    Only the groups of `shards` are asked for; shard axes have len(shards).

    Args:
      plan, shape: from `plan_step` and `step_shape`.
      get_group: position in the step -> its tokens.
      lengths: of every group of the step.
      shards: the data shards that this process holds.
      pad_id: token at padding; never seen by any other token.
      with_ref: fill `ref_logps` from the groups.
    """
    held = dataclasses.replace(shape, num_shards=len(shards))
    # numpy arrays until they are put on the devices
    batch: Any = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), abstract_batch(held, with_ref=with_ref)
    )
    batch.tokens[:] = pad_id
    batch.row_id[:] = -1
    batch.response_row[:] = -1
    num_chosen_tokens = 0
    for counted, pairs in zip(lengths.counted, lengths.pairs, strict=True):
        num_chosen_tokens += sum(counted[pair.chosen] for pair in pairs)
    num_response_tokens = sum(map(sum, lengths.responses))
    batch = batch._replace(
        num_micro=np.int32(len(plan.cells)),
        num_pairs=np.int32(sum(map(len, lengths.pairs))),
        num_chosen_tokens=np.int32(num_chosen_tokens),
        num_response_tokens=np.int32(sum(map(sum, lengths.counted))),
        num_tokens=np.int32(sum(lengths.prompts) + num_response_tokens),
    )
    for i, cells in enumerate(plan.cells):
        batch.num_scored[i] = max(_scored_tokens(cell, lengths) for cell in cells)
        for j, shard in enumerate(shards):
            numbers = _fill_rows(batch, shape, (i, j), cells[shard], get_group)
            for (g, _), number in numbers.items():
                batch.response_row[i, j, number] = get_group(g).row
            _fill_pairs(batch, (i, j), numbers, get_group)
    return batch


def _scored_tokens(cell: list[list[Segment]], lengths: StepLengths) -> int:
    """Response tokens of a cell's rows."""
    return sum(lengths.responses[s.group][k] for row in cell for s in row for k in s.branches)


def _fill_rows(
    batch,
    shape: PackShape,
    cell: tuple[int, int],
    rows: list[list[Segment]],
    get_group: GetGroup,
) -> dict[tuple[int, int], int]:
    """Writes the rows of one cell (micro-batch, shard of this process).

    Returns: the number within the cell of each (group, response).
    """
    micro, shard = cell
    numbers: dict[tuple[int, int], int] = {}
    end = 0  # of the cell's scored tokens
    for r, row in enumerate(rows):
        columns = list(shape.part_starts)  # where each part of the row goes on
        for in_row, segment in enumerate(row, 1):
            group = get_group(segment.group)
            prompt_size = len(group.prompt)
            last_prompt = r * shape.row_tokens + columns[0] + prompt_size - 1
            pieces = [(0, group.prompt), *((k + 1, group.responses[k]) for k in segment.branches)]
            for branch, ids in pieces:
                column = columns[shape.part_of(branch)]
                columns[shape.part_of(branch)] += len(ids)
                first_position = 0
                if branch:
                    first_position = prompt_size
                    first = r * shape.row_tokens + column
                    predictor = np.arange(first - 1, first + len(ids) - 1)
                    # The first response token is predicted at the last prompt token, in every
                    # branch.
                    predictor[:1] = last_prompt
                    number = numbers[segment.group, branch - 1] = len(numbers)
                    scored = (micro, shard, slice(end, end + len(ids)))
                    end += len(ids)
                    batch.predictor[scored] = predictor
                    batch.response[scored] = number
                    batch.last[micro, shard, number] = first + len(ids) - 1
                    _fill_response(batch, scored, number, group, branch - 1)
                place = (micro, shard * shape.shard_rows + r, slice(column, column + len(ids)))
                batch.tokens[place] = ids
                batch.positions[place] = np.arange(len(ids)) + first_position
                batch.group[place] = in_row
                batch.branch[place] = branch
    return numbers


def _fill_response(
    batch, scored: tuple[int, int, slice], number: int, group: TokenGroup, k: int
) -> None:
    """Writes what the group says of its response k, which has this number within its cell."""
    ids = group.responses[k]
    counted = np.ones(len(ids), bool)
    if group.counted is not None:
        counted = group.counted[k]
    micro, shard, _ = scored
    batch.lengths[micro, shard, number] = counted.sum()
    batch.target[scored] = ids
    batch.weight[scored] = counted
    if batch.ref_logps is not None:
        assert group.ref_logps is not None
        batch.ref_logps[scored] = group.ref_logps[k]


def _fill_pairs(batch, cell: tuple[int, int], numbers, get_group: GetGroup) -> None:
    """Writes the pairs of the groups whose responses have these numbers within the cell."""
    n = 0
    for g in dict.fromkeys(g for g, _ in numbers):
        group = get_group(g)
        for pair in group.pairs:
            place = (*cell, n)
            batch.chosen[place] = numbers[g, pair.chosen]
            batch.rejected[place] = numbers[g, pair.rejected]
            batch.pair_weight[place] = pair.weight
            batch.soft_label[place] = pair.soft_label
            batch.margin[place] = pair.margin
            batch.row_id[place] = group.row
            batch.valid[place] = True
            n += 1
