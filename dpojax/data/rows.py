"""Rows -> Group(prompt, responses, pairs): every quirk of a dataset ends here."""

import dataclasses
import itertools
import math
import re
from typing import Any

from dpojax.data.chat import ChatTemplate, Message
from dpojax.data.columns import (
    read_ids,
    read_masks,
    read_number,
    read_pair,
    read_text_column,
)
from dpojax.data.dialogues import by_prompt_template, by_template, read_messages, require_template
from dpojax.data.groups import Dropped, Group, is_empty, keep_sound
from dpojax.data.labels import read_labels, unpair
from dpojax.data.records import Row
from dpojax.data.token_groups import TokenPair
from dpojax.errors import DataError
from dpojax.untrusted.plain_data import MAX_FLOAT32

# The columns that tell the shape of a row: it has those of one shape alone.
SHAPES = (
    ("chosen", "rejected"),
    ("chosen_ids", "rejected_ids", "prompt_ids"),
    ("responses",),
    ("completions",),
    ("completion",),
    ("response",),
)


@dataclasses.dataclass(frozen=True)
class RowReader:
    """How rows become groups."""

    prompt_template: str  # with {prompt}; "" leaves prompts as they are
    # "sft": only the chosen response; "unpaired": a label for each response; "score": every
    # response, and no pair is needed; "prompts": the prompt alone, whatever answers it
    kind: str = "pairs"
    chat: ChatTemplate | None = None  # for message lists where there is no prompt_template
    # a prompt that is text is a user's message for `chat`, a transcript its dialogue
    text_as_chat: bool = False

    def read(self, row: Row, where: str) -> Group:
        """The group of a row.

        Raises:
          DataError: a column is missing or has a wrong type; names `where`, the column and the
            value.
          Dropped: the row is sound but holds no preference.
          ConfigError: message lists without data.prompt_template or chat template.
        """
        if self.kind == "prompts":
            group = self._with_template(read_prompt(row, where, self.prompt_template, self.chat))
            return self._as_dialogue(group, row, where)
        _check_shape(row, where)
        # with scores or without
        if self.kind == "score" and isinstance(row.get("responses"), list):
            texts = response_texts(row["responses"])
            row = {"prompt": row.get("prompt"), "completions": texts}
        group = _read_row(row, where, self.prompt_template, self.chat)
        if self.kind == "unpaired" and group.pairs:
            group = unpair(group, where)
        elif self.kind == "score":  # equal responses are scored once, and tie
            group = group.pick(
                [group.responses.index(r) for r in dict.fromkeys(group.responses)]
            )._replace(dropped=())
            if any(map(is_empty, group.responses)):
                raise Dropped("empty_response")
        elif self.kind != "pairs" and not group.pairs:
            group = read_labels(group, row, where, self.kind)
        group = self._with_template(group)
        sound = keep_sound(group.responses, group.pairs, had_pairs=bool(group.pairs))
        group = group.pick(sound.kept)._replace(
            pairs=sound.pairs, dropped=group.dropped + sound.reasons
        )
        if self.kind == "sft" and group.pairs:
            never_rejected = {p.chosen for p in group.pairs} - {p.rejected for p in group.pairs}
            best = min(never_rejected or {group.pairs[0].chosen})
            group = group.pick([best])._replace(masks=None, dropped=())
        return self._as_dialogue(group, row, where)

    def _with_template(self, group: Group) -> Group:
        """The group with its prompt in the prompt template. Raises Dropped for an empty prompt."""
        if isinstance(group.prompt, str):
            if not group.prompt.strip():
                raise Dropped("empty_prompt")
            if self.prompt_template and group.contents is None:
                return group._replace(prompt=self.prompt_template.format(prompt=group.prompt))
        elif not group.prompt:
            raise Dropped("empty_prompt")
        return group

    def _as_dialogue(self, group: Group, row: Row, where: str) -> Group:
        """Texts as messages, where `text_as_chat` asks for it and there is a template."""
        if (
            not self.text_as_chat
            or self.chat is None
            or group.contents is not None
            or not isinstance(group.prompt, str)
        ):
            return group
        before = [{"role": "user", "content": group.prompt}]
        words = [str(response) for response in group.responses]
        turns = []
        if "prompt" not in row:
            turns = _turns(group.prompt)
        if turns:
            before = turns
            words = [text.strip() for text in words]
        answers = [{"role": "assistant", "content": text} for text in words]
        return by_template(self.chat, before, answers, row, where)._replace(
            pairs=group.pairs, dropped=group.dropped
        )


