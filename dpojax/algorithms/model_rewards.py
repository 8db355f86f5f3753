"""Models on disk as terms of the reward: a reward model, or a policy against its reference.

They read texts: a response is tokenised as the run that trained the model wrote its rows, and ends
in EOS, also where the sampler cut it.
"""

import argparse
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dpojax.data.groups import Dropped
from dpojax.data.packing import PackShape
from dpojax.data.rollouts import Rollout, lone_batches, lone_shape
from dpojax.data.row_plan import response_numbers
from dpojax.data.written import Writing
from dpojax.errors import ConfigError, NumericsError
from dpojax.evaluation.reward_scale import read_normalisation
from dpojax.generation.loaded import Loaded, Text, open_text
from dpojax.generation.open_model import ROUND_TOKENS, OpenModel
from dpojax.models.params import param_shapes
from dpojax.models.placed import check_memory, check_positions, place_decoder
from dpojax.runtime import sharding
from dpojax.runtime.context import Job
from dpojax.runtime.mesh import local_shards, num_shards
from dpojax.training.rewards import make_rewards_step
from dpojax.weights.open import ignored_fields, open_weights

MOST_TOKENS = 2048  # of a prompt, and of a response, for a model that no run of dpojax wrote
BATCH_RESPONSES = 32  # at a time

Columns = Sequence[Mapping[str, Any]]


def load_frozen(job: Job, place: str, *, scalar_head: bool) -> Loaded:
    """A model on the run's mesh, in the run's shardings and types.

    Raises: ConfigError if it is not there, or of the other kind.
    """
    c = job.config
    weights = open_weights(
        place,
        ignore=ignored_fields(c.model.ignore_fields),
        setting="reward.terms",
        scalar_head=scalar_head,
    )
    check_memory(weights.config, c.model.param_dtype)
    rules = dict(c.mesh.rules)
    model = place_decoder(
        weights.config,
        job.mesh,
        rules,
        dtype=c.model.dtype,
        param_dtype=c.model.param_dtype,
        remat="none",
    )
    shardings = sharding.param_shardings(param_shapes(weights.config), model.axes, job.mesh, rules)
    params = weights.load(shardings, jnp.dtype(c.model.param_dtype), lambda count: None)
    return Loaded(model, weights.config, params, job.mesh, c.model.dtype)


def text_of(job: Job, place: str) -> Text:
    """How the model's rows were written: as the run says that trained it, else as this one."""
    c = job.config.data
    unset = dict.fromkeys(
        (
            "prompt_template",
            "chat",
            "max_prompt_tokens",
            "max_response_tokens",
            "mask_tokens",
            "mask_template",
        )
    )
    arguments = argparse.Namespace(tokenizer="", chat_template=c.chat_template, **unset)
    defaults = Writing(
        prompt_template=c.prompt_template,
        text_as_chat=c.text_as_chat,
        max_prompt_tokens=MOST_TOKENS,
        max_response_tokens=MOST_TOKENS,
    )
    return open_text(place, arguments, defaults)


def row_prompts(prompts: Sequence[str], columns: Columns) -> list[Any]:
    """The prompts as their rows hold them, texts or messages: a model writes them as its own run
    did, and not as this one. A row without the column has its text.
    """
    return [
        row["prompt"] if isinstance(row.get("prompt"), str | list) else prompt
        for prompt, row in zip(prompts, columns, strict=True)
    ]


def open_reward_model(job: Job, place: str) -> "RewardOfModel":
    """A run's folder with a reward model, or a classifier of transformers with one label.

    Raises: ConfigError if it is no reward model.
    """
    texts = OpenModel(load_frozen(job, place, scalar_head=True), text_of(job, place))
    step = make_rewards_step(texts.loaded.model)
    program = job.program(f"reward_of_{place}", step, out_shardings=job.replicated)
    return RewardOfModel(texts, place, program)


