"""Compiled HLO text -> what its collectives move between devices in one step.

XLA's cost analysis counts the body of a loop once and knows no links; here every loop counts as
often as it runs.
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
    "s4": 0.5,
    "u4": 0.5,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")

_OPERATION = re.compile(rf"= (\(?.*?\)?) ({'|'.join(KINDS)})(-start)?\(")

_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")

_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.\-]+(?:, ?%[\w.\-]+)*)"
)

_LIMIT = re.compile(r"= [su]32\[\][^ ]* constant\((\d+)\)")

BETWEEN = "between slices"

_CROSSING = re.compile(r"= \((\w+\[[\d,]*\])[^=]* send\(.*_xla_megascale_transfer_type=\"(\w+)\"")


class Traffic(NamedTuple):
    """What one kind of collective does in a step, on each device.

    What passes from slice to slice is a kind of its own.
    """

    kind: str
    runs: float
    sent: float  # bytes that leave the device, by the algorithm of rings


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    lines: list[str] | None = None
    entry = ""
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            name = match.group(1)
            lines = computations.setdefault(name, [])
            if line.startswith("ENTRY"):
                entry = name
        elif line == "}":  # alone: a line of a kernel's settings may begin with it
            lines = None
        elif lines is not None:
            lines.append(line)
    return computations, entry


def _trips(condition: list[str], name: str, body: list[str]) -> float | None:
    """How often a loop runs whose condition compares with a constant; None for another loop."""
    limits = {int(n) for line in condition for n in _LIMIT.findall(line) if int(n) > 1}
    if len(limits) != 1:
        return None
    trips = limits.pop()
    # A matrix product that XLA cuts into a ring goes round in steps of two.
    if "windowed_dot_general" in name and any("2" in _LIMIT.findall(line) for line in body):
        return trips / 2
    return trips


def _size(kind: str, shape: str, started: bool) -> float:
    """Bytes of a result. The start of an asynchronous collective names its operand and what it
    synchronises with beside it: the result is the largest.
    """
    parts = [
        _BYTES.get(kind, 4) * math.prod(int(d) for d in dims.split(",") if d)
        for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
    ]
    if started and kind != "all-reduce":
        return max(parts)
    return sum(parts)


def _group(line: str) -> int:
    """How many devices take part in a collective."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh.group(1)))
        return math.prod(int(sizes[a]) for a in re.findall(r"'([^']+)'", mesh.group(2)))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return int(iota.group(2))
    first = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if first:
        return len(first.group(1).split(","))
    return 2  # a permutation names pairs


def _sent(kind: str, size: float, group: int) -> float:
    if kind == "collective-permute":
        return size
    share = (group - 1) / group
    return {"all-reduce": 2 * size, "reduce-scatter": size * group}.get(kind, size) * share


class _Count(NamedTuple):
    """How often one kind of collective runs in a step, and what leaves a device."""

    runs: float = 0.0
    sent: float = 0.0

    def plus(self, runs: float, sent_each: float) -> "_Count":
        return _Count(self.runs + runs, self.sent + runs * sent_each)


class _Counter:
    """Walks the computations of a program from its entry on, and counts its collectives.

    Attributes:
      totals: by kind.
    """

    def __init__(
        self, computations: dict[str, list[str]], trips: tuple[float, ...], num_slices: int
    ):
        self.computations = computations
        self.trips = trips
        self.num_slices = num_slices
        self.totals: dict[str, _Count] = collections.defaultdict(_Count)

    def visit(self, name: str, times: float, depth: int, seen: set[str]) -> None:
        """Counts a computation that runs `times` times.

        Args:
          depth: of the loops around it whose trips are known at run time alone.
          seen: channels that this body has counted: an asynchronous collective is written in
            several parts.
        """
        for line in self.computations.get(name, ()):
            loop = _WHILE.search(line)
            crossing = _CROSSING.search(line)
            operation = _OPERATION.search(line)
            if loop:
                self._visit_loop(loop, times, depth)
            elif crossing:
                self._count_crossing(crossing, times)
            elif operation:
                self._count_operation(operation, line, times, seen)
            else:
                for called in _CALLED.findall(line):
                    for callee in called.replace("%", "").split(","):
                        self.visit(callee.strip(), times, depth, seen)

    def _visit_loop(self, loop: re.Match, times: float, depth: int) -> None:
        condition, body = loop.groups()
        trips = _trips(self.computations.get(condition, []), body, self.computations.get(body, []))
        if trips is None:
            trips = self.trips[min(depth, len(self.trips) - 1)]
            depth += 1
        self.visit(body, times * trips, depth, set())

    def _count_crossing(self, crossing: re.Match, times: float) -> None:
        """A send from slice to slice: XLA sums inside each slice first, and hands each device's
        share to the hosts' network.
        """
        shape, kind = crossing.groups()
        rounds = {
            "ALL_REDUCE": 2 * (self.num_slices - 1) / self.num_slices,
            "ALL_GATHER": self.num_slices - 1,
        }
        sent = _size(BETWEEN, shape, False) * rounds.get(kind, 1)
        self.totals[BETWEEN] = self.totals[BETWEEN].plus(times, sent)

    def _count_operation(
        self, operation: re.Match, line: str, times: float, seen: set[str]
    ) -> None:
        shape, kind, started = operation.groups()
        channel = re.search(r"channel_id=(\d+)", line)
        group = _group(line)
        if group == 1 or (channel and channel.group(1) in seen):
            return
        if channel:
            seen.add(channel.group(1))
        sent = _sent(kind, _size(kind, shape, bool(started)), group)
        self.totals[kind] = self.totals[kind].plus(times, sent)


def collective_traffic(
    text: str, *, trips: tuple[float, ...], num_slices: int = 1
) -> list[Traffic]:
    """What the collectives of a program move, most first.

    Args:
      text: of a compiled executable.
      trips: how often the loops run whose count is known at run time alone, by their depth among
        such loops.
      num_slices: over which the program runs.
    """
    computations, entry = _computations(text)
    counter = _Counter(computations, trips, num_slices)
    counter.visit(entry, 1.0, 0, set())
    traffic = [Traffic(kind, count.runs, count.sent) for kind, count in counter.totals.items()]
    return sorted(traffic, key=lambda kind: -kind.sent)
