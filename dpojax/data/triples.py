"""Rows -> Group(prompt, responses, pairs): every quirk of a dataset ends here.

Shapes of rows, told apart by their columns:

  explicit     prompt, chosen, rejected                       strings
  transcripts  chosen, rejected                               whole "\\n\\nHuman: ...\\n\\nAssistant: ..." dialogues
  messages     chosen, rejected [, prompt]                    lists of {role, content, ...}; by data.prompt_template, else by
                                                              the tokenizer's chat template [, tools, documents,
                                                              chat_template_kwargs]
  ranked       prompt, responses, scores | ranks              K responses; pairs of every two that differ
  token ids    prompt_ids, chosen_ids, rejected_ids           used as they are; chosen_mask, rejected_mask: 0 at
                                                              formatting tokens
  completion   prompt, completion | response | completions    no pair: for the SFT stage; completions is a list
  unpaired     the same with label | labels                   true or false, for KTO; pairs serve as two of these

Optional with a pair: weight, soft_label, and score_chosen with score_rejected (or margin).
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dpojax.data.chat import REASONING, ChatTemplate, Context, Message, TemplateError, without_nulls
from dpojax.data.groups import TokenPair
from dpojax.data.records import Row
from dpojax.errors import ConfigError, DataError
from dpojax.plain_data import MAX_FLOAT32, MAX_INT32, parse_json

# The columns that tell the shape of a row: it has those of one shape alone.
SHAPES = (
    ("chosen", "rejected"),
    ("chosen_ids", "rejected_ids", "prompt_ids"),
    ("responses",),
    ("completions",),
    ("completion",),
    ("response",),
)
# Reasons to drop a pair; each is counted, and the audit shows examples.
DROPPED = {
    "empty_prompt": "the prompt is empty",
    "empty_response": "a response is empty, or only white space or formatting tokens",
    "identical": "chosen and rejected are the same",
    "prompt_mismatch": "chosen and rejected answer different prompts",
    "role_order": "a dialogue does not end in an assistant's answer to somebody",
    "no_preference": "no two responses have different scores",
    "conflicting_scores": "equal responses have different scores",
    "special_token": "a message spells a special token of the tokenizer, which its chat template would pass on as one",
    "too_large": "a weight, score, rank or margin is larger than float32 holds",
    "undesirable": "the response is labelled as a bad one, and SFT learns good ones",
}


class Dropped(Exception):  # noqa: N818  # not an error: a verdict
    """A row that is read well but holds no usable preference; `reason` is a key of DROPPED."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason
        # Where truncation made it so: tokens of prompt, chosen and rejected of every pair before it.
        self.whole: tuple[tuple[int, int, int], ...] | None = None


class Dialogue(NamedTuple):
    """What a chat template wrote a prompt from, so that a shorter one can be written."""

    chat: ChatTemplate
    messages: tuple[Message, ...]
    context: Context


class Group(NamedTuple):
    """One prompt, its distinct responses, and the preferences between them."""

    prompt: str | tuple[int, ...]
    responses: tuple[str | tuple[int, ...], ...]
    pairs: tuple[TokenPair, ...]
    dropped: tuple[str, ...] = ()  # the reason of each pair that was left out, keys of DROPPED
    masks: tuple[tuple[int, ...], ...] | None = None  # of each response's ids: 0 at formatting tokens
    # By a chat template: where the message's own words stand in each response. The texts hold all special tokens themselves.
    contents: tuple[tuple[int, int] | None, ...] | None = None
    answers: tuple[Message, ...] | None = None  # the message of each response
    dialogue: Dialogue | None = None

    def pick(self, places: Sequence[int]) -> "Group":
        """The responses at `places` with all that belongs to them, without pairs."""

        def chosen(values):
            return None if values is None else tuple(values[i] for i in places)

        return self._replace(
            responses=chosen(self.responses) or (),
            pairs=(),
            masks=chosen(self.masks),
            contents=chosen(self.contents),
            answers=chosen(self.answers),
        )


class Sound(NamedTuple):
    """What `keep_sound` kept, and the reason of each pair that it left out."""

    responses: tuple
    pairs: tuple[TokenPair, ...]
    reasons: tuple[str, ...]
    kept: tuple[int, ...]  # which of the responses stayed


