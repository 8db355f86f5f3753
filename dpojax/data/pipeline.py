"""Dataset -> a stream of PackedBatches: the order of the data is a pure function of (seed, step).

grain's MapDataset does shuffle -> repeat -> batch -> pack by random access, so that step i can be
made without the steps before it: resuming is starting at another index, on any number of hosts.
"""

import dataclasses
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from dpojax.data.index import Dataset, Index
from dpojax.data.packing import (
    PackedBatch,
    PackShape,
    Segment,
    TokenGroup,
    pack_step,
    plan_step,
    step_shape,
    waste,
)
from dpojax.errors import ConfigError, DataError, DpojaxError

MOST_PADDED_TOKENS = 4096  # a row longer than its step's groups and than this is a slip of the hand
MOST_REPEATED_GROUPS = 1024  # so is a step that holds its data many times over and more groups than this
RefLookup = Callable[[int, Sequence[int]], tuple[np.ndarray, ...]]  # (source row, |y_k|) -> cached token log-probs


class StepSizes(NamedTuple):
    """What the host knows of a step's work."""

    packing: float  # tokens of the used rows over the ideal
    rounding: float  # tokens of all computed rows over those of the used ones
    prompts: list[int]  # |x| of every group
    responses: list[list[int]]  # |y_k| of every group


@dataclasses.dataclass(frozen=True)
class PackGroups:
    """Positions of groups in the index -> one step's PackedBatch and its sizes. Picklable."""

    data: Dataset
    index: Index
    shape: PackShape
    shards: tuple[int, ...]
    pad_id: int
    ref_lookup: RefLookup | None = None

    def __call__(self, positions: Sequence[int]) -> "tuple[PackedBatch, StepSizes]":
        index = self.index
        prompts = [int(index.prompt_lengths[i]) for i in positions]
        responses = [index.responses(i) for i in positions]
        plan = plan_step(prompts, responses, self.shape)
        cache: dict[int, TokenGroup] = {}

        def get_group(g: int) -> TokenGroup:
            if g not in cache:
                cache[g] = self.token_group(positions[g])
            return cache[g]

        batch = pack_step(
            plan,
            self.shape,
            get_group,
            prompt_lengths=prompts,
            response_lengths=responses,
            counted_lengths=[index.counted(i) for i in positions],
            pairs=[index.pairs(i) for i in positions],
            shards=self.shards,
            pad_id=self.pad_id,
            with_ref=self.ref_lookup is not None,
        )
        return batch, StepSizes(*waste(plan, self.shape), prompts, responses)

    def token_group(self, i: int) -> TokenGroup:
        """The tokens of group i, with its mismatched response; DataError if the file changed since it was indexed."""
        index, row = self.index, int(self.index.rows[i])
        group, _ = self.data.token_group(row)
        if index.mismatched is not None:
            other, _ = self.data.token_group(int(index.mismatched[i, 0]))
            pairs = tuple(p._replace(rejected=len(group.responses)) for p in group.pairs)
            own, answer = _with_masks(group), int(index.mismatched[i, 1])
            counted = (*own, _with_masks(other)[answer])
            group = group._replace(responses=(*group.responses, other.responses[answer]), pairs=pairs, counted=counted)
        if [len(r) for r in group.responses] != index.responses(i):
            raise DataError(f"{self.data.records.where(row)}: the row changed since it was indexed; start again")
        if self.ref_lookup is not None:
            group = group._replace(ref_logps=self.ref_lookup(row, index.responses(i)))
        return group


def _with_masks(group: TokenGroup) -> tuple[np.ndarray, ...]:
    """Which tokens of each response count, also where all do."""
    return tuple(np.ones(len(r), bool) for r in group.responses) if group.counted is None else group.counted


def _check_repeats(setting: str, value: int, groups: int, held: int) -> None:
    """Raises ConfigError where a step of `groups` groups would hold each of the data's `held` ones many times."""
    if groups > max(MOST_REPEATED_GROUPS, 16 * held):
        raise ConfigError(
            f"{setting}={value}: the data has {held:,} groups, of which a step would hold each {groups // held:,} times; lower it"
        )


