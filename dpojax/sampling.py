"""Prompts -> sampled responses, with a KV cache: batched, jitted, deterministic by seed.

Legend: R prompts of a batch, P prompt length (padded on the left), T new tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpojax.logps import token_logps
from dpojax.models import Model


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float  # 0 = greedy
    top_k: int  # 0 = off
    top_p: float  # 1 = off
    eos_id: int
    pad_id: int


class Samples(NamedTuple):
    """Sampled responses; tokens after EOS are padding with log-prob 0."""

    tokens: Int[Array, "R T"]
    logps: Float[Array, "R T"]  # log pi of each token under the model itself (temperature 1, no filter), nats
    lengths: Int[Array, "R"]  # EOS included


def filter_logits(logits: Float[Array, "R V"], *, top_k: int, top_p: float) -> Float[Array, "R V"]:
    """Keeps the `top_k` largest logits, then the fewest whose probability reaches `top_p`; the rest become -inf."""
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability  # of the more likely ones
        # The most likely token is always kept.
        last = jnp.max(jnp.where(before < top_p, jnp.arange(logits.shape[-1]), 0), axis=-1, keepdims=True)
        logits = jnp.where(logits < jnp.take_along_axis(ranked, last, axis=-1), -jnp.inf, logits)
    return logits


def make_sampler(model: Model, settings: SampleSettings) -> Callable[..., Samples]:
    """The function (params, tokens [R, P], valid [R, P], key data [R, 2]) -> Samples, to be jitted.

    Every row has its own key, so that a sample depends on its prompt and key and not on its neighbours.
    """

    def draw(logits, keys, step):
        if settings.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        scaled = filter_logits(logits / settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
        return jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(keys, scaled)

    def sample(params, tokens, valid, key_data) -> Samples:
        keys = jax.random.wrap_key_data(key_data)
        rows, prompt = tokens.shape
        total = settings.max_new_tokens
        head = model.head(params)
        hidden, cache = model.prefill(params, tokens, valid)
        # The cache has room for all tokens: [N layers, R, P + T, K, E].
        cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, total), (0, 0), (0, 0))), cache)
        length = valid.sum(axis=1)
        is_key = jnp.pad(valid, ((0, 0), (0, total)))

        def body(state):
            step, hidden, cache, done, out, logps = state
            logits = model.unembed(head, hidden)
            token = jnp.where(done, settings.pad_id, draw(logits, keys, step)).astype(jnp.int32)
            logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=1)[:, 0]
            out = out.at[:, step].set(token)
            logps = logps.at[:, step].set(jnp.where(done, 0.0, logp))
            done = done | (token == settings.eos_id)
            seen = is_key | ((jnp.arange(prompt + total) >= prompt) & (jnp.arange(prompt + total) <= prompt + step))
            hidden, cache = model.decode(params, token, length + step, prompt + step, seen, cache)
            return step + 1, hidden, cache, done, out, logps

        start = (
            jnp.zeros((), jnp.int32),
            hidden[:, -1],
            cache,
            jnp.zeros(rows, bool),
            jnp.full((rows, total), settings.pad_id, jnp.int32),
            jnp.zeros((rows, total), jnp.float32),
        )
        step, _, _, _, out, logps = jax.lax.while_loop(lambda s: (s[0] < total) & ~s[3].all(), body, start)
        ended = out == settings.eos_id
        lengths = jnp.where(ended.any(axis=1), jnp.argmax(ended, axis=1) + 1, step)
        return Samples(out, logps, lengths)

    return sample


def generate(
    sampler: Callable[..., Samples],
    params,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    width: int,
    batch_size: int,
    pad_id: int,
    put: Callable[[np.ndarray], Array],
    fetch: Callable[[Array], np.ndarray],
    progress: Callable[[int], None],
) -> tuple[list[list[int]], np.ndarray]:
    """Samples one response to every prompt, in batches of one shape.

    Args:
      sampler: jitted result of `make_sampler`.
      prompts: token ids.
      seed: prompt i is sampled with the key fold_in(key(seed), i).
      width: that prompts are padded to, at least `prompt_width` of them.
      put, fetch: host array to devices and back.
      progress: called with the number of prompts done.
    Returns: the responses' ids (EOS included where they ended) and log pi of each response, nats.
    """
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(prompts)))
    key_data = np.asarray(jax.random.key_data(keys))
    responses: list[list[int]] = []
    sums = []
    for start in range(0, len(prompts), batch_size):
        chosen = [min(i, len(prompts) - 1) for i in range(start, start + batch_size)]  # the last batch is filled up
        tokens = np.full((batch_size, width), pad_id, np.int32)
        valid = np.zeros((batch_size, width), bool)
        for row, i in enumerate(chosen):
            tokens[row, width - len(prompts[i]) :] = prompts[i]
            valid[row, width - len(prompts[i]) :] = True
        samples = sampler(params, put(tokens), put(valid), put(key_data[chosen]))
        samples = jax.tree.map(fetch, samples)
        for row in range(min(batch_size, len(prompts) - start)):
            responses.append(samples.tokens[row, : samples.lengths[row]].tolist())
            sums.append(samples.logps[row].sum())
        progress(len(responses))
    return responses, np.asarray(sums)


def make_scorer(model: Model, *, prompt_width: int, num_shards: int, chunk: int) -> Callable[..., Float[Array, "R"]]:
    """The function (params, tokens [R, P + T], valid [R, P + T]) -> log pi(response | prompt) [R], to be jitted.

    Prompts are padded on the left to `prompt_width`, responses on the right, as `generate` lays them out.
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
        count = jnp.asarray(target.shape[1])
        logps: Array = token_logps(model.unembed, model.head(params), hidden, predictor, target, count, chunk)
        return jnp.sum(jnp.where(valid[:, prompt_width:], logps.reshape(rows, -1), 0.0), axis=1)

    return score


def score_batches(
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
        chosen = [min(i, len(prompts) - 1) for i in range(start, start + batch_size)]
        tokens = np.full((batch_size, width + max_new_tokens), pad_id, np.int32)
        valid = np.zeros(tokens.shape, bool)
        for row, i in enumerate(chosen):
            whole = [*prompts[i], *responses[i]]
            place = slice(width - len(prompts[i]), width + len(responses[i]))
            tokens[row, place], valid[row, place] = whole, True
        sums.extend(fetch(scorer(params, put(tokens), put(valid)))[: len(prompts) - start].tolist())
    return np.asarray(sums)


def prompt_width(prompts: Sequence[Sequence[int]]) -> int:
    """The common width that prompts are padded to: a multiple of 64."""
    return -(-max(map(len, prompts)) // 64) * 64
