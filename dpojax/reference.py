"""Where the reference log-probs come from: a live frozen tree, or a cache computed once.

The reference is an argument of the step, never part of the trained tree, the optimizer or a checkpoint.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.checkpoint import digest
from dpojax.config import frozen_dtype
from dpojax.data.index import Dataset, Index
from dpojax.data.packing import PackedBatch, PackShape, by_response, plan_step
from dpojax.data.pipeline import PackGroups, eval_batches
from dpojax.datasets import Data
from dpojax.errors import DataError, NumericsError
from dpojax.job import Job, everywhere
from dpojax.models.quantise import store_as
from dpojax.plain_data import check_output
from dpojax.policy import Policy, frozen_layout
from dpojax.selfcheck import cache_bound
from dpojax.stages import packer
from dpojax.train import make_token_logps_step


def open_frozen(job: Job, policy: Policy, params: Any, dtype: str, rules: dict[str, str], memory: str = "device") -> Any:
    """A frozen copy of all parameters, stored as `dtype` says (config.STORED), in its own shardings and memory."""
    _, shardings = frozen_layout(job, policy, dtype, rules, memory)
    stored = lambda tree: store_as(jax.tree.map(jnp.copy, tree), policy.config, dtype or job.config.model.param_dtype)
    if memory == "device":
        return jax.jit(stored, out_shardings=shardings)(params)
    _, here = frozen_layout(job, policy, dtype, rules)
    return jax.device_put(jax.jit(stored, out_shardings=here)(params), shardings)


def open_live(job: Job, policy: Policy, params: Any) -> Any:
    """The live reference tree from the policy's parameters before DPO: reference.rules, dtype and memory."""
    c = job.config.reference
    return open_frozen(job, policy, params, c.dtype, c.rules, c.memory)


def same_layout(tree: Any, params: Any) -> bool:
    """Whether both trees have the same structure, dtypes and shardings."""
    return jax.tree.structure(tree) == jax.tree.structure(params) and all(
        x.dtype == p.dtype and x.sharding == p.sharding for x, p in zip(*map(jax.tree.leaves, (tree, params)), strict=True)
    )


def like(tree: Any, params: Any) -> Any:
    """The reference `tree` in the dtype and shardings of `params`, so that one program serves both.

    Of another structure (quantised, or the base of adapters) it stays as it is, and the program is compiled for it too.
    """
    if same_layout(tree, params) or jax.tree.structure(tree) != jax.tree.structure(params):
        return tree
    shardings, dtype = jax.tree.map(lambda p: p.sharding, params), jax.tree.leaves(params)[0].dtype
    return jax.jit(lambda t: jax.tree.map(lambda x: jnp.copy(x).astype(dtype), t), out_shardings=shardings)(tree)


class ReferenceCache:
    """Per-token reference log-probs of every response of a dataset, in the order of its index. Picklable."""

    def __init__(self, index: Index, values: np.ndarray):
        self.rows, self.offsets = index.rows, index.response_offsets
        self.starts = np.concatenate([[0], np.cumsum(index.response_lengths)])
        self.values = values  # [sum of |y|], nats

    def __call__(self, row: int, lengths: Sequence[int]) -> tuple[np.ndarray, ...]:
        """The log-probs of each response of a source row."""
        i = int(np.searchsorted(self.rows, row))
        first = int(self.offsets[i])
        own = [self.values[self.starts[first + k] : self.starts[first + k + 1]] for k in range(len(lengths))]
        if [len(v) for v in own] != list(lengths):
            raise DataError(f"reference cache: row {row} has responses of {lengths} tokens, the cache {[len(v) for v in own]}")
        return tuple(own)


