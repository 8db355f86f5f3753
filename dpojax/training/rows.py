"""Which rows the batches of a run have, and the offline batches of a dataset."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpojax.config.data import DataConfig
from dpojax.data.batches import PackGroups, RefLookup, train_batches
from dpojax.data.dataset import Dataset
from dpojax.data.index import Index
from dpojax.data.packing import PackShape
from dpojax.data.shapes import Lengths, StepSizes, make_shape
from dpojax.models.config import ModelConfig
from dpojax.models.placed import Policy, kernel_name
from dpojax.runtime.context import Job
from dpojax.runtime.mesh import local_shards, num_shards
from dpojax.training.flops import forward_flops, layer_work


def packer(
    job: Job,
    data: Dataset,
    index: Index,
    shape: PackShape,
    lookup: RefLookup | None = None,
) -> PackGroups:
    """Positions of groups -> this process's part of a batch."""
    pad = data.tokenizer.pad_id if data.tokenizer else 0
    return PackGroups(data, index, shape, tuple(local_shards(job.mesh)), pad, lookup)


def batch_shape(
    job: Job, policy: Policy, indexes: Sequence[Index | Lengths], groups: int
) -> PackShape:
    """The static shape of the batches of `groups` groups from any of `indexes`, or from data of
    such lengths.
    """
    c = job.config.data
    kernel, _ = kernel_name(job, policy.config, c.layout)
    shards = num_shards(job.mesh)
    platform = job.mesh.devices.flat[0].platform
    return make_shape(
        indexes,
        layout=_layout(c, policy.config, kernel),
        work=layer_work(policy.config, platform, num_shards=shards),
        bound_groups=kernel == "cudnn",
        num_groups=groups,
        num_shards=shards,
        micro_batch_tokens=c.micro_batch_tokens,
        row_tokens=c.row_tokens,
    )


def _layout(config: DataConfig, model: ModelConfig, kernel: str) -> str:
    """data.layout; auto is the shared one where slots, which are for splash, do not fit: slots have
    no place for windows.
    """
    if config.layout == "auto" and (kernel != "splash" or any(model.windows)):
        return "shared"
    return config.layout


def describe_rows(shape: PackShape) -> str:
    """The rows of a micro-batch, for people."""
    slots = ""
    if shape.slots is not None:
        slots = f" of {shape.slots[0]} + {shape.num_lanes} x {shape.slots[1]}"
    return (
        f"rows: {shape.shard_rows} x {shape.row_tokens} tokens a micro-batch on each of"
        f" {shape.num_shards} data shard(s), layout {shape.layout}{slots}"
    )


class OfflineBatches:
    """(step, state) -> the step's batch; its groups depend on seed and step alone."""

    def __init__(self, job: Job, pack: PackGroups, groups: int, num_steps: int):
        """Batches of `groups` groups up to step `num_steps`."""
        self.job = job
        self.pack = pack
        self.groups = groups
        self.num_steps = num_steps
        self._stream: Iterator[tuple[Any, StepSizes]] | None = None
        self._next = 0

    def __call__(self, step: int, state: Any = None) -> tuple[Any, StepSizes]:
        """The batch of a step, prefetched where it follows the one before."""
        if self._stream is None or step != self._next:
            c = self.job.config
            self._stream = train_batches(
                self.pack,
                num_groups=self.groups,
                seed=c.data_seed,
                shuffle=c.data.shuffle,
                start=step - 1,
                stop=self.num_steps,
                workers=c.data.workers,
            )
        self._next = step + 1
        return next(self._stream)


def step_flops(config: ModelConfig, passes: int) -> Callable[[StepSizes], float]:
    """Useful FLOPs of a step.

    Args:
      passes: forward passes' worth of work: 3 for a forward and a backward pass, 2 where the
        weights are frozen, 1 more for a live reference.
    """

    def flops(sizes: StepSizes) -> float:
        return passes * forward_flops(config, sizes.prompts, sizes.responses)

    return flops