def groups_per_step(index: Index, *, batch_size: int, batch_groups: int) -> int:
    """How many groups make a step of `batch_size` pairs.

    Where the number of pairs per group varies, it is batch_groups, or, unset, as many as hold batch_size pairs on average.
    Raises: ConfigError if batch_size does not fit the pairs per group.
    """
    counts = np.diff(index.pair_offsets)
    if counts.min() != counts.max():
        groups = batch_groups or max(1, round(batch_size / counts.mean()))
        _check_repeats("batch_groups" if batch_groups else "batch_size", batch_groups or batch_size, groups, len(counts))
        return groups
    if batch_groups:
        raise ConfigError(f"batch_groups={batch_groups}: every group holds {counts.min()} pairs; set batch_size alone")
    per_group = max(1, int(counts.min()))
    _check_repeats("batch_size", batch_size, batch_size // per_group, len(counts))
    if batch_size % per_group:
        fixed = -(-batch_size // per_group) * per_group
        raise ConfigError(f"batch_size={batch_size}: it must be a multiple of the {per_group} pairs per group, e.g. {fixed}")
    return batch_size // per_group


class Work(NamedTuple):
    """What a layer costs on this model, in any unit: how layouts and row lengths are compared."""

    token: float = 1.0  # of a token of a row, outside attention
    pair: float = 0.0  # of a query and a key
    micro_batch: float = (
        32.0  # of a micro-batch, in tokens: adding up a gradient moves 12 bytes a parameter, a token takes 6 FLOPs
    )


class Lengths(NamedTuple):
    """The lengths of a dataset's groups, tokens."""

    prompts: np.ndarray  # [G]
    responses: list[list[int]]  # of every group

    @classmethod
    def of(cls, index: Index) -> "Lengths":
        """Those of an index, mismatched responses included."""
        return cls(np.asarray(index.prompt_lengths), [index.responses(i) for i in range(len(index.rows))])

    def totals(self) -> np.ndarray:
        """|x| + |y_1| + ... of every group."""
        return self.prompts + np.array([sum(ys) for ys in self.responses])

    def sequences(self) -> np.ndarray:
        """|x| + |y| of every response."""
        return np.concatenate([x + np.asarray(ys) for x, ys in zip(self.prompts, self.responses, strict=True)])


class Steps:
    """Sampled steps of a dataset, planned on rows of any shape: what a shape would cost."""

    def __init__(self, lengths: Lengths, *, num_groups: int, num_shards: int, work: Work, longest: int, count: int = 12):
        rng = np.random.default_rng(0)
        size = len(lengths.prompts)
        draws = [rng.choice(size, min(num_groups, size), replace=False) for _ in range(count)]
        self.steps = [([int(lengths.prompts[i]) for i in own], [lengths.responses[i] for i in own]) for own in draws]
        self.lanes = max(map(len, lengths.responses))
        self.num_shards, self.work, self.longest = num_shards, work, longest

    def plans(self, row_tokens: int, slots: tuple[int, int] | None = None, row_groups: int = 0) -> list[list[list[Segment]]]:
        """The rows of every step."""
        layout = "shared" if slots is None else "slots"
        shape = PackShape(layout, len(self.steps[0][0]), 1, 1, row_tokens, 0, 0, self.lanes, 0, row_groups, slots)
        return [[row for (cell,) in plan_step(*step, shape).cells for row in cell] for step in self.steps]

    def cost(self, rows_used: list[int], rows: int, row_tokens: int, slots: tuple[int, int] | None = None) -> float:
        """What the steps' micro-batches of `rows` rows a shard cost."""
        if slots is None:
            band = min(self.longest, row_tokens)
            pairs = self.lanes * (row_tokens * band - band * band / 2)
        else:
            x, y = slots
            pairs = x * x / 2 + self.lanes * (y * y / 2 + x * y)
        micro = [-(-used // (self.num_shards * rows)) for used in rows_used]
        row = row_tokens * self.work.token + pairs * self.work.pair
        return sum(m * (self.num_shards * rows * row + self.work.micro_batch * self.work.token) for m in micro)

    def best(self, candidates: Iterable[tuple[int, tuple[int, int] | None]], most_tokens: int, row_groups: int = 0):
        """(cost, row length, rows of a shard's micro-batch, slots) of the cheapest candidate (row length, slots)."""
        found = []
        for length, slots in candidates:
            used = [len(plan) for plan in self.plans(length, slots, row_groups)]
            most_rows = min(max(1, most_tokens // length), max(1, *used))  # more than are used are padding alone
            for rows in range(1, most_rows + 1):
                found.append((self.cost(used, rows, length, slots), length, rows, slots))
        return min(found, key=lambda f: f[0])


def _row_candidates(longest: int, most_tokens: int, row_tokens: int) -> list[tuple[int, None]]:
    """The lengths of shared rows that hold every group: multiples of 128, or the one that is asked for."""
    first = -(-longest // 128) * 128
    lengths = [row_tokens] if row_tokens else range(first, max(first, min(2048, most_tokens)) + 1, 128)
    return [(n, None) for n in lengths]


def _slot_candidates(lengths: Lengths, most_tokens: int, row_tokens: int) -> list[tuple[int, tuple[int, int] | None]]:
    """Rows of slots that hold every group: multiples of 128 in about the proportion of the data."""
    lanes = max(map(len, lengths.responses))
    mean_x, mean_y = lengths.prompts.mean(), np.mean([max(ys) for ys in lengths.responses])
    least_x = -(-int(lengths.prompts.max()) // 128) * 128
    least_y = -(-max(max(ys) for ys in lengths.responses) // 128) * 128
    limit, found = max(row_tokens or most_tokens, least_x + lanes * least_y), []
    for y in range(least_y, min(limit, 4096) // lanes + 1, 128):
        middle = round(y * mean_x / mean_y / 128) * 128
        for x in sorted({max(least_x, middle + d) for d in (-256, -128, 0, 128)}):
            length = x + lanes * y
            if length <= min(limit, 4096) and (not row_tokens or length == row_tokens):
                found.append((length, (x, y)))
    return found or ([] if row_tokens else [(least_x + lanes * least_y, (least_x, least_y))])


def make_shape(
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
    """One static shape for the steps of every dataset in `indexes` (training first, then evaluation).

    The row length, the rows of a micro-batch and, for "auto", the layout are those of least work on sampled steps of the
    training data.

    Args:
      layout: "shared", "slots", "separate"; "auto": slots where they cost less, for groups of two responses, else shared.
      micro_batch_tokens: most tokens of a micro-batch on a data shard (one row at least).
      row_tokens: 0 = any multiple of 128 that holds the longest group; else taken as it is.
      work: what tokens and scores cost.
      bound_groups: whether a row holds a bounded number of groups, for kernels that give each a place.
    Raises: ConfigError if row_tokens is shorter than the longest group.
    """
    lengths = [i if isinstance(i, Lengths) else Lengths.of(i) for i in indexes]
    lanes = max(max(map(len, own.responses)) for own in lengths)
    sequence = int(max(own.sequences().max() for own in lengths))
    totals = [own.totals() if layout != "separate" else own.sequences() for own in lengths]
    longest = int(max(t.max() for t in totals))
    if row_tokens and row_tokens < longest:
        raise ConfigError(f"data.row_tokens={row_tokens}: the longest group has {longest} tokens; raise it or lower the limits")
    most = num_groups * longest  # of a step
    if row_tokens > max(MOST_PADDED_TOKENS, most):
        raise ConfigError(
            f"data.row_tokens={row_tokens}: the groups of a step have {most} tokens at most, so that the rest of a row is padding; "
            "lower it, or set 0"
        )
    common = dict(num_groups=num_groups, num_shards=num_shards, work=work, longest=sequence)
    slots, row_groups = None, 0
    if layout == "separate":
        length = row_tokens or -(-longest // 128) * 128
        rows = min(max(1, micro_batch_tokens // length), num_groups * lanes)
    else:
        steps = Steps(lengths[0], **common)
        best = None
        if layout != "slots":
            best = steps.best(_row_candidates(longest, micro_batch_tokens, row_tokens), micro_batch_tokens)
        if layout == "slots" or (layout == "auto" and lanes == 2):
            union = Lengths(np.concatenate([o.prompts for o in lengths]), [ys for o in lengths for ys in o.responses])
            other = _slot_candidates(union, micro_batch_tokens, row_tokens)
            if other:
                _, length, rows, slots = Steps(lengths[0], **common, count=4).best(other, micro_batch_tokens)
                rows_used = [len(plan) for plan in steps.plans(length, slots)]
                found = (steps.cost(rows_used, rows, length, slots), length, rows, slots)
                best = found if best is None or found[0] < best[0] else best
        if best is None:
            raise ConfigError(
                f"data.row_tokens={row_tokens}: no slots of this length hold the longest prompt and responses; set 0"
            )
        _, length, rows, slots = best
        if bound_groups and slots is None:
            # A sequence has a place of its own in memory: rows of many short groups are left to another row.
            counts = [len(row) for plan in steps.plans(length) for row in plan]
            row_groups = int(np.ceil(np.quantile(counts, 0.9)))
    # A step that crosses epochs holds a group twice, and more often where there are fewer groups than it takes.
    if slots is not None:
        totals = [
            np.array([x / slots[0] + sum(ys) / slots[1] for x, ys in zip(o.prompts, o.responses, strict=True)]) * length
            for o in lengths
        ]
    repeated = [np.repeat(t, 1 + -(-num_groups // len(t))) for t in totals]
    pairs = [int(np.diff(i.pair_offsets).max()) for i in indexes if not isinstance(i, Lengths)]
    return step_shape(
        layout="separate" if layout == "separate" else "shared" if slots is None else "slots",
        row_tokens=length,
        shard_rows=rows,
        num_shards=num_shards,
        num_groups=num_groups,
        max_responses=lanes,
        max_pairs=max([*pairs, 1]),
        longest=np.ceil(np.sort(np.concatenate(repeated))[::-1]).astype(int).tolist(),
        longest_sequence=sequence,
        row_groups=row_groups,
        slots=slots,
    )


MOST_GROUPS = 2**52  # that a run takes; float64, in which grain divides lengths, holds it exactly


def step_positions(index: Index, *, num_groups: int, seed: int, shuffle: bool) -> grain.MapDataset:
    """Step -> the positions of its groups: a fresh shuffle every epoch, a pure function of (seed, step)."""
    source = grain.MapDataset.range(len(index.rows)).seed(seed)
    if shuffle:
        source = source.shuffle()
    # Grain's endless repetition has sys.maxsize elements, which its batches of one round up past what a length can be.
    epochs = max(1, MOST_GROUPS // len(index.rows))
    return source.repeat(epochs).batch(num_groups, batch_fn=list)


def train_batches(
    pack: PackGroups, *, num_groups: int, seed: int, shuffle: bool, start: int, stop: int, workers: int
) -> Iterator[tuple[PackedBatch, StepSizes]]:
    """The batches of steps [start, stop), prefetched by threads or by worker processes, in order."""
    steps = step_positions(pack.index, num_groups=num_groups, seed=seed, shuffle=shuffle)[start:stop].map(pack)
    options = grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=4)
    stream = steps.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl's flags, and dpojax parses its own command line
        # Ctrl-C reaches the whole process group; the workers leave it to their parent, which saves first.
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_ignore_interrupts)
    return _name_failures(iter(stream), start)


def _ignore_interrupts(worker: int, num_workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _name_failures(batches: Iterator, start: int) -> Iterator:
    """Passes batches on; whatever a worker dies of becomes a DataError with the step and the worker's traceback."""
    step = start
    while True:
        step += 1
        try:
            batch = next(batches)
        except StopIteration:
            return
        except DpojaxError:
            raise
        except Exception as error:  # a worker raises anything, and a killed one a RuntimeError of grain's
            trace = "".join(traceback.format_exception(error))
            raise DataError(f"the batch of step {step} could not be made: {error!r}\n{trace}") from error
        yield batch


def eval_batches(pack: PackGroups, *, num_groups: int, count: int) -> Iterator[tuple[PackedBatch, StepSizes]]:
    """The first `count` groups once, in file order; the last batch may be short."""
    steps = grain.MapDataset.range(count).batch(num_groups, batch_fn=list, drop_remainder=False).map(pack)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
