"""A reward model -> where the rewards of its reference's samples lie, kept beside the model.

Rewards that have mean 0 and standard deviation 1 on samples of the reference make beta mean the
same in every run (Ziegler et al. 2019, arXiv:1909.08593, section 2.1).
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpojax.data.open import Data
from dpojax.data.open_tokenizer import stop_ids
from dpojax.data.rollouts import lone, lone_batches, lone_shape
from dpojax.data.row_plan import response_numbers
from dpojax.errors import ConfigError
from dpojax.evaluation.samples import distinct_prompts
from dpojax.generation.decoding import SampleSettings, compile_sampler
from dpojax.generation.sampler import (
    draw,
    fetch_whole,
    prompt_width,
    rows_put,
    whole_batch,
)
from dpojax.models.placed import Policy, fitted
from dpojax.objectives.reward import Normalisation, fit_normalisation
from dpojax.runtime.context import Job
from dpojax.runtime.mesh import local_shards, num_shards
from dpojax.training.rewards import make_rewards_step
from dpojax.untrusted.plain_data import read_json
from dpojax.weights.open import NORMALISATION


def write_normalisation(folder: pathlib.Path, scale: Normalisation) -> None:
    """Writes the scale beside a reward model's weights."""
    text = json.dumps({"mean": scale.mean, "std": scale.std}, indent=2) + "\n"
    (folder / NORMALISATION).write_text(text, encoding="utf-8")


def read_normalisation(folder: pathlib.Path) -> Normalisation | None:
    """The scale that lies beside a reward model, or in the workdir that holds it; None: there is
    none, as for a model that dpojax did not train.

    Raises: ConfigError for a file that holds no finite mean and no positive deviation.
    """
    for place in (folder, folder.parent, folder.parent.parent):
        path = place / NORMALISATION
        if not path.is_file():
            continue
        values = read_json(path)
        mean, std = values.get("mean"), values.get("std")
        numbers = [x for x in (mean, std) if isinstance(x, int | float) and np.isfinite(x)]
        if len(numbers) < 2 or numbers[1] <= 0:
            raise ConfigError(
                f"{path}: mean is {mean!r} and std {std!r}; they must be finite, and std > 0"
            )
        return Normalisation(float(numbers[0]), float(numbers[1]))
    return None


def sample_reference(
    job: Job, data: Data, policy: Policy, params: Any, count: int
) -> tuple[list[list[int]], list[list[int]]]:
    """One response of the reference to each of the first `count` distinct prompts, as ids, at
    temperature 1: held-out prompts where there are any.

    Args:
      policy, params: of the language model that the reward model was made from.
    Returns: prompts and responses.
    """
    assert data.tokenizer is not None
    dataset, index = data.train, data.train_index
    if data.eval is not None and data.eval_index is not None:
        dataset, index = data.eval, data.eval_index
    _, prompts = distinct_prompts(dataset, index, count)
    settings = SampleSettings(
        max_new_tokens=job.config.sample.max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_ids=stop_ids(data.tokenizer, data.train.reader.chat),
        pad_id=data.tokenizer.pad_id,
    )
    sampler = compile_sampler(
        policy.model, settings, job.mesh, job.program, name="reference_sampler"
    )
    progress = job.progress("sampling from the reference", len(prompts), "prompts")
    drawn = draw(
        sampler,
        params,
        prompts,
        settings=settings,
        seed=job.config.seed,
        width=prompt_width(prompts),
        batch_size=whole_batch(job.config.sample.batch_size, len(prompts), job.mesh),
        put=rows_put(job.mesh),
        fetch=fetch_whole,
        shards=num_shards(job.mesh),
        progress=progress,
    )
    responses = [response.ids for response in drawn]
    progress.close(f"{sum(map(len, responses)):,} tokens")
    return prompts, responses


def score_responses(
    job: Job,
    policy: Policy,
    params: Any,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
) -> np.ndarray:
    """The reward of each response to its prompt, [N], as the head says it.

    Args:
      policy, params: of the reward model.
    """
    size = min(job.config.sample.batch_size, len(prompts))
    rollouts = [
        lone(prompt, response, number)
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    shape = lone_shape(rollouts, count=size, num_shards=num_shards(job.mesh))
    model = fitted(job, policy, shape).model
    program = job.program("reward_pass", make_rewards_step(model), out_shardings=job.replicated)
    rewards = np.zeros(len(prompts), np.float64)
    shards = tuple(local_shards(job.mesh))
    for part in lone_batches(rollouts, shape, count=size, shards=shards):
        values = np.asarray(program(params, job.put(part.batch)))
        for (group, _), where in response_numbers(part.plan):
            rewards[part.first + group] = values[where]
    return rewards


def normalise_on_reference(
    job: Job, data: Data, language: Policy, start: Any, policy: Policy, params: Any
) -> Normalisation | None:
    """The scale on samples of the reference, written into the workdir; None where nothing can be
    sampled, which is said.

    Args:
      language, start: the language model that the reward model was made from, and its parameters.
      policy, params: of the reward model.
    """
    count = job.config.reward_model.norm_prompts
    if not count:
        return None
    if data.tokenizer is None:
        job.say("rewards are not normalised: nothing can be sampled without a tokenizer")
        return None
    prompts, responses = sample_reference(job, data, language, start, count)
    rewards = score_responses(job, policy, params, prompts, responses)
    scale = fit_normalisation(rewards)
    job.write(lambda: write_normalisation(job.workdir, scale))
    job.say(
        f"rewards of {len(rewards)} samples of the reference: mean {scale.mean:+.3f}, standard"
        f" deviation {scale.std:.3f} ({job.workdir / NORMALISATION})"
    )
    return scale
