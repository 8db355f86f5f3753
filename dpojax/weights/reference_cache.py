"""Reference log-probs of every response of a dataset, computed once and kept on disk."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpojax.config.schema import frozen_dtype
from dpojax.data.batches import PackGroups, eval_batches
from dpojax.data.dataset import Dataset
from dpojax.data.index import Index
from dpojax.data.open import Data
from dpojax.data.packing import PackedBatch, PackShape
from dpojax.data.row_plan import by_response, plan_step
from dpojax.errors import DataError, NumericsError
from dpojax.models.placed import Policy
from dpojax.runtime.context import Job, everywhere
from dpojax.training.checksums import digest
from dpojax.training.rounding import cache_bound
from dpojax.training.rows import packer
from dpojax.training.scores import make_token_logps_step
from dpojax.untrusted.plain_data import check_output


class ReferenceCache:
    """Per-token reference log-probs of every response of a dataset, in the order of its index.

    Picklable.
    """

    def __init__(self, index: Index, values: np.ndarray):
        self.rows = index.rows
        self.offsets = index.response_offsets
        self.starts = np.concatenate([[0], np.cumsum(index.response_lengths)])
        self.values = values  # [sum of |y|], nats

    def __call__(self, row: int, lengths: Sequence[int]) -> tuple[np.ndarray, ...]:
        """The log-probs of each response of a source row."""
        i = int(np.searchsorted(self.rows, row))
        first = int(self.offsets[i])
        logps = [
            self.values[self.starts[first + k] : self.starts[first + k + 1]]
            for k in range(len(lengths))
        ]
        cached = [len(values) for values in logps]
        if cached != list(lengths):
            raise DataError(
                f"reference cache: row {row} has responses of {lengths} tokens, the cache {cached}"
            )
        return tuple(logps)


def compute(
    pack: PackGroups,
    token_logps: Callable[[PackedBatch], np.ndarray],
    *,
    num_groups: int,
    count: int,
    progress: Callable[[int], None],
) -> np.ndarray:
    """The reference pass over the first `count` groups of a dataset: token log-probs in the index's
    order.

    Args:
      token_logps: batch -> [M, A, T] on the host, of all data shards.
      progress: called with the number of groups done.
    """
    index = pack.index
    starts = np.concatenate([[0], np.cumsum(index.response_lengths)])
    values = np.zeros(starts[index.response_offsets[count]], np.float32)
    for step, (batch, _) in enumerate(eval_batches(pack, num_groups=num_groups, count=count)):
        positions = range(step * num_groups, min((step + 1) * num_groups, count))
        prompts = [int(index.prompt_lengths[i]) for i in positions]
        responses = [index.responses(i) for i in positions]
        plan = plan_step(prompts, responses, pack.shape)
        logps = token_logps(batch)
        for (g, k), response_logps in by_response(plan, responses, logps):
            start = starts[index.response_offsets[positions[g]] + k]
            values[start : start + len(response_logps)] = response_logps
        progress(positions[-1] + 1)
    _check_finite(values, starts, pack)
    return values


def _check_finite(values: np.ndarray, starts: np.ndarray, pack: PackGroups) -> None:
    """Raises NumericsError naming the first row with a log-prob that is not finite."""
    bad = np.flatnonzero(~np.isfinite(values))
    if not len(bad):
        return
    response = int(np.searchsorted(starts, bad[0], side="right")) - 1
    group = int(np.searchsorted(pack.index.response_offsets, response, side="right")) - 1
    row = pack.data.records.where(int(pack.index.rows[group]))
    raise NumericsError(
        f"{row}: the log-prob of a token is {values[bad[0]]} ({len(bad):,} of {len(values):,}"
        " tokens are not finite); the weights are finite, so that their products overflow: compute"
        " in float32 (model.dtype, --dtype), or look at the weights"
    )


def open_caches(
    job: Job,
    data: Data,
    policy: Policy,
    ref: Any,
    weights: dict[str, str],
    shape: PackShape,
    groups: int,
) -> tuple[ReferenceCache, ReferenceCache | None]:
    """The cached reference of training and evaluation data: loaded and checked on a sample, or
    computed from `ref`.

    A cache is stored under a key made from the weights' checksums, the model, the token ids and the
    precision.
    """
    c = job.config
    step = make_token_logps_step(policy.model, chunk=c.model.logps_chunk_tokens)
    program = job.program("reference_pass", step, out_shardings=job.replicated)

    def token_logps(batch):
        return np.asarray(program(ref, job.put(batch)))

    model = dataclasses.asdict(policy.config)
    precision = [c.model.dtype, frozen_dtype(c)]

    def open_cache(name: str, dataset: Dataset, index: Index) -> ReferenceCache:
        key_parts = [1, sorted(weights.items()), model, dataset.fingerprint(), precision]
        if index.mismatched is not None:
            key_parts.append(hashlib.sha256(index.mismatched.tobytes()).hexdigest())
        # Held-out rows are not in the index, whose order the cache has.
        key_parts.append(hashlib.sha256(index.rows.tobytes()).hexdigest())
        key = digest(key_parts)
        path = job.workdir / "cache" / f"reference-{name}-{key}.npy"
        run = functools.partial(
            compute, packer(job, dataset, index, shape), token_logps, num_groups=groups
        )
        values = load(path, index)
        # The passes below are collective: a process that took them alone would wait for ever.
        if everywhere(values is not None):
            assert values is not None
            again = run(count=min(8, len(index.rows)), progress=lambda n: None)
            off = float(np.sqrt(np.mean(np.square(again - values[: len(again)]))))
            if off <= cache_bound(values, dtype=c.model.dtype, depth=policy.config.num_layers):
                job.say(
                    f"reference cache of {name}: loaded; {len(again)} sampled tokens agree within"
                    f" {off:.1e} nats"
                )
                return ReferenceCache(index, values)
            job.say(f"reference cache of {name}: {off:.1e} nats off on a sample; computed anew")
        progress = job.progress(f"reference pass over {name}", len(index.rows), "prompts")
        values = run(count=len(index.rows), progress=progress)
        job.write(functools.partial(store, path, values))
        progress.close(f"{len(values):,} tokens")
        return ReferenceCache(index, values)

    train = open_cache("train", data.train, data.train_index)
    if data.eval is None or data.eval_index is None:
        return train, None
    return train, open_cache("eval", data.eval, data.eval_index)


def load(path: pathlib.Path, index: Index) -> np.ndarray | None:
    """The values of a stored cache, or None if there is none, or it is truncated, altered or not
    finite.
    """
    try:
        values = np.load(path, allow_pickle=False)
        digest = path.with_suffix(".sha256").read_text(encoding="utf-8")
    except (OSError, ValueError, EOFError):
        return None
    if values.shape != (int(index.response_lengths.sum()),) or values.dtype != np.float32:
        return None
    if not np.isfinite(values).all():
        return None
    if hashlib.sha256(values.tobytes()).hexdigest() != digest:
        return None
    return values


def store(path: pathlib.Path, values: np.ndarray) -> None:
    """Writes a cache completely or not at all, also with two writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    digest = path.with_suffix(f".{os.getpid()}.tmp")
    digest.write_text(hashlib.sha256(values.tobytes()).hexdigest(), encoding="utf-8")
    digest.replace(path.with_suffix(".sha256"))
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
    np.save(temporary, values)
    temporary.replace(path)
