"""Cases of a property of which the fast suite tries some, and the slow one all."""

from collections.abc import Iterable
from typing import Any

import pytest


def cases(fast: Iterable[Any], slow: Iterable[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`, those of `slow` marked so."""
    return [*fast, *(pytest.param(value, marks=pytest.mark.slow) for value in slow)]
