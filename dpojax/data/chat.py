"""Messages -> the text of a prompt and of the answer after it, by the checkpoint's chat template.

A template sees every key of a message, as transformers passes them; nulls are absent keys. It is
code from strangers: `template_sandbox.py` bounds what it may do.
"""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jinja2

from dpojax.data.template_sandbox import BROKEN, MAX_CHARACTERS, TemplateError, compile_template
from dpojax.errors import ConfigError
from dpojax.untrusted.plain_data import read_json, read_text

TEMPLATE_FOLDER = "additional_chat_templates"

MARK = "\ue000\ue001"  # characters of private use: no dialogue holds them

# The names under which a message's reasoning comes; templates read the first two.
REASONING = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


def without_nulls(value: Any) -> Any:
    """`value` with every null of a dict as an absent key: Arrow pads rows with the keys of others.

    Lists keep theirs.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def with_reasoning_names(message: Message) -> Message:
    """The message with its reasoning under both names that templates read.

    transformers 5 passes it so.
    """
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _strings(value: Any) -> Iterator[str]:
    """All texts in a nested value, the keys of dicts too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


class Context(NamedTuple):
    """What a template sees beside the messages."""

    tools: Any = None
    documents: Any = None
    options: Any = None  # the column chat_template_kwargs: variables by name, or None


class Rendered(NamedTuple):
    """A dialogue as text."""

    prompt: str
    response: str  # exactly what the template puts after the prompt
    # Where the words of the message's content stand in the response; None: they were changed, or
    # others stand beside them.
    content: tuple[int, int] | None
    empty: bool  # whether the template writes for the answer what it writes for one without words


class ChatTemplate(NamedTuple):
    """A chat template with what it may ask for. Picklable."""

    source: str
    variables: tuple[tuple[str, str], ...] = ()  # bos_token, eos_token, ...
    specials: tuple[str, ...] = ()  # texts that the tokenizer reads as special tokens
    name: str = "chat template"
    tool_use: str = ""  # the template for dialogues with tools, where there are two

    def identity(self) -> list[Any]:
        """What changes the text that is written, for fingerprints."""
        return [
            self.source,
            self.tool_use,
            [list(pair) for pair in self.variables],
            list(self.specials),
        ]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        context: Context = Context(),  # noqa: B008
    ) -> str:
        """The text of the messages, in no bounded time.

        Raises TemplateError if the template refuses them or writes too much.
        """
        source = self.source
        if self.tool_use and context.tools is not None:
            source = self.tool_use
        values = {
            **dict(self.variables),
            **(context.options or {}),
            "messages": [with_reasoning_names(message) for message in messages],
            "tools": context.tools,
            "documents": context.documents,
            "add_generation_prompt": add_generation_prompt,
        }
        parts = []
        length = 0
        try:
            template = compile_template(source)
            for part in template.generate(**values):
                length += len(part)
                if length > MAX_CHARACTERS:
                    raise TemplateError(f"it writes more than {MAX_CHARACTERS:,} characters")
                parts.append(part)
        except TemplateError:
            raise
        except (jinja2.TemplateError, *BROKEN) as error:
            raise TemplateError(f"{type(error).__name__}: {str(error) or 'no message'}") from error
        except MemoryError as error:
            raise TemplateError("it takes too much memory") from error
        return "".join(parts)

    def split(
        self,
        before: Sequence[Message],
        answers: Sequence[Message],
        context: Context = Context(),  # noqa: B008
    ) -> list[Rendered]:
        """The prompt `before` an assistant's answers, and the text of each answer.

        Raises: TemplateError, also where the text with an answer does not start with the text
          without it.
        """
        prompt = self.render(before, add_generation_prompt=True, context=context)
        return [self._split_answer(prompt, before, answer, context) for answer in answers]

    def _split_answer(
        self, prompt: str, before: Sequence[Message], answer: Message, context: Context
    ) -> Rendered:
        response = self._response(prompt, before, answer, context)
        content = answer.get("content")
        words = ""
        if isinstance(content, str):
            words = content.strip()
        start = response.find(words)
        alone = answer.keys() <= {"role", "content"}
        if not words or start < 0:
            empty = self._is_empty(prompt, response, before, answer, context)
            return Rendered(prompt, response, content=None, empty=empty)
        # the template's own text holds the words too: where do others stand?
        if response.count(words) > 1:
            marked = self.render(
                [*before, {**answer, "content": MARK}], add_generation_prompt=False, context=context
            )
            start = marked.find(MARK) - len(prompt)
        stop = start + len(words)
        if alone and start >= 0 and response[start:stop] == words:
            return Rendered(prompt, response, content=(start, stop), empty=False)
        return Rendered(prompt, response, content=None, empty=False)

    def _response(
        self, prompt: str, before: Sequence[Message], answer: Message, context: Context
    ) -> str:
        dialogue = self.render([*before, answer], add_generation_prompt=False, context=context)
        if dialogue.startswith(prompt):
            return dialogue[len(prompt) :]
        pairs = enumerate(zip(prompt, dialogue, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(dialogue)))
        raise TemplateError(
            "the text of a dialogue does not start with the text of its prompt, so that the"
            f" response cannot be told from it: after {prompt[max(0, at - 40) : at]!r} the prompt"
            f" has {prompt[at : at + 30]!r}, the dialogue {dialogue[at : at + 30]!r}"
        )

    def _is_empty(
        self,
        prompt: str,
        response: str,
        before: Sequence[Message],
        answer: Message,
        context: Context,
    ) -> bool:
        """Whether the template writes the answer as it writes a message without words."""
        content = answer.get("content")
        blank = content is None or (isinstance(content, str) and not content.strip())
        if blank and answer.keys() <= {"role", "content"}:
            return True
        try:
            nothing = self._response(
                prompt, before, {"role": answer["role"], "content": ""}, context
            )
        except TemplateError:  # it refuses a message without words, and did not refuse this one
            return False
        return response.strip() == nothing.strip()

    def forged(self, messages: Sequence[Message], context: Context = Context()) -> str | None:  # noqa: B008
        """A special token that the messages, tools or documents spell; None: they spell none."""
        words = "\0".join(_strings([list(messages), *context]))
        return next((s for s in self.specials if s in words), None)


def find_templates(folder: pathlib.Path) -> dict[str, str]:
    """The chat templates among a tokenizer's files by name: "default", "tool_use", ...

    Files of templates go before those in tokenizer_config.json.
    Raises: ConfigError for a damaged file.
    """
    templates: dict[str, str] = {}
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(folder / "chat_template.jinja")
    if (folder / TEMPLATE_FOLDER).is_dir():
        for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
            templates[path.stem] = read_text(path)
    for name in ("tokenizer_config.json", "chat_template.json"):
        if templates or not (folder / name).is_file():
            continue
        value = read_json(folder / name).get("chat_template")
        if isinstance(value, str):
            templates = {"default": value}
        elif isinstance(value, list | dict):
            templates = _named_templates(value, folder / name)
        elif value is not None:
            raise ConfigError(
                f"{folder / name}: chat_template is {value!r:.60}; it must be a text, or a list of"
                " texts by name"
            )
    return templates


def _named_templates(value: Any, path: pathlib.Path) -> dict[str, str]:
    """tokenizer_config.json's form of several templates: a list of {name, template}, or a table."""
    named = value
    try:
        if not isinstance(value, dict):
            named = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"{path}: chat_template is no list of {{name, template}} ({error!r})"
        ) from error
    if not all(isinstance(text, str) for item in named.items() for text in item):
        raise ConfigError(f"{path}: chat_template is no list of {{name, template}} of texts")
    return dict(named)
