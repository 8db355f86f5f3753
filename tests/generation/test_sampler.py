"""Sampling with a cache against the training forward."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from dpojax.generation.decoding import Sampler, SampleSettings, filter_logits, make_sampler
from dpojax.generation.sampler import (
    draw,
)
from dpojax.generation.scorer import make_scorer, score_batches

MODEL = tiny.model(full=True)
PARAMS = tiny.params(MODEL)
PROMPTS = [[5, 6, 7], [9], list(range(10, 40))]


def generate(seed=0, batch_size=3, prompts=PROMPTS, options={}, **changes):  # noqa: B006
    drawing: dict[str, Any] = dict(
        max_new_tokens=12, temperature=1.0, top_k=0, top_p=1.0, eos_ids=(2,), pad_id=0
    )
    settings = SampleSettings(**(drawing | changes))
    sampler = Sampler(*map(jax.jit, make_sampler(MODEL, settings)))
    common = dict(
        settings=settings, width=64, put=jnp.asarray, fetch=np.asarray, progress=lambda n: None
    )
    found = draw(sampler, PARAMS, prompts, seed=seed, batch_size=batch_size, **common, **options)
    return [r.ids for r in found], [r.logps.sum() for r in found]


def test_sampled_log_probs_equal_the_training_forward():
    responses, sums = generate()
    for prompt, response, total in zip(PROMPTS, responses, sums, strict=True):
        np.testing.assert_allclose(
            tiny.naive_logps(MODEL, PARAMS, prompt, response).sum(), total, atol=1e-4
        )
    scorer = jax.jit(make_scorer(MODEL, prompt_width=64, num_shards=1, chunk=16))
    scores = score_batches(
        scorer,
        PARAMS,
        PROMPTS,
        responses,
        width=64,
        batch_size=2,
        max_new_tokens=12,
        pad_id=0,
        put=jnp.asarray,
        fetch=np.asarray,
    )
    np.testing.assert_allclose(scores, sums, atol=1e-4)


def test_a_sample_depends_on_its_prompt_and_key_and_not_on_its_neighbours():
    alone, _ = generate(batch_size=1)
    together, _ = generate(batch_size=3)
    assert alone == together
    assert generate(seed=1)[0] != together


def test_greedy_is_the_argmax_token_by_token():
    responses, _ = generate(temperature=0.0)
    for prompt, response in zip(PROMPTS, responses, strict=True):
        best = tiny.all_logps(MODEL, PARAMS, [*prompt, *response]).argmax(axis=-1)
        assert best[len(prompt) - 1 : -1].tolist() == response


def test_filters_keep_what_they_say():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))

    def kept(**k):
        return (filter_logits(logits, **{"top_k": 0, "top_p": 1.0, **k}) > -jnp.inf)[0].tolist()

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.7) == [True, True, False, False]
    assert kept() == [True] * 4


def test_samples_follow_the_models_distribution():
    settings = SampleSettings(
        max_new_tokens=1, temperature=1.0, top_k=0, top_p=1.0, eos_ids=(2,), pad_id=0
    )
    sampler = make_sampler(MODEL, settings)
    draw = jax.jit(lambda *start: sampler.extend(PARAMS, sampler.start(*start), 1))
    tokens, valid = jnp.full((4000, 4), 7), jnp.ones((4000, 4), bool)
    keys = jax.random.key_data(
        jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(4000))
    )
    drawn = (
        np.bincount(np.asarray(draw(PARAMS, tokens, valid, keys).tokens)[:, 0], minlength=61) / 4000
    )
    expected = np.exp([tiny.naive_logps(MODEL, PARAMS, [7] * 4, [t])[0] for t in range(5)])
    np.testing.assert_allclose(drawn[:5], expected, atol=5 * (0.25 / 4000) ** 0.5)
