"""Responses -> how often a judge, a language model behind an endpoint, prefers them.

Two texts are compared in both orders, as a judge likes what it reads first; a tie counts 0.5. What
a judge is asked follows Rafailov et al. 2023 (arXiv:2305.18290), appendix C.2, in our own words
(judge_*.txt).
"""

import collections
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

from dpojax.config.online import JUDGE_PROMPTS, RewardConfig
from dpojax.errors import ConfigError
from dpojax.generation.chat_endpoint import ChatEndpoint, EndpointSettings, NoReplyError
from dpojax.untrusted.plain_data import existing_path, parse_json

FIELDS = ("prompt", "first", "second")
_FIELD = re.compile(r"\{(prompt|first|second)\}")
_VERDICT = re.compile(r"preferred\W+(A|B|tie)\b", re.IGNORECASE)
SHARES = {"A": 1.0, "B": 0.0, "TIE": 0.5}  # of the first text

Write = Callable[[Callable[[], None]], None]


class Comparison(NamedTuple):
    """Two answers to a prompt, in the order in which a judge reads them."""

    prompt: str
    first: str
    second: str

    def turned(self) -> "Comparison":
        """The same in the other order."""
        return Comparison(self.prompt, self.second, self.first)


def read_judge_prompt(name: str) -> str:
    """What a judge is asked: a shipped text, or a file's.

    Raises: ConfigError where there is none, or it lacks a field.
    """
    if name in JUDGE_PROMPTS:
        path = pathlib.Path(__file__).with_name(f"judge_{name}.txt")
    else:
        path = existing_path(name)
    if path is None or not path.is_file():
        raise ConfigError(
            f"reward.judge_prompt is {name!r}; it must be one of {', '.join(JUDGE_PROMPTS)}, or a"
            " file with {prompt}, {first} and {second}"
        )
    text = path.read_text(encoding="utf-8")
    missing = [field for field in FIELDS if f"{{{field}}}" not in text]
    if missing:
        raise ConfigError(
            f"reward.judge_prompt={name!r}: the text lacks {{{missing[0]}}}; it holds {{prompt}},"
            " {first} and {second}, and asks for a last line 'Preferred: A', 'Preferred: B' or"
            " 'Preferred: tie'"
        )
    return text


def verdict(reply: str) -> float | None:
    """The share of the first text: 1, 0.5 or 0, as the last line with a verdict says; None: the
    reply names neither.
    """
    found = _VERDICT.findall(reply)
    if not found:
        return None
    return SHARES[found[-1].upper()]


class Replies:
    """Replies by what was asked, kept in a file, so that no question is paid for twice."""

    def __init__(self, path: pathlib.Path, write: Write):
        """Reads the file; a damaged line is asked again.

        Args:
          write: makes a change of the workdir, now or once the run may change it.
        """
        self.path = path
        self.write = write
        self.replies: dict[str, str] = {}
        if not path.is_file():
            return
        for line in path.read_bytes().splitlines():
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row.get("key"), str) and isinstance(row.get("reply"), str):
                self.replies[row["key"]] = row["reply"]

    def keep(self, key: str, reply: str) -> None:
        """Keeps a reply."""
        self.replies[key] = reply
        line = json.dumps({"key": key, "reply": reply}) + "\n"
        self.write(functools.partial(self._append, line))

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)


