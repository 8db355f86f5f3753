"""Settings of algorithms that sample: what a sampled response is worth."""

import dataclasses
import math
from typing import NamedTuple

from dpojax.config.limits import Count, CountOrZero, Positive, require
from dpojax.errors import ConfigError, did_you_mean
from dpojax.untrusted.user_function import names_code

# Terms that are a name alone, and terms that are KIND:WHERE.
PLAIN_TERMS = ("world", "exact", "numeric", "regex")
PLACED_TERMS = ("model", "implicit", "judge")
VERIFIABLE = ("exact", "numeric", "regex")

# Comparisons that are shipped with dpojax: what a judge is asked (generation/judge_*.txt).
JUDGE_PROMPTS = ("tldr", "helpful")


class RewardTerm(NamedTuple):
    """One summand of the reward, as reward.terms names it."""

    name: str  # the text of the setting, and the term's key among the scores
    kind: str  # one of PLAIN_TERMS or PLACED_TERMS, or "function"
    place: str  # the folder, the URL or the function; "" for a plain term


def reward_terms(text: str) -> tuple[RewardTerm, ...]:
    """The terms of reward.terms, in order.

    Raises: ConfigError for a term that is no name, no folder, no URL and no function, or one that
      stands there twice.
    """
    terms = [_read_term(name) for name in filter(None, map(str.strip, text.split(",")))]
    names = [term.name for term in terms]
    require(len(set(names)) == len(names), "reward.terms", text, "a list without repetition")
    return tuple(terms)


def _read_term(name: str) -> RewardTerm:
    if name in PLAIN_TERMS:
        return RewardTerm(name, name, "")
    kind, _, place = name.partition(":")
    if kind in PLACED_TERMS:
        where = "http://HOST:PORT/v1" if kind == "judge" else "DIR"
        require(bool(place), "reward.terms", name, f"{kind}:{where}")
        return RewardTerm(name, kind, place)
    if names_code(name):
        return RewardTerm(name, "function", name)
    known = (*PLAIN_TERMS, *PLACED_TERMS)
    raise ConfigError(
        f"reward.terms holds {name!r}; a term is one of {', '.join(PLAIN_TERMS)}, model:DIR,"
        " implicit:DIR, judge:URL, or a function of your own as file.py:name"
        f"{did_you_mean(name, known)}"
    )


def names_reward_code(text: str) -> bool:
    """Whether one of the terms is a function, which would be executed, or a server, which would be
    sent the rows and a key.
    """
    return any(term.kind in ("function", "judge") for term in reward_terms(text))


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What a sampled response is worth: a weighted sum of terms."""

    terms: str  # comma-separated: world, exact, numeric, regex, model:DIR, implicit:DIR, judge:URL,
    # file.py:name or module:name; "" = the world's exact reward, where a world is the data, else
    # sample.reward
    weights: str  # comma-separated, one for each term; "" = 1 each
    answer_column: str  # of a row, which exact, numeric and regex compare a response with
    beta: Positive  # implicit:DIR = beta (log pi_DIR - log pi_reference)
    judge_model: str  # the name that the judge's endpoint gives its model
    judge_prompt: str  # tldr, helpful, or a file with {prompt}, {first} and {second}
    judge_against: str  # the column that a response is compared with; "" = the other responses to
    # the same prompt
    judge_key: str  # the environment variable that holds the key of the judge's endpoint
    judge_max_calls: CountOrZero  # of a run, answers from the cache not counted; 0 = any number
    judge_calls_per_minute: CountOrZero  # at most; 0 = as many as the threads make
    judge_threads: Count  # calls that wait for the judge at the same time
    judge_retries: CountOrZero  # of a call that failed, each after a longer pause
    judge_timeout_s: Positive  # of one call

    def term_list(self) -> tuple[RewardTerm, ...]:
        """The terms, in order; () = unset."""
        return reward_terms(self.terms)

    def weight_list(self) -> tuple[float, ...]:
        """One weight for each term; () = 1 each.

        Raises: ConfigError for what is no finite number.
        """
        weights = []
        for text in filter(None, map(str.strip, self.weights.split(","))):
            try:
                weight = float(text)
            except ValueError:
                weight = math.nan
            must = "comma-separated finite numbers, one for each term"
            require(math.isfinite(weight), "reward.weights", self.weights, must)
            weights.append(weight)
        return tuple(weights)

    def check(self) -> None:
        """Known terms, as many weights, and what a judge needs."""
        terms = self.term_list()
        weights = self.weight_list()
        count = max(1, len(terms))
        must = f"'' or {count} numbers: reward.terms is {self.terms!r}"
        require(len(weights) in (0, count), "reward.weights", self.weights, must)
        if any(term.kind in VERIFIABLE for term in terms):
            must = "the name of a column: exact, numeric and regex compare with it"
            require(bool(self.answer_column), "reward.answer_column", self.answer_column, must)
        if any(term.kind == "judge" for term in terms):
            must = "the name of a model: judge:URL asks for it"
            require(bool(self.judge_model), "reward.judge_model", self.judge_model, must)
