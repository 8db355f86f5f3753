"""The fields of Config -> what --help says of every setting: the comment beside the field, its type and its choices."""

import functools
import inspect
import re
import textwrap
import types
import typing
from typing import Any, NamedTuple

import ml_collections

from dpojax.config import CHOICES, Config, setting_kinds
from dpojax.losses import OBJECTIVES
from dpojax.objectives import SHORTHANDS


class Setting(NamedTuple):
    """What is known of a setting, from the field that declares it."""

    key: str
    kind: str  # number, whole number, text, true or false, names
    choices: tuple[str, ...]
    optional: bool  # may be None, which is "unset"
    about: str


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def describe_settings() -> list[Setting]:
    """Every setting with its type, its choices, and the comment beside its field."""
    found = []
    for key, kind in setting_kinds().items():
        section, _, name = key.rpartition(".")
        holder = typing.get_type_hints(Config)[section] if section else Config
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        value = options[0]
        if typing.get_origin(value) is dict:
            word = f"{key}.NAME is {WORDS[typing.get_args(value)[1]]}"
        else:
            word = WORDS[value]
        choices = (*OBJECTIVES, *SHORTHANDS) if key == "loss.name" else CHOICES.get(key, ())
        found.append(Setting(key, word, choices, type(None) in options, _comments(holder).get(name, "")))
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
    """All settings of a config, one a paragraph: flag and value, then what it may be and what it means."""
    lines = []
    for setting in describe_settings():
        value: Any = values
        for part in setting.key.split("."):
            value = value.get(part) if isinstance(value, ml_collections.ConfigDict) else None
        if isinstance(value, ml_collections.ConfigDict):
            value = value.to_dict()
        lines.append(f"--config.{setting.key}={value}")
        may_be = ", ".join(choice or "''" for choice in setting.choices) or setting.kind
        unset = " or None (unset)" if setting.optional else ""
        text = f"{may_be}{unset}: {setting.about}"
        lines += textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