class Judge:
    """(prompts, responses, columns) -> the share of comparisons that each response wins."""

    def __init__(self, url: str, section: RewardConfig, cache: pathlib.Path, write: Write):
        """Reads the prompt and the replies that are kept.

        Args:
          cache: the file of replies, in the workdir.
        Raises: ConfigError for an address or a prompt that is none.
        """
        self.url = url
        self.model = section.judge_model
        self.against = section.judge_against
        self.threads = section.judge_threads
        self.template = read_judge_prompt(section.judge_prompt)
        self.kept = Replies(cache, write)
        settings = EndpointSettings(
            url=url,
            model=section.judge_model,
            key=os.environ.get(section.judge_key, ""),
            timeout_s=section.judge_timeout_s,
            retries=section.judge_retries,
            max_calls=section.judge_max_calls,
            calls_per_minute=section.judge_calls_per_minute,
        )
        self.endpoint = ChatEndpoint(settings, calls=len(self.kept.replies))

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        """The mean share of each response over its comparisons; None where it has no verdict.

        Raises: ConfigError where no comparison at all got a reply, and for a spent budget.
        """
        wanted = self._comparisons(prompts, responses, columns)
        asked = [order for pair in dict.fromkeys(wanted.values()) for order in both_orders(pair)]
        replies = self._replies(asked)
        shares: list[list[float]] = [[] for _ in responses]
        for (i, j), pair in wanted.items():
            share = share_of_first(pair, replies)
            if share is None:
                continue
            shares[i].append(share)
            if j is not None:
                shares[j].append(1 - share)
        return [sum(own) / len(own) if own else None for own in shares]

    def _comparisons(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> dict[tuple[int, int | None], Comparison]:
        """What is compared, by the numbers of the responses; None: it is no response but a column
        of the row.
        """
        wanted: dict[tuple[int, int | None], Comparison] = {}
        if self.against:
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                other = column_text(columns[i].get(self.against), prompt)
                if other is not None:
                    wanted[i, None] = Comparison(prompt, response.strip(), other.strip())
            return wanted
        of_prompt = collections.defaultdict(list)
        for i, prompt in enumerate(prompts):
            of_prompt[prompt].append(i)
        for prompt, numbers in of_prompt.items():
            for place, i in enumerate(numbers):
                for j in numbers[place + 1 :]:
                    first = str(responses[i]).strip()
                    wanted[i, j] = Comparison(prompt, first, str(responses[j]).strip())
        return wanted

    def _replies(self, asked: Sequence[Comparison]) -> dict[Comparison, str]:
        """The reply to each question, kept or asked for; those that got none are left out."""
        replies = {}
        waiting = {}
        reason = ""
        with ThreadPoolExecutor(max_workers=self.threads) as pool:
            for pair in dict.fromkeys(asked):
                text = self._question(pair)
                key = self._key(text)
                if key in self.kept.replies:
                    replies[pair] = self.kept.replies[key]
                else:
                    waiting[pool.submit(self.endpoint.reply, text)] = (pair, key)
            try:
                for future in as_completed(waiting):
                    pair, key = waiting[future]
                    try:
                        replies[pair] = future.result()
                    except NoReplyError as error:
                        reason = str(error)
                        continue
                    self.kept.keep(key, replies[pair])
            except ConfigError:
                pool.shutdown(cancel_futures=True)
                raise
        if waiting and not replies:
            raise ConfigError(
                f"reward.terms: judge:{self.url} {reason}, on all of {len(waiting)} questions;"
                " start again when it answers (reward.judge_timeout_s and reward.judge_retries say"
                " how long a call is tried)"
            )
        return replies

    def _question(self, pair: Comparison) -> str:
        values = pair._asdict()

        def filled(match: re.Match) -> str:
            return values[match[1]]

        return _FIELD.sub(filled, self.template)  # in one pass: texts may hold fields themselves

    def _key(self, text: str) -> str:
        return hashlib.sha256(json.dumps([self.url, self.model, text]).encode()).hexdigest()


def both_orders(pair: Comparison) -> tuple[Comparison, ...]:
    """A comparison and its turn; nothing for equal texts, which tie without a judge."""
    if pair.first == pair.second:
        return ()
    return (pair, pair.turned())


def share_of_first(pair: Comparison, replies: Mapping[Comparison, str]) -> float | None:
    """The mean of the verdicts on both orders; None where one of them is missing, as the other
    alone would say what is read first.
    """
    if pair.first == pair.second:
        return 0.5
    shares = [verdict(replies.get(order, "")) for order in both_orders(pair)]
    if shares[0] is None or shares[1] is None:
        return None
    return (shares[0] + 1 - shares[1]) / 2


def column_text(value: Any, prompt: str) -> str | None:
    """The response that a column holds: a text, the last message of a dialogue, or what a
    transcript adds to the prompt; None: there is none.
    """
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    if isinstance(value, str):
        return value.removeprefix(prompt)
    return None
