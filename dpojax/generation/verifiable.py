"""Responses and the answers of their rows -> 1 where they agree, 0 where they do not.

Nothing of a row is executed: numbers are read by a grammar, and patterns are matched in a process
with limits.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from dpojax.errors import DataError
from dpojax.untrusted.patterns import match_all

MINUS = "-\u2212\u2013\uff0d"  # hyphen-minus, minus sign, en dash, full-width hyphen
_SIGN = r"[+\-\u2212\u2013\uff0d]"
MAX_DIGITS = 400  # of a number, and the largest exponent: more would take memory for nothing

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_PLAIN = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_SCALED = rf"{_PLAIN}(?:[eE]{_SIGN}?[0-9]+)?"
# A minus after a word, a digit or a bracket joins two numbers: "3-5" ends in 5.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w)\]]){_SIGN})?(?P<top>{_SCALED})"
    rf"(?:\s?/\s?(?P<bottom>{_PLAIN}))?"
)


def last_number(text: str) -> Fraction | None:
    """The last number of a text, exactly; None: it holds none.

    Read are "1,000", "-3.50", "1/2", "2e-3" and a Unicode minus. A number of more than MAX_DIGITS
    digits, or one over zero, is none.
    """
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    top = _exact(match["top"])
    bottom = Fraction(1)
    if match["bottom"]:
        bottom = _exact(match["bottom"])
    if top is None or not bottom:  # 0, or None
        return None
    value = top / bottom
    if match["sign"] and match["sign"] in MINUS:
        return -value
    return value


def _exact(text: str) -> Fraction | None:
    """A number without its sign; None where it is too long to be meant."""
    digits, _, exponent = text.replace(",", "").lower().partition("e")
    for mark in MINUS:
        exponent = exponent.replace(mark, "-")
    if len(digits) > MAX_DIGITS or len(exponent) > len(str(MAX_DIGITS)) + 1:
        return None
    power = int(exponent or 0)
    if abs(power) > MAX_DIGITS:
        return None
    whole, _, decimals = digits.partition(".")
    return Fraction(int(whole + decimals)) * Fraction(10) ** (power - len(decimals))


def answer_text(value: Any) -> str:
    """An answer of a row as text: numbers of JSON are answers too.

    Raises: DataError for a truth value, a list or an object, a predicate.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    raise DataError(f"is of type {type(value).__name__}; an answer is text or a number")


def agree_exactly(response: str, answer: str) -> float:
    """1 where response and answer are the same text, white space at the ends apart."""
    return float(response.strip() == answer.strip())


def agree_in_number(response: str, answer: str) -> float:
    """1 where the last number of the response is the last number of the answer, exactly.

    Raises: DataError for an answer without a number, a predicate.
    """
    want = last_number(answer)
    if want is None:
        raise DataError("holds no number, which the term 'numeric' compares; compare by 'exact'")
    return float(last_number(response) == want)


class Verifier:
    """(prompts, responses, columns) -> 1, 0, or None for a row without an answer."""

    def __init__(self, kind: str, column: str):
        """Takes what is compared, "exact", "numeric" or "regex", and the column of the answer."""
        self.kind = kind
        self.column = column

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        """The score of each response. Raises DataError naming the row and its answer."""
        del prompts
        given = [i for i, row in enumerate(columns) if row.get(self.column) is not None]
        texts: list[str] = []
        for i in given:
            try:
                texts.append(answer_text(columns[i][self.column]))
            except DataError as error:
                raise self._fault(i, columns[i], str(error)) from error
        scores: list[float | None] = [None] * len(responses)
        if self.kind == "regex":
            found = match_all([(text, responses[i]) for i, text in zip(given, texts, strict=True)])
            for i, match in zip(given, found, strict=True):
                if isinstance(match, bool):
                    scores[i] = float(match)
                elif not match.startswith("takes"):  # it takes too long: that is no answer
                    raise self._fault(i, columns[i], match)
            return scores
        agree = agree_in_number if self.kind == "numeric" else agree_exactly
        for i, text in zip(given, texts, strict=True):
            try:
                scores[i] = agree(responses[i], text)
            except DataError as error:
                raise self._fault(i, columns[i], str(error)) from error
        return scores

    def _fault(self, number: int, row: Mapping[str, Any], predicate: str) -> DataError:
        """An error of a row, which is named by file and line where it comes from a file."""
        where = getattr(row, "where", f"response {number}")
        value = row[self.column]
        return DataError(f"{where}: column {self.column!r} is {value!r:.60}, which {predicate}")