def _check_shape(row: Row, where: str) -> None:
    """Raises DataError for a row of two shapes: which of them is meant cannot be known."""
    named = [
        next(c for c in shape if row.get(c) is not None)
        for shape in SHAPES
        if any(row.get(c) is not None for c in shape)
    ]
    if row.get("scores") is not None and row.get("ranks") is not None:
        named = ["scores", "ranks"]
    if len(named) > 1:
        first, second = named[:2]
        raise DataError(
            f"{where}: columns {first!r} and {second!r} belong to two shapes of rows; remove one of"
            " them, so that it is clear which responses are meant"
        )


def _read_row(row: Row, where: str, template: str, chat: ChatTemplate | None) -> Group:
    # a null column is an absent one: joined tables have them
    row = {k: v for k, v in row.items() if v is not None}
    if "prompt_ids" in row or "chosen_ids" in row:
        ids = [read_ids(row, key, where) for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
        return Group(
            ids[0], tuple(ids[1:]), (read_pair(row, where),), masks=read_masks(row, ids[1:], where)
        )
    for key in ("chosen_mask", "rejected_mask"):
        if key in row:
            raise DataError(
                f"{where}: column {key!r} masks ids, and the row is text; name the tokens in"
                " data.mask_tokens"
            )
    if "responses" in row:
        return _ranked(row, where)
    if isinstance(row.get("completion"), list) and "chosen" not in row:
        return _from_completion(row, where, template, chat)
    if "completions" in row and "chosen" not in row:
        texts = row["completions"]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise DataError(f"{where}: column 'completions' must be a list of strings")
        return Group(read_text_column(row, "prompt", where), tuple(dict.fromkeys(texts)), ())
    for key in ("completion", "response"):
        if key in row and "chosen" not in row:
            return Group(
                read_text_column(row, "prompt", where), (read_text_column(row, key, where),), ()
            )
    if "prompt" in row and not {"chosen", "rejected"} & set(row):
        raise DataError(
            f"{where}: column 'chosen' is missing; the row has {', '.join(map(repr, row))}: a"
            " prompt without responses, which serves stages that sample their own (config.stages);"
            " preferences have 'chosen' and 'rejected', demonstrations a 'completion' (sft.data"
            " names a file of them, and sft.num_steps=0 leaves them out)"
        )
    if "chosen" not in row or "rejected" not in row:
        missing = next(key for key in ("chosen", "rejected") if key not in row)
        raise DataError(
            f"{where}: column {missing!r} is missing; the row has"
            f" {', '.join(map(repr, row)) or 'none'}"
        )
    if isinstance(row["chosen"], list) or isinstance(row["rejected"], list):
        return _from_messages(row, where, template, chat)
    chosen = read_text_column(row, "chosen", where)
    rejected = read_text_column(row, "rejected", where)
    if "prompt" in row:
        return Group(
            read_text_column(row, "prompt", where), (chosen, rejected), (read_pair(row, where),)
        )
    prompt, chosen = _split_transcript(chosen, where)
    other_prompt, rejected = _split_transcript(rejected, where)
    if prompt != other_prompt:
        raise Dropped("prompt_mismatch")
    return Group(prompt, (chosen, rejected), (read_pair(row, where),))


def holds_preferences(row: Row) -> bool:
    """Whether a row has the columns of a preference, or of labelled responses."""
    columns = {key for key, value in row.items() if value is not None}
    labelled = {"label", "labels", "scores", "ranks"}
    return bool(columns & {"chosen", "rejected", "chosen_ids", "rejected_ids"}) or (
        bool(columns & labelled) and bool(columns & {"responses", "completions", "completion"})
    )


def read_prompt(row: Row, where: str, template: str, chat: ChatTemplate | None) -> Group:
    """The prompt of a row of any shape, without responses.

    Raises: as `RowReader.read`.
    """
    row = {k: v for k, v in row.items() if v is not None}
    if "prompt_ids" in row:
        return Group(read_ids(row, "prompt_ids", where), (), ())
    if isinstance(row.get("prompt"), str):
        return Group(row["prompt"], (), ())
    if {"chosen", "rejected"} & set(row):  # the prompt is what both responses start with
        _check_shape(row, where)
        return _read_row(row, where, template, chat).pick([])
    key = "prompt"
    if "prompt" not in row and "messages" in row:
        key = "messages"
    if not isinstance(row.get(key), list):
        return Group(read_text_column(row, key, where), (), ())
    require_template(where, template, chat)
    messages = read_messages(row[key], key, where)
    if messages[-1]["role"] == "assistant":
        raise Dropped("role_order")
    if template:
        return by_prompt_template(messages, (), row, where)
    assert chat is not None
    return by_template(chat, messages, (), row, where)


def response_texts(responses: list[Any]) -> list[Any]:
    """Responses as texts: those that dpojax.generate wrote hold their text beside other things."""
    return [
        response["text"] if isinstance(response, dict) and "text" in response else response
        for response in responses
    ]


def _ranked(row: Row, where: str) -> Group:
    """K responses with scores (more is better) or ranks (less is better).

    Every two whose scores differ are a pair.
    """
    responses = row["responses"]
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise DataError(f"{where}: column 'responses' must be a list of strings")
    if "scores" not in row and "ranks" not in row:
        raise DataError(f"{where}: 'responses' needs a column 'scores' or 'ranks'")
    column = "ranks"
    sign = -1
    if "scores" in row:
        column = "scores"
        sign = 1
    values = row[column]
    if not isinstance(values, list) or len(values) != len(responses):
        raise DataError(
            f"{where}: there are {len(responses)} responses and {values!r:.60} as their {column}"
        )
    scores = [sign * read_number({column: v}, column, where, math.nan) for v in values]
    if any(math.isnan(s) for s in scores):
        raise DataError(f"{where}: column {column!r} holds a null")
    if max(scores, default=0) - min(scores, default=0) > MAX_FLOAT32:
        raise Dropped("too_large")
    # Equal responses are scored once; those that were given different scores say nothing.
    given: dict[str, set[float]] = {}
    for response, score in zip(responses, scores, strict=True):
        given.setdefault(response, set()).add(score)
    distinct = list(given)
    unclear = sum(len(values) > 1 for values in given.values())
    scored = [(i, *values) for i, values in enumerate(given.values()) if len(values) == 1]
    pairs = []
    for (i, score_i), (j, score_j) in itertools.combinations(scored, 2):
        if score_i > score_j:
            pairs.append(TokenPair(i, j, 1.0, 1.0, score_i - score_j))
        elif score_i < score_j:
            pairs.append(TokenPair(j, i, 1.0, 1.0, score_j - score_i))
    if not pairs and unclear:
        raise Dropped("conflicting_scores")
    if not pairs:
        raise Dropped("no_preference")
    return Group(
        read_text_column(row, "prompt", where),
        tuple(distinct),
        tuple(pairs),
        ("conflicting_scores",) * unclear,
    )


_TURN = re.compile(r"\n\n(Human|Assistant):")


def _turns(transcript: str) -> list[Message]:
    """The turns of "\n\nHuman: ...\n\nAssistant:" as messages, without the last one, which waits
    for its words.
    """
    marks = list(_TURN.finditer(transcript))
    ends = [mark.start() for mark in marks[1:]]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[mark.group(1)], "content": transcript[mark.end() : end].strip()}
        for mark, end in zip(marks[:-1], ends, strict=True)
    ]


