"""Token groups -> PackedBatch: prefix-shared rows with static shapes; and the attention rule.

A row holds groups one after another, each `[x | y_1 | y_2 | ... | y_K]`: the prompt once, then its
responses. K = 2 is the DPO triple. Packing is a pure function of one step's groups.

In the layout "slots" a row has 1 + K parts of fixed lengths, [x x' ... | y_1 y_1' ... | y_2 y_2' ...]: the same tokens under the
same rule in another order, for a kernel with a static mask. In "separate", the oracle, a row is one prompt with one response.

Legend: M micro-batches of a step, A data shards, R rows of a micro-batch over all shards, L row length,
T scored tokens, S responses and P pairs of one shard's micro-batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dpojax.data.groups import TokenGroup, TokenPair


def visible(query, key, query_group, key_group, query_branch, key_branch, distance=None, window=None):
    """The one attention rule: may the query at row index `query` see the key at row index `key`?

    A key is visible iff it is not later, it belongs to the same group (0 is padding), and it is in the
    group's prompt (branch 0) or in the query's own response. Arguments broadcast against each other.

    Args:
      distance: the query's position minus the key's; positions, not row indices, for layers with a window.
      window: a key is seen only at a distance below it; None: at any.
    """
    same_group = (key_group == query_group) & (query_group != 0)
    seen = (key <= query) & same_group & ((key_branch == 0) | (key_branch == query_branch))
    return seen if window is None else seen & (distance < window)


class PackedBatch(NamedTuple):
    """One optimizer step's groups in prefix-shared rows, cut into micro-batches of one static shape.

    Indices stay inside a data shard: shard a owns rows [a R/A, (a+1) R/A) of every micro-batch.
    """

    tokens: Int[Array, "M R L"]
    positions: Int[Array, "M R L"]  # each response restarts at |x|
    group: Int[Array, "M R L"]  # counted from 1 in each row; 0 = padding
    branch: Int[Array, "M R L"]  # 0 = prompt, k = the k-th response
    # scored tokens, first in, no gaps; `weight` is 0 at padding
    predictor: Int[Array, "M A T"]  # index into the shard's R/A * L tokens of the token that predicts this one
    target: Int[Array, "M A T"]
    slot: Int[Array, "M A T"]  # the response that it belongs to, < S
    weight: Float[Array, "M A T"]  # 0 at formatting tokens too
    ref_logps: Float[Array, "M A T"] | None  # cached log ref(target | prefix), nats
    # pairs; `valid` is False at padding
    chosen: Int[Array, "M A P"]  # response slot
    rejected: Int[Array, "M A P"]
    pair_weight: Float[Array, "M A P"]
    soft_label: Float[Array, "M A P"]
    margin: Float[Array, "M A P"]
    row_id: Int[Array, "M A P"]  # row of the source, -1 at padding
    valid: Bool[Array, "M A P"]
    # response slots
    lengths: Int[Array, "M A S"]  # scored tokens that count
    slot_row: Int[Array, "M A S"]  # row of the source, -1 at padding
    # of the whole step, from the host's plan: the same on every process
    num_micro: Int[Array, ""]  # micro-batches in use, <= M
    num_scored: Int[Array, " M"]  # most scored tokens of any shard
    num_pairs: Int[Array, ""]
    num_chosen_tokens: Int[Array, ""]  # sum of |y_w| over the step's pairs
    num_response_tokens: Int[Array, ""]  # sum of |y| over the step's responses; as |y_w| above, of tokens that count
    num_tokens: Int[Array, ""]  # sum of |x| + |y_1| + ... over the step's groups


@dataclasses.dataclass(frozen=True)
class PackShape:
    """The static shape of a PackedBatch, and what attention kernels may rely on in it."""

    layout: str  # "shared", "slots" or "separate"
    num_micro: int  # M
    shard_rows: int  # R / A
    num_shards: int  # A
    row_tokens: int  # L
    num_slots: int  # S
    num_pairs: int  # P
    num_lanes: int = 1  # most responses of a group
    longest: int = 0  # most tokens of a prompt and one response; 0: as many as a row
    row_groups: int = 0  # most groups of a row; 0: as many as fit
    slots: tuple[int, int] | None = None  # tokens of the prompts' and of each response's part of a row, in layout "slots"


def abstract_batch(shape: PackShape, *, with_ref: bool) -> PackedBatch:
    """The ShapeDtypeStructs of a global batch: what `pack_step` makes, of all shards together."""
    m, a, rows = shape.num_micro, shape.num_shards, shape.num_shards * shape.shard_rows
    scored = shape.shard_rows * shape.row_tokens
    sizes = {"L": (m, rows, shape.row_tokens), "T": (m, a, scored), "P": (m, a, shape.num_pairs), "S": (m, a, shape.num_slots)}
    kinds = {
        "L": {"tokens": np.int32, "positions": np.int32, "group": np.int32, "branch": np.int32},
        "T": {"predictor": np.int32, "target": np.int32, "slot": np.int32, "weight": np.float32, "ref_logps": np.float32},
        "P": {"chosen": np.int32, "rejected": np.int32, "pair_weight": np.float32, "soft_label": np.float32}
        | {"margin": np.float32, "row_id": np.int32, "valid": np.bool_},
        "S": {"lengths": np.int32, "slot_row": np.int32},
    }
    fields: dict = {k: jax.ShapeDtypeStruct(sizes[s], kind) for s, own in kinds.items() for k, kind in own.items()}
    if not with_ref:
        fields["ref_logps"] = None
    scalars = ("num_micro", "num_pairs", "num_chosen_tokens", "num_response_tokens", "num_tokens")
    fields |= {k: jax.ShapeDtypeStruct((), np.int32) for k in scalars}
    return PackedBatch(**fields, num_scored=jax.ShapeDtypeStruct((m,), np.int32))


class Segment(NamedTuple):
    """Part of a row: one group of the step (by position) with some of its responses."""

    group: int
    branches: tuple[int, ...]


class StepPlan(NamedTuple):
    """Where each group of a step goes: the rows of each (micro-batch, shard) cell."""

    cells: list[list[list[list[Segment]]]]  # [micro][shard][row] -> segments
    rows_used: int
    ideal_tokens: int


def _best_fit(lengths: Sequence[Sequence[int]], capacity: Sequence[int], most: int) -> list[list[int]]:
    """Best-fit decreasing: longest first, each into the fullest row that still holds it.

    Args:
      lengths: tokens of each item in every part of a row.
      capacity: tokens of every part.
      most: items of a row; 0: as many as fit.
    """
    rows: list[list[int]] = []
    sizes, totals = np.asarray(lengths, np.int64), [sum(x) for x in lengths]
    room, count = np.empty(sizes.shape, np.int64), np.zeros(len(sizes), np.int64)
    for item in sorted(range(len(sizes)), key=lambda i: (-totals[i], i)):
        left = room[: len(rows)] - sizes[item]
        holds = (left >= 0).all(axis=1)
        fits = np.flatnonzero(holds & (count[: len(rows)] < most) if most else holds)
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


def _parts(prompt: int, responses: Sequence[int], shape: PackShape) -> tuple[int, ...]:
    """A group's tokens in every part of a row: all in one, or its prompt and each response in a slot of its own."""
    return (prompt + sum(responses),) if shape.slots is None else (prompt, *responses)


