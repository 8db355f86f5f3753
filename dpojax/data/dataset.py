"""Rows by number -> groups, as text and as token ids; and each row's verdict."""

import collections
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dpojax.data.groups import Dropped, Group
from dpojax.data.records import Records, Row
from dpojax.data.rows import RowReader
from dpojax.data.token_groups import TokenGroup
from dpojax.data.tokenizers import Tokenizer
from dpojax.data.tokens import Cut, Limits, tokenize
from dpojax.errors import ConfigError, DataError
from dpojax.untrusted.sandbox import SandboxError, spread

MANY_ROWS = 4000  # of these on, several processes read: each takes a second to start
VERSION = 7  # raise it when a change of this package changes lengths or verdicts


class RowColumns(dict[str, Any]):
    """The columns of a row as they stand in its file; null ones are absent."""

    def __init__(self, values: Row, where: str):
        super().__init__((key, value) for key, value in values.items() if value is not None)
        self.where = where  # "file:line", for messages


class Read(NamedTuple):
    """A row as it was read."""

    text: Group
    tokens: TokenGroup
    cut: Cut


def _read_item(data: "Dataset", item: tuple[Row, int, str]) -> Read | Exception:
    """A row of `Dataset.read_groups`; an exception is a verdict."""
    try:
        text, tokens, cut = data.read_row(*item)
        # What is written of messages stays; the messages themselves need not be sent on.
        return Read(text._replace(answers=None, dialogue=None), tokens, cut)
    except (Dropped, DataError, ConfigError) as verdict:
        return verdict


def _verdict(result: Any, where: str) -> Read | Dropped | DataError:
    """A result of the sandbox, or the verdict in its place. Raises what is none."""
    if isinstance(result, SandboxError):
        return DataError(f"{where}: the chat template or tokenizer {result} on this row")
    if isinstance(result, Exception) and not isinstance(result, Dropped | DataError):
        raise result
    return result


def _nowhere(row: int) -> Any:
    raise AssertionError(f"row {row}: the records are elsewhere")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Records with the way to token groups; picklable, so that worker processes can hold it."""

    records: Records
    reader: RowReader
    tokenizer: Tokenizer | None
    limits: Limits
    flip_labels: float = 0.0
    seed: int = 0
    mask_ids: frozenset[int] = frozenset()  # formatting tokens, which count in no log-prob
    mask_template: bool = False  # and all that a chat template puts around an answer

    def text_group(self, row: int) -> Group:
        """The group of a source row, labels flipped where `flip_labels` says so."""
        return self._text_group(self.records.get(row), row, self.records.where(row))

    def columns(self, row: int) -> RowColumns:
        """All columns of a source row, the prompt's included: what rewards are told of it."""
        return RowColumns(self.records.get(row), self.records.where(row))

    def plain_texts(self, row: int) -> tuple[str, list[str]]:
        """The prompt of a source row and its responses as texts; ids are decoded.

        Raises: ConfigError for ids without a tokenizer; as `text_group`.
        """
        group = self.text_group(row)
        return self._plain(group.prompt), [self._plain(text) for text in group.responses]

    def _plain(self, text: str | tuple[int, ...]) -> str:
        if isinstance(text, str):
            return text
        if self.tokenizer is None:
            raise ConfigError("tokenizer is '': responses are judged as text; name one")
        return self.tokenizer.decode(text)

    def _text_group(self, values: Row, row: int, where: str) -> Group:
        group = self.reader.read(values, where)
        if (
            self.flip_labels
            and np.random.Generator(np.random.Philox(key=[self.seed, row])).random()
            < self.flip_labels
        ):
            if self.reader.kind == "unpaired":
                pairs = tuple(p._replace(soft_label=1 - p.soft_label) for p in group.pairs)
            else:
                pairs = tuple(
                    p._replace(chosen=p.rejected, rejected=p.chosen, margin=-p.margin)
                    for p in group.pairs
                )
            group = group._replace(pairs=pairs)
        return group

    def token_group(self, row: int) -> tuple[TokenGroup, Cut]:
        """The token ids of a source row, in no bounded time: of one that `read_groups` got through.

        Raises: Dropped or DataError.
        """
        _, group, cut = self.read_row(self.records.get(row), row, self.records.where(row))
        return group, cut

    def read_row(self, values: Row, row: int, where: str) -> tuple[Group, TokenGroup, Cut]:
        """What the columns `values` of a row are, as text and as token ids.

        Raises Dropped or DataError.
        """
        group = self._text_group(values, row, where)
        if isinstance(group.prompt, str):
            if self.tokenizer is None:
                raise DataError(f"{where}: the rows are text; set tokenizer")
            try:
                "".join((group.prompt, *map(str, group.responses))).encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: {error.object[error.start]!r} is half a character (a lone surrogate)"
                ) from error
        try:
            return group, *tokenize(
                group, self.tokenizer, self.limits, row, self.mask_ids, self.mask_template
            )
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def read_groups(
        self, rows: Iterable[int]
    ) -> "Iterator[tuple[int, Read | Dropped | DataError]]":
        """Every row with its groups, or the verdict in their place, in order.

        Template and tokenizer are those of strangers: they work in a child process with limits
        (`dpojax.sandbox`).
        """
        under_way: collections.deque[tuple[int, str, DataError | None]] = collections.deque()

        def items() -> Iterator[tuple[Row, int, str]]:
            for row in rows:
                where = self.records.where(row)
                try:
                    values = self.records.get(row)
                except DataError as error:
                    under_way.append((row, where, error))
                    continue
                under_way.append((row, where, None))
                yield values, row, where

        # The child gets the rows one by one; it has no use for the file.
        reading = dataclasses.replace(
            self, records=self.records._replace(get=_nowhere, where=_nowhere)
        )
        trusted = self.reader.chat is None and (
            self.tokenizer is None or self.tokenizer.folder is None
        )
        step = functools.partial(_read_item, reading)
        children = 1 if self.records.size < MANY_ROWS else min(4, os.cpu_count() or 1)
        for result in (
            map(step, items())
            if trusted
            else spread(_read_item, reading, items(), children=children)
        ):
            while (damaged := under_way[0][2]) is not None:
                yield under_way.popleft()[0], damaged
            row, where, _ = under_way.popleft()
            yield row, _verdict(result, where)
        for row, _, damaged in under_way:
            assert damaged is not None
            yield row, damaged

    def fingerprint(self) -> str:
        """Changes with anything that changes a token or a label."""
        parts: list[Any] = [
            VERSION,
            self.records.fingerprint,
            self.tokenizer and self.tokenizer.fingerprint,
        ]
        parts += [
            list(self.limits),
            self.reader.prompt_template,
            self.reader.kind,
            sorted(self.mask_ids),
        ]
        parts += [self.flip_labels, self.seed if self.flip_labels else 0, self.mask_template]
        parts += [self.reader.chat and [self.reader.text_as_chat, self.reader.chat.identity()]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
