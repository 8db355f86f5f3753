"""The columns of a row, read one by one: each error names the row, the column and the value."""

import math
from collections.abc import Sequence

from dpojax.data.groups import Dropped
from dpojax.data.records import Row
from dpojax.data.token_groups import TokenPair
from dpojax.errors import DataError
from dpojax.untrusted.plain_data import MAX_FLOAT32, MAX_INT32


def read_text_column(row: Row, key: str, where: str) -> str:
    if key not in row:
        raise DataError(
            f"{where}: column {key!r} is missing; the row has {', '.join(map(repr, row)) or 'none'}"
        )
    if not isinstance(row[key], str):
        raise DataError(
            f"{where}: column {key!r} is {row[key]!r:.60}, of type {type(row[key]).__name__}, not a"
            " string"
        )
    return row[key]


def read_ids(row: Row, key: str, where: str) -> tuple[int, ...]:
    value = row.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{where}: column {key!r} is {value!r:.60}; it must be a list of token ids")
    for token in value:
        if type(token) is not int or not 0 <= token <= MAX_INT32:
            raise DataError(f"{where}: column {key!r} holds {token!r:.60}, which is no token id")
    return tuple(value)


def read_masks(
    row: Row, responses: Sequence[tuple[int, ...]], where: str
) -> tuple[tuple[int, ...], ...] | None:
    """The columns chosen_mask and rejected_mask: 0 or 1 for every id; None if there are none."""
    keys = ("chosen_mask", "rejected_mask")
    if not any(key in row for key in keys):
        return None
    masks = []
    for key, ids in zip(keys, responses, strict=True):
        value = row.get(key, [1] * len(ids))
        if (
            not isinstance(value, Sequence)
            or len(value) != len(ids)
            or not all(v in (0, 1) for v in value)
        ):
            raise DataError(
                f"{where}: column {key!r} is {value!r:.60}; it must hold 0 or 1 for each of the"
                f" {len(ids)} ids"
            )
        masks.append(tuple(map(int, value)))
    return tuple(masks)


def read_number(row: Row, key: str, where: str, default: float) -> float:
    value = row.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise DataError(f"{where}: column {key!r} is {value!r:.60}; it must be a finite number")
    if abs(value) > MAX_FLOAT32:
        raise Dropped("too_large")
    return float(value)


def read_weight(row: Row, where: str) -> float:
    weight = read_number(row, "weight", where, 1.0)
    if weight < 0:
        raise DataError(f"{where}: column 'weight' is {weight}; it must be at least 0")
    return weight


def read_pair(row: Row, where: str) -> TokenPair:
    weight = read_weight(row, where)
    soft_label = read_number(row, "soft_label", where, 1.0)
    if not 0 <= soft_label <= 1:
        raise DataError(
            f"{where}: column 'soft_label' is {soft_label}; it is a probability, in [0, 1]"
        )
    if ("score_chosen" in row) != ("score_rejected" in row):
        (lacks,) = {"score_chosen", "score_rejected"} - set(row)
        raise DataError(
            f"{where}: column {lacks!r} is missing; the scores of both responses are needed, or"
            " none"
        )
    margin = read_number(row, "score_chosen", where, 0.0) - read_number(
        row, "score_rejected", where, 0.0
    )
    margin = read_number(row, "margin", where, margin)
    return TokenPair(
        0, 1, weight, soft_label, read_number({"margin": margin}, "margin", where, 0.0)
    )
