"""Rows -> prompts to be answered, as token ids: what `dpojax.generate` reads."""

import dataclasses
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from dpojax.data.chat import ChatTemplate
from dpojax.data.dialogues import read_messages, write_prompt
from dpojax.data.groups import DROPPED, Dropped
from dpojax.data.tokenizers import Tokenizer
from dpojax.data.tokens import chat_prompt, prompt_ids
from dpojax.data.written import Writing
from dpojax.errors import DataError
from dpojax.untrusted.sandbox import SandboxError, each


class Prompt(NamedTuple):
    """A row and its prompt as ids."""

    row: dict[str, Any]
    ids: list[int]


@dataclasses.dataclass(frozen=True)
class PromptReader:
    """How rows become prompts. Picklable."""

    tokenizer: Tokenizer
    chat: ChatTemplate | None
    writing: Writing

    def read_all(self, rows: Iterable[tuple[dict[str, Any], str]]) -> list[Prompt]:
        """The prompts of all (row, where), read in a child process with limits (`dpojax.sandbox`).

        Raises: DataError for the first row that cannot be read.
        """
        prompts = []
        places = []

        def items():
            for row, where in rows:
                places.append(where)
                yield row, where

        for result in each(_read, self, items()):
            if isinstance(result, SandboxError):
                raise DataError(
                    f"{places[len(prompts)]}: the chat template or tokenizer {result} on this row"
                )
            if isinstance(result, Exception):
                raise result
            prompts.append(result)
        return prompts

    def read(self, row: dict[str, Any], where: str) -> Prompt:
        """A row's prompt, in no bounded time. Raises DataError naming the column that is wrong."""
        row = {k: v for k, v in row.items() if v is not None}  # a null column is an absent one
        given = row.get("prompt_ids", row.get("messages", row.get("prompt")))
        tokenizer = self.tokenizer
        chat = self.chat
        writing = self.writing
        limit = writing.max_prompt_tokens or sys.maxsize
        if "prompt_ids" in row:
            if (
                not isinstance(given, list)
                or not given
                or not all(type(i) is int and i >= 0 for i in given)
            ):
                raise DataError(
                    f"{where}: column 'prompt_ids' is {given!r:.60}; it must be a list of token ids"
                )
            return Prompt(row, given[-limit:])
        if isinstance(given, str) and writing.text_as_chat:
            given = [{"role": "user", "content": given}]
        if isinstance(given, list):
            column = "messages" if "messages" in row else "prompt"
            messages = read_messages(given, column, where)
            if writing.prompt_template:
                written = write_prompt(messages, row, None, where, writing.prompt_template).prompt
                return Prompt(row, prompt_ids(written, tokenizer, limit)[0])
            if chat is None:
                raise DataError(
                    f"{where}: the prompt is a dialogue, and the tokenizer has no chat template;"
                    " name one: --chat_template"
                )
            try:
                group = write_prompt(messages, row, chat, where)
            except Dropped as verdict:
                raise DataError(f"{where}: {DROPPED[verdict.reason]}") from verdict
            try:
                return Prompt(row, chat_prompt(group, tokenizer, limit).ids)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        if not isinstance(given, str) or not given:
            raise DataError(
                f"{where}: column 'prompt' is {given!r:.60}; it must be text, or a list of messages"
            )
        written = writing.prompt_template.format(prompt=given) if writing.prompt_template else given
        ids = prompt_ids(written, tokenizer, limit)[0]
        if not ids:
            raise DataError(
                f"{where}: column 'prompt' is {given!r:.60}, which the tokenizer reads as no token"
                " at all"
            )
        return Prompt(row, ids)


def _read(reader: PromptReader, item: tuple[dict[str, Any], str]) -> Prompt:
    return reader.read(*item)
