"""What is wrong with a preference dataset, before anyone trains on it.

python -m dpojax.audit --data=FILE --tokenizer=PATH [--chat_template=FILE] [--prompt_template=...] [--show=2] [...]
PATH may be a run's workdir: templates, limits and masks are then those of the run.
"""

import argparse
import collections
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.command import leave
from dpojax.data.index import Dataset
from dpojax.data.packing import TokenGroup
from dpojax.data.records import Records
from dpojax.data.sources import open_sources
from dpojax.data.triples import DROPPED, Dropped
from dpojax.data.written import Writing
from dpojax.errors import DataError
from dpojax.evaluation.statistics import wilson
from dpojax.flags import Parser
from dpojax.inference import add_text_arguments, open_text, run_tool
from dpojax.metrics import Progress

COLOR = {"prompt": "\x1b[90m", "chosen": "\x1b[32m", "rejected": "\x1b[31m", "special": "\x1b[7m", "off": "\x1b[0m"}


class Audit(NamedTuple):
    """What was found; lists hold `file:line` places."""

    rows: int
    bad: list[str]  # messages of rows that cannot be read
    dropped: dict[str, list[str]]  # by reason
    cut_away: dict[str, list[str]]  # by reason, of rows whose pairs are sound before they are cut
    duplicated: list[str]  # the same pair again
    contradictory: list[str]  # the same responses with the labels reversed
    cut_prompts: int
    cut_turns: int  # messages of these that are left out whole
    cut_contents: int  # prompts of these that lose the start of a message
    cut_responses: int
    # [pairs, 3] tokens of prompt, chosen, rejected; unpaired: prompt, response, response. After truncation, and before it
    # (whole_lengths, with the pairs that truncation takes away).
    lengths: np.ndarray
    whole_lengths: np.ndarray
    groups: int  # rows that are read, with pairs or without
    labels: np.ndarray  # [pairs] of unpaired responses; 1 elsewhere
    unpaired: bool
    one_bos: int  # groups whose prompt holds exactly one BOS, at its start
    ends_in_eos: int
    eos_inside: int  # responses with an EOS before their end
    glued: int  # responses without white space between the prompt and them
    responses: int
    examples: list[TokenGroup]


def audit(data: Dataset, *, show: int, progress) -> Audit:
    """Reads every row of `data` once and counts; keeps the first `show` groups."""
    bad, dropped, cut_away = [], collections.defaultdict(list), collections.defaultdict(list)
    whole_lengths: list[tuple[int, int, int]] = []
    duplicated, contradictory, lengths, labels, examples = [], [], [], [], []
    seen: dict[tuple, str] = {}
    count: collections.Counter = collections.Counter()
    bos, eos = (data.tokenizer.bos_id, data.tokenizer.eos_id) if data.tokenizer else (None, None)
    for row, result in data.read_groups(range(data.records.size)):
        progress(row)
        where = data.records.where(row)
        if isinstance(result, Dropped):
            if result.whole is None:
                dropped[result.reason].append(where)
            else:  # truncation alone made it so
                cut_away[result.reason].append(where)
                whole_lengths += result.whole
            continue
        if isinstance(result, DataError):
            bad.append(str(result))
            continue
        text, group, cut = result
        count["groups"] += 1
        whole_lengths += cut.whole
        if isinstance(text.prompt, str) and text.prompt[-1:].strip():
            count["glued"] += sum(bool(str(r)[:1].strip()) for r in text.responses)
        count["cut_prompts"] += cut.prompt > 0
        count["cut_turns"] += cut.turns
        count["cut_contents"] += cut.content > 0
        count["cut_responses"] += sum(c > 0 for c in cut.responses)
        count["one_bos"] += bool(group.prompt[0] == bos and (group.prompt == bos).sum() == 1)
        for response in group.responses:
            count["responses"] += 1
            count["ends_in_eos"] += bool(response[-1] == eos)
            count["eos_inside"] += bool((response[:-1] == eos).any())
        ids = [r.tobytes() for r in group.responses]
        for pair in group.pairs:
            key = (group.prompt.tobytes(), ids[pair.chosen], ids[pair.rejected], pair.soft_label)
            if key in seen:
                duplicated.append(f"{where} repeats {seen[key]}")
            other = (key[0], key[2], key[1], key[3])
            if data.reader.kind == "unpaired":
                other = (*key[:3], 1 - key[3])
            if other in seen:
                contradictory.append(f"{where} reverses {seen[other]}")
            seen.setdefault(key, where)
            labels.append(pair.soft_label)
        lengths += _pair_lengths(group)
        if len(examples) < show:
            examples.append(group)
    return Audit(
        rows=data.records.size,
        bad=bad,
        dropped=dict(dropped),
        cut_away=dict(cut_away),
        duplicated=duplicated,
        contradictory=contradictory,
        cut_prompts=count["cut_prompts"],
        cut_turns=count["cut_turns"],
        cut_contents=count["cut_contents"],
        cut_responses=count["cut_responses"],
        lengths=np.asarray(lengths).reshape(-1, 3),
        whole_lengths=np.asarray(whole_lengths).reshape(-1, 3),
        groups=count["groups"],
        labels=np.asarray(labels),
        unpaired=data.reader.kind == "unpaired",
        one_bos=count["one_bos"],
        ends_in_eos=count["ends_in_eos"],
        eos_inside=count["eos_inside"],
        glued=count["glued"],
        responses=count["responses"],
        examples=examples,
    )


