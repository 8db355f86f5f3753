"""The fields of Config -> what --help says of every setting: the comment beside the field, its
type, its unit and its choices.
"""

import functools
import inspect
import re
import textwrap
import types
import typing
from typing import Any, NamedTuple

import ml_collections

from dpojax.config.load import setting_kinds
from dpojax.config.schema import Config, setting_choices
from dpojax.objectives.settings import ALIASES, SHORTHANDS
from dpojax.objectives.table import OBJECTIVES


class Setting(NamedTuple):
    """What is known of a setting, from the field that declares it."""

    key: str
    kind: str  # number, whole number, text, true or false, names
    unit: str  # tokens, steps, ...; "" where it has none
    choices: tuple[str, ...]
    optional: bool  # may be None, which is "unset"
    about: str


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}

# What the last word of a setting's name says of its unit.
UNITS = {
    "tokens": "tokens",
    "steps": "steps",
    "step": "steps",
    "pairs": "pairs",
    "prompts": "prompts",
    "groups": "groups of responses to one prompt",
    "epochs": "epochs",
    "positions": "tokens",
    "share": "a share, 0 to 1",
    "ratio": "a share, 0 to 1",
    "labels": "a share, 0 to 1",
}


def describe_settings() -> list[Setting]:
    """Every setting with its type, its choices, and the comment beside its field."""
    found = []
    listed = setting_choices() | {"loss.name": (*OBJECTIVES, *SHORTHANDS, *ALIASES)}
    for key, kind in setting_kinds().items():
        section, _, name = key.rpartition(".")
        holder = typing.get_type_hints(Config)[section] if section else Config
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        value = options[0]
        if typing.get_origin(value) is dict:
            word = f"{key}.NAME is {WORDS[typing.get_args(value)[1]]}"
        else:
            word = WORDS[value]
        found.append(
            Setting(
                key=key,
                kind=word,
                unit=UNITS.get(name.rpartition("_")[2], "") if value in (int, float) else "",
                choices=listed.get(key, ()),
                optional=type(None) in options,
                about=_comments(holder).get(name, "").strip(),
            )
        )
    return found


@functools.cache
def _comments(section: Any) -> dict[str, str]:
    """Field -> the comment that stands beside it, and goes on in lines of its own below."""
    found: dict[str, str] = {}
    name = ""
    try:
        source = inspect.getsource(section)
    except OSError:  # an installation without sources
        return found
    for line in source.splitlines():
        field = re.match(r"    (\w+): [^#]*?(?:#\s*(.*))?$", line)
        more = re.match(r"    #\s*(.*)$", line)
        if field:
            name = field[1]
            found[name] = field[2] or ""
        elif more and name:
            found[name] += f" {more[1]}"
        else:
            name = ""
    return found


def settings_help(values: ml_collections.ConfigDict) -> str:
    """All settings of a config by section: flag and value, then
    what it may be and what it means.
    """
    lines = ["Settings, by section. Every one is changed by --config.KEY=VALUE."]
    shown = None
    for setting in describe_settings():
        section = setting.key.rpartition(".")[0]
        if section != shown:
            lines += ["", _heading(section)]
            shown = section
        lines.append(f"  --config.{setting.key}={_value(values, setting.key)}")
        lines += textwrap.wrap(
            _meaning(setting), 100, initial_indent=INDENT, subsequent_indent=INDENT
        )
    return "\n".join(lines)


INDENT = " " * 6


def _heading(section: str) -> str:
    """The first sentence about a section, from the class that declares it."""
    holder = typing.get_type_hints(Config)[section] if section else Config
    sentence = (inspect.getdoc(holder) or "").split("\n\n")[0].replace("\n", " ")
    return f"{section or 'run'}: {sentence}"


def _value(values: ml_collections.ConfigDict, key: str) -> Any:
    """The value of a dotted setting."""
    value: Any = values
    for part in key.split("."):
        value = value.get(part) if isinstance(value, ml_collections.ConfigDict) else None
    return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value


def _meaning(setting: Setting) -> str:
    """What a setting may be, its unit, and what it means."""
    may_be = ", ".join(choice or "''" for choice in setting.choices) or setting.kind
    if setting.unit:
        may_be += f" ({setting.unit})"
    if setting.optional:
        may_be += " or None (unset)"
    return f"{may_be}: {setting.about}"
