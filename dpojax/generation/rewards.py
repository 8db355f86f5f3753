"""Responses -> what they are worth: the weighted sum of a run's terms, and the judge of samples."""

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from dpojax.config.schema import Config
from dpojax.errors import ConfigError
from dpojax.untrusted.user_function import load_function


def check_scores(spec: str, scores: object, count: int) -> list[float]:
    """A reward function's scores of `count` responses as numbers.

    Raises: ConfigError for anything else.
    """
    try:
        values = [float(score) for score in scores]  # pyright: ignore[reportGeneralTypeIssues]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"sample.reward={spec!r} gave {scores!r:.80}; it must give a number for every response"
        ) from error
    if len(values) != count:
        raise ConfigError(f"sample.reward={spec!r} gave {len(values)} scores for {count} responses")
    bad = next((value for value in values if not math.isfinite(value)), None)
    if bad is not None:
        raise ConfigError(
            f"sample.reward={spec!r} gave the score {bad}; it must be a finite number"
        )
    return values


def try_reward(spec: str, prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Calls a reward function on a few samples, so that its mistakes show before the training.

    Raises: ConfigError.
    """
    reward = load_reward(spec)
    try:
        scores = reward(list(prompts), list(responses))
    except Exception as error:  # whatever a user's function raises is theirs to read
        raise ConfigError(
            f"sample.reward={spec!r} fails on {len(prompts)} samples: {type(error).__name__}:"
            f" {error}; it is called with a list of prompts and a list of responses, texts, and"
            " gives a number for each"
        ) from error
    check_scores(spec, scores, len(prompts))


def load_reward(spec: str) -> Callable[[Sequence[str], Sequence[str]], Sequence[float]]:
    """The function that `sample.reward` names: module:function or file.py:function, (prompts,
    responses) -> scores.

    Raises: ConfigError if it cannot be found.
    """
    return load_function(spec, "sample.reward")


# The functions that judge samples of the worlds, by name.
WORLD_REWARDS = {
    "summaries": "dpojax.data.world:true_reward",
    "sorting": "dpojax.data.sorting:true_reward",
}


def reward_name(config: Config) -> str:
    """The function that judges samples: sample.reward, or the embedded world's own where the world
    is the data; else "".
    """
    if config.sample.reward:
        return config.sample.reward
    if config.embedded:
        return WORLD_REWARDS[config.world]
    return ""


# (prompts, responses, columns of their rows) -> a number for each response, or None
TermFunction = Callable[
    [Sequence[str], Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float | None]
]


class Term(NamedTuple):
    """One summand of the reward."""

    name: str  # as reward.terms names it
    weight: float
    score: TermFunction
    in_thread: bool  # whether it may wait for something, so that it runs beside the others


class Scored(NamedTuple):
    """What N responses are worth."""

    total: np.ndarray  # [N] float64, NaN where every term gave None
    terms: dict[str, np.ndarray]  # by term, [N] float64, NaN for None


class Rewards:
    """The weighted sum of a run's terms; a term that gives no number for a response is left out of
    its sum.
    """

    def __init__(self, terms: Sequence[Term]):
        """Takes the terms, at least one."""
        self.terms = tuple(terms)
        self.names = tuple(term.name for term in terms)

    def __call__(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        columns: Sequence[Mapping[str, Any]],
    ) -> Scored:
        """Scores N responses.

        Args:
          prompts, responses: texts, N each.
          columns: of the row of each prompt; {} where there are none.
        Raises: ConfigError for a term that fails or gives something else than numbers; DataError
          for an answer that cannot be read.
        """
        count = len(responses)
        if len(prompts) != count or len(columns) != count:
            raise ValueError(
                f"{len(prompts)} prompts, {count} responses, {len(columns)} rows: all must be as"
                " many"
            )
        given = (list(prompts), list(responses), list(columns))
        waiting = {}
        scores: dict[str, np.ndarray] = {}
        # Models and the sandbox stay in this thread: every process must call them in one order.
        with ThreadPoolExecutor(max_workers=max(1, len(self.terms))) as pool:
            for term in self.terms:
                if term.in_thread:
                    waiting[term.name] = pool.submit(term.score, *given)
            for term in self.terms:
                if not term.in_thread:
                    scores[term.name] = check_term(term.name, term.score(*given), given)
            for name, future in waiting.items():
                scores[name] = check_term(name, future.result(), given)
        ordered = {name: scores[name] for name in self.names}
        return Scored(weighted_total([term.weight for term in self.terms], ordered), ordered)


def weighted_total(weights: Sequence[float], terms: Mapping[str, np.ndarray]) -> np.ndarray:
    """sum_k w_k r_k over the terms that gave a number, [N] float64; NaN where none did."""
    values = np.stack(list(terms.values()))
    has_number = np.isfinite(values)
    total = np.where(has_number, np.asarray(weights)[:, None] * values, 0.0).sum(axis=0)
    return np.where(has_number.any(axis=0), total, np.nan)


def check_term(
    name: str, scores: object, given: tuple[list[str], list[str], list[Mapping[str, Any]]]
) -> np.ndarray:
    """A term's scores, [N] float64, NaN in the place of None.

    Raises: ConfigError naming the term and the first response whose score is no number.
    """
    _, responses, columns = given
    must = f"reward.terms: {name!r} must give a number or None for each response"
    if isinstance(scores, str | bytes | Mapping) or not isinstance(scores, Iterable):
        raise ConfigError(f"{must}; it gave {scores!r:.80}, of type {type(scores).__name__}")
    listed = list(scores)
    if len(listed) != len(responses):
        raise ConfigError(f"{must}; it gave {len(listed)} for {len(responses)} responses")
    values = np.full(len(listed), np.nan)
    for i, score in enumerate(listed):
        if score is None:
            continue
        number = _as_number(score)
        if number is None or not math.isfinite(number):
            where = getattr(columns[i], "where", f"response {i}")
            raise ConfigError(
                f"{must}; for {where} it gave {score!r:.80}, of type {type(score).__name__}, on the"
                f" response {responses[i]!r:.60}"
            )
        values[i] = number
    return values


def _as_number(score: object) -> float | None:
    """A score as float64; None: it is no number, as a text is none."""
    if isinstance(score, numbers.Real):  # of NumPy's too
        return float(score)
    if getattr(score, "shape", None) == ():  # an array of one number, on any device
        return float(score)  # pyright: ignore[reportArgumentType]
    return None


class UserFunction:
    """A function of the user's own as a term: (prompts, responses), and the rows' columns where it
    takes a third parameter.
    """

    def __init__(self, spec: str):
        """Loads file.py:name or module:name. Raises ConfigError if it cannot be found."""
        self.spec = spec
        self.function = load_function(spec, "reward.terms")
        self.takes_columns = _takes_columns(self.function)

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Any:
        """What the function gives. Raises ConfigError with the row where it fails."""
        try:
            return self._call(prompts, responses, columns)
        except Exception as error:  # whatever a user's function raises is theirs to read
            where = self._failing_row(prompts, responses, columns)
            raise ConfigError(
                f"reward.terms: {self.spec!r} fails on {where}: {type(error).__name__}: {error};"
                " it is called with lists of prompts and responses, texts, and with the rows'"
                " columns where it takes a third parameter, and gives a number or None for each"
            ) from error

    def _call(self, prompts, responses, columns) -> Any:
        if self.takes_columns:
            return self.function(list(prompts), list(responses), [dict(row) for row in columns])
        return self.function(list(prompts), list(responses))

    def _failing_row(self, prompts, responses, columns) -> str:
        """The first row that the function fails on when it is called with that one alone."""
        for i, row in enumerate(columns):
            try:
                self._call([prompts[i]], [responses[i]], [row])
            except Exception:
                where = getattr(row, "where", f"response {i}")
                return f"{where} (prompt {prompts[i]!r:.60}, response {responses[i]!r:.60})"
        return f"{len(prompts)} responses together, and on none of them alone"


def _takes_columns(function: Callable[..., Any]) -> bool:
    """Whether a function has a third parameter that it needs, or one of the name `columns`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in ones do not tell
        return False
    by_place = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(by_place) < 3:
        return False
    third = by_place[2]
    return third.default is third.empty or third.name == "columns"
