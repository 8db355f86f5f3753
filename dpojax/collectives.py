"""Compiled HLO text -> what its collectives move between devices in one step.

XLA's own cost analysis counts the body of a loop once and knows no links; here every loop counts as often as it runs.
"""

import collections
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "f64": 8,
}
_BYTES |= {"s4": 0.5, "u4": 0.5, "f8e4m3fn": 1, "f8e5m2": 1}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(rf"= (\(?.*?\)?) ({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)")
_LIMIT = re.compile(r"= [su]32\[\][^ ]* constant\((\d+)\)")


BETWEEN = "between slices"
_CROSSING = re.compile(r"= \((\w+\[[\d,]*\])[^=]* send\(.*_xla_megascale_transfer_type=\"(\w+)\"")


class Traffic(NamedTuple):
    """What one kind of collective does in a step, on each device. What passes from slice to slice is a kind of its own."""

    kind: str
    runs: float
    sent: float  # bytes that leave the device, by the algorithm of rings


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the first one that runs."""
    found: dict[str, list[str]] = {}
    own: list[str] | None = None
    entry = ""
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            own = found.setdefault(match.group(1), [])
            entry = match.group(1) if line.startswith("ENTRY") else entry
        elif line == "}":  # a kernel's own settings may begin a line with it
            own = None
        elif own is not None:
            own.append(line)
    return found, entry


def _trips(condition: list[str], name: str, body: list[str]) -> float | None:
    """How often a loop runs, where its condition compares with a constant; None where it does not."""
    limits = {int(n) for line in condition for n in _LIMIT.findall(line) if int(n) > 1}
    if len(limits) != 1:
        return None
    # A matrix product that XLA cuts into a ring goes round in steps of two.
    two = "windowed_dot_general" in name and any(n == "2" for line in body for n in _LIMIT.findall(line))
    return limits.pop() / (2 if two else 1)


def _size(kind: str, shape: str, started: bool) -> float:
    """Bytes of a result; an asynchronous one names its operand too, and what it synchronises with."""
    parts = [
        _BYTES.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    ]
    return max(parts) if started and kind != "all-reduce" else sum(parts)


def _group(line: str) -> int:
    """Devices that take part together."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[a]) for a in re.findall(r"'([^']+)'", mesh.group(2)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota.group(2))
    first = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(first.group(1).split(",")) if first else 2


def _sent(kind: str, size: float, group: int) -> float:
    if kind == "collective-permute":
        return size
    share = (group - 1) / group
    return {"all-reduce": 2 * size, "reduce-scatter": size * group}.get(kind, size) * share


def collective_traffic(text: str, *, trips: tuple[float, ...], num_slices: int = 1) -> list[Traffic]:
    """What the collectives of a program move, most first.

    Args:
      text: of a compiled executable.
      trips: how often loops whose count is known at run time alone run, by their depth among such loops.
      num_slices: over which the program runs.
    """
    computations, entry = _computations(text)
    totals: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])

    def visit(name: str, times: float, depth: int, seen: set[str]) -> None:
        """`seen`: channels counted already in this body: an asynchronous collective is written in several parts."""
        for line in computations.get(name, ()):
            loop = _WHILE.search(line)
            if loop:
                body = loop.group(2)
                count = _trips(computations.get(loop.group(1), []), body, computations.get(body, []))
                own = trips[min(depth, len(trips) - 1)] if count is None else count
                visit(body, times * own, depth + (count is None), set())
                continue
            crossing = _CROSSING.search(line)
            if crossing:  # XLA sums inside each slice, and hands each device's share to the hosts' network
                size = _size(BETWEEN, crossing.group(1), False)
                rounds = {"ALL_REDUCE": 2 * (num_slices - 1) / num_slices, "ALL_GATHER": num_slices - 1}
                totals[BETWEEN][0] += times
                totals[BETWEEN][1] += times * size * rounds.get(crossing.group(2), 1)
                continue
            operation = _OPERATION.search(line)
            if operation:
                shape, kind, started = operation.groups()
                channel = re.search(r"channel_id=(\d+)", line)
                group = _group(line)
                if group > 1 and not (channel and channel.group(1) in seen):
                    seen |= {channel.group(1)} if channel else set()
                    totals[kind][0] += times
                    totals[kind][1] += times * _sent(kind, _size(kind, shape, bool(started)), group)
                continue
            for called in _CALLED.findall(line):
                for other in called.replace("%", "").split(","):
                    visit(other.strip(), times, depth, seen)

    visit(entry, 1.0, 0, set())
    return sorted((Traffic(kind, *own) for kind, own in totals.items()), key=lambda t: -t.sent)