def keep_sound(responses: Sequence, pairs: Sequence[TokenPair], *, had_pairs: bool) -> Sound:
    """Leaves out empty responses with their pairs, and pairs of equal responses.

    Raises: Dropped if nothing is left: no response, or no pair of a group that had some.
    """
    empty = {i for i, r in enumerate(responses) if not (r.strip() if isinstance(r, str) else len(r))}
    kept, reasons = [], []
    for p in pairs:
        if p.chosen in empty or p.rejected in empty:
            reasons.append("empty_response")
        elif p.chosen != p.rejected and responses[p.chosen] == responses[p.rejected]:
            reasons.append("identical")
        else:
            kept.append(p)
    # Only responses that are trained on stay: those of a pair, or all sound ones where there never was a pair.
    used = (
        sorted({i for p in kept for i in (p.chosen, p.rejected)}) if had_pairs else sorted(set(range(len(responses))) - empty)
    )
    if not used:
        raise Dropped(reasons[0] if reasons else "empty_response")
    place = {old: new for new, old in enumerate(used)}
    moved = tuple(p._replace(chosen=place[p.chosen], rejected=place[p.rejected]) for p in kept)
    return Sound(tuple(responses[i] for i in used), moved, tuple(reasons), tuple(used))


@dataclasses.dataclass(frozen=True)
class RowReader:
    """How rows become groups."""

    prompt_template: str  # with {prompt}; "" leaves prompts as they are
    # "sft": only the chosen response; "unpaired": a label for each response; "score": every response, and no pair is needed
    kind: str = "pairs"
    chat: ChatTemplate | None = None  # for message lists where there is no prompt_template
    text_as_chat: bool = False  # a prompt that is text is a user's message for `chat`, a transcript its dialogue

    def read(self, row: Row, where: str) -> Group:
        """The group of a row.

        Raises:
          DataError: a column is missing or has a wrong type; names `where`, the column and the value.
          Dropped: the row is sound but holds no preference.
          ConfigError: message lists without data.prompt_template or chat template.
        """
        _check_shape(row, where)
        if self.kind == "score" and isinstance(row.get("responses"), list):  # with scores or without
            row = {"prompt": row.get("prompt"), "completions": row["responses"]}
        group = _read_row(row, where, self.prompt_template, self.chat)
        if self.kind == "unpaired" and group.pairs:
            group = _unpair(group, where)
        elif self.kind == "score":  # equal responses are scored once, and tie
            group = group.pick([group.responses.index(r) for r in dict.fromkeys(group.responses)])._replace(dropped=())
            if any(not (r.strip() if isinstance(r, str) else r) for r in group.responses):
                raise Dropped("empty_response")
        elif self.kind != "pairs" and not group.pairs:
            group = _label(group, row, where, self.kind)
        if isinstance(group.prompt, str):
            if not group.prompt.strip():
                raise Dropped("empty_prompt")
            if self.prompt_template and group.contents is None:
                group = group._replace(prompt=self.prompt_template.format(prompt=group.prompt))
        elif not group.prompt:
            raise Dropped("empty_prompt")
        sound = keep_sound(group.responses, group.pairs, had_pairs=bool(group.pairs))
        group = group.pick(sound.kept)._replace(pairs=sound.pairs, dropped=group.dropped + sound.reasons)
        if self.kind == "sft" and group.pairs:
            never_rejected = {p.chosen for p in group.pairs} - {p.rejected for p in group.pairs}
            best = min(never_rejected or {group.pairs[0].chosen})
            group = group.pick([best])._replace(masks=None, dropped=())
        return self._as_dialogue(group, row, where)

    def _as_dialogue(self, group: Group, row: Row, where: str) -> Group:
        """Texts as messages, where `text_as_chat` asks for it and there is a template."""
        if not self.text_as_chat or self.chat is None or group.contents is not None or not isinstance(group.prompt, str):
            return group
        turns = [] if "prompt" in row else _turns(group.prompt)
        before = turns or [{"role": "user", "content": group.prompt}]
        words = [str(response).strip() if turns else str(response) for response in group.responses]
        answers = [{"role": "assistant", "content": text} for text in words]
        return _by_template(self.chat, before, answers, row, where)._replace(pairs=group.pairs, dropped=group.dropped)