def _pair_lengths(group: TokenGroup) -> list[list[int]]:
    """Tokens of prompt, chosen and rejected of every pair of a group."""
    sizes = [len(response) for response in group.responses]
    return [[len(group.prompt), sizes[pair.chosen], sizes[pair.rejected]] for pair in group.pairs]


def _bias(lengths: np.ndarray, when: str) -> str:
    """Whether the labels favour the longer response, of [pairs, 3] lengths."""
    difference = lengths[:, 1] - lengths[:, 2]
    rate = wilson(float((difference > 0).sum() + 0.5 * (difference == 0).sum()), len(difference))
    bias = f"chosen is the longer one in {rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}] of pairs"
    verdict = "the labels favour neither" if rate.low <= 0.5 <= rate.high else "the labels carry a length bias"
    return f"length {when}: {bias}, by {difference.mean():+.1f} tokens on average: {verdict}"


def _places(places: Sequence[str]) -> str:
    return "; ".join(places[:3]) + (f"; and {len(places) - 3} more" if len(places) > 3 else "")


def lines(found: Audit) -> list[str]:
    """The report as text."""
    unit = "labelled responses" if found.unpaired else "pairs"
    out = [f"{found.rows:>8,} rows, {len(found.lengths):,} usable {unit}"]
    line = lambda n, what, places=(): out.append(f"{n:>8,} {what}" + (f": {_places(places)}" if places else ""))
    line(len(found.bad), "rows cannot be read", found.bad)
    for reason, what in DROPPED.items():
        line(len(found.dropped.get(reason, [])), f"dropped, {what}", found.dropped.get(reason, []))
    for reason in {"identical": 0, "empty_response": 0, **found.cut_away}:
        places = found.cut_away.get(reason, [])
        line(len(places), f"dropped after truncation, {DROPPED[reason]}", places)
    line(len(found.duplicated), f"{unit} occur again", found.duplicated)
    line(len(found.contradictory), f"{unit} contradict another (labels reversed)", found.contradictory)
    line(found.cut_prompts, "prompts would be cut")
    if found.cut_turns or found.cut_contents:
        line(found.cut_turns, "messages of dialogues would be left out whole, the oldest first")
        line(found.cut_contents, "dialogues would lose the start of the first message that is left")
    line(found.cut_responses, f"responses of {found.responses:,} would be cut")
    line(found.one_bos, "prompts start with their one BOS")
    line(found.ends_in_eos, f"responses of {found.responses:,} end in EOS; {found.eos_inside:,} hold one before their end")
    line(found.glued, f"responses of {found.responses:,} are glued to their prompt, with no white space between")
    if len(found.lengths):
        out.append(f"{'tokens':>10} {'mean':>8} {'p50':>6} {'p95':>6} {'max':>6}")
        columns = dict(zip(("prompt", "chosen", "rejected"), found.lengths.T, strict=True))
        if found.unpaired:
            good, response = found.labels > 0.5, found.lengths[:, 1]
            columns = {"prompt": found.lengths[:, 0], "desirable": response[good], "undesired": response[~good]}
        for name, x in columns.items():
            if len(x):
                out.append(f"{name:>10} {x.mean():8.1f} {np.median(x):6.0f} {np.percentile(x, 95):6.0f} {x.max():6d}")
        if found.unpaired:
            share = wilson(float(good.sum()), len(good))
            out.append(f"labels: {share.value:.1%} [{share.low:.1%}, {share.high:.1%}] desirable; KTO's authors keep the weighted "
                       "numbers of both sides within 1:1 and 4:3 (loss.desirable_weight, loss.undesirable_weight)")  # fmt: skip
            return out
        out.append(_bias(found.whole_lengths, "before truncation"))
        out.append(_bias(found.lengths, "after truncation"))
    elif found.groups:
        out.append(f"{found.groups:,} rows hold responses and no preference: they can serve as sft.data")
    return out


