"""What every message of a DpojaxError must hold to: conftest checks each one that a test raises."""

import re

_EMPTY_LIST = re.compile(
    r"\b(there is|there are|takes only|one of|it has|the row has|names out of|these do:|they"
    r" are)\s*([;,.)]|$)"
)
_GAPS = re.compile(r",\s*,|\(\s*\)|:\s*$|;\s*$|\bNone of\b")


def faults(text):
    """What is wrong with a message: lists of nothing, gaps, no words at all."""
    found = [f"an empty list: {m[0]!r}" for m in _EMPTY_LIST.finditer(text)]
    found += [f"a gap: {m[0]!r}" for m in _GAPS.finditer(text)]
    return found if text.strip() else ["no text"]