def _check_shape(row: Row, where: str) -> None:
    """Raises DataError for a row of two shapes: which of them is meant cannot be known."""
    named = [next(c for c in shape if row.get(c) is not None) for shape in SHAPES if any(row.get(c) is not None for c in shape)]
    if row.get("scores") is not None and row.get("ranks") is not None:
        named = ["scores", "ranks"]
    if len(named) > 1:
        first, second = named[:2]
        raise DataError(
            f"{where}: columns {first!r} and {second!r} belong to two shapes of rows; remove one of them, so that it is clear "
            "which responses are meant"
        )


def _read_row(row: Row, where: str, template: str, chat: ChatTemplate | None) -> Group:
    row = {k: v for k, v in row.items() if v is not None}  # a null column is an absent one: joined tables have them
    if "prompt_ids" in row or "chosen_ids" in row:
        ids = [_ids(row, key, where) for key in ("prompt_ids", "chosen_ids", "rejected_ids")]
        return Group(ids[0], tuple(ids[1:]), (_pair(row, where),), masks=_masks(row, ids[1:], where))
    for key in ("chosen_mask", "rejected_mask"):
        if key in row:
            raise DataError(f"{where}: column {key!r} masks ids, and the row is text; name the tokens in data.mask_tokens")
    if "responses" in row:
        return _ranked(row, where)
    if isinstance(row.get("completion"), list) and "chosen" not in row:
        return _from_completion(row, where, template, chat)
    if "completions" in row and "chosen" not in row:
        texts = row["completions"]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise DataError(f"{where}: column 'completions' must be a list of strings")
        return Group(_text(row, "prompt", where), tuple(dict.fromkeys(texts)), ())
    for key in ("completion", "response"):
        if key in row and "chosen" not in row:
            return Group(_text(row, "prompt", where), (_text(row, key, where),), ())
    if "chosen" not in row or "rejected" not in row:
        missing = "chosen" if "chosen" not in row else "rejected"
        raise DataError(f"{where}: column {missing!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}")
    if isinstance(row["chosen"], list) or isinstance(row["rejected"], list):
        return _from_messages(row, where, template, chat)
    chosen, rejected = _text(row, "chosen", where), _text(row, "rejected", where)
    if "prompt" in row:
        return Group(_text(row, "prompt", where), (chosen, rejected), (_pair(row, where),))
    prompt, chosen = _split_transcript(chosen, where)
    other_prompt, rejected = _split_transcript(rejected, where)
    if prompt != other_prompt:
        raise Dropped("prompt_mismatch")
    return Group(prompt, (chosen, rejected), (_pair(row, where),))


def _text(row: Row, key: str, where: str) -> str:
    if key not in row:
        raise DataError(f"{where}: column {key!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}")
    if not isinstance(row[key], str):
        raise DataError(f"{where}: column {key!r} is {row[key]!r:.60}, of type {type(row[key]).__name__}, not a string")
    return row[key]


def _ids(row: Row, key: str, where: str) -> tuple[int, ...]:
    value = row.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{where}: column {key!r} is {value!r:.60}; it must be a list of token ids")
    for token in value:
        if type(token) is not int or not 0 <= token <= MAX_INT32:
            raise DataError(f"{where}: column {key!r} holds {token!r:.60}, which is no token id")
    return tuple(value)


def _masks(row: Row, responses: Sequence[tuple[int, ...]], where: str) -> tuple[tuple[int, ...], ...] | None:
    """The columns chosen_mask and rejected_mask: 0 or 1 for every id; None if there are none."""
    keys = ("chosen_mask", "rejected_mask")
    if not any(key in row for key in keys):
        return None
    masks = []
    for key, ids in zip(keys, responses, strict=True):
        value = row.get(key, [1] * len(ids))
        if not isinstance(value, Sequence) or len(value) != len(ids) or not all(v in (0, 1) for v in value):
            raise DataError(f"{where}: column {key!r} is {value!r:.60}; it must hold 0 or 1 for each of the {len(ids)} ids")
        masks.append(tuple(map(int, value)))
    return tuple(masks)