def plan_step(prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]], shape: PackShape) -> StepPlan:
    """Assigns a step's groups to rows and cells, from lengths alone: every process finds the same plan.

    Args:
      prompt_lengths: |x| of each group.
      response_lengths: |y_k| of each group.
      shape: what the plan must fit.
    Raises: ValueError if a group is longer than a row, or the step needs more than M micro-batches.
    """
    totals = [x + sum(ys) for x, ys in zip(prompt_lengths, response_lengths, strict=True)]
    if shape.layout == "separate":
        longest = max(x + max(ys) for x, ys in zip(prompt_lengths, response_lengths, strict=True))
        if longest > shape.row_tokens:
            raise ValueError(f"a sequence of {longest} tokens does not fit a row of {shape.row_tokens}")
        # A unit is a list of rows that must share a cell, so that a pair is never torn apart.
        units = [[[Segment(g, (k,))] for k in range(len(ys))] for g, ys in enumerate(response_lengths)]
    else:
        capacity = (shape.row_tokens,) if shape.slots is None else (shape.slots[0], *[shape.slots[1]] * shape.num_lanes)
        parts = [_parts(x, ys, shape) for x, ys in zip(prompt_lengths, response_lengths, strict=True)]
        parts = [p + (0,) * (len(capacity) - len(p)) for p in parts]  # groups with fewer responses than slots
        for own in parts:
            if any(n > room for n, room in zip(own, capacity, strict=True)):
                raise ValueError(f"a group of {' + '.join(map(str, own))} tokens does not fit a row of {capacity}")
        fitted = _best_fit(parts, capacity, shape.row_groups)
        units = [[[Segment(g, tuple(range(len(response_lengths[g])))) for g in row]] for row in fitted]
    cells: list[list[list[Segment]]] = [[]]
    for unit in units:
        if len(cells[-1]) + len(unit) > shape.shard_rows:
            cells.append([])
        cells[-1].extend(unit)
    if len(cells) > shape.num_micro * shape.num_shards:
        raise ValueError(f"{len(cells)} cells of rows do not fit {shape.num_micro} x {shape.num_shards}")
    cells += [[] for _ in range(-len(cells) % shape.num_shards)]
    micro = [cells[i : i + shape.num_shards] for i in range(0, len(cells), shape.num_shards)]
    return StepPlan(micro, sum(len(unit) for unit in units), sum(totals))


