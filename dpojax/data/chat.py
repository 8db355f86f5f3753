"""Messages -> the text of a prompt and of the answer after it, by the checkpoint's own chat template.

Messages reach the template whole, as transformers passes them: every key of theirs, nulls as absent keys.

A template is code from strangers: it runs in jinja2's sandbox, with a limit on its output, and without the parts of
the language that make large texts from small ones. Time and memory are bounded by the process that reads rows
(`dpojax.sandbox`). It does not see the date (`strftime_now`): rows would change daily.
"""

import datetime
import functools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from dpojax.errors import ConfigError
from dpojax.plain_data import read_json, read_text

MAX_CHARACTERS = 10_000_000
LARGEST = 10**12  # number that a template may multiply
# Methods and filters that make a large text from a small one and that chat templates do not need.
FORBIDDEN = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate", "encode"}
DROPPED_FILTERS = ("center", "format", "indent", "wordwrap", "urlize", "xmlattr", "pprint", "filesizeformat", "random")
DROPPED_FILTERS += ("round", "batch", "slice", "tojson", "replace", "join")  # the last three have bounded forms below

# What a template's own mistakes raise; SyntaxError: Python's limits on what it is compiled to.
BROKEN = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, SyntaxError)
TEMPLATE_FOLDER = "additional_chat_templates"
MARK = "\ue000\ue001"  # characters of private use: no dialogue holds them

# What a template that does not ask whether there is a clock is told: the day that Llama 3's templates fall back to.
FIXED_DATE = datetime.date(2024, 7, 26)
# The names under which a message's reasoning comes; templates read the first two.
REASONING = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


class TemplateError(Exception):
    """A template that refuses its messages or writes too much."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks an assistant's words in some templates; it changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _bounded(size: int, what: str) -> None:
    if size > MAX_CHARACTERS:
        raise TemplateError(f"{what} makes more than {MAX_CHARACTERS:,} characters")


def _concat(parts) -> str:
    """What blocks, macros and `~` put together."""
    parts = [str(p) for p in parts]
    _bounded(sum(map(len, parts)), "it")
    return "".join(parts)


class _Code(jinja2.compiler.CodeGenerator):
    def visit_Concat(self, node, frame):  # noqa: N802  # jinja2's name
        self.write("environment.concat((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Code
    concat = staticmethod(_concat)  # type: ignore[assignment]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.safe_attributes: dict[tuple[type, str], bool] = {}

    def call(self, context, obj, *args, **kwargs):
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name in ("replace", "join"):
            _check_size(owner, name, args)
        return super().call(context, obj, *args, **kwargs)

    def is_safe_attribute(self, obj, attr, value):
        kind = (type(obj), attr)  # all that the answer depends on; a template asks for the same few again and again
        if kind not in self.safe_attributes:
            self.safe_attributes[kind] = attr not in FORBIDDEN and super().is_safe_attribute(obj, attr, value)
        return self.safe_attributes[kind]

    def call_binop(self, context, operator, left, right):
        if operator == "+" and type(left) is str and type(right) is str:  # nearly always
            _bounded(len(left) + len(right), "+")
            return left + right
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "+" and not numbers:
            if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                _bounded(len(left) + len(right), "+")
        elif not numbers or abs(left) > LARGEST or (operator == "**" and abs(right) > 64):
            raise TemplateError(f"{type(left).__name__} {operator} {type(right).__name__} is not allowed in a template")
        return super().call_binop(context, operator, left, right)


def _check_size(text: str, name: str, args: Sequence[Any]) -> None:
    """Raises TemplateError before text.replace or text.join makes more than MAX_CHARACTERS."""
    if name == "join":
        parts = list(args[0])
        size = sum(len(str(p)) for p in parts) + len(text) * len(parts)
    else:
        size = len(text) + text.count(str(args[0])) * len(str(args[1]))
    _bounded(size, name)


def _replace(text, old, new, count=-1):
    _check_size(str(text), "replace", (old, new))
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _join(value, d="", attribute=None):
    parts = [str(v if attribute is None else v[attribute]) for v in value]
    _check_size(str(d), "join", (parts,))
    return str(d).join(parts)


def _refuse(message):
    raise TemplateError(str(message))


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """As transformers' own: the built-in filter escapes HTML."""
    if indent is not None and not 0 <= int(indent) <= 16:
        raise TemplateError(f"tojson(indent={indent})")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _NoClock(jinja2.Undefined):
    """`strftime_now`: undefined for a template that asks, and always the same day for one that does not."""

    unsafe_callable = alters_data = False  # jinja2 asks for these before a call
    jinja_pass_arg = None

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        form = str(args[0]) if args else ""
        if len(form) > 100 or re.search(r"%(?![-#]?[A-Za-z%])", form):
            raise TemplateError(f"strftime_now({form[:40]!r})")
        return FIXED_DATE.strftime(form)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    # Not optimised: constants are not folded while it compiles, where no limit holds.
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], optimized=False
    )
    for name in DROPPED_FILTERS:
        environment.filters.pop(name, None)
    environment.filters |= {"tojson": _to_json, "replace": _replace, "join": _join}
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _NoClock(name="strftime_now")
    environment.globals.pop("lipsum", None)
    environment.globals.pop("cycler", None)
    return environment.from_string(source)


