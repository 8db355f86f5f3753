"""Lengths of a step's groups -> which row each goes to.

From lengths alone, so that every process finds the same plan.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.data.packing import PackShape


class Segment(NamedTuple):
    """Part of a row: one group of the step (by position) with some of its responses."""

    group: int
    branches: tuple[int, ...]


class StepPlan(NamedTuple):
    """Where each group of a step goes: the rows of each (micro-batch, shard) cell."""

    cells: list[list[list[list[Segment]]]]  # [micro][shard][row] -> segments
    rows_used: int
    ideal_tokens: int


class RowShape(NamedTuple):
    """The rows of a data shard's micro-batch."""

    layout: str  # "shared", "slots" or "separate"
    row_tokens: int  # L
    shard_rows: int  # R / A
    row_groups: int = 0  # most groups of a row; 0: as many as fit
    # tokens of the prompts' and of each response's part of a row, in layout "slots"
    slots: tuple[int, int] | None = None


def step_shape(
    rows: RowShape,
    *,
    num_shards: int,
    num_groups: int,
    max_responses: int,
    max_pairs: int,
    longest: Sequence[int],
    longest_sequence: int = 0,
) -> PackShape:
    """The smallest static shape that holds every possible step of `num_groups` groups.

    Args:
      rows: of a data shard's micro-batch.
      max_responses, max_pairs: of one group.
      longest: total tokens of the longest groups of the data, longest first (num_groups of them are
        used). In slots, the shares of a row's slots that the fullest groups take, summed, times
        row_tokens.
      longest_sequence: most tokens of a prompt and one response; 0: as many as a row.
    """
    shard_rows = rows.shard_rows
    if rows.layout == "separate":
        # a pair is never torn apart: all responses of a group stand in one shard's micro-batch
        shard_rows = -(-shard_rows // max_responses) * max_responses
        cells = -(-num_groups // (shard_rows // max_responses))
    else:
        # Best fit leaves no two rows that would fit one: it opens fewer than 2 total / L + 1, and
        # as many again for each full count of groups.
        most_rows = 2 * sum(longest[:num_groups]) // rows.row_tokens + 1
        if rows.row_groups:
            most_rows += 2 * num_groups // rows.row_groups + 1
        cells = -(-min(num_groups, most_rows) // shard_rows)
    most_groups = num_groups  # of a data shard's micro-batch
    if rows.row_groups:
        most_groups = min(num_groups, shard_rows * rows.row_groups)
    return PackShape(
        layout=rows.layout,
        num_micro=-(-cells // num_shards),
        shard_rows=shard_rows,
        num_shards=num_shards,
        row_tokens=rows.row_tokens,
        num_responses=most_groups * max_responses,
        num_pairs=max(1, most_groups * max_pairs),
        num_lanes=max_responses,
        longest=longest_sequence,
        row_groups=rows.row_groups,
        slots=rows.slots,
    )


def _best_fit(
    lengths: Sequence[Sequence[int]], capacity: Sequence[int], most: int
) -> list[list[int]]:
    """Best-fit decreasing: longest first, each into the fullest row that still holds it.

    Args:
      lengths: tokens of each item in every part of a row.
      capacity: tokens of every part.
      most: items of a row; 0: as many as fit.
    """
    rows: list[list[int]] = []
    sizes = np.asarray(lengths, np.int64)
    totals = [sum(x) for x in lengths]
    room = np.empty(sizes.shape, np.int64)
    count = np.zeros(len(sizes), np.int64)
    for item in sorted(range(len(sizes)), key=lambda i: (-totals[i], i)):
        left = room[: len(rows)] - sizes[item]
        holds = (left >= 0).all(axis=1)
        if most:
            holds = holds & (count[: len(rows)] < most)
        fits = np.flatnonzero(holds)
        if fits.size:
            row = int(fits[np.argmin(left[fits].sum(axis=1))])
            rows[row].append(item)
        else:
            row = len(rows)
            rows.append([item])
            room[row] = capacity
        room[row] -= sizes[item]
        count[row] += 1
    return rows


def _separate_units(
    prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]], shape: PackShape
) -> list[list[list[Segment]]]:
    """The rows of each group, one for each response: they share a cell, so that a pair is whole."""
    longest = max(x + max(ys) for x, ys in zip(prompt_lengths, response_lengths, strict=True))
    if longest > shape.row_tokens:
        raise ValueError(f"a sequence of {longest} tokens does not fit a row of {shape.row_tokens}")
    return [[[Segment(g, (k,))] for k in range(len(ys))] for g, ys in enumerate(response_lengths)]


def _shared_units(
    prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]], shape: PackShape
) -> list[list[list[Segment]]]:
    """Rows that hold groups one after another, each a unit of its own."""
    capacity = shape.part_tokens
    parts = []
    for prompt, responses in zip(prompt_lengths, response_lengths, strict=True):
        # a group's tokens in every part of a row: all in one, or each response in a slot of its own
        tokens = (prompt + sum(responses),)
        if shape.slots is not None:
            empty = (0,) * (shape.num_lanes - len(responses))
            tokens = (prompt, *responses, *empty)
        if any(n > room for n, room in zip(tokens, capacity, strict=True)):
            raise ValueError(
                f"a group of {' + '.join(map(str, tokens))} tokens does not fit a row of {capacity}"
            )
        parts.append(tokens)
    return [
        [[Segment(g, tuple(range(len(response_lengths[g])))) for g in row]]
        for row in _best_fit(parts, capacity, shape.row_groups)
    ]


