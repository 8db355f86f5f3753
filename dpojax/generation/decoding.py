"""Prompts -> sampled responses on the devices: pure functions, to be jitted.

Legend: R prompts of a batch, G samples of each, B = R G rows, A packed rows of L tokens, P prompt
columns of the cache, T new tokens, V vocabulary, D model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dpojax.models.attention.cached import Cache, Seen
from dpojax.models.decoder import Model
from dpojax.models.decoding import empty_caches, prompt_caches
from dpojax.runtime import sharding


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
    hidden: Float[Array, "B D"]  # of the last token
    cache: Cache
    is_key: Bool[Array, "R P"]  # columns of the prompts' cache that hold a token
    prompt_lengths: Int[Array, " R"]
    keys: Array  # key data [B, 2]
    done: Bool[Array, " B"]
    tokens: Int[Array, "B T"]
    # log pi of each token under the model itself (temperature 1, no filter), nats
    logps: Float[Array, "B T"]
    lengths: Int[Array, " B"]  # EOS included


class Sampler(NamedTuple):
    """Four pure functions, to be jitted."""

    # params -> the parameters as `extend` takes them, to be made once a rollout. `extend` takes
    # params too, and lays them out itself.
    serve: Callable[..., Any]
    # (params, tokens [A, L], group [A, L], key data [B, 2][, places [R, P]]) -> Decoding. Groups
    # are prompts, numbered from 1 in each row; 0 is padding. `places` are the columns of each
    # prompt's tokens in its row, L where there is none; without them, each row holds one prompt.
    start: Callable[..., Decoding]
    extend: Callable[..., Decoding]  # (served, decoding, until): draws up to `until` tokens in all
    # (decoding, prompts [R'], rows [B'], live [B']) -> the decoding of these prompts and rows,
    # whose rows are done where they are not live
    take: Callable[..., Decoding]


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


def first_largest(x: Float[Array, "R V"]) -> Int[Array, " R"]:
    """argmax, by two plain reductions: XLA runs them several times as fast on CPUs."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    is_largest = x == x.max(axis=-1, keepdims=True)
    # A row with a NaN has no largest; its log-prob says so.
    return jnp.min(jnp.where(is_largest, index, x.shape[-1] - 1), axis=-1)


def draw_tokens(
    logits: Float[Array, "R V"], keys: Array, step: Int[Array, ""], settings: SampleSettings
) -> Int[Array, " R"]:
    """The next token of every row: jax.random.categorical's, with the key fold_in(key, step)."""
    if settings.temperature == 0:
        return first_largest(logits)
    scaled = filter_logits(
        logits / settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    noise = jax.vmap(
        lambda key: jax.random.gumbel(jax.random.fold_in(key, step), scaled.shape[1:], scaled.dtype)
    )(keys)
    # Inside a reduction, the logarithms of the noise would be computed one by one.
    return first_largest(jax.lax.optimization_barrier(noise + scaled))


def _positions(group: Int[Array, "A L"]) -> Int[Array, "A L"]:
    """The place of each token in its group."""
    index = jnp.arange(group.shape[1])
    begins = jnp.diff(group, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def make_sampler(model: Model, settings: SampleSettings) -> Sampler:
    """The functions that draw responses. `extend` may be called again and again; its decoding can
    be donated.

    Every row has its own key, so that a sample depends on its prompt and key and not on its
    neighbours.
    """
    total = settings.max_new_tokens
    each = settings.num_samples

    def start(params, tokens, group, key_data, places=None) -> Decoding:
        group = group.astype(jnp.int32)
        packed, length = tokens.shape
        if places is None:
            places = jnp.where(group > 0, jnp.arange(length), length)
        rows = len(key_data)
        is_key = places < length
        hidden, filled = model.prefill(params, tokens, _positions(group), group)
        # The hidden state of each prompt's last token.
        last = jnp.where(is_key, places, -1).max(axis=1).reshape(packed, -1)
        hidden = jax.vmap(lambda x, index: x[index])(hidden, last)
        prompts = prompt_caches(filled, places)
        return Decoding(
            step=jnp.zeros((), jnp.int32),
            hidden=jnp.repeat(hidden.reshape(rows // each, -1), each, axis=0),
            cache=Cache(prompts, empty_caches(prompts, rows, total)),
            is_key=is_key,
            prompt_lengths=is_key.sum(axis=1),
            keys=key_data,
            done=jnp.zeros(rows, bool),
            tokens=jnp.full((rows, total), settings.pad_id, jnp.int32),
            logps=jnp.zeros((rows, total), jnp.float32),
            lengths=jnp.zeros(rows, jnp.int32),
        )

    def extend(params, decoding: Decoding, until) -> Decoding:
        served = model.serve(params)
        head = model.head(served)
        keys = jax.random.wrap_key_data(decoding.keys)
        ends = jnp.asarray(settings.eos_ids)

        def body(d: Decoding) -> Decoding:
            logits = model.unembed(head, d.hidden)
            token = jnp.where(d.done, settings.pad_id, draw_tokens(logits, keys, d.step, settings))
            token = token.astype(jnp.int32)
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)
            seen = Seen(d.is_key, d.prompt_lengths, d.step)
            hidden, cache = model.decode(served, token, seen, d.cache)
            return d._replace(
                step=d.step + 1,
                hidden=hidden,
                cache=cache,
                done=d.done | jnp.isin(token, ends),
                tokens=d.tokens.at[:, d.step].set(token),
                logps=d.logps.at[:, d.step].set(jnp.where(d.done, 0.0, logp[:, 0])),
                lengths=d.lengths + ~d.done,
            )

        return jax.lax.while_loop(lambda d: (d.step < until) & ~d.done.all(), body, decoding)

    def take(decoding: Decoding, prompts, rows, live) -> Decoding:
        def of_prompts(x):
            return jax.tree.map(lambda leaf: leaf[prompts], x)

        def of_rows(x):
            return jax.tree.map(lambda leaf: leaf[rows], x)

        cache = decoding.cache
        return Decoding(
            step=decoding.step,
            hidden=of_rows(decoding.hidden),
            cache=Cache(of_prompts(cache.prompts), of_rows(cache.samples)),
            is_key=of_prompts(decoding.is_key),
            prompt_lengths=of_prompts(decoding.prompt_lengths),
            keys=of_rows(decoding.keys),
            done=of_rows(decoding.done) | ~live,
            tokens=of_rows(decoding.tokens),
            logps=of_rows(decoding.logps),
            lengths=of_rows(decoding.lengths),
        )

    return Sampler(serve=model.serve, start=start, extend=extend, take=take)


def decoding_shardings(mesh: Mesh) -> Decoding:
    """Rows and prompts over the data axes, in the fields of a Decoding.

    They are the same before and after `extend`, so that one program serves all of its calls.
    """
    rows: Any = sharding.rows_sharding(mesh, leading=0)
    replicated: Any = NamedSharding(mesh, PartitionSpec())
    return Decoding(
        step=replicated,
        hidden=rows,
        cache=rows,
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
        serve=jit(f"{name}_weights", plain.serve),
        start=jit(f"{name}_start", plain.start, out_shardings=shardings),
        extend=jit(name, plain.extend, donate_argnums=1, out_shardings=shardings),
        take=jit(f"{name}_take", plain.take, out_shardings=shardings),
    )
