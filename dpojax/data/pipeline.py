"""Dataset -> a stream of PackedBatches: the order of the data is a pure function of (seed, step).

grain's MapDataset does shuffle -> repeat -> batch -> pack by random access, so that step i can be
made without the steps before it: resuming is starting at another index, on any number of hosts.
"""

import dataclasses
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np
from absl import flags

from dpojax.data.index import Dataset, Index
from dpojax.data.packing import (
    PackedBatch,
    PackShape,
    TokenGroup,
    pack_step,
    plan_step,
    step_shape,
    waste,
)
from dpojax.errors import ConfigError, DataError, DpojaxError

RefLookup = Callable[[int, Sequence[int]], tuple[np.ndarray, ...]]  # (source row, |y_k|) -> cached token log-probs


@dataclasses.dataclass(frozen=True)
class PackGroups:
    """Positions of groups in the index -> one step's PackedBatch and its waste. Picklable."""

    data: Dataset
    index: Index
    shape: PackShape
    shards: tuple[int, ...]
    pad_id: int
    ref_lookup: RefLookup | None = None

    def __call__(self, positions: Sequence[int]) -> tuple[PackedBatch, tuple[float, float]]:
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
        return batch, waste(plan, self.shape)

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


def groups_per_step(index: Index, *, batch_size: int, batch_groups: int) -> int:
    """How many groups make a step of `batch_size` pairs.

    Raises: ConfigError if batch_size does not fit the pairs per group, or that number varies and
      batch_groups is not set.
    """
    counts = np.diff(index.pair_offsets)
    if counts.min() != counts.max():
        if not batch_groups:
            raise ConfigError(
                f"batch_size={batch_size}: groups hold {counts.min()} to {counts.max()} pairs; set batch_groups to the "
                "number of whole groups per step (the mean is over the pairs that they hold)"
            )
        return batch_groups
    if batch_groups:
        raise ConfigError(f"batch_groups={batch_groups}: every group holds {counts.min()} pairs; set batch_size alone")
    per_group = max(1, int(counts.min()))
    if batch_size % per_group:
        fixed = -(-batch_size // per_group) * per_group
        raise ConfigError(f"batch_size={batch_size}: it must be a multiple of the {per_group} pairs per group, e.g. {fixed}")
    return batch_size // per_group


def choose_row_tokens(
    totals: Sequence[np.ndarray], *, num_groups: int, num_shards: int, micro_batch_tokens: int, row_tokens: int
) -> tuple[int, int]:
    """(row length, rows of a shard's micro-batch) with the least computed tokens on sampled steps.

    Args:
      totals: tokens of every group, of each dataset; the first one is sampled, all must fit.
      num_groups: groups of a step.
      micro_batch_tokens: most tokens of a micro-batch on a data shard (one row at least).
      row_tokens: 0 = any multiple of 128 that holds the longest group; else taken as it is.
    Raises: ConfigError if row_tokens is shorter than the longest group.
    """
    longest = int(max(t.max() for t in totals))
    if row_tokens and row_tokens < longest:
        raise ConfigError(f"data.row_tokens={row_tokens}: the longest group has {longest} tokens; raise it or lower the limits")
    first = -(-longest // 128) * 128
    candidates = [row_tokens] if row_tokens else range(first, max(first, min(2048, micro_batch_tokens)) + 1, 128)
    rng = np.random.default_rng(0)
    steps = [rng.choice(totals[0], min(num_groups, len(totals[0])), replace=False) for _ in range(12)]
    best = None
    for length in candidates:
        rows_used = [_count_rows(step, length) for step in steps]
        for rows in range(1, max(1, micro_batch_tokens // length) + 1):
            micro = [-(-used // (num_shards * rows)) for used in rows_used]
            # A micro-batch costs a few tokens on top: adding up its gradient moves 12 bytes a parameter, a token 6 FLOPs.
            cost = sum(m * (num_shards * rows * length + 32) for m in micro)
            if best is None or cost < best[0]:
                best = (cost, length, rows)
    assert best is not None
    return best[1], best[2]


def _count_rows(totals: np.ndarray, capacity: int) -> int:
    shape = PackShape("shared", len(totals), 1, 1, capacity, 0, 0)
    return plan_step([int(t) - 1 for t in totals], [[1]] * len(totals), shape).rows_used


def make_shape(
    indexes: Sequence[Index],
    *,
    layout: str,
    num_groups: int,
    num_shards: int,
    micro_batch_tokens: int,
    row_tokens: int,
) -> PackShape:
    """One static shape for the steps of every dataset in `indexes` (training first, then evaluation)."""
    layout = "shared" if layout == "auto" else layout
    responses = [np.diff(i.response_offsets) for i in indexes]
    if layout == "shared":
        totals = [i.totals() for i in indexes]
    else:
        totals = [i.sequence_lengths() for i in indexes]
    length, rows = choose_row_tokens(
        totals,
        num_groups=num_groups,
        num_shards=num_shards,
        micro_batch_tokens=micro_batch_tokens,
        row_tokens=row_tokens,
    )
    if layout == "separate":
        rows = max(1, micro_batch_tokens // length)
    # A step that crosses epochs holds a group twice, and more often where there are fewer groups than it takes.
    repeated = [np.repeat(t, 1 + -(-num_groups // len(t))) for t in totals]
    return step_shape(
        layout=layout,
        row_tokens=length,
        shard_rows=rows,
        num_shards=num_shards,
        num_groups=num_groups,
        max_responses=max(int(r.max()) for r in responses),
        max_pairs=max(int(np.diff(i.pair_offsets).max()) for i in indexes),
        longest=np.sort(np.concatenate(repeated))[::-1].tolist(),
    )


def step_positions(index: Index, *, num_groups: int, seed: int, shuffle: bool) -> grain.MapDataset:
    """Step -> the positions of its groups: a fresh shuffle every epoch, a pure function of (seed, step)."""
    source = grain.MapDataset.range(len(index.rows)).seed(seed)
    if shuffle:
        source = source.shuffle()
    return source.repeat().batch(num_groups, batch_fn=list)


def train_batches(
    pack: PackGroups, *, num_groups: int, seed: int, shuffle: bool, start: int, stop: int, workers: int
) -> Iterator[tuple[PackedBatch, tuple[float, float]]]:
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


def eval_batches(pack: PackGroups, *, num_groups: int, count: int) -> Iterator[tuple[PackedBatch, tuple[float, float]]]:
    """The first `count` groups once, in file order; the last batch may be short."""
    steps = grain.MapDataset.range(count).batch(num_groups, batch_fn=list, drop_remainder=False).map(pack)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
