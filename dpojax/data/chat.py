"""Messages -> the text of a prompt and of the answer after it, by the checkpoint's own chat template.

A template is code from strangers: it runs in jinja2's sandbox, with a limit on its output, and without the parts of
the language that make large texts from small ones. Time and memory are bounded by the process that reads rows
(`dpojax.sandbox`). It does not see the date (`strftime_now`): rows would change daily.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from dpojax.plain_data import read_json

MAX_CHARACTERS = 10_000_000
LARGEST = 10**12  # number that a template may multiply
# Methods and filters that make a large text from a small one and that chat templates do not need.
FORBIDDEN = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate", "encode"}
DROPPED_FILTERS = ("center", "format", "indent", "wordwrap", "urlize", "xmlattr", "pprint", "filesizeformat", "random")
DROPPED_FILTERS += ("round", "batch", "slice", "tojson", "replace", "join")  # the last three have bounded forms below

# What a template's own mistakes raise; SyntaxError: Python's limits on what it is compiled to.
BROKEN = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError, SyntaxError)
MARK = "\ue000\ue001"  # characters of private use: no dialogue holds them

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

    def call(self, context, obj, *args, **kwargs):
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name in ("replace", "join"):
            _check_size(owner, name, args)
        return super().call(context, obj, *args, **kwargs)

    def is_safe_attribute(self, obj, attr, value):
        return attr not in FORBIDDEN and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context, operator, left, right):
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
    environment.globals.pop("lipsum", None)
    environment.globals.pop("cycler", None)
    return environment.from_string(source)


class Rendered(NamedTuple):
    """A dialogue as text."""

    prompt: str
    response: str  # exactly what the template puts after the prompt
    content: tuple[int, int] | None  # where the message's own words stand in the response; None: they were changed


class ChatTemplate(NamedTuple):
    """A chat template with what it may ask for. Picklable."""

    source: str
    variables: tuple[tuple[str, str], ...] = ()  # bos_token, eos_token, ...
    specials: tuple[str, ...] = ()  # texts that the tokenizer reads as special tokens
    name: str = "chat template"

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Any = None) -> str:
        """The text of the messages, in no bounded time. Raises TemplateError if the template refuses them or writes too much."""
        parts, length = [], 0
        values = {"messages": list(messages), "tools": tools, "documents": None, **dict(self.variables)}
        try:
            template = _compile(self.source)
            for part in template.generate(**values, add_generation_prompt=add_generation_prompt):
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

    def split(self, before: Sequence[Message], answer: Message, tools: Any = None) -> Rendered:
        """The prompt `before` an assistant's `answer`, and the text of the answer.

        Raises: TemplateError, also where the text with the answer does not start with the text without it.
        """
        prompt = self.render(before, add_generation_prompt=True, tools=tools)
        whole = self.render([*before, answer], add_generation_prompt=False, tools=tools)
        if not whole.startswith(prompt):
            at = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
            raise TemplateError(
                "the text of a dialogue does not start with the text of its prompt, so that the response cannot be told from "
                f"it: after {prompt[max(0, at - 40) : at]!r} the prompt has {prompt[at : at + 30]!r}, the dialogue {whole[at : at + 30]!r}"
            )
        response = whole[len(prompt) :]
        words = str(answer["content"]).strip()
        start = response.find(words)
        if response.count(words) > 1:  # the template's own text holds the words too: where do others stand?
            marked = self.render([*before, {**answer, "content": MARK}], add_generation_prompt=False, tools=tools)
            start = marked.find(MARK) - len(prompt)
        found = words and start >= 0 and response[start : start + len(words)] == words
        return Rendered(prompt, response, (start, start + len(words)) if found else None)

    def forged(self, messages: Sequence[Message], tools: Any = None) -> str | None:
        """A special token that the messages or tools spell themselves; None if they spell none."""
        words = json.dumps([list(messages), tools], ensure_ascii=False, default=str)
        return next((s for s in self.specials if json.dumps(s, ensure_ascii=False)[1:-1] in words), None)


def find_template(folder: pathlib.Path) -> str | None:
    """The chat template among a tokenizer's files, or None. Raises ConfigError for a damaged file."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not (folder / name).is_file():
            continue
        found = read_json(folder / name).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = next((t.get("template") for t in found if t.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None
