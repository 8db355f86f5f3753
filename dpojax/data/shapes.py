"""Lengths of the data -> the static shape of a batch that wastes least."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.data.index import Index
from dpojax.data.packing import PackShape
from dpojax.data.row_plan import RowShape, Segment, plan_step, step_shape
from dpojax.errors import ConfigError

MOST_PADDED_TOKENS = 4096  # a row longer than its step's groups and than this is a slip of the hand

# so is a step that holds its data many times over and more groups than this
MOST_REPEATED_GROUPS = 1024


class StepSizes(NamedTuple):
    """What the host knows of a step's work."""

    packing: float  # tokens of the used rows over the ideal
    rounding: float  # tokens of all computed rows over those of the used ones
    prompts: list[int]  # |x| of every group
    responses: list[list[int]]  # |y_k| of every group


def _check_repeats(setting: str, value: int, groups: int, held: int) -> None:
    """Raises ConfigError where a step holds each of the data's `held` groups many times."""
    if groups > max(MOST_REPEATED_GROUPS, 16 * held):
        raise ConfigError(
            f"{setting}={value}: the data has {held:,} groups, of which a step would hold each"
            f" {groups // held:,} times; lower it"
        )


def groups_per_step(index: Index, *, batch_size: int, batch_groups: int) -> int:
    """How many groups make a step of `batch_size` pairs.

    Where the number of pairs per group varies, it is batch_groups, or, unset, as many as hold
    batch_size pairs on average.
    Raises: ConfigError if batch_size does not fit the pairs per group.
    """
    counts = np.diff(index.pair_offsets)
    if counts.min() != counts.max():
        groups = batch_groups or max(1, round(batch_size / counts.mean()))
        _check_repeats(
            "batch_groups" if batch_groups else "batch_size",
            batch_groups or batch_size,
            groups,
            len(counts),
        )
        return groups
    if batch_groups:
        raise ConfigError(
            f"batch_groups={batch_groups}: every group holds {counts.min()} pairs; set batch_size"
            " alone"
        )
    per_group = max(1, int(counts.min()))
    _check_repeats("batch_size", batch_size, batch_size // per_group, len(counts))
    if batch_size % per_group:
        fixed = -(-batch_size // per_group) * per_group
        raise ConfigError(
            f"batch_size={batch_size}: it must be a multiple of the {per_group} pairs per group,"
            f" e.g. {fixed}"
        )
    return batch_size // per_group


class Work(NamedTuple):
    """What a layer costs on this model, in any unit: how layouts and row lengths are compared."""

    token: float = 1.0  # of a token of a row, outside attention
    pair: float = 0.0  # of a query and a key
    micro_batch: float = (
        # of a micro-batch, in tokens: adding up a gradient moves 12 bytes a parameter, a token
        # takes 6 FLOPs
        32.0
    )


class Lengths(NamedTuple):
    """The lengths of a dataset's groups, tokens."""

    prompts: np.ndarray  # [G]
    responses: list[list[int]]  # of every group

    @classmethod
    def of(cls, index: Index) -> "Lengths":
        """Those of an index, mismatched responses included."""
        return cls(
            np.asarray(index.prompt_lengths), [index.responses(i) for i in range(len(index.rows))]
        )

    def totals(self) -> np.ndarray:
        """|x| + |y_1| + ... of every group."""
        return self.prompts + np.array([sum(ys) for ys in self.responses])

    def sequences(self) -> np.ndarray:
        """|x| + |y| of every response."""
        return np.concatenate(
            [x + np.asarray(ys) for x, ys in zip(self.prompts, self.responses, strict=True)]
        )


Slots = tuple[int, int]  # tokens of the prompts' and of each response's part of a row


class Candidate(NamedTuple):
    """The rows of a shard's micro-batch, and what the sampled steps cost on them."""

    cost: float
    row_tokens: int
    shard_rows: int
    slots: Slots | None


class Steps:
    """Sampled steps of a dataset, planned on rows of any shape: what a shape would cost."""

    def __init__(
        self,
        lengths: Lengths,
        *,
        num_groups: int,
        num_shards: int,
        work: Work,
        longest: int,
        count: int = 12,
    ):
        rng = np.random.default_rng(0)
        size = len(lengths.prompts)
        draws = [rng.choice(size, min(num_groups, size), replace=False) for _ in range(count)]
        self.steps = [
            ([int(lengths.prompts[i]) for i in draw], [lengths.responses[i] for i in draw])
            for draw in draws
        ]
        self.lanes = max(map(len, lengths.responses))
        self.num_shards = num_shards
        self.work = work
        self.longest = longest

    def plans(self, row_tokens: int, slots: Slots | None = None) -> list[list[list[Segment]]]:
        """The rows of every step."""
        layout = "shared"
        if slots is not None:
            layout = "slots"
        prompts, _ = self.steps[0]
        shape = PackShape(
            layout=layout,
            num_micro=len(prompts),  # a row each: every step fits
            shard_rows=1,
            num_shards=1,
            row_tokens=row_tokens,
            num_responses=0,
            num_pairs=0,
            num_lanes=self.lanes,
            slots=slots,
        )
        return [
            [row for (cell,) in plan_step(prompts, responses, shape).cells for row in cell]
            for prompts, responses in self.steps
        ]

    def cost(
        self, rows_used: list[int], rows: int, row_tokens: int, slots: Slots | None = None
    ) -> float:
        """What the steps' micro-batches of `rows` rows a shard cost."""
        if slots is None:
            band = min(self.longest, row_tokens)
            pairs = self.lanes * (row_tokens * band - band * band / 2)
        else:
            x, y = slots
            pairs = x * x / 2 + self.lanes * (y * y / 2 + x * y)
        micro = [-(-used // (self.num_shards * rows)) for used in rows_used]
        row = row_tokens * self.work.token + pairs * self.work.pair
        return sum(
            m * (self.num_shards * rows * row + self.work.micro_batch * self.work.token)
            for m in micro
        )

    def best(self, candidates: Iterable[tuple[int, Slots | None]], most_tokens: int) -> Candidate:
        """The cheapest of the candidates (row length, slots) with any number of rows.

        Args:
          most_tokens: of a shard's micro-batch; one row at least.
        """
        priced = []
        for length, slots in candidates:
            used = [len(plan) for plan in self.plans(length, slots)]
            # more than are used are padding alone
            most_rows = min(max(1, most_tokens // length), max(1, *used))
            for rows in range(1, most_rows + 1):
                cost = self.cost(used, rows, length, slots)
                priced.append(Candidate(cost, length, rows, slots))
        return min(priced, key=lambda candidate: candidate.cost)


def _row_candidates(longest: int, most_tokens: int, row_tokens: int) -> list[tuple[int, None]]:
    """The lengths of shared rows that hold every group: multiples of 128, or `row_tokens`."""
    if row_tokens:
        return [(row_tokens, None)]
    first = -(-longest // 128) * 128
    last = max(first, min(2048, most_tokens))
    return [(n, None) for n in range(first, last + 1, 128)]


def _slot_candidates(
    lengths: Lengths, most_tokens: int, row_tokens: int
) -> list[tuple[int, Slots | None]]:
    """Rows of slots that hold every group: multiples of 128 in about the proportion of the data."""
    lanes = max(map(len, lengths.responses))
    mean_x = lengths.prompts.mean()
    mean_y = np.mean([max(ys) for ys in lengths.responses])
    least_x = -(-int(lengths.prompts.max()) // 128) * 128
    least_y = -(-max(max(ys) for ys in lengths.responses) // 128) * 128
    limit = max(row_tokens or most_tokens, least_x + lanes * least_y)
    candidates: list[tuple[int, Slots | None]] = []
    for y in range(least_y, min(limit, 4096) // lanes + 1, 128):
        middle = round(y * mean_x / mean_y / 128) * 128
        for x in sorted({max(least_x, middle + d) for d in (-256, -128, 0, 128)}):
            length = x + lanes * y
            if length <= min(limit, 4096) and (not row_tokens or length == row_tokens):
                candidates.append((length, (x, y)))
    if not candidates and not row_tokens:
        candidates.append((least_x + lanes * least_y, (least_x, least_y)))
    return candidates


class RowSearch(NamedTuple):
    """What the cheapest rows are searched for."""

    lengths: list[Lengths]  # of every dataset, training first
    layout: str
    num_groups: int
    num_shards: int
    micro_batch_tokens: int
    row_tokens: int
    work: Work

    @property
    def lanes(self) -> int:
        """Most responses of a group."""
        return max(max(map(len, lengths.responses)) for lengths in self.lengths)

    @property
    def longest_sequence(self) -> int:
        """Most tokens of a prompt and one response."""
        return int(max(lengths.sequences().max() for lengths in self.lengths))

    def totals(self) -> list[np.ndarray]:
        """Tokens of what must stand in one row, of every dataset: a group, or one sequence."""
        if self.layout == "separate":
            return [lengths.sequences() for lengths in self.lengths]
        return [lengths.totals() for lengths in self.lengths]

    def steps(self, count: int = 12) -> Steps:
        """Sampled steps of the training data."""
        return Steps(
            self.lengths[0],
            num_groups=self.num_groups,
            num_shards=self.num_shards,
            work=self.work,
            longest=self.longest_sequence,
            count=count,
        )

    def separate_rows(self, longest: int) -> RowShape:
        """Rows of one sequence each: the oracle's."""
        length = self.row_tokens or -(-longest // 128) * 128
        rows = min(max(1, self.micro_batch_tokens // length), self.num_groups * self.lanes)
        return RowShape(layout="separate", row_tokens=length, shard_rows=rows)

    def cheapest_rows(self, longest: int, *, bound_groups: bool) -> RowShape:
        """Rows of several groups, shared or in slots, of least work on the sampled steps."""
        steps = self.steps()
        candidates = []
        if self.layout != "slots":
            shared = _row_candidates(longest, self.micro_batch_tokens, self.row_tokens)
            candidates.append(steps.best(shared, self.micro_batch_tokens))
        if self.layout == "slots" or (self.layout == "auto" and self.lanes == 2):
            in_slots = self._best_slots(steps)
            if in_slots is not None:
                candidates.append(in_slots)
        if not candidates:
            raise ConfigError(
                f"data.row_tokens={self.row_tokens}: no slots of this length hold the longest"
                " prompt and responses; set 0"
            )
        best = min(candidates, key=lambda candidate: candidate.cost)
        if best.slots is not None:
            return RowShape("slots", best.row_tokens, best.shard_rows, slots=best.slots)
        row_groups = 0
        if bound_groups:
            # Every group of a row takes memory for a sequence of full length: a bound leaves many
            # short groups to the next row.
            counts = [len(row) for plan in steps.plans(best.row_tokens) for row in plan]
            row_groups = int(np.ceil(np.quantile(counts, 0.9)))
        return RowShape("shared", best.row_tokens, best.shard_rows, row_groups=row_groups)

    def _best_slots(self, steps: Steps) -> Candidate | None:
        """The cheapest rows of slots that hold the groups of every dataset; None: there are none.

        They are found on four steps and priced on all, as rows without slots are.
        """
        union = Lengths(
            np.concatenate([lengths.prompts for lengths in self.lengths]),
            [ys for lengths in self.lengths for ys in lengths.responses],
        )
        candidates = _slot_candidates(union, self.micro_batch_tokens, self.row_tokens)
        if not candidates:
            return None
        best = self.steps(count=4).best(candidates, self.micro_batch_tokens)
        rows_used = [len(plan) for plan in steps.plans(best.row_tokens, best.slots)]
        cost = steps.cost(rows_used, best.shard_rows, best.row_tokens, best.slots)
        return best._replace(cost=cost)


def make_shape(  # noqa: PLR0913  # what the rows depend on, by keyword
    indexes: Sequence[Index | Lengths],
    *,
    layout: str,
    num_groups: int,
    num_shards: int,
    micro_batch_tokens: int,
    row_tokens: int,
    work: Work = Work(),  # noqa: B008  # a constant
    bound_groups: bool = False,
) -> PackShape:
    """One static shape for the steps of every dataset in `indexes`.

    Training comes first, then evaluation.

    The row length, the rows of a micro-batch and, for "auto", the layout are those of least work on
    sampled steps of the training data.

    Args:
      layout: "shared", "slots", "separate"; "auto": slots where they cost less, for groups of two
        responses, else shared.
      micro_batch_tokens: most tokens of a micro-batch on a data shard (one row at least).
      row_tokens: 0 = any multiple of 128 that holds the longest group; else taken as it is.
      work: what tokens and scores cost.
      bound_groups: whether a row holds a bounded number of groups, for kernels that give each a
        place.
    Raises: ConfigError if row_tokens is shorter than the longest group.
    """
    lengths = [_lengths(index) for index in indexes]
    search = RowSearch(
        lengths, layout, num_groups, num_shards, micro_batch_tokens, row_tokens, work
    )
    totals = search.totals()
    longest = int(max(t.max() for t in totals))
    if row_tokens and row_tokens < longest:
        raise ConfigError(
            f"data.row_tokens={row_tokens}: the longest group has {longest} tokens; raise it or"
            " lower the limits"
        )
    most = num_groups * longest  # of a step
    if row_tokens > max(MOST_PADDED_TOKENS, most):
        raise ConfigError(
            f"data.row_tokens={row_tokens}: the groups of a step have {most} tokens at most, so"
            " that the rest of a row is padding; lower it, or set 0"
        )
    if layout == "separate":
        rows = search.separate_rows(longest)
    else:
        rows = search.cheapest_rows(longest, bound_groups=bound_groups)
    if rows.slots is not None:
        totals = [_slot_totals(each, rows.slots) * rows.row_tokens for each in lengths]
    # A step that crosses epochs holds a group twice, and more often where there are fewer groups
    # than it takes.
    repeated = [np.repeat(t, 1 + -(-num_groups // len(t))) for t in totals]
    pairs = [int(np.diff(i.pair_offsets).max()) for i in indexes if not isinstance(i, Lengths)]
    return step_shape(
        rows,
        num_shards=num_shards,
        num_groups=num_groups,
        max_responses=search.lanes,
        max_pairs=max([*pairs, 1]),
        longest=np.ceil(np.sort(np.concatenate(repeated))[::-1]).astype(int).tolist(),
        longest_sequence=search.longest_sequence,
    )


def _lengths(index: Index | Lengths) -> Lengths:
    if isinstance(index, Lengths):
        return index
    return Lengths.of(index)


def _slot_totals(lengths: Lengths, slots: Slots) -> np.ndarray:
    """The shares of a row's slots that each group fills, summed."""
    x_slot, y_slot = slots
    return np.array(
        [
            x / x_slot + sum(ys) / y_slot
            for x, ys in zip(lengths.prompts, lengths.responses, strict=True)
        ]
    )