def plan_step(
    prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]], shape: PackShape
) -> StepPlan:
    """Assigns a step's groups to rows and cells, from lengths alone.

    Args:
      prompt_lengths: |x| of each group.
      response_lengths: |y_k| of each group.
      shape: what the plan must fit.
    Raises: ValueError if a group is longer than a row, or the step needs more than M micro-batches.
    """
    make_units = _shared_units
    if shape.layout == "separate":
        make_units = _separate_units
    units = make_units(prompt_lengths, response_lengths, shape)
    cells: list[list[list[Segment]]] = [[]]
    for unit in units:
        if len(cells[-1]) + len(unit) > shape.shard_rows:
            cells.append([])
        cells[-1].extend(unit)
    if len(cells) > shape.num_micro * shape.num_shards:
        raise ValueError(
            f"{len(cells)} cells of rows do not fit {shape.num_micro} x {shape.num_shards}"
        )
    cells += [[] for _ in range(-len(cells) % shape.num_shards)]
    return StepPlan(
        cells=[cells[i : i + shape.num_shards] for i in range(0, len(cells), shape.num_shards)],
        rows_used=sum(len(unit) for unit in units),
        ideal_tokens=sum(prompt_lengths) + sum(map(sum, response_lengths)),
    )


def by_response(
    plan: StepPlan, response_lengths: Sequence[Sequence[int]], values: np.ndarray
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Per-token values [M, A, T] of all shards, response by response.

    Yields ((group of the step, response), values [|y|]).
    """
    # micro-batches past the plan are padding
    for cells, of_micro in zip(plan.cells, values, strict=False):
        for cell, of_cell in zip(cells, of_micro, strict=True):
            end = 0
            for group, k in [
                (segment.group, k) for row in cell for segment in row for k in segment.branches
            ]:
                size = response_lengths[group][k]
                yield (group, k), of_cell[end : end + size]
                end += size


def response_numbers(plan: StepPlan) -> Iterator[tuple[tuple[int, int], tuple[int, int, int]]]:
    """Where the values of each response lie in arrays [M, A, S].

    Yields ((group of the step, response), (micro-batch, data shard, number)).
    """
    for micro, cells in enumerate(plan.cells):
        for shard, cell in enumerate(cells):
            number = 0
            for row in cell:
                for segment in row:
                    for k in segment.branches:
                        yield (segment.group, k), (micro, shard, number)
                        number += 1


def waste(plan: StepPlan, shape: PackShape) -> tuple[float, float]:
    """(packing, rounding) of a plan.

    packing: tokens of the used rows over the ideal; rounding: tokens of all rows over the used.
    """
    used = plan.rows_used * shape.row_tokens
    computed = len(plan.cells) * shape.num_shards * shape.shard_rows * shape.row_tokens
    return used / plan.ideal_tokens, computed / used
