"""The errors that a user can cause, each with the exit code of the command that it ends.

Every message names the field (or the file and line), the value, and the fix.
"""

import difflib
from collections.abc import Iterable, Mapping


class DpojaxError(Exception):
    """An error whose message is written for the user.

    `exit_code` is the process's, and `about` says in a list of exit codes what is wrong.
    """

    exit_code = 1
    about = "a fault of dpojax"


class Interrupted(BaseException):
    """A signal asked the run to stop, and what there was to save is saved.

    It is no Exception: code that handles errors would swallow it, and the run would go on.
    `exit_code` is the process's: 128 and the signal's number.
    """

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


class ConfigError(DpojaxError, ValueError):
    """A setting, the command line, or a path that does not exist. Exit code 2."""

    exit_code = 2
    about = "config or command line"


class DataError(DpojaxError, ValueError):
    """The contents of a data file. Exit code 3."""

    exit_code = 3
    about = "contents of data"


class CheckpointError(DpojaxError):
    """A checkpoint that is damaged or belongs to another run. Exit code 4."""

    exit_code = 4
    about = "checkpoint"


class FitError(DpojaxError):
    """The run does not fit the devices' memory. Exit code 6."""

    exit_code = 6
    about = "does not fit"


class NumericsError(DpojaxError):
    """Training produced non-finite numbers and stopped. Exit code 5."""

    exit_code = 5
    about = "numerics"


def describe_exit_codes() -> str:
    """All exit codes with what they mean, as help texts list them."""
    kinds = (ConfigError, DataError, CheckpointError, NumericsError, FitError)
    listed = [f"{kind.exit_code} {kind.about}" for kind in kinds]
    return ", ".join(["0 ok", *listed, "130 and 143 signals"])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that ends a message with the nearest known name; "" where none is near."""
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    if not near:
        return ""
    return f"; did you mean {lower[near[0]]}?"


def nearest_setting(name: str, settings: Iterable[str]) -> str:
    """`did_you_mean` of dotted settings: by the full name, or else by its last part, so that beta
    is near loss.beta.
    """
    settings = list(settings)
    last = name.rpartition(".")[2]
    of_that_name = [s for s in settings if s.rpartition(".")[2] == last]
    if of_that_name:
        # Several sections may have it: the nearest is spelt most like the name that was given.
        likeness = {s: difflib.SequenceMatcher(None, name, s).ratio() for s in of_that_name}
        return f"; did you mean {max(likeness, key=likeness.__getitem__)}?"
    by_full_name = did_you_mean(name, settings)
    if by_full_name:
        return by_full_name
    by_last: Mapping[str, str] = {s.rpartition(".")[2]: s for s in reversed(settings)}
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)
    if not near:
        return ""
    return f"; did you mean {by_last[near[0]]}?"
