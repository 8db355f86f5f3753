"""What a single setting may be: rules that stand in its type, beside its name."""

import dataclasses
import math
from typing import Annotated, Any

from dpojax.errors import ConfigError, did_you_mean


def require(test: bool, field: str, value: Any, must: str) -> None:
    """Raises ConfigError naming the field, its value and what it must be."""
    if not test:
        raise ConfigError(f"{field} is {value!r}; it must be {must}")


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """A whole number that is not below `least`."""

    least: int

    def check(self, field: str, value: Any) -> None:
        require(value >= self.least, field, value, f"at least {self.least}")


@dataclasses.dataclass(frozen=True)
class Within:
    """A number from `low` to `high`; brackets as in mathematics."""

    low: float
    high: float
    brackets: str = "[]"

    def check(self, field: str, value: Any) -> None:
        opening, closing = self.brackets
        above = value >= self.low if opening == "[" else value > self.low
        below = value <= self.high if closing == "]" else value < self.high
        span = f"{opening}{self.low:g}, {self.high:g}{closing}"
        require(above and below, field, value, f"in {span}")


@dataclasses.dataclass(frozen=True)
class Finite:
    """A finite number above 0, or from 0 on."""

    or_zero: bool = False

    def check(self, field: str, value: Any) -> None:
        fits = value >= 0 if self.or_zero else value > 0
        sign = ">= 0" if self.or_zero else "> 0"
        require(math.isfinite(value) and fits, field, value, f"a finite number {sign}")


@dataclasses.dataclass(frozen=True)
class Above:
    """A number above `bound`, which may be infinite."""

    bound: float
    infinite: str  # what infinity means

    def check(self, field: str, value: Any) -> None:
        require(value > self.bound, field, value, f"> {self.bound:g} ({self.infinite})")


@dataclasses.dataclass(frozen=True)
class OneOf:
    """A text out of a list; --help shows it."""

    choices: tuple[str, ...]

    def check(self, field: str, value: Any) -> None:
        near = did_you_mean(str(value), filter(None, self.choices))
        listed = ", ".join(map(repr, self.choices))
        require(value in self.choices, field, value, f"one of {listed}{near}")


Rule = AtLeast | Within | Finite | Above | OneOf

Count = Annotated[int, AtLeast(1)]
CountOrZero = Annotated[int, AtLeast(0)]
CountOrUnset = Annotated[int, AtLeast(-1)]
Share = Annotated[float, Within(0, 1)]
ShareBelowOne = Annotated[float, Within(0, 1, "[)")]
Positive = Annotated[float, Finite()]
NotNegative = Annotated[float, Finite(or_zero=True)]
