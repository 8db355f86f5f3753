"""What a stage says of itself when it is done: for summary.json and for the report's page."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

TRAIN_COLOR = "#4575b4"
EVAL_COLOR = "#f46d43"
CHOSEN_COLOR = "#1b7837"
REJECTED_COLOR = "#b2182b"


class Line(NamedTuple):
    """One metric over the steps, as a panel draws it."""

    key: str  # of metrics.jsonl
    label: str
    color: str = TRAIN_COLOR


class Panel(NamedTuple):
    """Some metrics that are drawn over the steps together."""

    title: str
    lines: Sequence[Line]
    level: float | None = None  # of a dotted line: what chance gives
    band: tuple[str, str] | None = None  # keys of the lower and the upper end of a shaded interval
    # key of a standard error, for a band around the first line
    error: str | None = None


class Card(NamedTuple):
    """One number at the top of the page."""

    value: str
    label: str
    note: str


class Before(NamedTuple):
    """A row of the table of before and after: a metric of metrics.jsonl at its first and last
    evaluation.
    """

    label: str
    key: str
    form: str  # a format string of one number


class Section(NamedTuple):
    """A part of the page: a picture, and a table under it."""

    title: str
    figure: Any  # of matplotlib
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Findings(NamedTuple):
    """What a stage found out, once its last step is done."""

    title: str  # of the report: what was trained, on what
    settings: tuple[str, ...]  # what a reader asks first: the objective, the batch, the optimizer
    unit: str  # what a step counts: pairs, responses, prompts
    scalars: dict[str, Any]  # for summary.json
    panels: tuple[Panel, ...] = ()
    note: str = ""  # under the panels: what may look like a fault and is none
    cards: tuple[Card, ...] = ()
    before: tuple[Before, ...] = ()
    sections: tuple[Section, ...] = ()
    samples: dict[str, Any] | None = None  # of policy and reference: see evaluation/samples.py
    # () -> the parameters of the whole policy, for the export; None: nothing was trained
    policy_params: Callable[[], Any] | None = None
