"""What is wrong with a preference dataset, before anyone trains on it.

python -m dpojax.audit --data=FILE --tokenizer=PATH [--chat_template=FILE] [--prompt_template=...]
[--show=2] [...] PATH may be a run's workdir: templates, limits and masks are then those of the run.
"""

import argparse
import collections
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dpojax.command_line import Parser, leave, run_tool
from dpojax.data.dataset import Dataset
from dpojax.data.groups import DROPPED, Dropped, Group
from dpojax.data.painted_tokens import show_group
from dpojax.data.records import Records
from dpojax.data.sources import open_sources
from dpojax.data.token_groups import TokenGroup
from dpojax.data.tokens import Cut
from dpojax.data.written import Writing
from dpojax.errors import DataError
from dpojax.evaluation.statistics import wilson
from dpojax.generation.loaded import add_text_arguments, open_text
from dpojax.runtime.log import Progress

SHOWN_PLACES = 3  # of the rows that a line of the report counts


def _lists_by_reason() -> dict[str, list[str]]:
    return collections.defaultdict(list)


@dataclass
class Audit:
    """What the rows of a dataset hold. Lists of str hold places, `file:line`."""

    rows: int
    unpaired: bool  # whether rows are labelled responses
    bad: list[str] = field(default_factory=list)  # messages of rows that cannot be read
    dropped: dict[str, list[str]] = field(default_factory=_lists_by_reason)  # by reason
    # By reason, of rows whose pairs are sound before truncation.
    cut_away: dict[str, list[str]] = field(default_factory=_lists_by_reason)
    duplicated: list[str] = field(default_factory=list)  # the same pair again
    contradictory: list[str] = field(
        default_factory=list
    )  # the same responses with the labels reversed
    cut_prompts: int = 0
    cut_turns: int = 0  # messages of these that are left out entirely
    cut_contents: int = 0  # prompts of these that lose the start of a message
    cut_responses: int = 0
    # Tokens of prompt, chosen and rejected of every pair; unpaired: prompt, response, response.
    # After truncation, and before it, with the pairs that truncation takes away.
    cut_lengths: list[Sequence[int]] = field(default_factory=list)
    uncut_lengths: list[Sequence[int]] = field(default_factory=list)
    groups: int = 0  # rows that are read, with pairs or without
    labels: list[float] = field(default_factory=list)  # of unpaired responses; 1 elsewhere
    one_bos: int = 0  # groups whose prompt holds exactly one BOS, at its start
    ends_in_eos: int = 0
    eos_inside: int = 0  # responses with an EOS before their end
    glued: int = 0  # responses without white space between the prompt and them
    responses: int = 0
    examples: list[TokenGroup] = field(default_factory=list)
    _seen: dict[tuple, str] = field(default_factory=dict)  # where each pair stands

    def drop(self, where: str, verdict: Dropped) -> None:
        """Counts a row that holds no usable pair."""
        if verdict.uncut_lengths is None:
            self.dropped[verdict.reason].append(where)
            return
        # Truncation alone made it so.
        self.cut_away[verdict.reason].append(where)
        self.uncut_lengths += verdict.uncut_lengths

    def add(self, text: Group, group: TokenGroup, cut: Cut) -> None:
        """Counts what truncation and the template did to a row."""
        self.groups += 1
        self.uncut_lengths += cut.uncut_lengths
        self.cut_lengths += _pair_lengths(group)
        if isinstance(text.prompt, str) and text.prompt[-1:].strip():
            self.glued += sum(bool(str(response)[:1].strip()) for response in text.responses)
        self.cut_prompts += cut.prompt > 0
        self.cut_turns += cut.turns
        self.cut_contents += cut.content > 0
        self.cut_responses += sum(tokens > 0 for tokens in cut.responses)

    def add_special_tokens(self, group: TokenGroup, bos: int | None, eos: int | None) -> None:
        """Counts BOS and EOS where they belong, and where they do not."""
        self.one_bos += bool(group.prompt[0] == bos and (group.prompt == bos).sum() == 1)
        for response in group.responses:
            self.responses += 1
            self.ends_in_eos += bool(response[-1] == eos)
            self.eos_inside += bool((response[:-1] == eos).any())

    def add_pairs(self, where: str, group: TokenGroup) -> None:
        """Looks for pairs that stand in the data already, as they are or reversed."""
        ids = [response.tobytes() for response in group.responses]
        prompt = group.prompt.tobytes()
        for pair in group.pairs:
            chosen = ids[pair.chosen]
            rejected = ids[pair.rejected]
            key = (prompt, chosen, rejected, pair.soft_label)
            reverse = (prompt, rejected, chosen, pair.soft_label)
            if self.unpaired:
                reverse = (prompt, chosen, rejected, 1 - pair.soft_label)
            if key in self._seen:
                self.duplicated.append(f"{where} repeats {self._seen[key]}")
            if reverse in self._seen:
                self.contradictory.append(f"{where} reverses {self._seen[reverse]}")
            self._seen.setdefault(key, where)
            self.labels.append(pair.soft_label)