def _split_transcript(text: str, where: str) -> tuple[str, str]:
    """A dialogue split before the last answer.

    In front: everything up to the last "\\n\\nAssistant:".

    Never by the longest common prefix of the pair: that swallows the first words the two responses
    share.
    """
    turns = list(_TURN.finditer(text))
    if not turns:
        raise DataError(
            f"{where}: no column 'prompt', and 'chosen' is no \"\\n\\nHuman: ...\\n\\nAssistant:"
            ' ..." transcript'
        )
    last = turns[-1]
    if last.group(1) != "Assistant" or len(turns) < 2:
        raise Dropped("role_order")
    return text[: last.end()], text[last.end() :]


def _from_completion(row: Row, where: str, template: str, chat: ChatTemplate | None) -> Group:
    """A dialogue in 'prompt' and its answer, an assistant's message, in 'completion': no pair."""
    require_template(where, template, chat)
    before = read_messages(row.get("prompt"), "prompt", where)
    answer = read_messages(row["completion"], "completion", where)
    if len(answer) != 1 or answer[0]["role"] != "assistant" or before[-1]["role"] == "assistant":
        raise Dropped("role_order")
    if template:
        return by_prompt_template(before, answer, row, where)
    assert chat is not None
    return by_template(chat, before, answer, row, where)


def _from_messages(row: Row, where: str, template: str, chat: ChatTemplate | None) -> Group:
    """Message lists, split before the last message; its sender must be the assistant."""
    require_template(where, template, chat)
    sides = [read_messages(row[key], key, where) for key in ("chosen", "rejected")]
    if isinstance(row.get("prompt"), list):
        # The prompt is apart: the responses hold the answer only, or the whole dialogue again.
        prompt = read_messages(row["prompt"], "prompt", where)
        for i, side in enumerate(sides):
            if side[: len(prompt)] != prompt:
                sides[i] = prompt + side
    if sides[0][:-1] != sides[1][:-1]:
        raise Dropped("prompt_mismatch")
    before = sides[0][:-1]
    answers = [side[-1] for side in sides]
    if (
        any(answer["role"] != "assistant" for answer in answers)
        or not before
        or before[-1]["role"] == "assistant"
    ):
        raise Dropped("role_order")
    if template:
        group = by_prompt_template(before, answers, row, where)
    else:
        assert chat is not None
        group = by_template(chat, before, answers, row, where)
    return group._replace(pairs=(read_pair(row, where),))
