"""config.reward -> the rewards of a run, opened and tried: what a sampled response is worth.

The face is generation/rewards.py; this file opens what its terms need of a run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dpojax.algorithms.face import Inputs
from dpojax.algorithms.model_rewards import ImplicitReward, open_reward_model
from dpojax.config.online import VERIFIABLE, RewardTerm
from dpojax.config.schema import Config
from dpojax.errors import ConfigError, DpojaxError
from dpojax.generation.judge import Judge
from dpojax.generation.rewards import (
    WORLD_REWARDS,
    Rewards,
    Term,
    TermFunction,
    UserFunction,
    check_term,
    load_reward,
)
from dpojax.generation.verifiable import Verifier
from dpojax.runtime.context import Job

TRIED_ROWS = 4  # on which every term is tried before the training


def open_rewards(job: Job, inputs: Inputs) -> Rewards:
    """The run's rewards, tried on a few rows, so that mistakes show before the training.

    Raises: ConfigError for a term that cannot be opened or gives no numbers, or where none is
      named and no world is the data.
    """
    config = job.config
    terms = config.reward.term_list() or _default_terms(config, inputs)
    weights = config.reward.weight_list() or (1.0,) * len(terms)
    rewards = Rewards(
        [open_term(job, inputs, term, weight) for term, weight in zip(terms, weights, strict=True)]
    )
    try_rewards(job, inputs, rewards)
    return rewards


def _default_terms(config: Config, inputs: Inputs) -> tuple[RewardTerm, ...]:
    """The world's own reward, or else the judge of samples.

    Raises: ConfigError where there is neither.
    """
    if config.embedded:
        return (RewardTerm("world", "world", ""),)
    judge = config.sample.reward
    if judge:
        return (RewardTerm(judge, "function", judge),)
    index = inputs.data.train_index
    columns = inputs.data.train.columns(int(index.rows[0]))
    advice = ""
    if config.reward.answer_column in columns:
        advice = f"; the rows have a column {config.reward.answer_column!r}: try numeric or exact"
    raise ConfigError(
        "reward.terms is '', and so is sample.reward; it must say what a sampled response is worth:"
        " exact, numeric or regex (by the row's answer), model:DIR, implicit:DIR, judge:URL, or a"
        f" function of your own as file.py:name{advice}"
    )


def open_term(job: Job, inputs: Inputs, term: RewardTerm, weight: float) -> Term:
    """One term, with what it needs.

    Raises: ConfigError for what is not there.
    """
    if term.kind == "model":
        return Term(term.name, weight, open_reward_model(job, term.place), in_thread=False)
    if term.kind == "implicit":
        return Term(term.name, weight, ImplicitReward(job, term.place), in_thread=False)
    if term.kind in VERIFIABLE:
        verifier = Verifier(term.kind, job.config.reward.answer_column)
        return Term(term.name, weight, verifier, in_thread=False)
    if term.kind == "world":
        return Term(term.name, weight, WorldReward(job.config), in_thread=False)
    score: TermFunction
    if term.kind == "judge":
        cache = job.workdir / "cache" / "judge.jsonl"
        score = Judge(term.place, job.config.reward, cache, job.write)
    else:
        score = UserFunction(term.place)
    if jax.process_count() > 1:
        # A function or a judge may answer otherwise each time: all processes train on what
        # process 0 got.
        return Term(term.name, weight, FromProcess0(term.name, score), in_thread=False)
    return Term(term.name, weight, score, in_thread=True)


class WorldReward:
    """The exact reward of the world that is the data."""

    def __init__(self, config: Config):
        """Finds it. Raises ConfigError where no world is the data."""
        if not config.embedded:
            raise ConfigError(
                "reward.terms holds 'world', and the data are files; the world's reward judges its"
                " own prompts alone (data.train='' or world:sorting)"
            )
        self.reward = load_reward(WORLD_REWARDS[config.world])

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float]:
        """The reward of each response."""
        del columns
        return self.reward(prompts, responses)


class FromProcess0:
    """A term that process 0 computes for all processes."""

    def __init__(self, name: str, score: TermFunction):
        """Takes the term's name and what scores."""
        self.name = name
        self.score = score

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        """Process 0's scores. Raises ConfigError in every process where process 0 fails."""
        values = np.full(len(responses), np.nan)
        fault: DpojaxError | None = None
        if jax.process_index() == 0:
            given = (list(prompts), list(responses), list(columns))
            try:
                values = check_term(self.name, self.score(*given), given)
            except DpojaxError as error:
                fault = error
        # As bytes: an array of float64 would be rounded to float32 on its way.
        message = np.frombuffer(values.tobytes() + bytes([fault is not None]), np.uint8)
        received = np.asarray(multihost_utils.broadcast_one_to_all(message), np.uint8)
        if fault is not None:
            raise fault
        if received[-1]:
            raise ConfigError(f"reward.terms: {self.name!r} failed in process 0, which says why")
        numbers = np.frombuffer(received[:-1].tobytes(), np.float64)
        return [None if np.isnan(number) else float(number) for number in numbers]


def compared_column(config: Config, term: RewardTerm) -> tuple[str, str] | None:
    """The setting that names the row's column which a term compares with, and the column; None: it
    compares with none.
    """
    if term.kind in VERIFIABLE:
        return "reward.answer_column", config.reward.answer_column
    if term.kind == "judge" and config.reward.judge_against:
        return "reward.judge_against", config.reward.judge_against
    return None


def try_rewards(job: Job, inputs: Inputs, rewards: Rewards) -> None:
    """Calls every term on a few rows of the data, with their own responses or answers.

    Raises: ConfigError where a term fails, or where an answer column is in none of the rows.
    """
    data = inputs.data
    answer = job.config.reward.answer_column
    rows = [int(row) for row in data.train_index.rows[:TRIED_ROWS]]
    prompts = []
    responses = []
    columns = []
    for row in rows:
        prompt, own = data.train.plain_texts(row)
        row_columns = data.train.columns(row)
        for response in own[:2] or [str(row_columns.get(answer, ""))]:
            prompts.append(prompt)
            responses.append(response)
            columns.append(row_columns)
    scored = rewards(prompts, responses, columns)
    for term in job.config.reward.term_list():
        compared = compared_column(job.config, term)
        if compared is None:
            continue
        setting, column = compared
        if all(row.get(column) is None for row in columns):
            raise ConfigError(
                f"{setting} is {column!r}, which none of the first {len(rows)} rows of"
                f" {data.train.records.name} has; they have"
                f" {', '.join(map(repr, columns[0]))}"
            )
    means = {
        name: "none" if np.isnan(values).all() else f"{np.nanmean(values):.3g}"
        for name, values in scored.terms.items()
    }
    listed = ", ".join(f"{name} {mean}" for name, mean in means.items())
    job.say(f"rewards: {listed} (mean on {len(rows)} rows of {data.train.records.name})")