def audit(data: Dataset, *, show: int, progress: Callable[[int], None]) -> Audit:
    """Reads every row of `data` once and counts; keeps the first `show` groups."""
    result = Audit(rows=data.records.size, unpaired=data.reader.kind == "unpaired")
    bos = None
    eos = None
    if data.tokenizer:
        bos = data.tokenizer.bos_id
        eos = data.tokenizer.eos_id
    for row, read in data.read_groups(range(data.records.size)):
        progress(row)
        where = data.records.where(row)
        if isinstance(read, Dropped):
            result.drop(where, read)
            continue
        if isinstance(read, DataError):
            result.bad.append(str(read))
            continue
        text, group, cut = read
        result.add(text, group, cut)
        result.add_special_tokens(group, bos, eos)
        result.add_pairs(where, group)
        if len(result.examples) < show:
            result.examples.append(group)
    return result


def _pair_lengths(group: TokenGroup) -> list[list[int]]:
    """Tokens of prompt, chosen and rejected of every pair of a group."""
    sizes = [len(response) for response in group.responses]
    return [[len(group.prompt), sizes[pair.chosen], sizes[pair.rejected]] for pair in group.pairs]


def _bias(lengths: np.ndarray, when: str) -> str:
    """Whether the labels favour the longer response, of [pairs, 3] lengths."""
    difference = lengths[:, 1] - lengths[:, 2]
    longer = float((difference > 0).sum() + 0.5 * (difference == 0).sum())
    rate = wilson(longer, len(difference))
    verdict = "the labels carry a length bias"
    if rate.low <= 0.5 <= rate.high:
        verdict = "the labels favour neither"
    return (
        f"length {when}: chosen is the longer one in {rate.value:.1%} [{rate.low:.1%},"
        f" {rate.high:.1%}] of pairs, by {difference.mean():+.1f} tokens on average: {verdict}"
    )


def _count_line(count: int, what: str, places: Sequence[str] = ()) -> str:
    """A line of the report: a count, and where the first of them stand."""
    line = f"{count:>8,} {what}"
    if places:
        line += f": {'; '.join(places[:SHOWN_PLACES])}"
    if len(places) > SHOWN_PLACES:
        line += f"; and {len(places) - SHOWN_PLACES} more"
    return line


def _row_lines(result: Audit, unit: str) -> list[str]:
    """What becomes of the rows."""
    lines = [
        f"{result.rows:>8,} rows, {len(result.cut_lengths):,} usable {unit}",
        _count_line(len(result.bad), "rows cannot be read", result.bad),
    ]
    for reason, what in DROPPED.items():
        places = result.dropped.get(reason, [])
        lines.append(_count_line(len(places), f"dropped, {what}", places))
    for reason in {"identical": 0, "empty_response": 0, **result.cut_away}:
        places = result.cut_away.get(reason, [])
        lines.append(
            _count_line(len(places), f"dropped after truncation, {DROPPED[reason]}", places)
        )
    lines.append(_count_line(len(result.duplicated), f"{unit} occur again", result.duplicated))
    lines.append(
        _count_line(
            len(result.contradictory),
            f"{unit} contradict another (labels reversed)",
            result.contradictory,
        )
    )
    return lines


def _token_lines(result: Audit) -> list[str]:
    """What truncation, BOS and EOS do to prompts and responses."""
    lines = [_count_line(result.cut_prompts, "prompts would be cut")]
    if result.cut_turns or result.cut_contents:
        lines.append(
            _count_line(
                result.cut_turns,
                "messages of dialogues would be left out whole, the oldest first",
            )
        )
        lines.append(
            _count_line(
                result.cut_contents,
                "dialogues would lose the start of the first message that is left",
            )
        )
    responses = f"responses of {result.responses:,}"
    return [
        *lines,
        _count_line(result.cut_responses, f"{responses} would be cut"),
        _count_line(result.one_bos, "prompts start with their one BOS"),
        _count_line(
            result.ends_in_eos,
            f"{responses} end in EOS; {result.eos_inside:,} hold one before their end",
        ),
        _count_line(
            result.glued,
            f"{responses} are glued to their prompt, with no white space between",
        ),
    ]


