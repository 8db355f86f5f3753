"""Command lines: a name that is not known is answered with the nearest one that is."""

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from dpojax.plain_data import number_fault


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The question for the nearest of the known names, to end a message with; "" where none is near."""
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {lower[near[0]]}?" if near else ""


def nearest_setting(name: str, settings: Iterable[str]) -> str:
    """`did_you_mean` of dotted settings: by the whole name, or else by its last part: beta is near loss.beta."""
    settings = list(settings)
    whole = did_you_mean(name, settings)
    last = name.rpartition(".")[2]
    same = [s for s in settings if s.rpartition(".")[2] == last]
    if same:
        # Of several sections that have it, the one that is spelt most like the one that was named.
        nearest = max(same, key=lambda s: difflib.SequenceMatcher(None, name, s).ratio())
        return f"; did you mean {nearest}?"
    if whole:
        return whole
    by_last: Mapping[str, str] = {s.rpartition(".")[2]: s for s in reversed(settings)}
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)
    return f"; did you mean {by_last[near[0]]}?" if near else ""


def _read_number(text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except (ValueError, OverflowError):
        value = None
    fault = number_fault(value, kind)
    if fault is not None:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: {fault}")
    return value


def _read_int(text: str) -> int:
    return _read_number(text, int)


def _read_float(text: str) -> float:
    return _read_number(text, float)


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors name the nearest flag or choice, and whose numbers fit 32 bits."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.register("type", int, _read_int)
        self.register("type", float, _read_float)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The command line; leaves with exit code 2 for what is not understood."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"not understood: {' '.join(unknown)}{self.nearest(unknown[0])}")
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The command line, and the arguments that are not understood."""
        found, unknown = super().parse_known_args(args, namespace)
        self._refuse_dashes(found)
        return found, unknown

    def _refuse_dashes(self, found: argparse.Namespace) -> None:
        """Until Python 3.13 argparse takes `--flag=--` for an empty list of values."""
        for action in self._actions:
            value = getattr(found, action.dest, None)
            repeated = isinstance(action.default, list)
            values = value if repeated and isinstance(value, list) else [value]
            if any(isinstance(v, list) for v in values):
                self.error(f"argument {action.option_strings[0]}: '--' is no value")

    def nearest(self, flag: str) -> str:
        """`did_you_mean` of this parser's flags."""
        flags = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        return did_you_mean(flag.partition("=")[0], flags)

    def error(self, message: str) -> NoReturn:
        """Leaves with exit code 2, after the message alone: the usage is what --help prints."""
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if choice:
            message += did_you_mean(choice[1], choice[2].replace("'", "").split(", "))
        self.exit(2, f"error: {message}\n{self.prog} --help lists the flags\n")
