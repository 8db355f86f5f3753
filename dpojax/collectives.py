"""Compiled HLO text -> what its collectives move between devices."""

from typing import NamedTuple


class Traffic(NamedTuple):
    kind: str


def collective_traffic(text):
    return []