def _length_table(columns: dict[str, np.ndarray]) -> list[str]:
    """A table of lengths in tokens, by name."""
    lines = [f"{'tokens':>10} {'mean':>8} {'p50':>6} {'p95':>6} {'max':>6}"]
    for name, lengths in columns.items():
        if len(lengths):
            lines.append(
                f"{name:>10} {lengths.mean():8.1f} {np.median(lengths):6.0f}"
                f" {np.percentile(lengths, 95):6.0f} {lengths.max():6d}"
            )
    return lines


def _length_lines(result: Audit) -> list[str]:
    """How long pairs are, and whether their labels favour long responses."""
    lengths = np.asarray(result.cut_lengths)
    if result.unpaired:
        desirable = np.asarray(result.labels) > 0.5
        responses = lengths[:, 1]
        columns = {
            "prompt": lengths[:, 0],
            "desirable": responses[desirable],
            "undesired": responses[~desirable],
        }
        share = wilson(float(desirable.sum()), len(desirable))
        return [
            *_length_table(columns),
            f"labels: {share.value:.1%} [{share.low:.1%}, {share.high:.1%}] desirable; KTO's"
            " authors keep the weighted numbers of both sides within 1:1 and 4:3"
            " (loss.desirable_weight, loss.undesirable_weight)",
        ]
    columns = {"prompt": lengths[:, 0], "chosen": lengths[:, 1], "rejected": lengths[:, 2]}
    return [
        *_length_table(columns),
        _bias(np.asarray(result.uncut_lengths), "before truncation"),
        _bias(lengths, "after truncation"),
    ]


def report_lines(result: Audit) -> list[str]:
    """The report as text."""
    unit = "pairs"
    if result.unpaired:
        unit = "labelled responses"
    lines = [*_row_lines(result, unit), *_token_lines(result)]
    if result.cut_lengths:
        lines += _length_lines(result)
    elif result.groups:
        lines.append(
            f"{result.groups:,} rows hold responses and no preference: they can serve as sft.data"
        )
    return lines


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(
        prog="python -m dpojax.audit",
        description="Reports what is wrong with a preference dataset.",
    )
    parser.add_argument("--data", required=True, help="file of preferences, or hf:NAME[:SPLIT]")
    parser.add_argument(
        "--model",
        default="",
        help="a model or workdir whose tokenizer is used; --tokenizer takes one as well",
    )
    parser.add_argument(
        "--unpaired",
        action="store_true",
        help="pairs too are read as labelled responses, as KTO takes them",
    )
    add_text_arguments(parser)
    parser.add_argument("--show", type=int, default=2, help="pairs printed token by token")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    return run_tool(_audit, parser, argv)


# How rows are written for a tokenizer that no run of dpojax wrote.
DEFAULTS = Writing(max_prompt_tokens=512, max_response_tokens=128)


def _are_labelled(records: Records) -> bool:
    """Whether the first rows that can be read are responses with labels, as KTO takes them."""
    preferences = {"chosen", "chosen_ids", "scores", "ranks"}
    for row in range(min(records.size, 20)):
        try:
            columns = {key for key, value in records.get(row).items() if value is not None}
        except DataError:
            continue
        return bool(columns & {"label", "labels"}) and not columns & preferences
    return False


def _audit(args: argparse.Namespace) -> None:
    """Reads, counts and prints. Raises: DataError after the report if no row is usable."""
    records = open_sources(args.data, "--data")
    kind = "pairs"
    if args.unpaired or _are_labelled(records):
        kind = "unpaired"
    text = open_text(args.model, args, DEFAULTS, needed=bool(args.model or args.tokenizer))
    data = text.dataset(records, kind)
    progress = Progress("reading", data.records.size, "rows", enabled=True)
    result = audit(data, show=args.show, progress=progress)
    progress.close(data.records.name)
    print("\n".join(report_lines(result)))
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    if result.examples:
        legend = "special tokens in [brackets]"
        if color:
            legend = "grey prompt (no loss), green chosen, red rejected, special tokens inverse"
        print(
            f"\nFirst pairs, token by token; loss falls on every token of both responses: {legend}"
        )
    for group in result.examples:
        print(show_group(group, text.tokenizer, color=color) + "\n")
    if not result.groups:
        first = ""
        if result.bad:
            first = f"; {result.bad[0]}"
        raise DataError(f"{records.name}: none of its {result.rows:,} rows is usable{first}")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