class RewardOfModel:
    """r(x, y) of a reward model: its head's number, on the scale that lies beside it."""

    def __init__(self, texts: OpenModel, place: str, program: Callable[[Any, Any], Any]):
        """Takes the model, its folder, and its jitted pass (parameters, batch) -> rewards."""
        self.texts = texts
        self.place = place
        self.scale = read_normalisation(pathlib.Path(place))
        self.program = program

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Columns
    ) -> list[float | None]:
        """The reward of each response; None for one that is empty.

        Raises: NumericsError for a reward that is not finite.
        """
        return self.of_prompts(row_prompts(prompts, columns), responses)

    def of_prompts(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float | None]:
        """The same of prompts as they stand: texts, messages or ids."""
        rollouts = tokens_of(self.texts, prompts, responses)
        numbers = [i for i, rollout in enumerate(rollouts) if rollout is not None]
        values = self._rewards([rollout for rollout in rollouts if rollout is not None])
        scores: list[float | None] = [None] * len(responses)
        for i, value in zip(numbers, values, strict=True):
            scores[i] = float(value)
        return scores

    def _rewards(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        """The reward of each rollout's response, [N] float64."""
        rewards = np.zeros(len(rollouts), np.float64)
        if not rollouts:
            return rewards
        loaded = self.texts.loaded
        shape = shape_of(loaded, rollouts)
        shards = tuple(local_shards(loaded.mesh))
        for part in lone_batches(rollouts, shape, count=BATCH_RESPONSES, shards=shards):
            placed = sharding.put_batch(part.batch, loaded.mesh)
            values = np.asarray(self.program(loaded.params, placed))
            for (group, _), where in response_numbers(part.plan):
                rewards[part.first + group] = values[where]
        if not np.isfinite(rewards).all():
            raise NumericsError(
                f"the reward model {self.place} gives the reward"
                f" {rewards[~np.isfinite(rewards)][0]}; compute in float32 (model.dtype)"
            )
        if self.scale is None:
            return rewards
        return np.asarray(self.scale.apply(rewards), np.float64)


def tokens_of(
    texts: OpenModel, prompts: Sequence[Any], responses: Sequence[str]
) -> list[Rollout | None]:
    """Prompts with their responses as ids; None for a response that is empty or that no row of a
    data file could hold.
    """
    rollouts: list[Rollout | None] = []
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            rollouts.append(texts.tokens(prompt, response, number))
        except Dropped:
            rollouts.append(None)
    return rollouts


def shape_of(loaded: Loaded, rollouts: Sequence[Rollout]) -> PackShape:
    """The static shape of a batch of BATCH_RESPONSES such rollouts.

    Raises: ConfigError for a sequence that the model cannot hold.
    """
    longest_prompt = max(len(rollout.prompt) for rollout in rollouts)
    longest_response = max(len(rollout.responses[0]) for rollout in rollouts)
    check_positions(
        loaded.config, longest_prompt + longest_response, "the prompts or the responses of the data"
    )
    return lone_shape(
        rollouts,
        count=BATCH_RESPONSES,
        num_shards=num_shards(loaded.mesh),
        multiple=ROUND_TOKENS,
    )


class ImplicitReward:
    """beta (log pi(y | x) - log pi_ref(y | x)), Eq. 5 of Rafailov et al. 2023 (arXiv:2305.18290),
    up to a constant of the prompt.
    """

    def __init__(self, job: Job, place: str):
        """Loads both models.

        Args:
          place: DIR, whose reference is the run's model.init, or DIR|REFDIR.
        Raises: ConfigError where one of them is not there, or no reference is named.
        """
        policy, _, reference = place.partition("|")
        reference = reference or job.config.model.init
        if not reference:
            raise ConfigError(
                f"reward.terms holds implicit:{place}, and the run starts from random weights;"
                " name the reference as well: implicit:DIR|REFDIR"
            )
        self.beta = job.config.reward.beta
        text = text_of(job, policy)
        self.policy = OpenModel(load_frozen(job, policy, scalar_head=False), text)
        self.reference = OpenModel(load_frozen(job, reference, scalar_head=False), text)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Columns
    ) -> list[float | None]:
        """The reward of each response; None for one that is empty."""
        rollouts = tokens_of(self.policy, row_prompts(prompts, columns), responses)
        kept = [i for i, rollout in enumerate(rollouts) if rollout is not None]
        scores: list[float | None] = [None] * len(responses)
        if not kept:
            return scores
        ids = [rollout for rollout in rollouts if rollout is not None]
        texts = ([r.prompt for r in ids], [r.responses[0] for r in ids])
        policy = self.policy.logps(*texts, batch_size=BATCH_RESPONSES)
        reference = self.reference.logps(*texts, batch_size=BATCH_RESPONSES)
        for i, ratio in zip(kept, policy - reference, strict=True):
            scores[i] = self.beta * float(ratio)
        return scores