def _unpair(group: Group, where: str) -> Group:
    """A pair as two labelled responses."""
    if len(group.pairs) != 1:
        raise DataError(f"{where}: ranked responses have no label; give them a column 'labels', or use a pairwise objective")
    (p,) = group.pairs
    if p.soft_label != 1:
        raise DataError(f"{where}: column 'soft_label' is {p.soft_label}; an unpaired objective takes labels, true or false")
    if group.responses[p.chosen] == group.responses[p.rejected]:
        raise Dropped("identical")
    both = [TokenPair(i, i, p.weight, label, 0.0) for i, label in ((p.chosen, 1.0), (p.rejected, 0.0))]
    return group._replace(pairs=tuple(both))


def _label(group: Group, row: Row, where: str, kind: str) -> Group:
    """Completions with their labels: examples for an unpaired objective, and the good ones for SFT."""
    row = {k: v for k, v in row.items() if v is not None}
    key = "labels" if "completions" in row else "label"
    if key not in row:
        if kind == "sft":
            return group
        raise DataError(f"{where}: column {key!r} is missing; an unpaired objective needs it for every response")
    labels, texts = (row[key], row["completions"]) if key == "labels" else ([row[key]], list(group.responses))
    if not isinstance(labels, list) or len(labels) != len(texts) or not all(v in (0, 1) for v in labels):
        raise DataError(
            f"{where}: column {key!r} is {row[key]!r:.60}; it must be true or false for each of {len(texts)} responses"
        )
    place = {text: i for i, text in enumerate(group.responses)}
    if kind == "sft":
        good = tuple(dict.fromkeys(t for t, label in zip(texts, labels, strict=True) if label))
        if not good:
            raise Dropped("undesirable")
        return group._replace(responses=good)
    weight = _weight(row, where)
    examples = [TokenPair(place[t], place[t], weight, float(v), 0.0) for t, v in zip(texts, labels, strict=True)]
    return group._replace(pairs=tuple(examples))


def _number(row: Row, key: str, where: str, default: float) -> float:
    value = row.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise DataError(f"{where}: column {key!r} is {value!r:.60}; it must be a finite number")
    if abs(value) > MAX_FLOAT32:
        raise Dropped("too_large")
    return float(value)


def _weight(row: Row, where: str) -> float:
    weight = _number(row, "weight", where, 1.0)
    if weight < 0:
        raise DataError(f"{where}: column 'weight' is {weight}; it must be at least 0")
    return weight


def _pair(row: Row, where: str) -> TokenPair:
    weight, soft_label = _weight(row, where), _number(row, "soft_label", where, 1.0)
    if not 0 <= soft_label <= 1:
        raise DataError(f"{where}: column 'soft_label' is {soft_label}; it is a probability, in [0, 1]")
    if ("score_chosen" in row) != ("score_rejected" in row):
        lacks = "score_rejected" if "score_chosen" in row else "score_chosen"
        raise DataError(f"{where}: column {lacks!r} is missing; the scores of both responses are needed, or none")
    margin = _number(row, "score_chosen", where, 0.0) - _number(row, "score_rejected", where, 0.0)
    margin = _number(row, "margin", where, margin)
    return TokenPair(0, 1, weight, soft_label, _number({"margin": margin}, "margin", where, 0.0))


def _ranked(row: Row, where: str) -> Group:
    """K responses with scores (more is better) or ranks (less is better): pairs of every two that differ."""
    responses = row["responses"]
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise DataError(f"{where}: column 'responses' must be a list of strings")
    if "scores" not in row and "ranks" not in row:
        raise DataError(f"{where}: 'responses' needs a column 'scores' or 'ranks'")
    column, sign = ("scores", 1) if "scores" in row else ("ranks", -1)
    values = row[column]
    if not isinstance(values, list) or len(values) != len(responses):
        raise DataError(f"{where}: there are {len(responses)} responses and {values!r:.60} as their {column}")
    scores = [sign * _number({column: v}, column, where, math.nan) for v in values]
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
    known = [(slot, values.copy().pop()) for slot, values in enumerate(given.values()) if len(values) == 1]
    pairs = []
    for place, (i, one) in enumerate(known):
        for j, other in known[place + 1 :]:
            if one != other:
                w, l = (i, j) if one > other else (j, i)
                pairs.append(TokenPair(w, l, 1.0, 1.0, abs(one - other)))
    if not pairs:
        raise Dropped("conflicting_scores" if unclear else "no_preference")
    return Group(_text(row, "prompt", where), tuple(distinct), tuple(pairs), ("conflicting_scores",) * unclear)


