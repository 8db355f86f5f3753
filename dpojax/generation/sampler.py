"""Prompts -> sampled responses, with a KV cache: batched, jitted, deterministic by seed.

Legend: R prompts of a batch, P prompt length (padded on the left), T new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpojax.models.decoder import Model
from dpojax.runtime import sharding
from dpojax.runtime.mesh import num_shards
from dpojax.training.logps import HeadInputs, Targets, token_logps


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How tokens are drawn.

    >>> settings = dpojax.SampleSettings(
    ...     max_new_tokens=64, temperature=0.0, top_k=0, top_p=1.0, eos_ids=(2,), pad_id=0
    ... )
    >>> settings.num_samples
    1
    """

    max_new_tokens: int
    temperature: float  # 0 = greedy
    top_k: int  # 0 = off
    top_p: float  # 1 = off
    eos_ids: tuple[int, ...]  # any of them ends a response
    pad_id: int
    num_samples: int = 1  # of each prompt, which is read once


class Decoding(NamedTuple):
    """Responses as far as they are drawn; tokens after the end are padding with log-prob 0."""

    step: Int[Array, ""]  # tokens drawn
    hidden: Float[Array, "R D"]  # of the last token
    cache: Any
    is_key: Bool[Array, "R S"]  # the prompt's part of the cache
    prompt_lengths: Int[Array, " R"]
    keys: Array  # key data [R, 2]
    done: Bool[Array, " R"]
    tokens: Int[Array, "R T"]
    # log pi of each token under the model itself (temperature 1, no filter), nats
    logps: Float[Array, "R T"]
    lengths: Int[Array, " R"]  # EOS included


class Sampler(NamedTuple):
    """Two pure functions, to be jitted."""

    # (params, tokens [R, P], valid [R, P], key data [R num_samples, 2])
    start: Callable[..., Decoding]
    extend: Callable[..., Decoding]  # (params, decoding, until): draws up to `until` tokens in all


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


def filter_logits(logits: Float[Array, "R V"], *, top_k: int, top_p: float) -> Float[Array, "R V"]:
    """Keeps the `top_k` largest logits, then the fewest whose probability reaches `top_p`; the rest
    become -inf.
    """
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of the more likely ones
        # The most likely token is always kept.
        last = jnp.max(
            jnp.where(before < top_p, jnp.arange(logits.shape[-1]), 0), axis=-1, keepdims=True
        )
        logits = jnp.where(logits < jnp.take_along_axis(ranked, last, axis=-1), -jnp.inf, logits)
    return logits


def make_sampler(model: Model, settings: SampleSettings) -> Sampler:
    """The functions that draw responses. `extend` may be called again and again; its decoding can
    be donated.

    Every row has its own key, so that a sample depends on its prompt and key and not on its
    neighbours.
    """
    total = settings.max_new_tokens

    def draw(logits, keys, step):
        if settings.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        scaled = filter_logits(
            logits / settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )
        return jax.vmap(
            lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row)
        )(keys, scaled)

    def start(params, tokens, valid, key_data) -> Decoding:
        hidden, cache = model.prefill(params, tokens, valid)
        # The cache has room for all tokens: [N layers, R, P + T, K, E].
        room = ((0, 0), (0, 0), (0, total), (0, 0), (0, 0))

        def for_samples(x, axis=0):
            """A prompt's row for each of its samples."""
            if settings.num_samples == 1:
                return x
            return jnp.repeat(x, settings.num_samples, axis=axis)

        rows = tokens.shape[0] * settings.num_samples
        return Decoding(
            step=jnp.zeros((), jnp.int32),
            hidden=for_samples(hidden[:, -1]),
            cache=jax.tree.map(lambda x: for_samples(jnp.pad(x, room), axis=1), cache),
            is_key=for_samples(jnp.pad(valid, ((0, 0), (0, total)))),
            prompt_lengths=for_samples(valid.sum(axis=1)),
            keys=key_data,
            done=jnp.zeros(rows, bool),
            tokens=jnp.full((rows, total), settings.pad_id, jnp.int32),
            logps=jnp.zeros((rows, total), jnp.float32),
            lengths=jnp.zeros(rows, jnp.int32),
        )

    def extend(params, decoding: Decoding, until) -> Decoding:
        head = model.head(params)
        keys = jax.random.wrap_key_data(decoding.keys)
        width = decoding.is_key.shape[1]
        prompt = width - total

        def body(d: Decoding) -> Decoding:
            logits = model.unembed(head, d.hidden)
            token = jnp.where(d.done, settings.pad_id, draw(logits, keys, d.step)).astype(jnp.int32)
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)[
                :, 0
            ]
            index = jnp.arange(width)
            seen = d.is_key | ((index >= prompt) & (index <= prompt + d.step))
            hidden, cache = model.decode(
                params, token, d.prompt_lengths + d.step, prompt + d.step, seen, d.cache
            )
            return d._replace(
                step=d.step + 1,
                hidden=hidden,
                cache=cache,
                done=d.done | jnp.isin(token, jnp.asarray(settings.eos_ids)),
                tokens=d.tokens.at[:, d.step].set(token),
                logps=d.logps.at[:, d.step].set(jnp.where(d.done, 0.0, logp)),
                lengths=d.lengths + ~d.done,
            )

        return jax.lax.while_loop(lambda d: (d.step < until) & ~d.done.all(), body, decoding)

    return Sampler(start, extend)


