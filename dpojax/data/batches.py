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

from dpojax.data.dataset import Dataset
from dpojax.data.index import Index
from dpojax.data.packing import PackedBatch, PackShape
from dpojax.data.row_filling import StepLengths, pack_step
from dpojax.data.row_plan import plan_step, waste
from dpojax.data.shapes import StepSizes
from dpojax.data.token_groups import TokenGroup
from dpojax.errors import DataError, DpojaxError

# (source row, |y_k|) -> cached token log-probs
RefLookup = Callable[[int, Sequence[int]], tuple[np.ndarray, ...]]


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

        lengths = StepLengths(
            prompts=prompts,
            responses=responses,
            counted=[index.counted(i) for i in positions],
            pairs=[index.pairs(i) for i in positions],
        )
        batch = pack_step(
            plan,
            self.shape,
            get_group,
            lengths,
            shards=self.shards,
            pad_id=self.pad_id,
            with_ref=self.ref_lookup is not None,
        )
        packing, rounding = waste(plan, self.shape)
        return batch, StepSizes(packing, rounding, prompts, responses)

    def token_group(self, i: int) -> TokenGroup:
        """The tokens of group i, with its mismatched response.

        Raises: DataError if the file changed since it was indexed.
        """
        index = self.index
        row = int(self.index.rows[i])
        group, _ = self.data.token_group(row)
        if index.mismatched is not None:
            donor, _ = self.data.token_group(int(index.mismatched[i, 0]))
            answer = int(index.mismatched[i, 1])
            group = group._replace(
                responses=(*group.responses, donor.responses[answer]),
                pairs=tuple(p._replace(rejected=len(group.responses)) for p in group.pairs),
                counted=(*_with_masks(group), _with_masks(donor)[answer]),
            )
        if [len(r) for r in group.responses] != index.responses(i):
            raise DataError(
                f"{self.data.records.where(row)}: the row changed since it was indexed; start again"
            )
        if self.ref_lookup is not None:
            group = group._replace(ref_logps=self.ref_lookup(row, index.responses(i)))
        return group


def _with_masks(group: TokenGroup) -> tuple[np.ndarray, ...]:
    """Which tokens of each response count, also where all do."""
    if group.counted is None:
        return tuple(np.ones(len(response), bool) for response in group.responses)
    return group.counted


MOST_GROUPS = 2**52  # that a run takes; float64, in which grain divides lengths, holds it exactly


def step_positions(index: Index, *, num_groups: int, seed: int, shuffle: bool) -> grain.MapDataset:
    """Step -> the positions of its groups: a pure function of (seed, step).

    Every epoch is a fresh shuffle.
    """
    source = grain.MapDataset.range(len(index.rows)).seed(seed)
    if shuffle:
        source = source.shuffle()
    # Grain's endless repetition has sys.maxsize elements, which its batches of one round up past
    # what a length can be.
    epochs = max(1, MOST_GROUPS // len(index.rows))
    return source.repeat(epochs).batch(num_groups, batch_fn=list)


def train_batches(
    pack: PackGroups,
    *,
    num_groups: int,
    seed: int,
    shuffle: bool,
    start: int,
    stop: int,
    workers: int,
) -> Iterator[tuple[PackedBatch, StepSizes]]:
    """The batches of steps [start, stop), prefetched by threads or worker processes, in order."""
    steps = step_positions(pack.index, num_groups=num_groups, seed=seed, shuffle=shuffle)[
        start:stop
    ].map(pack)
    options = grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=4)
    stream = steps.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            # grain reads absl's flags, and dpojax parses its own command line
            flags.FLAGS.mark_as_parsed()
        # Ctrl-C reaches the whole process group; the workers leave it to their parent, which saves
        # first.
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_ignore_interrupts
        )
    return _name_failures(iter(stream), start)


def _ignore_interrupts(worker: int, num_workers: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _name_failures(batches: Iterator, start: int) -> Iterator:
    """Passes batches on.

    Whatever a worker dies of becomes a DataError with the step and the worker's traceback.
    """
    step = start
    while True:
        step += 1
        try:
            batch = next(batches)
        except StopIteration:
            return
        except DpojaxError:
            raise
        # a worker raises anything, and a killed one a RuntimeError of grain's
        except Exception as error:
            trace = "".join(traceback.format_exception(error))
            raise DataError(
                f"the batch of step {step} could not be made: {error!r}\n{trace}"
            ) from error
        yield batch


def eval_batches(
    pack: PackGroups, *, num_groups: int, count: int
) -> Iterator[tuple[PackedBatch, StepSizes]]:
    """The first `count` groups once, in file order; the last batch may be short."""
    steps = (
        grain.MapDataset.range(count)
        .batch(num_groups, batch_fn=list, drop_remainder=False)
        .map(pack)
    )
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
