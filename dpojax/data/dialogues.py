"""What a row says -> the prompt and the responses as the model sees them.

A row holds text, or messages.
"""

from collections.abc import Sequence
from typing import Any

from dpojax.data.chat import REASONING, ChatTemplate, Context, Message, without_nulls
from dpojax.data.groups import Dialogue, Dropped, Group
from dpojax.data.records import Row
from dpojax.data.template_sandbox import TemplateError
from dpojax.errors import ConfigError, DataError
from dpojax.untrusted.plain_data import parse_json


def read_messages(value: Any, key: str, where: str) -> list[Message]:
    """The messages of a column, whole; a null is an absent key.

    Raises DataError naming the column and what is wrong.
    """
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: column {key!r} is {value!r:.60}; it must be a list of {{role, content}}"
        )
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(
                f"{where}: column {key!r} holds {message!r:.60}; a message is {{role, content}} of"
                " strings"
            )
        message = without_nulls(message)
        content = message.get("content", "")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list) or not all(isinstance(part, dict) for part in parts):
            raise DataError(
                f"{where}: column {key!r}: the content of a message is {content!r:.60}; it must be"
                " text, null, or a list of parts"
            )
        messages.append(message)
    return messages


def read_context(row: Row, where: str) -> Context:
    """What a chat template sees of a row beside its messages.

    Raises DataError naming the column that is wrong.
    """
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
    if value is not None and not (
        isinstance(value, list) and all(isinstance(item, dict) for item in value)
    ):
        raise DataError(
            f"{where}: column {key!r} is {value!r:.60}; it must be a list of objects, or the same"
            " as JSON text"
        )
    return value


def _options(row: Row, where: str) -> Any:
    """The column chat_template_kwargs: variables of the template by name."""
    value = _from_json(row, "chat_template_kwargs", where)
    if value is not None and not isinstance(value, dict):
        raise DataError(
            f"{where}: column 'chat_template_kwargs' is {value!r:.60}; it must be an object"
        )
    return value or None


def write_prompt(
    messages: Sequence[Message], row: Row, chat: ChatTemplate | None, where: str, template: str = ""
) -> Group:
    """A dialogue that waits for its answer: a group without responses.

    Written by the chat template, or by a prompt template.

    Raises: Dropped for a dialogue that spells a special token; DataError where the template refuses
      it.
    """
    if template:
        group = by_prompt_template(messages, [], row, where)
        return group._replace(prompt=template.format(prompt=group.prompt))
    assert chat is not None
    return by_template(chat, messages, [], row, where)


def require_template(where: str, template: str, chat: ChatTemplate | None) -> None:
    if not template and chat is None:
        raise ConfigError(
            f"{where}: the rows are message lists, and the tokenizer has no chat template; set"
            " data.chat_template to a .jinja file, or data.prompt_template, e.g."
            " --config.data.prompt_template='{prompt}', to say how a prompt is written"
        )


def by_prompt_template(
    before: Sequence[Message], answers: Sequence[Message], row: Row, where: str
) -> Group:
    """The group of messages for a prompt template.

    One message is taken as it is; of several turns it must stay visible who says what.

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
        f"{where}: {what}, and data.prompt_template writes no more than roles and contents; leave"
        " it out, or write the rows by a chat template (data.chat_template)"
    )


def by_template(
    chat: ChatTemplate, before: Sequence[Message], answers: Sequence[Message], row: Row, where: str
) -> Group:
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
    # An answer for which the template writes what it writes for no words is empty, whatever its
    # fields hold.
    responses = tuple("" if w.empty else w.response for w in written)
    dialogue = Dialogue(chat, tuple(before), context)
    contents = tuple(w.content for w in written)
    return Group(
        prompt, responses, (), contents=contents, answers=tuple(answers), dialogue=dialogue
    )


def rewrite_group(group: Group, messages: Sequence[Message]) -> Group:
    """The group of a dialogue with other messages before the same answers.

    Raises: DataError where the template refuses them.
    """
    assert group.dialogue is not None and group.answers is not None
    chat, _, context = group.dialogue
    try:
        written = chat.split(messages, group.answers, context)
        prompt = (
            written[0].prompt
            if written
            else chat.render(messages, add_generation_prompt=True, context=context)
        )
    except TemplateError as error:
        raise DataError(f"{chat.name}: a prompt that is too long cannot be cut: {error}") from error
    return group._replace(
        prompt=prompt,
        responses=tuple(w.response for w in written),
        contents=tuple(w.content for w in written),
        dialogue=Dialogue(chat, tuple(messages), context),
    )