_TURN = re.compile(r"\n\n(Human|Assistant):")


def _turns(transcript: str) -> list[Message]:
    """The turns of "\n\nHuman: ...\n\nAssistant:" as messages, without the last one, which waits for its words."""
    found = list(_TURN.finditer(transcript))
    ends = [turn.start() for turn in found[1:]]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[turn.group(1)], "content": transcript[turn.end() : end].strip()}
        for turn, end in zip(found[:-1], ends, strict=True)
    ]


def _split_transcript(text: str, where: str) -> tuple[str, str]:
    """A dialogue split by message: everything up to the last "\\n\\nAssistant:", and what follows it.

    Never by the longest common prefix of the pair: that swallows the first words the two responses share.
    """
    turns = list(_TURN.finditer(text))
    if not turns:
        raise DataError(f"{where}: no column 'prompt', and 'chosen' is no \"\\n\\nHuman: ...\\n\\nAssistant: ...\" transcript")
    last = turns[-1]
    if last.group(1) != "Assistant" or len(turns) < 2:
        raise Dropped("role_order")
    return text[: last.end()], text[last.end() :]


def read_messages(value: Any, key: str, where: str) -> list[Message]:
    """The messages of a column, whole; a null is an absent key. Raises DataError naming the column and what is wrong."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: column {key!r} is {value!r:.60}; it must be a list of {{role, content}}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: column {key!r} holds {message!r:.60}; a message is {{role, content}} of strings")
        message = without_nulls(message)
        content = message.get("content", "")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list) or not all(isinstance(part, dict) for part in parts):
            raise DataError(
                f"{where}: column {key!r}: the content of a message is {content!r:.60}; it must be text, null, or a list "
                "of parts"
            )
        messages.append(message)
    return messages


def read_context(row: Row, where: str) -> Context:
    """What a chat template sees of a row beside its messages. Raises DataError naming the column that is wrong."""
    return Context(
        tools=_objects(row, "tools", where),
        documents=_objects(row, "documents", where),
        options=_options(row, where),
    )


def _from_json(row: Row, key: str, where: str) -> Any:
    value = row.get(key)
    try:
        return without_nulls(parse_json(value, shape=None) if isinstance(value, str) else value)
    except ValueError as error:
        raise DataError(f"{where}: column {key!r} is {value!r:.60}, not JSON: {error}") from error


def _objects(row: Row, key: str, where: str) -> Any:
    """A column that is a list of objects, or the same as JSON text."""
    value = _from_json(row, key, where)
    if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
        raise DataError(f"{where}: column {key!r} is {value!r:.60}; it must be a list of objects, or the same as JSON text")
    return value


def _options(row: Row, where: str) -> Any:
    """The column chat_template_kwargs: variables of the template by name."""
    value = _from_json(row, "chat_template_kwargs", where)
    if value is not None and not isinstance(value, dict):
        raise DataError(f"{where}: column 'chat_template_kwargs' is {value!r:.60}; it must be an object")
    return value or None


def write_prompt(messages: Sequence[Message], row: Row, chat: ChatTemplate | None, where: str, template: str = "") -> Group:
    """A dialogue that waits for its answer, as the chat template writes it, or a prompt template: a group without responses.

    Raises: Dropped for a dialogue that spells a special token; DataError where the template refuses it.
    """
    if template:
        group = _by_prompt_template(messages, [], row, where)
        return group._replace(prompt=template.format(prompt=group.prompt))
    assert chat is not None
    return _by_template(chat, messages, [], row, where)


def _require_template(where: str, template: str, chat: ChatTemplate | None) -> None:
    if not template and chat is None:
        raise ConfigError(
            f"{where}: the rows are message lists, and the tokenizer has no chat template; set data.chat_template to a .jinja "
            "file, or data.prompt_template, e.g. --config.data.prompt_template='{prompt}', to say how a prompt is written"
        )


def _from_completion(row: Row, where: str, template: str, chat: ChatTemplate | None) -> Group:
    """A dialogue in 'prompt' and its answer, an assistant's message, in 'completion': no pair."""
    _require_template(where, template, chat)
    before = read_messages(row.get("prompt"), "prompt", where)
    answer = read_messages(row["completion"], "completion", where)
    if len(answer) != 1 or answer[0]["role"] != "assistant" or before[-1]["role"] == "assistant":
        raise Dropped("role_order")
    if template:
        return _by_prompt_template(before, answer, row, where)
    assert chat is not None
    return _by_template(chat, before, answer, row, where)


