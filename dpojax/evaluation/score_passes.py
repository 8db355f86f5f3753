"""A model on the devices -> log-probs, or rewards, of every response of a dataset."""

import argparse
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpojax.data.batches import PackGroups
from dpojax.data.dataset import Dataset
from dpojax.data.index import Index
from dpojax.data.shapes import make_shape
from dpojax.errors import ConfigError
from dpojax.evaluation.dataset_rewards import dataset_rewards
from dpojax.evaluation.reward_scale import read_normalisation
from dpojax.generation.loaded import LOGPS_CHUNK_TOKENS, Loaded
from dpojax.models.placed import check_positions
from dpojax.runtime import sharding
from dpojax.runtime.log import Progress
from dpojax.runtime.mesh import local_shards, num_shards
from dpojax.training.rewards import make_rewards_step
from dpojax.training.scores import make_token_logps_step
from dpojax.weights import reference_cache


def dataset_pack(loaded: Loaded, data: Dataset, index: Index, args: argparse.Namespace):
    """(what packs the rows for this model, groups of a batch).

    Raises: ConfigError for rows that the model cannot take.
    """
    check_positions(
        loaded.config,
        int(index.sequence_lengths().max()),
        "--max_prompt_tokens or --max_response_tokens",
    )
    if int(index.largest_id) >= loaded.config.vocab_size:
        raise ConfigError(
            f"the data holds the token id {int(index.largest_id)}, the model has"
            f" {loaded.config.vocab_size}"
        )
    groups = min(args.batch_size, len(index.rows))
    shape = make_shape(
        [index],
        layout="shared",
        num_groups=groups,
        num_shards=num_shards(loaded.mesh),
        micro_batch_tokens=args.micro_batch_tokens,
        row_tokens=0,
    )
    pad = 0
    if data.tokenizer is not None:
        pad = data.tokenizer.pad_id
    return PackGroups(data, index, shape, tuple(local_shards(loaded.mesh)), pad), groups


def whole_pass(loaded: Loaded, step: Callable[..., Any]) -> Callable[[Any], np.ndarray]:
    """A jitted pass (params, batch) as a function of the batch alone, its values on the host."""
    everywhere = jax.sharding.NamedSharding(loaded.mesh, jax.sharding.PartitionSpec())
    program = jax.jit(step, out_shardings=everywhere)

    def run(batch: Any) -> np.ndarray:
        return np.asarray(program(loaded.params, sharding.put_batch(batch, loaded.mesh)))

    return run


def response_rewards(
    loaded: Loaded, data: Dataset, index: Index, args: argparse.Namespace
) -> list[np.ndarray]:
    """r(x, y_k) of every response of every group: the head's number, on the scale of the samples of
    its reference where dpojax trained it.
    """
    pack, groups = dataset_pack(loaded, data, index, args)
    count = len(index.rows)
    name = f"scoring with {args.reward_model}"
    progress = Progress(name, count, "prompts", enabled=args.out != "-")
    rewards_of = whole_pass(loaded, make_rewards_step(loaded.model))
    rewards = dataset_rewards(pack, rewards_of, num_groups=groups, progress=progress)
    progress.close(f"{sum(map(len, rewards)):,} responses")
    scale = read_normalisation(pathlib.Path(args.reward_model))
    if scale is None:
        return rewards
    return [scale.apply(values) for values in rewards]


def response_logps(
    loaded: Loaded, data: Dataset, index: Index, args: argparse.Namespace, name: str
) -> list[np.ndarray]:
    """log pi(y_k | x) of every response of every group, nats."""
    pack, groups = dataset_pack(loaded, data, index, args)
    token_logps = whole_pass(loaded, make_token_logps_step(loaded.model, chunk=LOGPS_CHUNK_TOKENS))
    progress = Progress(f"scoring with {name}", len(index.rows), "prompts", enabled=args.out != "-")
    values = reference_cache.compute(
        pack, token_logps, num_groups=groups, count=len(index.rows), progress=progress
    )
    progress.close(f"{len(values):,} tokens")
    values = _without_formatting(values, data, index)
    ends = np.cumsum(index.response_lengths)
    sums = np.add.reduceat(values.astype(np.float64), ends - index.response_lengths)
    return [sums[first:end] for first, end in itertools.pairwise(index.response_offsets)]


def _without_formatting(values: np.ndarray, data: Dataset, index: Index) -> np.ndarray:
    """The log-probs with 0 in the place of formatting tokens, which training leaves out too."""
    if not (index.counted_lengths != index.response_lengths).any():
        return values
    counted = []
    for row in index.rows:
        group, _ = data.token_group(int(row))
        counted += group.counted or [np.ones(len(ids), bool) for ids in group.responses]
    return np.where(np.concatenate(counted), values, 0)
