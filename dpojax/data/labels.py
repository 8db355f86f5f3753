"""Pairs and labels -> labelled responses: examples for an unpaired objective, or for SFT."""

from dpojax.data.columns import read_weight
from dpojax.data.groups import Dropped, Group
from dpojax.data.records import Row
from dpojax.data.token_groups import TokenPair
from dpojax.errors import DataError


def unpair(group: Group, where: str) -> Group:
    """A pair as two labelled responses."""
    if len(group.pairs) != 1:
        raise DataError(
            f"{where}: ranked responses have no label; give them a column 'labels', or use a"
            " pairwise objective"
        )
    (p,) = group.pairs
    if p.soft_label != 1:
        raise DataError(
            f"{where}: column 'soft_label' is {p.soft_label}; an unpaired objective takes labels,"
            " true or false"
        )
    if group.responses[p.chosen] == group.responses[p.rejected]:
        raise Dropped("identical")
    desirable = TokenPair(p.chosen, p.chosen, p.weight, 1.0, 0.0)
    undesirable = TokenPair(p.rejected, p.rejected, p.weight, 0.0, 0.0)
    return group._replace(pairs=(desirable, undesirable))


def read_labels(group: Group, row: Row, where: str, kind: str) -> Group:
    """Completions with their labels: examples for an unpaired objective, the good ones for SFT."""
    row = {k: v for k, v in row.items() if v is not None}
    key = "label"
    if "completions" in row:
        key = "labels"
    if key not in row:
        if kind == "sft":
            return group
        raise DataError(
            f"{where}: column {key!r} is missing; an unpaired objective needs it for every response"
        )
    if key == "labels":
        labels = row["labels"]
        texts = row["completions"]
    else:
        labels = [row["label"]]
        texts = list(group.responses)
    if (
        not isinstance(labels, list)
        or len(labels) != len(texts)
        or not all(v in (0, 1) for v in labels)
    ):
        raise DataError(
            f"{where}: column {key!r} is {row[key]!r:.60}; it must be true or false for each of"
            f" {len(texts)} responses"
        )
    place = {text: i for i, text in enumerate(group.responses)}
    if kind == "sft":
        good = tuple(dict.fromkeys(t for t, label in zip(texts, labels, strict=True) if label))
        if not good:
            raise Dropped("undesirable")
        return group._replace(responses=good)
    weight = read_weight(row, where)
    examples = [
        TokenPair(place[t], place[t], weight, float(v), 0.0)
        for t, v in zip(texts, labels, strict=True)
    ]
    return group._replace(pairs=tuple(examples))