def _by_prompt_template(before: Sequence[Message], answers: Sequence[Message], row: Row, where: str) -> Group:
    """For a prompt template: one message as it is; of several turns it must stay visible who says what.

    Raises: DataError for a field that only a chat template can write.
    """
    for message in (*before, *answers):
        for field in ("tool_calls", "function_call", *REASONING):
            if message.get(field):
                raise DataError(_needs_chat(where, f"a message holds {field!r}"))
        if not isinstance(message.get("content", ""), str):
            raise DataError(_needs_chat(where, "the 'content' of a message is a list"))
    for field, value in read_context(row, where)._asdict().items():
        if value and field != "options":
            raise DataError(_needs_chat(where, f"the row holds {field!r}"))
    texts = [message.get("content", "") for message in before]
    if len(before) > 1:
        named = zip(before, texts, strict=True)
        texts = [f"{message['role'].capitalize()}: {text}" for message, text in named]
    return Group("\n\n".join(texts), tuple(answer.get("content", "") for answer in answers), ())


def _needs_chat(where: str, what: str) -> str:
    return (
        f"{where}: {what}, and data.prompt_template writes no more than roles and contents; leave it out, or write the "
        "rows by a chat template (data.chat_template)"
    )


def _from_messages(row: Row, where: str, template: str, chat: ChatTemplate | None) -> Group:
    """Message lists, split before the last message; its sender must be the assistant."""
    _require_template(where, template, chat)
    sides = [read_messages(row[key], key, where) for key in ("chosen", "rejected")]
    if isinstance(row.get("prompt"), list):
        # The prompt is apart: the responses hold the answer only, or the whole dialogue again.
        prompt = read_messages(row["prompt"], "prompt", where)
        sides = [side if side[: len(prompt)] == prompt else prompt + side for side in sides]
    if sides[0][:-1] != sides[1][:-1]:
        raise Dropped("prompt_mismatch")
    before, answers = sides[0][:-1], [side[-1] for side in sides]
    if any(answer["role"] != "assistant" for answer in answers) or not before or before[-1]["role"] == "assistant":
        raise Dropped("role_order")
    if template:
        group = _by_prompt_template(before, answers, row, where)
    else:
        assert chat is not None
        group = _by_template(chat, before, answers, row, where)
    return group._replace(pairs=(_pair(row, where),))


def _by_template(chat: ChatTemplate, before: Sequence[Message], answers: Sequence[Message], row: Row, where: str) -> Group:
    """The prompt and its answers as the chat template writes them, without pairs."""
    context = read_context(row, where)
    if chat.forged([*before, *answers], context) is not None:
        raise Dropped("special_token")
    try:
        if answers:
            written = chat.split(before, answers, context)
            prompt = written[0].prompt
        else:
            written = []
            prompt = chat.render(before, add_generation_prompt=True, context=context)
    except TemplateError as error:
        raise DataError(f"{where}: {chat.name}: {error}") from error
    # An answer for which the template writes what it writes for no words is empty, whatever its fields hold.
    responses = tuple("" if w.empty else w.response for w in written)
    dialogue = Dialogue(chat, tuple(before), context)
    contents = tuple(w.content for w in written)
    return Group(prompt, responses, (), contents=contents, answers=tuple(answers), dialogue=dialogue)


def rewrite_group(group: Group, messages: Sequence[Message]) -> Group:
    """The group of a dialogue with other messages before the same answers.

    Raises: DataError where the template refuses them.
    """
    assert group.dialogue is not None and group.answers is not None
    chat, _, context = group.dialogue
    try:
        written = chat.split(messages, group.answers, context)
        prompt = written[0].prompt if written else chat.render(messages, add_generation_prompt=True, context=context)
    except TemplateError as error:
        raise DataError(f"{chat.name}: a prompt that is too long cannot be cut: {error}") from error
    return group._replace(
        prompt=prompt,
        responses=tuple(w.response for w in written),
        contents=tuple(w.content for w in written),
        dialogue=Dialogue(chat, tuple(messages), context),
    )
