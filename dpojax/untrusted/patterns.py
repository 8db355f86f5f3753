"""Regular expressions of a data file: matched in the sandbox, so that a hostile one cannot hang."""

import re
from collections.abc import Sequence

from dpojax.untrusted.sandbox import SandboxError, each

MAX_PATTERN_CHARACTERS = 2000


def match_all(pairs: Sequence[tuple[str, str]]) -> list[bool | str]:
    """Whether each pattern is found in its text (re.search: `^` and `$` ask for more).

    Args:
      pairs: (pattern, text).
    Returns: for each pair True or False; where there is no answer the reason, a predicate: "takes
      more than 2 s".
    """
    results: list[bool | str] = []
    for result in each(_search, None, pairs):
        if isinstance(result, SandboxError):
            result = str(result)
        elif isinstance(result, Exception):
            raise result
        results.append(result)
    return results


def pattern_fault(pattern: str) -> str:
    """Why a text is no pattern, a predicate; "": it is one."""
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return f"has more than {MAX_PATTERN_CHARACTERS} characters"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression: {error}"
    return ""


def _search(_: None, pair: tuple[str, str]) -> bool | str:
    pattern, text = pair
    fault = pattern_fault(pattern)
    if fault:
        return fault
    return re.search(pattern, text) is not None
