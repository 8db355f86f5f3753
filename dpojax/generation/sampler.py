"""Prompts -> sampled responses, batch by batch; rows that have ended give up their place.

Legend: R prompts of a batch, G samples of each, B = R G rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array

from dpojax.generation.batching import (
    batch_order,
    compacted,
    first_places,
    least_half,
    pack_prompts,
    rounded,
    row_tokens,
)
from dpojax.generation.decoding import (
    Decoding,
    Sampler,
    SampleSettings,
)
from dpojax.runtime import sharding
from dpojax.runtime.mesh import num_shards

SEGMENT = 32  # tokens that are drawn between two looks for rows that have ended


class Response(NamedTuple):
    """A sampled response."""

    ids: list[int]  # EOS included where it ended
    logps: np.ndarray  # of each id, nats
    ended: bool  # by EOS or a stop string, not by max_new_tokens

    def without_end(self, eos_ids: Sequence[int]) -> list[int]:
        """The ids without the EOS that ends them, if one does."""
        if self.ids and self.ids[-1] in eos_ids:
            return self.ids[:-1]
        return self.ids


def whole_batch(batch_size: int, count: int, mesh: Mesh) -> int:
    """Prompts of a batch: no more than there are, rounded up to the data shards."""
    shards = num_shards(mesh)
    return -(-min(batch_size, count) // shards) * shards


def rows_put(mesh: Mesh) -> Callable[[np.ndarray], Array]:
    """Puts a host array that every process holds onto the devices, rows over the data axes."""
    rows = sharding.rows_sharding(mesh, leading=0)
    return lambda x: jax.make_array_from_callback(x.shape, rows, lambda index: x[index])


def fetch_whole(x: Array) -> np.ndarray:
    """A global array on every host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


class Rollout(NamedTuple):
    """How the batches of one call of `draw` are drawn."""

    sampler: Sampler
    served: Any  # the parameters as `sampler.extend` takes them
    settings: SampleSettings
    shards: int
    put: Callable[[np.ndarray], Array]
    fetch: Callable[[Array], np.ndarray]
    stopped: Callable[[list[int]], int | None] | None

    def finish(self, decoding: Decoding, is_wanted: np.ndarray) -> list[Response | None]:
        """The responses of a batch's rows; None for those that are not wanted, [B]."""
        total = self.settings.max_new_tokens
        responses: list[Response | None] = [None] * len(is_wanted)
        row_at = np.arange(len(is_wanted))  # place of the decoding -> row of the batch
        is_open = is_wanted
        for first in range(0, total, SEGMENT):
            until = min(first + SEGMENT, total)
            decoding = self.sampler.extend(self.served, decoding, np.int32(until))
            done = np.asarray(self.fetch(decoding.done))
            done, cut = self._collect(decoding, row_at, is_open, done, responses, until == total)
            is_open = is_open & ~done
            if not is_open.any():
                break
            prompts = len(decoding.prompt_lengths)
            plan = compacted(is_open.reshape(prompts, -1), self.shards)
            if plan is not None:
                decoding = self.sampler.take(decoding, *map(self.put, plan))
                row_at = row_at[plan.rows]
                is_open = plan.live
            elif cut:
                decoding = decoding._replace(done=self.put(done))
        return responses

    def _collect(  # where each row stands
        self,
        decoding: Decoding,
        row_at: np.ndarray,
        is_open: np.ndarray,
        done: np.ndarray,
        responses: list[Response | None],
        is_last: bool,
    ) -> tuple[np.ndarray, bool]:
        """Writes the responses that have ended, or all at the last segment.

        Returns: which rows are done, and whether a stop string ended one.
        """
        if self.stopped is None and not is_last and not (is_open & done).any():
            return done, False
        ids = np.asarray(self.fetch(decoding.tokens))
        logps = np.asarray(self.fetch(decoding.logps))
        lengths = np.asarray(self.fetch(decoding.lengths))
        done = done.copy()
        cut = False
        for place in np.flatnonzero(is_open):
            length = int(lengths[place])
            end = None
            if self.stopped is not None:
                end = self.stopped(ids[place, :length].tolist())
            if end is not None:
                length = end
                cut = cut or not done[place]
                done[place] = True
            if done[place] or is_last:
                responses[row_at[place]] = Response(
                    ids[place, :length].tolist(), logps[place, :length], ended=bool(done[place])
                )
        return done, cut


def sample_keys(seed: int, count: int, each: int) -> np.ndarray:
    """Key data [count, each, 2]: fold_in(key(seed), i) for response i of all, prompt by prompt."""
    fold = functools.partial(jax.random.fold_in, jax.random.key(seed))
    keys = jax.random.key_data(jax.vmap(fold)(jnp.arange(count * each)))
    return np.asarray(keys).reshape(count, each, -1)


def draw(  # noqa: PLR0913  # settings of several kinds, by keyword
    sampler: Sampler,
    params,
    prompts: Sequence[Sequence[int]],
    *,
    settings: SampleSettings,
    seed: int,
    width: int,
    batch_size: int,
    put: Callable[[np.ndarray], Array],
    fetch: Callable[[Array], np.ndarray],
    progress: Callable[[int], None],
    stopped: Callable[[list[int]], int | None] | None = None,
    shards: int = 1,
) -> list[Response]:
    """Samples `settings.num_samples` responses to every prompt.

    Those of a prompt follow one another. A response is a function of the parameters, its prompt and
    its key: whatever else is drawn beside it, it is the same up to the rounding of matrix products
    of other shapes.

    Args:
      sampler: jitted results of `make_sampler`.
      prompts: token ids.
      seed: response i of all is sampled with the key fold_in(key(seed), i).
      width: prompt columns of the cache, at least `prompt_width` of the prompts.
      batch_size: prompts of a batch, a multiple of `shards`.
      put, fetch: host array to devices and back.
      progress: called with the number of prompts done.
      stopped: a response's ids so far -> how many of them make it end (a stop string), or None.
      shards: data shards, over which `put` spreads rows.
    """
    each = settings.num_samples
    keys = sample_keys(seed, len(prompts), each)
    lengths = [len(prompt) for prompt in prompts]
    # The copy of the weights lives as long as this call.
    rollout = Rollout(sampler, sampler.serve(params), settings, shards, put, fetch, stopped)
    responses: list[Any] = [None] * (len(prompts) * each)
    finished = 0
    batches = batch_order(lengths, batch_size=batch_size, shards=shards)
    totals = [row_tokens([lengths[i] for i in numbers], shards) for numbers in batches]
    whole = rounded(max(totals, default=0))
    for numbers, total in zip(batches, totals, strict=True):
        packed = pack_prompts(
            [prompts[i] for i in numbers],
            shards=shards,
            width=least_half(max(lengths[i] for i in numbers), width),
            pad_id=settings.pad_id,
            length=least_half(total, whole),
        )
        decoding = sampler.start(
            params,
            put(packed.tokens),
            put(packed.group),
            put(keys[numbers].reshape(batch_size * each, -1)),
            put(packed.places),
        )
        is_first = first_places(numbers)
        drawn = rollout.finish(decoding, np.repeat(is_first, each))
        for place in np.flatnonzero(is_first):
            number = numbers[place]
            ours = slice(place * each, (place + 1) * each)
            responses[number * each : (number + 1) * each] = drawn[ours]
        finished += int(is_first.sum())
        progress(finished)
    return responses


def prompt_width(prompts: Sequence[Sequence[int]]) -> int:
    """The common width that prompts are padded to: a multiple of 64."""
    return -(-max(map(len, prompts)) // 64) * 64
