"""The groups that the start-up check takes: as rows packed for training, and as plain sequences.

Legend: M micro-batches, A data shards, T scored tokens and U tokens of a shard, S sequences, L
  their
length, Q response tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dpojax.data.batches import PackGroups
from dpojax.data.packing import PackedBatch, PackShape
from dpojax.data.row_filling import StepLengths, pack_step
from dpojax.data.row_plan import Segment, StepPlan, by_response, plan_step
from dpojax.data.token_groups import TokenGroup, TokenPair

# of the groups that are checked, on every data shard, as far as they fit a micro-batch
LEAST_TOKENS = 1024

MOST_GROUPS = 8  # of a data shard


def positions_of_shards(pack: PackGroups, shape: PackShape) -> list[list[int]]:
    """The groups that each data shard checks, by their positions in the index.

    Of those at the start, short ones come first.

    Two groups that fit one row are wanted, so that a leak between them shows.
    """
    index = pack.index
    shards = shape.num_shards
    first = range(min(len(index.rows), max(64, 4 * shards)))
    total = {i: int(index.prompt_lengths[i]) + sum(index.responses(i)) for i in first}
    half = shape.row_tokens // 2
    short = [i for i in first if total[i] <= half]
    long = sorted((i for i in first if total[i] > half), key=lambda i: total[i])
    checked: list[list[int]] = [[] for _ in range(shards)]
    for place, i in enumerate([*short, *long]):
        of_shard = checked[place % shards]
        enough = len(of_shard) >= 2 and sum(total[j] for j in of_shard) >= max(
            LEAST_TOKENS, shape.row_tokens // 2
        )
        if (
            not enough
            and len(of_shard) < MOST_GROUPS
            and _plan(index, [*of_shard, i], shape) is not None
        ):
            of_shard.append(i)
    return checked


def _plan(index, positions: Sequence[int], shape: PackShape) -> StepPlan | None:
    """Where the groups of one data shard go in one micro-batch; None where they do not fit."""
    prompts = [int(index.prompt_lengths[i]) for i in positions]
    shard = dataclasses.replace(shape, num_micro=1, num_shards=1)
    try:
        return plan_step(prompts, [index.responses(i) for i in positions], shard)
    except ValueError:
        return None


def _plan_shards(index, checked: Sequence[Sequence[int]], shape: PackShape) -> StepPlan:
    """One micro-batch of the groups that each data shard checks, counted through all shards."""
    cells = []
    start = 0
    for positions in checked:
        rows = []
        plan = None
        if positions:
            plan = _plan(index, positions, shape)
        if plan is not None:
            rows = plan.cells[0][0]
        cells.append([[Segment(start + s.group, s.branches) for s in row] for row in rows])
        start += len(positions)
    return StepPlan(cells=[cells], rows_used=sum(map(len, cells)), ideal_tokens=0)


class CheckedRows(NamedTuple):
    """The groups of the data that are checked, and the rows that training would pack them in."""

    groups: list[TokenGroup]
    plan: StepPlan
    batch: PackedBatch  # one micro-batch, of all data shards
    shards: int


def checked_rows(pack: PackGroups) -> CheckedRows:
    """The first groups of the data, packed as in training, for every data shard."""
    index = pack.index
    most_pairs = int(np.diff(index.pair_offsets).max(initial=1))
    shape = dataclasses.replace(
        pack.shape,
        num_micro=1,
        # A step may take fewer groups than are checked.
        num_responses=max(pack.shape.num_responses, MOST_GROUPS * pack.shape.num_lanes),
        num_pairs=max(pack.shape.num_pairs, MOST_GROUPS * most_pairs),
    )
    checked = positions_of_shards(pack, shape)
    positions = [i for of_shard in checked for i in of_shard]
    groups = [pack.token_group(i) for i in positions]
    plan = _plan_shards(index, checked, shape)
    lengths = StepLengths(
        prompts=[len(group.prompt) for group in groups],
        responses=[[len(ids) for ids in group.responses] for group in groups],
        counted=[index.counted(i) for i in positions],
        pairs=[index.pairs(i) for i in positions],
    )
    batch = pack_step(
        plan,
        shape,
        lambda g: groups[g],
        lengths,
        shards=range(shape.num_shards),
        pad_id=pack.pad_id,
        with_ref=False,
    )
    return CheckedRows(groups, plan, batch, shape.num_shards)


class Sequences(NamedTuple):
    """The same groups as rows of one sequence each, made from the data without any packing."""

    tokens: np.ndarray  # [S, L]
    predictor: np.ndarray  # [Q], index into the S L tokens
    target: np.ndarray  # [Q]
    lengths: dict[tuple[int, int], int]  # (group, response) -> |y|, in the order of Q


def plain_sequences(groups: Sequence[TokenGroup], *, multiple: int) -> Sequences:
    """Every prompt with every response; the number of rows is a multiple of the data shards."""
    pairs = [(g, k) for g, group in enumerate(groups) for k in range(len(group.responses))]
    sequences = [np.concatenate([groups[g].prompt, groups[g].responses[k]]) for g, k in pairs]
    length = -(-max(map(len, sequences)) // 128) * 128
    tokens = np.zeros((-(-len(sequences) // multiple) * multiple, length), np.int32)
    predictor = []
    target = []
    for row, ((g, _), ids) in enumerate(zip(pairs, sequences, strict=True)):
        tokens[row, : len(ids)] = ids
        before = np.arange(len(groups[g].prompt), len(ids)) - 1
        predictor.append(row * length + before)
        target.append(ids[before + 1])
    lengths = {(g, k): len(groups[g].responses[k]) for g, k in pairs}
    return Sequences(tokens, np.concatenate(predictor), np.concatenate(target), lengths)


def faults_in_rows(batch: PackedBatch, plan: StepPlan, groups: Sequence[TokenGroup]) -> list[str]:
    """What a packed batch of all data shards says that its groups do not.

    Exact, whatever the precision: every response must stand behind its prompt, each token at its
    position, predicted by the token before it, and every pair must name its responses.
    """
    rows = _PackedRows(batch, plan, groups)
    faults = []
    for g, group in enumerate(groups):
        for k in range(len(group.responses)):
            faults += [
                f"row {group.row}, response {k + 1}: {name}" for name in rows.faults(g, group, k)
            ]
        for pair in group.pairs:
            if not rows.has_pair(g, group, pair):
                faults.append(
                    f"row {group.row}: no pair has response {pair.chosen + 1} chosen and"
                    f" {pair.rejected + 1} rejected"
                )
    expected = sum(len(group.pairs) for group in groups)
    if int(batch.valid.sum()) != expected:
        faults.append(f"{int(batch.valid.sum())} pairs where {expected} belong")
    return faults


class _PackedRows:
    """A packed batch, read response by response."""

    def __init__(self, batch: PackedBatch, plan: StepPlan, groups: Sequence[TokenGroup]):
        shards = batch.predictor.shape[1]

        def flat(x):
            return np.asarray(x).reshape(x.shape[0], shards, -1)

        self.batch = batch
        self.tokens = flat(batch.tokens)  # [M, A, U], as are the next three
        self.positions = flat(batch.positions)
        self.group = flat(batch.group)
        self.branch = flat(batch.branch)
        self.row = np.broadcast_to(  # [A, U]
            np.arange(self.tokens.shape[-1]) // batch.tokens.shape[-1], self.tokens.shape[1:]
        )
        lengths = [[len(ids) for ids in group.responses] for group in groups]

        def read(values):
            return dict(by_response(plan, lengths, np.asarray(values)))

        # (group, response) -> its scored tokens
        self.target = read(batch.target)
        self.predictor = read(batch.predictor)
        self.response = read(batch.response)
        self.weight = read(batch.weight)
        self.cell = {}  # (group, response) -> (micro-batch, shard)
        for m, cells in enumerate(plan.cells):
            for a, cell in enumerate(cells):
                for segment in (segment for row in cell for segment in row):
                    for k in segment.branches:
                        self.cell[segment.group, k] = (m, a)
        self.taken = set()  # (cell, row, number in the row, response) of what was read

    def faults(self, g: int, group: TokenGroup, k: int) -> list[str]:
        """What is wrong with response k of a group."""
        ids = group.responses[k]
        cell = self.cell[g, k]
        predictor = self.predictor[g, k]
        row = self.row[cell[1]][predictor[0]]
        number = self.group[cell][predictor[0]]
        in_group = (self.row[cell[1]] == row) & (self.group[cell] == number)
        prompt = in_group & (self.branch[cell] == 0)
        answer = in_group & (self.branch[cell] == k + 1)
        counted = np.ones(len(ids))
        if group.counted is not None:
            counted = group.counted[k]
        size = len(group.prompt)
        before = [np.flatnonzero(prompt)[-1:].sum(), *np.flatnonzero(answer)[:-1]]
        place = (cell, row, number, k)
        holds = {
            "the targets are not its tokens": _equal(self.target[g, k], ids),
            "its prompt is not the prompt": _equal(self.tokens[cell][prompt], group.prompt),
            "its tokens are not its tokens": _equal(self.tokens[cell][answer], ids),
            "the prompt's positions are wrong": _equal(
                self.positions[cell][prompt], np.arange(size)
            ),
            "its positions are wrong": _equal(
                self.positions[cell][answer], size + np.arange(len(ids))
            ),
            "a token is predicted at the wrong place": _equal(predictor, before),
            "its weights are wrong": _equal(self.weight[g, k], counted),
            "its tokens count for several responses": len(set(self.response[g, k].tolist())) == 1,
            "another group has its number": number > 0 and place not in self.taken,
        }
        self.taken.add(place)
        return [name for name, right in holds.items() if not right]

    def has_pair(self, g: int, group: TokenGroup, pair: TokenPair) -> bool:
        """Whether the batch holds this pair of a group."""
        cell = self.cell[g, pair.chosen]
        in_group = (self.batch.row_id[cell] == group.row) & self.batch.valid[cell]
        chosen = self.batch.chosen[cell] == int(self.response[g, pair.chosen][0])
        rejected = self.batch.rejected[cell] == int(self.response[g, pair.rejected][0])
        return bool((in_group & chosen & rejected).any())


def _equal(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def with_other_tokens(batch: PackedBatch, shards: int) -> tuple[PackedBatch, np.ndarray]:
    """The batch with other tokens wherever a row's last response cannot see.

    In each row the last group keeps its prompt and the first half of its last response. Padding,
    groups before it, other responses, and what follows in the response itself all change; the
    targets stay. Second, which scored tokens therefore keep their log-probs: [A, T].
    """
    tokens, group, branch = (np.array(x[0]) for x in (batch.tokens, batch.group, batch.branch))
    keep = np.zeros(tokens.shape, bool)
    for r in range(len(tokens)):
        last = group[r] == group[r].max()
        answer = np.flatnonzero(last & (branch[r] == branch[r][last].max()))
        if group[r].max():
            keep[r] = last & (branch[r] == 0)
            keep[r, answer[: len(answer) // 2]] = True
    ids = np.unique(tokens[group > 0])
    rank = np.searchsorted(ids, tokens) % len(ids)
    changed = np.where(
        keep, tokens, ids[(rank + 1 + np.arange(tokens.size).reshape(tokens.shape) % 7) % len(ids)]
    )
    predictor = np.asarray(batch.predictor[0])
    # A prompt that is kept predicts the first token of every response behind it.
    same = np.take_along_axis(keep.reshape(shards, -1), predictor, axis=1)
    used = np.arange(predictor.shape[1]) < np.array(
        [[np.count_nonzero(b)] for b in branch.reshape(shards, -1)]
    )
    return batch._replace(tokens=changed[None].astype(np.int32)), same & used


def of_shards(batch: PackedBatch, held: Sequence[int], shards: int) -> PackedBatch:
    """The part of a batch of all data shards that this process holds."""

    def part(x):
        if x.ndim < 2:
            return x
        return x.reshape(x.shape[0], shards, -1, *x.shape[2:])[:, list(held)].reshape(
            x.shape[0], -1, *x.shape[2:]
        )

    return jax.tree.map(part, batch)


def by_token(rows: CheckedRows, values) -> np.ndarray:
    """Token values [A, T] in the order of the plain sequences, [Q]."""
    lengths = [[len(ids) for ids in group.responses] for group in rows.groups]
    responses = sorted(by_response(rows.plan, lengths, np.asarray(values)[None]))
    return np.concatenate([values for _, values in responses])