def decoding_shardings(mesh: Mesh) -> Decoding:
    """Rows over the data axes, in the fields of a Decoding.

    They are the same before and after `extend`, so that one program serves all of its calls.
    """
    rows: Any = sharding.rows_sharding(mesh, leading=0)
    layers: Any = sharding.rows_sharding(mesh, leading=1)
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    return Decoding(
        step=replicated,
        hidden=rows,
        cache=layers,
        is_key=rows,
        prompt_lengths=rows,
        keys=rows,
        done=rows,
        tokens=rows,
        logps=rows,
        lengths=rows,
    )


def compile_sampler(
    model: Model, settings: SampleSettings, mesh: Mesh, jit: Callable[..., Callable], name="sampler"
) -> Sampler:
    """The programs of a sampler; `jit`: (name, function, **options of jax.jit) -> the program."""
    plain = make_sampler(model, settings)
    shardings = decoding_shardings(mesh)
    return Sampler(
        start=jit(f"{name}_start", plain.start, out_shardings=shardings),
        extend=jit(name, plain.extend, donate_argnums=1, out_shardings=shardings),
    )


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


SEGMENT = 32  # tokens that are drawn between two looks for stop strings


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
) -> list[Response]:
    """Samples `settings.num_samples` responses to every prompt, in batches of one shape.

    Those of a prompt follow one another.

    Args:
      sampler: jitted results of `make_sampler`.
      prompts: token ids.
      seed: response i of all is sampled with the key fold_in(key(seed), i).
      width: that prompts are padded to, at least `prompt_width` of them.
      batch_size: prompts of a batch.
      put, fetch: host array to devices and back.
      progress: called with the number of prompts done.
      stopped: a response's ids so far -> how many of them make it end (a stop string), or None.
    """
    count = len(prompts)
    each = settings.num_samples
    pad_id = settings.pad_id
    fold = functools.partial(jax.random.fold_in, jax.random.key(seed))
    key_data = np.asarray(jax.random.key_data(jax.vmap(fold)(jnp.arange(count * each)))).reshape(
        count, each, -1
    )
    responses: list[Response] = []
    for start in range(0, count, batch_size):
        # The last prompt fills the last batch up: all batches have one shape.
        numbers = [min(i, count - 1) for i in range(start, start + batch_size)]
        tokens = np.full((batch_size, width), pad_id, np.int32)
        valid = np.zeros((batch_size, width), bool)
        for row, i in enumerate(numbers):
            tokens[row, width - len(prompts[i]) :] = prompts[i]
            valid[row, width - len(prompts[i]) :] = True
        keys = key_data[numbers].reshape(batch_size * each, -1)
        decoding = sampler.start(params, put(tokens), put(valid), put(keys))
        cuts: dict[int, int] = {}  # row -> length at which a stop string ended it
        step = settings.max_new_tokens
        if stopped is not None:
            step = SEGMENT
        for until in range(step, settings.max_new_tokens + step, step):
            decoding = sampler.extend(
                params, decoding, np.int32(min(until, settings.max_new_tokens))
            )
            if stopped is None:
                break
            ids = np.array(fetch(decoding.tokens))
            lengths = np.array(fetch(decoding.lengths))
            done = np.array(fetch(decoding.done))
            for row in range(len(ids)):
                if row in cuts:
                    continue
                cut = stopped(ids[row, : lengths[row]].tolist())
                if cut is not None:
                    cuts[row] = cut
                    done[row] = True
            decoding = decoding._replace(done=put(done))
            if done.all():
                break
        ids = np.array(fetch(decoding.tokens))
        logps = np.array(fetch(decoding.logps))
        lengths = np.array(fetch(decoding.lengths))
        done = np.array(fetch(decoding.done))
        for row in range(min(batch_size, count - start) * each):
            length = cuts.get(row, int(lengths[row]))
            responses.append(
                Response(ids[row, :length].tolist(), logps[row, :length], ended=bool(done[row]))
            )
        progress(len(responses) // each)
    return responses


def make_scorer(
    model: Model, *, prompt_width: int, num_shards: int, chunk: int
) -> Callable[..., Float[Array, " R"]]:
    """The function (params, tokens [R, P + T], valid [R, P + T]) -> log pi(response | prompt) [R],
    to be jitted.

    Prompts are padded on the left to `prompt_width`, responses on the right, as `draw` lays them
    out.
    """

    def score(params, tokens, valid):
        rows, width = tokens.shape
        # A row of this call is one group: right padding has group 0, left padding too.
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        group = valid.astype(jnp.int32)
        hidden = model.hidden_states(params, tokens, positions, group, jnp.zeros_like(group))
        hidden = hidden.reshape(num_shards, -1, hidden.shape[-1])
        per_shard = rows // num_shards
        columns = jnp.arange(prompt_width, width) - 1
        predictor = (jnp.arange(per_shard)[:, None] * width + columns).reshape(-1)
        predictor = jnp.broadcast_to(predictor, (num_shards, predictor.size))
        target = tokens[:, prompt_width:].reshape(num_shards, -1)
        logps: Array = token_logps(
            model.unembed,
            HeadInputs(head=model.head(params), hidden=hidden),
            Targets(predictor, target, count=jnp.asarray(target.shape[1])),
            chunk=chunk,
        )
        return jnp.sum(jnp.where(valid[:, prompt_width:], logps.reshape(rows, -1), 0.0), axis=1)

    return score


def score_batches(  # noqa: PLR0913  # settings of several kinds, by keyword
    scorer: Callable[..., Array],
    params,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    width: int,
    batch_size: int,
    max_new_tokens: int,
    pad_id: int,
    put: Callable[[np.ndarray], Array],
    fetch: Callable[[Array], np.ndarray],
) -> np.ndarray:
    """log pi(response | prompt) of every prompt under `params`, in batches of one shape. nats."""
    sums: list[float] = []
    for start in range(0, len(prompts), batch_size):
        numbers = [min(i, len(prompts) - 1) for i in range(start, start + batch_size)]
        tokens = np.full((batch_size, width + max_new_tokens), pad_id, np.int32)
        valid = np.zeros(tokens.shape, bool)
        for row, i in enumerate(numbers):
            place = slice(width - len(prompts[i]), width + len(responses[i]))
            tokens[row, place] = [*prompts[i], *responses[i]]
            valid[row, place] = True
        sums.extend(fetch(scorer(params, put(tokens), put(valid)))[: len(prompts) - start].tolist())
    return np.asarray(sums)


def prompt_width(prompts: Sequence[Sequence[int]]) -> int:
    """The common width that prompts are padded to: a multiple of 64."""
    return -(-max(map(len, prompts)) // 64) * 64