def show_group(group: TokenGroup, tokenizer: Any, *, color: bool) -> str:
    """A group token by token: the prompt (no loss), then each response (every token carries loss)."""
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} if tokenizer else set()
    first = group.pairs[0] if group.pairs else None

    def paint(kind, ids):
        pieces = [(tokenizer.piece(i) if tokenizer else str(i)).replace("\n", "\\n") for i in ids.tolist()]
        if not color:
            return f"{kind}: " + " ".join(f"[{p}]" if i in special else p for p, i in zip(pieces, ids.tolist(), strict=True))
        parts = []
        for p, i in zip(pieces, ids.tolist(), strict=True):
            parts.append((COLOR["special"] + p + COLOR["off"] + COLOR[kind]) if i in special else p)
        return COLOR[kind] + " ".join(parts) + COLOR["off"]

    chosen = 0 if first is None else first.chosen
    shown = [paint("prompt", group.prompt)]
    good = {p.chosen for p in group.pairs if p.soft_label > 0.5} if first and first.chosen == first.rejected else {chosen}
    shown += [paint("chosen" if k in good else "rejected", r) for k, r in enumerate(group.responses)]
    return "\n".join(shown)


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = Parser(prog="python -m dpojax.audit", description="Reports what is wrong with a preference dataset.")
    parser.add_argument("--data", required=True, help="file of preferences, or hf:NAME[:SPLIT]")
    parser.add_argument("--model", default="", help="a model or workdir whose tokenizer is used; --tokenizer takes one as well")
    parser.add_argument("--unpaired", action="store_true", help="pairs too are read as labelled responses, as KTO takes them")
    add_text_arguments(parser)
    parser.add_argument("--show", type=int, default=2, help="pairs printed token by token")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    return run_tool(_audit, parser, argv)


DEFAULTS = Writing(max_prompt_tokens=512, max_response_tokens=128)  # of a tokenizer that no run of dpojax wrote


def _are_labelled(records: Records) -> bool:
    """Whether the first rows that can be read are responses with labels, as KTO takes them."""
    for row in range(min(records.size, 20)):
        try:
            values = {key for key, value in records.get(row).items() if value is not None}
        except DataError:
            continue
        return bool(values & {"label", "labels"}) and not values & {"chosen", "chosen_ids", "scores", "ranks"}
    return False


def _audit(args: argparse.Namespace) -> None:
    """Reads, counts and prints. Raises: DataError after the report if no row is usable."""
    records = open_sources(args.data, "--data")
    kind = "unpaired" if args.unpaired or _are_labelled(records) else "pairs"
    text = open_text(args.model, args, DEFAULTS, needed=bool(args.model or args.tokenizer))
    tokenizer, data = text.tokenizer, text.dataset(records, kind)
    progress = Progress("reading", data.records.size, "rows", enabled=True)
    found = audit(data, show=args.show, progress=progress)
    progress.close(data.records.name)
    print("\n".join(lines(found)))
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    if found.examples:
        legend = (
            "grey prompt (no loss), green chosen, red rejected, special tokens inverse"
            if color
            else "special tokens in [brackets]"
        )
        print(f"\nFirst pairs, token by token; loss falls on every token of both responses: {legend}")
    for group in found.examples:
        print(show_group(group, tokenizer, color=color) + "\n")
    if not found.groups:
        first = f"; {found.bad[0]}" if found.bad else ""
        raise DataError(f"{records.name}: none of its {found.rows:,} rows is usable{first}")


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