def without_nulls(value: Any) -> Any:
    """`value` with every null of a dict as an absent key: Arrow pads rows with the keys of others. Lists keep theirs."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def with_reasoning_names(message: Message) -> Message:
    """The message with its reasoning under both names that templates read, as transformers 5 passes it."""
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
    # Where the words of the message's content stand in the response; None: they were changed, or others stand beside them.
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
        return [self.source, self.tool_use, [list(pair) for pair in self.variables], list(self.specials)]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        context: Context = Context(),  # noqa: B008
    ) -> str:
        """The text of the messages, in no bounded time. Raises TemplateError if the template refuses them or writes too much."""
        source = self.tool_use if self.tool_use and context.tools is not None else self.source
        values = {
            **dict(self.variables),
            **(context.options or {}),
            "messages": [with_reasoning_names(message) for message in messages],
            "tools": context.tools,
            "documents": context.documents,
            "add_generation_prompt": add_generation_prompt,
        }
        parts, length = [], 0
        try:
            template = _compile(source)
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

        Raises: TemplateError, also where the text with an answer does not start with the text without it.
        """
        prompt = self.render(before, add_generation_prompt=True, context=context)
        return [self._split_answer(prompt, before, answer, context) for answer in answers]

    def _split_answer(self, prompt: str, before: Sequence[Message], answer: Message, context: Context) -> Rendered:
        response = self._response(prompt, before, answer, context)
        content = answer.get("content")
        words = content.strip() if isinstance(content, str) else ""
        start = response.find(words)
        alone = answer.keys() <= {"role", "content"}
        if not words or start < 0:
            return Rendered(prompt, response, None, self._is_empty(prompt, response, before, answer, context))
        if response.count(words) > 1:  # the template's own text holds the words too: where do others stand?
            marked = self.render([*before, {**answer, "content": MARK}], add_generation_prompt=False, context=context)
            start = marked.find(MARK) - len(prompt)
        stop = start + len(words)
        stands = alone and start >= 0 and response[start:stop] == words
        return Rendered(prompt, response, (start, stop) if stands else None, False)

    def _response(self, prompt: str, before: Sequence[Message], answer: Message, context: Context) -> str:
        whole = self.render([*before, answer], add_generation_prompt=False, context=context)
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        pairs = enumerate(zip(prompt, whole, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
        raise TemplateError(
            "the text of a dialogue does not start with the text of its prompt, so that the response cannot be told from "
            f"it: after {prompt[max(0, at - 40) : at]!r} the prompt has {prompt[at : at + 30]!r}, "
            f"the dialogue {whole[at : at + 30]!r}"
        )

    def _is_empty(self, prompt: str, response: str, before: Sequence[Message], answer: Message, context: Context) -> bool:
        """Whether the template writes the answer as it writes an assistant's message without words."""
        content = answer.get("content")
        blank = content is None or (isinstance(content, str) and not content.strip())
        if blank and answer.keys() <= {"role", "content"}:
            return True
        try:
            nothing = self._response(prompt, before, {"role": answer["role"], "content": ""}, context)
        except TemplateError:  # it refuses a message without words, and did not refuse this one
            return False
        return response.strip() == nothing.strip()

    def forged(self, messages: Sequence[Message], context: Context = Context()) -> str | None:  # noqa: B008
        """A special token that the messages, tools or documents spell themselves; None if they spell none."""
        words = "\0".join(_strings([list(messages), *context]))
        return next((s for s in self.specials if s in words), None)


def find_templates(folder: pathlib.Path) -> dict[str, str]:
    """The chat templates among a tokenizer's files by name: "default", "tool_use", ...; files go before the config's.

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
        found = read_json(folder / name).get("chat_template")
        if isinstance(found, str):
            templates = {"default": found}
        elif isinstance(found, list | dict):
            templates = _named_templates(found, folder / name)
        elif found is not None:
            raise ConfigError(f"{folder / name}: chat_template is {found!r:.60}; it must be a text, or a list of texts by name")
    return templates


def _named_templates(value: Any, path: pathlib.Path) -> dict[str, str]:
    """tokenizer_config.json's form of several templates: a list of {name, template}, or a table."""
    try:
        named = value if isinstance(value, dict) else {t["name"]: t["template"] for t in value}
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{path}: chat_template is no list of {{name, template}} ({error!r})") from error
    if not all(isinstance(text, str) for item in named.items() for text in item):
        raise ConfigError(f"{path}: chat_template is no list of {{name, template}} of texts")
    return dict(named)