def compute(
    pack: PackGroups,
    token_logps: Callable[[PackedBatch], np.ndarray],
    *,
    num_groups: int,
    count: int,
    progress: Callable[[int], None],
) -> np.ndarray:
    """The reference pass over the first `count` groups of a dataset: token log-probs in the index's order.

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
        for (g, k), own in by_response(plan, responses, logps):
            start = starts[index.response_offsets[positions[g]] + k]
            values[start : start + len(own)] = own
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
        f"{row}: the log-prob of a token is {values[bad[0]]} ({len(bad):,} of {len(values):,} tokens are not finite); the weights "
        "are finite, so that their products overflow: compute in float32 (model.dtype, --dtype), or look at the weights"
    )


def open_caches(
    job: Job, data: Data, policy: Policy, ref: Any, weights: dict[str, str], shape: PackShape, groups: int
) -> tuple[ReferenceCache, ReferenceCache | None]:
    """The cached reference of training and evaluation data: loaded and checked on a sample, or computed from `ref`.

    A cache is stored under a key made from the weights' checksums, the model, the token ids and the precision.
    """
    c = job.config
    step = make_token_logps_step(policy.model, chunk=c.model.logps_chunk_tokens)
    program = job.program("reference_pass", step, out_shardings=job.replicated)
    token_logps = lambda batch: np.asarray(program(ref, job.put(batch)))
    model, precision = dataclasses.asdict(policy.config), [c.model.dtype, frozen_dtype(c)]

    def open_one(name: str, dataset: Dataset, index: Index) -> ReferenceCache:
        other = [] if index.mismatched is None else [hashlib.sha256(index.mismatched.tobytes()).hexdigest()]
        other.append(hashlib.sha256(index.rows.tobytes()).hexdigest())  # rows may be held out
        key = digest([1, sorted(weights.items()), model, dataset.fingerprint(), precision, *other])
        path = job.workdir / "cache" / f"reference-{name}-{key}.npy"
        run = functools.partial(compute, packer(job, dataset, index, shape), token_logps, num_groups=groups)
        values = load(path, index)
        if everywhere(values is not None):  # the passes below are collective: all processes take them, or none
            assert values is not None
            again = run(count=min(8, len(index.rows)), progress=lambda n: None)
            off = float(np.sqrt(np.mean(np.square(again - values[: len(again)]))))
            if off <= cache_bound(values, dtype=c.model.dtype, depth=policy.config.num_layers):
                job.say(f"reference cache of {name}: loaded; {len(again)} sampled tokens agree within {off:.1e} nats")
                return ReferenceCache(index, values)
            job.say(f"reference cache of {name}: {off:.1e} nats off on a sample; computed anew")
        progress = job.progress(f"reference pass over {name}", len(index.rows), "prompts")
        values = run(count=len(index.rows), progress=progress)
        job.write(functools.partial(store, path, values))
        progress.close(f"{len(values):,} tokens")
        return ReferenceCache(index, values)

    train = open_one("train", data.train, data.train_index)
    if data.eval is None or data.eval_index is None:
        return train, None
    return train, open_one("eval", data.eval, data.eval_index)


def load(path: pathlib.Path, index: Index) -> np.ndarray | None:
    """The values of a stored cache, or None if there is none, or it is truncated, altered or not finite."""
    try:
        values = np.load(path, allow_pickle=False)
        digest = path.with_suffix(".sha256").read_text(encoding="utf-8")
    except (OSError, ValueError, EOFError):
        return None
    whole = values.shape == (int(index.response_lengths.sum()),) and values.dtype == np.float32
    if not whole or not np.isfinite(values).all() or hashlib.sha256(values.tobytes()).hexdigest() != digest:
        return None
    return values


def store(path: pathlib.Path, values: np.ndarray) -> None:
    """Writes a cache whole or not at all, also with two writers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    digest = path.with_suffix(f".{os.getpid()}.tmp")
    digest.write_text(hashlib.sha256(values.tobytes()).hexdigest(), encoding="utf-8")
    digest.replace(path.with_suffix(".sha256"))
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npy")
    np.save(temporary, values)
    temporary.replace(path)
