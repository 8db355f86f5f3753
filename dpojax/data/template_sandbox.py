"""Bounds on chat templates, which are code from strangers.

They run in jinja2's sandbox, with a limit on their output, and without the parts of the language
that make large texts from small ones. Time and memory are bounded by the process that reads rows
(`dpojax.untrusted.sandbox`). Templates do not see the date (`strftime_now`): rows would change
daily.
"""

import datetime
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MAX_CHARACTERS = 10_000_000

LARGEST = 10**12  # number that a template may multiply

# Methods and filters that make a large text from a small one and that chat templates do not need.
FORBIDDEN = {
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "format",
    "format_map",
    "translate",
    "encode",
}

DROPPED_FILTERS = (
    *("center", "format", "indent", "wordwrap", "urlize", "xmlattr", "pprint", "filesizeformat"),
    *("random", "round", "batch", "slice"),
    # these have bounded forms below
    *("tojson", "replace", "join"),
)

# What a template's own mistakes raise; SyntaxError: Python's limits on what it is compiled to.
BROKEN = (
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    SyntaxError,
)

# What a template that does not ask whether there is a clock is told: the day that Llama 3's
# templates fall back to.
FIXED_DATE = datetime.date(2024, 7, 26)


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
        owner = getattr(obj, "__self__", None)
        name = getattr(obj, "__name__", "")
        if isinstance(owner, str) and name in ("replace", "join"):
            _check_size(owner, name, args)
        return super().call(context, obj, *args, **kwargs)

    def is_safe_attribute(self, obj, attr, value):
        # all that the answer depends on; a template asks for the same few again and again
        kind = (type(obj), attr)
        if kind not in self.safe_attributes:
            self.safe_attributes[kind] = attr not in FORBIDDEN and super().is_safe_attribute(
                obj, attr, value
            )
        return self.safe_attributes[kind]

    def call_binop(self, context, operator, left, right):
        if operator == "+" and type(left) is str and type(right) is str:  # nearly always
            _bounded(len(left) + len(right), "+")
            return left + right
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "+" and not numbers:
            if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                _bounded(len(left) + len(right), "+")
        elif not (isinstance(left, int | float) and isinstance(right, int | float)) or (
            abs(left) > LARGEST or (operator == "**" and abs(right) > 64)
        ):
            raise TemplateError(
                f"{type(left).__name__} {operator} {type(right).__name__} is not allowed in a"
                " template"
            )
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
    if count is None:
        count = -1
    return str(text).replace(str(old), str(new), count)


def _join(value, d="", attribute=None):
    if attribute is not None:
        value = [item[attribute] for item in value]
    parts = [str(item) for item in value]
    _check_size(str(d), "join", (parts,))
    return str(d).join(parts)


def _refuse(message):
    raise TemplateError(str(message))


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter of transformers: jinja2's escapes HTML."""
    if indent is not None and not 0 <= int(indent) <= 16:
        raise TemplateError(f"tojson(indent={indent})")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _NoClock(jinja2.Undefined):
    """`strftime_now` without a clock.

    A template that asks whether it is defined is told no; one that calls it gets FIXED_DATE.
    """

    unsafe_callable = alters_data = False  # jinja2 asks for these before a call
    jinja_pass_arg = None

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        form = ""
        if args:
            form = str(args[0])
        if len(form) > 100 or re.search(r"%(?![-#]?[A-Za-z%])", form):
            raise TemplateError(f"strftime_now({form[:40]!r})")
        return FIXED_DATE.strftime(form)


@functools.lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    """The template of this source, with the bounds of this module.

    Raises: jinja2.TemplateError, or one of BROKEN.
    """
    # Optimised templates fold constants while they compile, where no limit holds.
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        optimized=False,
    )
    for name in DROPPED_FILTERS:
        environment.filters.pop(name, None)
    environment.filters |= {"tojson": _to_json, "replace": _replace, "join": _join}
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _NoClock(name="strftime_now")
    environment.globals.pop("lipsum", None)
    environment.globals.pop("cycler", None)
    return environment.from_string(source)