def step_shape(
    *,
    layout: str,
    row_tokens: int,
    shard_rows: int,
    num_shards: int,
    num_groups: int,
    max_responses: int,
    max_pairs: int,
    longest: Sequence[int],
    longest_sequence: int = 0,
    row_groups: int = 0,
    slots: tuple[int, int] | None = None,
) -> PackShape:
    """The smallest static shape that holds every possible step of `num_groups` groups.

    Args:
      max_responses, max_pairs: of one group.
      longest: total tokens of the longest groups of the data, longest first (num_groups of them are used). In slots, the
        shares of a row's slots that the fullest groups take, summed, times row_tokens.
      longest_sequence, row_groups, slots: as in PackShape.
    """
    if layout != "separate":
        # Best fit leaves no two rows that would fit one: it opens fewer than 2 total / L + 1, and as many again for each
        # full count of groups.
        full = 2 * num_groups // row_groups + 1 if row_groups else 0
        rows = min(num_groups, 2 * sum(longest[:num_groups]) // row_tokens + 1 + full)
        cells = -(-rows // shard_rows)
    else:
        shard_rows = -(-shard_rows // max_responses) * max_responses
        cells = -(-num_groups // (shard_rows // max_responses))
    return PackShape(
        layout=layout,
        num_micro=-(-cells // num_shards),
        shard_rows=shard_rows,
        num_shards=num_shards,
        row_tokens=row_tokens,
        num_slots=num_groups * max_responses,
        num_pairs=max(1, num_groups * max_pairs),
        num_lanes=max_responses,
        longest=longest_sequence,
        row_groups=row_groups,
        slots=slots,
    )


def pack_step(
    plan: StepPlan,
    shape: PackShape,
    get_group: Callable[[int], TokenGroup],
    *,
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[Sequence[int]],
    counted_lengths: Sequence[Sequence[int]],
    pairs: Sequence[Sequence[TokenPair]],
    shards: Sequence[int],
    pad_id: int,
    with_ref: bool,
) -> PackedBatch:
    """Fills a plan with tokens. Only the groups of `shards` are asked for; shard axes have len(shards).

    Args:
      plan, shape: from `plan_step` and `step_shape`.
      get_group: position in the step -> its tokens.
      prompt_lengths, response_lengths, counted_lengths, pairs: of every group of the step, for the denominators;
        formatting tokens are in response_lengths only.
      shards: the data shards that this process holds.
      pad_id: token at padding; never seen by any other token.
      with_ref: fill `ref_logps` from the groups.
    """
    m, a, rows, length = shape.num_micro, len(shards), shape.shard_rows, shape.row_tokens
    token_arrays = {k: np.zeros((m, a, rows, length), np.int32) for k in ("tokens", "positions", "group", "branch")}
    token_arrays["tokens"] += pad_id
    scored_size = rows * length
    scored = {k: np.zeros((m, a, scored_size), np.int32) for k in ("predictor", "target", "slot")}
    scored |= {k: np.zeros((m, a, scored_size), np.float32) for k in ("weight", "ref_logps")}
    pair = {k: np.zeros((m, a, shape.num_pairs), np.int32) for k in ("chosen", "rejected", "row_id")}
    pair |= {k: np.zeros((m, a, shape.num_pairs), np.float32) for k in ("pair_weight", "soft_label", "margin")}
    pair["valid"] = np.zeros((m, a, shape.num_pairs), bool)
    pair["row_id"] -= 1
    lengths, slot_row = np.zeros((m, a, shape.num_slots), np.int32), np.full((m, a, shape.num_slots), -1, np.int32)
    num_scored = np.zeros(m, np.int32)

    for i, cells in enumerate(plan.cells):
        for cell in cells:
            count = sum(response_lengths[s.group][k] for row in cell for s in row for k in s.branches)
            num_scored[i] = max(num_scored[i], count)
        for j, shard in enumerate(shards):
            cell_tokens = {name: array[i, j] for name, array in token_arrays.items()}
            cell_scored = {name: array[i, j] for name, array in scored.items()}
            slots = _fill_rows(cells[shard], get_group, cell_tokens, cell_scored, lengths[i, j], shape, with_ref)
            for (g, _), slot in slots.items():
                slot_row[i, j, slot] = get_group(g).row
            _fill_pairs(slots, get_group, {name: array[i, j] for name, array in pair.items()})

    chosen_tokens = sum(counted_lengths[g][p.chosen] for g, ps in enumerate(pairs) for p in ps)
    merged = {k: v.reshape(m, a * rows, length) for k, v in token_arrays.items()}
    ref_logps = scored.pop("ref_logps")
    return PackedBatch(
        **merged,
        **scored,
        ref_logps=ref_logps if with_ref else None,
        **pair,
        lengths=lengths,
        slot_row=slot_row,
        num_micro=np.int32(len(plan.cells)),
        num_scored=num_scored,
        num_pairs=np.int32(sum(map(len, pairs))),
        num_chosen_tokens=np.int32(chosen_tokens),
        num_response_tokens=np.int32(sum(map(sum, counted_lengths))),
        num_tokens=np.int32(sum(prompt_lengths) + sum(map(sum, response_lengths))),
    )  # pyright: ignore[reportArgumentType]  # numpy arrays until they are put on the devices


def _fill_rows(cell, get_group, tokens, scored, lengths, shape: PackShape, with_ref) -> dict[tuple[int, int], int]:
    """Writes one cell's rows. Returns the response slot of each (group, branch)."""
    slots: dict[tuple[int, int], int] = {}
    end = 0  # of the scored tokens
    for r, row in enumerate(cell):
        # Where each branch goes on: all in one part, or each in a slot of its own.
        part = [0] * (1 + shape.num_lanes) if shape.slots is None else list(range(1 + shape.num_lanes))
        columns = [0] if shape.slots is None else [0, *(shape.slots[0] + k * shape.slots[1] for k in range(shape.num_lanes))]
        for number, segment in enumerate(row, 1):
            group = get_group(segment.group)
            size = len(group.prompt)
            last_prompt = r * tokens["tokens"].shape[1] + columns[0] + size - 1
            pieces = [(0, group.prompt)] + [(k + 1, group.responses[k]) for k in segment.branches]
            for branch, ids in pieces:
                column = columns[part[branch]]
                place = (r, slice(column, column + len(ids)))
                tokens["tokens"][place] = ids
                tokens["positions"][place] = np.arange(len(ids)) + (size if branch else 0)
                tokens["group"][place] = number
                tokens["branch"][place] = branch
                if branch:
                    slot = slots[segment.group, branch - 1] = len(slots)
                    counted = np.ones(len(ids), bool) if group.counted is None else group.counted[branch - 1]
                    lengths[slot] = counted.sum()
                    here = slice(end, end + len(ids))
                    end += len(ids)
                    # The first response token is predicted at the last prompt token, in every branch.
                    first = r * tokens["tokens"].shape[1] + column
                    scored["predictor"][here] = np.arange(first - 1, first + len(ids) - 1)
                    scored["predictor"][here.start] = last_prompt
                    scored["target"][here] = ids
                    scored["slot"][here] = slot
                    scored["weight"][here] = counted
                    if with_ref:
                        assert group.ref_logps is not None
                        scored["ref_logps"][here] = group.ref_logps[branch - 1]
                columns[part[branch]] += len(ids)
    return slots


def by_response(
    plan: StepPlan, response_lengths: Sequence[Sequence[int]], values: np.ndarray
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """Per-token values [M, A, T] of all shards, response by response: ((group of the step, response), [|y|])."""
    for cells, of_micro in zip(plan.cells, values, strict=False):  # micro-batches past the plan are padding
        for cell, of_cell in zip(cells, of_micro, strict=True):
            end = 0
            for group, k in [(segment.group, k) for row in cell for segment in row for k in segment.branches]:
                size = response_lengths[group][k]
                yield (group, k), of_cell[end : end + size]
                end += size


def _fill_pairs(slots, get_group, pair) -> None:
    """Writes the pairs of the groups whose responses `slots` holds."""
    n = 0
    for g in dict.fromkeys(g for g, _ in slots):
        group = get_group(g)
        for p in group.pairs:
            pair["chosen"][n] = slots[g, p.chosen]
            pair["rejected"][n] = slots[g, p.rejected]
            pair["pair_weight"][n] = p.weight
            pair["soft_label"][n] = p.soft_label
            pair["margin"][n] = p.margin
            pair["row_id"][n] = group.row
            pair["valid"][n] = True
            n += 1


def waste(plan: StepPlan, shape: PackShape) -> tuple[float, float]:
    """(packing, rounding): tokens of the used rows over the ideal; tokens of all rows over the used."""
    used = plan.rows_used * shape.row_tokens
    computed = len(plan.cells) * shape.num_shards * shape.shard_rows * shape.row_tokens
    return used / plan.ideal_tokens, computed / used
