"""config.data -> the datasets of a run, indexed: from files, or from the embedded world."""

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.data import world
from dpojax.data.dataset import Dataset
from dpojax.data.index import Index
from dpojax.data.index_cache import load_or_build_index
from dpojax.data.open_tokenizer import chat_template, load_tokenizer
from dpojax.data.records import Records, Row
from dpojax.data.rows import RowReader, holds_preferences
from dpojax.data.sorting import make_sorting
from dpojax.data.sources import Part, open_named, open_sources
from dpojax.data.tokenizers import Tokenizer
from dpojax.data.tokens import Limits, mask_ids
from dpojax.errors import ConfigError, DataError
from dpojax.objectives.loss import Loss
from dpojax.runtime.context import Job, same_everywhere

LOOKED_AT = 100  # rows, for one that can be read


class Data(NamedTuple):
    """The datasets of a run, indexed."""

    tokenizer: Tokenizer | None
    train: Dataset  # of the preference stage; where there is none, the rows of the SFT stage
    train_index: Index
    eval: Dataset | None  # held-out preferences; None: there are none
    eval_index: Index | None
    eval_parts: tuple[Part, ...]  # their names, where data.eval gives some
    sft: Dataset | None
    sft_index: Index | None
    has_preferences: bool = True  # whether `train` holds preferences
    # whether `train` holds prompts for a stage that samples: preferences have some too
    has_prompts: bool = True


class Indexed(NamedTuple):
    """A dataset with its index."""

    data: Dataset
    index: Index


def _open_dataset(
    job: Job, records: Records, tokenizer: Tokenizer | None, *, kind: str, flip: float = 0.0
) -> Indexed:
    config = job.config.data
    chat = None
    if tokenizer is not None and not config.prompt_template:
        chat = chat_template(tokenizer, config.chat_template)
    masked: frozenset[int] = frozenset()
    if kind != "sft":
        masked = mask_ids(config.mask_tokens, tokenizer)
    data = Dataset(
        records,
        RowReader(config.prompt_template, kind, chat, config.text_as_chat and chat is not None),
        tokenizer,
        Limits(config.max_prompt_tokens, config.max_response_tokens),
        flip,
        job.config.data_seed,
        masked,
        config.mask_template and kind != "sft",
    )
    progress = job.progress(f"reading {records.name}", records.size, "rows")
    index = load_or_build_index(
        data,
        job.workdir / "cache",
        on_bad_line=config.on_bad_line,
        max_bad_share=config.max_bad_share,
        write=job.write,
        progress=progress,
    )
    absent = [i for i in sorted(masked) if f"masked/{i}" not in index.counts]
    if absent and tokenizer is not None:
        raise ConfigError(
            f"data.mask_tokens names {', '.join(repr(tokenizer.piece(i)) for i in absent)}, and no"
            f" response of {records.name} holds it (text that spells a special token is read as"
            " plain text, unless a chat template wrote it); rows of ids have chosen_mask and"
            " rejected_mask"
        )
    left_out = [*index.dropped, *index.bad]
    file_name = ""
    if left_out:
        file_name = f"left_out-{re.sub(r'[^A-Za-z0-9._-]', '_', records.name)}.txt"
        job.write_file(file_name, "\n".join(left_out) + "\n")
    progress.close(
        f"{len(index.rows):,} of {records.size:,} rows usable;"
        f" {_left_out_text(index.counts, file_name)}{_cut_text(index.counts)}"
    )
    return Indexed(data, index)


def _left_out_text(counts: Mapping[str, int], file_name: str) -> str:
    """What was left out and why, as the start of a sentence; "": nothing was.

    Args:
      file_name: of the file that lists it; "": there is none.
    """
    notes = []
    for key, count in counts.items():
        if key.startswith("dropped/") and count:
            notes.append(f"{count} {key.removeprefix('dropped/')}")
    for key, count in counts.items():
        if key.startswith("dropped_pair/"):
            notes.append(f"{count} pairs by {key.removeprefix('dropped_pair/')}")
    if counts["bad_line"]:
        notes.append(f"{counts['bad_line']} bad lines")
    if not notes:
        return ""
    text = f"left out {', '.join(notes)}"
    if file_name:
        text += f" (see {file_name})"
    return f"{text}; "


def _cut_text(counts: Mapping[str, int]) -> str:
    """How much was cut to the limits, as the end of a sentence."""
    turns = counts.get("cut/turns", 0)
    contents = counts.get("cut/content", 0)
    text = f"cut {counts.get('cut/prompt', 0)} prompts"
    if turns or contents:
        text += f" ({turns} whole messages, {contents} by the start of a message)"
    return f"{text} and {counts.get('cut/response', 0)} pairs' responses"


# By the world's name: (seed) -> the world, and what its rows are.
WORLD_MAKERS = {"summaries": (world.make_world, "pairs"), "sorting": (make_sorting, "prompts")}


class _Sources(NamedTuple):
    """What a run reads, before it is indexed."""

    tokenizer: Tokenizer | None
    train: Records
    eval: Records | None  # None: a share of `train`, or nothing
    eval_parts: tuple[Part, ...]
    sft: Records | None


def _open_sources(job: Job, beside: str) -> _Sources:
    config = job.config
    want_sft = config.sft.num_steps > 0
    if config.embedded:
        make, unit = WORLD_MAKERS[config.world]
        embedded = make(config.data_seed)
        job.say(
            f"embedded world: {embedded.train.size:,} {unit}, {embedded.eval.size} held out,"
            f" {embedded.tokenizer.vocab_size} pieces"
        )
        return _Sources(
            tokenizer=embedded.tokenizer,
            train=embedded.train,
            eval=embedded.eval,
            eval_parts=(),
            sft=embedded.demonstrations if want_sft else None,
        )
    tokenizer = None
    place = config.tokenizer or beside
    if place:
        tokenizer = load_tokenizer(place)
        for note in tokenizer.notes:
            job.say(note)
    held_out = None
    parts = ()
    if config.data.eval:
        held_out, parts = open_named(config.data.eval, "data.eval")
    train = held_out
    if config.data.train:
        train = open_sources(config.data.train, "data.train")
    sft = None
    if want_sft:
        sft = train if config.data.train else None
        if config.sft.data:
            sft = open_sources(config.sft.data, "sft.data")
    assert train is not None  # the config is refused where both are unset
    return _Sources(tokenizer=tokenizer, train=train, eval=held_out, eval_parts=parts, sft=sft)


def _check_same_data(sources: _Sources) -> None:
    """Raises ConfigError where processes see different data."""
    opened = [
        records.fingerprint
        for records in (sources.train, sources.eval, sources.sft)
        if records is not None
    ]
    opened.append(sources.tokenizer.fingerprint if sources.tokenizer else "")
    same_everywhere("data or tokenizer", hashlib.sha256(repr(opened).encode()).hexdigest())


class _Rows:
    """Opens the rows of the last stages: preferences as the objective takes them, or prompts."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None):
        self.job = job
        self.tokenizer = tokenizer
        self.loss = job.config.loss.objective

    def open(self, records: Records, flip: float = 0.0) -> Indexed:
        """The dataset of these records.

        Where no stage of dpojax's own asks for preferences, the first row says what they are.

        Args:
          flip: share of the labels that are turned round.
        """
        loss = self.loss
        if not self.job.config.wants_preferences and not holds_preferences(_first_row(records)):
            return _open_dataset(self.job, records, self.tokenizer, kind="prompts")
        kind = "unpaired" if loss.unpaired else "pairs"
        opened = _open_dataset(self.job, records, self.tokenizer, kind=kind, flip=flip)
        check_pairs(opened.data, opened.index, loss)
        labels = opened.index.soft_labels
        if loss.unpaired and len(set((labels > 0.5).tolist())) == 1:
            label = "desirable" if labels[0] > 0.5 else "undesirable"
            self.job.say(
                f"warning: all responses of {records.name} are {label}: {loss.name} compares both"
                " kinds; what is logged of the other kind is null"
            )
        return opened

    def with_mismatched(self, indexed: Indexed) -> Indexed:
        """With answers to other prompts, where the objective compares with them."""
        if not self.loss.needs("mismatched") or not len(indexed.index.chosen):
            return indexed
        return indexed._replace(index=indexed.index.with_mismatched(self.job.config.data_seed))


def open_data(job: Job, beside: str) -> Data:
    """The run's datasets.

    Args:
      beside: the tokenizer beside the weights, for where config.tokenizer names none; "": there is
        none.

    Raises: ConfigError for missing files or processes that see different data, DataError for their
      contents.
    """
    config = job.config
    sources = _open_sources(job, beside)
    _check_same_data(sources)
    sft = None
    if sources.sft is not None:
        sft = _open_dataset(job, sources.sft, sources.tokenizer, kind="sft")
    rows = _Rows(job, sources.tokenizer)
    train = None
    evaluation = None
    if config.num_steps:
        train = rows.open(sources.train, config.data.flip_labels)
    eval_records = sources.eval
    if train is None and eval_records is None and sft is None:
        eval_records = sources.train
    if eval_records is not None:
        evaluation = rows.open(eval_records)
        index = _first_of_each(evaluation.index, sources.eval_parts, config.data.eval_max_pairs)
        evaluation = evaluation._replace(index=index)
    if train is None:
        # Where nothing is trained on preferences, those that are evaluated stand for the training
        # data.
        train = evaluation
    elif config.data.eval_share:
        train, evaluation, sft = _held_out(job, rows, sources, train, sft)
    if train is None:
        assert sft is not None  # something is trained or evaluated
        return Data(
            tokenizer=sources.tokenizer,
            train=sft.data,
            train_index=sft.index,
            eval=None,
            eval_index=None,
            eval_parts=(),
            sft=sft.data,
            sft_index=sft.index,
            has_preferences=False,
            has_prompts=False,
        )
    train = rows.with_mismatched(train)
    if evaluation is not None:
        evaluation = rows.with_mismatched(evaluation)
    return Data(
        tokenizer=sources.tokenizer,
        train=train.data,
        train_index=train.index,
        eval=evaluation and evaluation.data,
        eval_index=evaluation and evaluation.index,
        eval_parts=sources.eval_parts,
        sft=sft and sft.data,
        sft_index=sft and sft.index,
        has_preferences=len(train.index.chosen) > 0,
    )


def _first_row(records: Records) -> Row:
    """The first row that can be read; {} where the first ones cannot: indexing says why."""
    for row in range(min(records.size, LOOKED_AT)):
        with contextlib.suppress(DataError):
            return records.get(row)
    return {}


def _held_out(
    job: Job, rows: _Rows, sources: _Sources, train: Indexed, sft: Indexed | None
) -> tuple[Indexed, Indexed, Indexed | None]:
    """(train, evaluation, sft), with a share of the prompts held out.

    It is evaluated and not trained.
    """
    config = job.config
    prompts = train.index.drawn_prompts(config.data.eval_share, config.data_seed)
    evaluation = train
    if config.data.flip_labels:
        evaluation = rows.open(sources.train)
    evaluation = evaluation._replace(index=_only(evaluation.index, prompts, inside=True))
    train = train._replace(index=_only(train.index, prompts, inside=False))
    if sft is not None and sources.sft is sources.train:
        sft = sft._replace(index=_only(sft.index, prompts, inside=False))
    job.say(
        f"held out: {len(prompts):,} prompts of {sources.train.name} with"
        f" {len(evaluation.index.rows):,} rows (data.eval_share={config.data.eval_share:g})"
    )
    return train, evaluation, sft


def _only(index: Index, prompts: np.ndarray, *, inside: bool) -> Index:
    """The groups whose prompts are, or are not, among these hashes; with the counts of what stays.

    Raises: ConfigError if nothing stays.
    """
    kept = np.flatnonzero(np.isin(index.prompt_hashes, prompts) == inside)
    if not len(kept):
        raise ConfigError("data.eval_share: it leaves no row to train on; name a file in data.eval")
    return index.select(kept)._replace(counts={**index.counts, "used": len(kept)})


def _first_of_each(index: Index, parts: Sequence[Part], max_pairs: int) -> Index:
    """The first `max_pairs` pairs of every named part (0: all of them); without names, everything.

    Raises: ConfigError if a part holds no usable row.
    """
    if not parts:
        return index
    kept = []
    for part in parts:
        groups = np.flatnonzero((index.rows >= part.start) & (index.rows < part.stop))
        if not len(groups):
            raise ConfigError(f"data.eval: none of the rows of {part.name!r} is usable")
        kept.append(groups[: index.select(groups).groups_within(max_pairs)])
    return index.select(np.concatenate(kept))


def check_pairs(data: Dataset, index: Index, loss: Loss) -> None:
    """Raises ConfigError where the rows hold no preferences.

    Raises DataError where they lack what the objective takes.
    """
    if not len(index.chosen):
        raise ConfigError(
            f"{data.records.name}: its rows hold responses but no preferences; it can serve as"
            " sft.data, and with a column 'label' for an unpaired objective (loss.name=kto)"
        )
    if loss.needs("scores") and (index.margins <= 0).any():
        pair = int(np.argmax(index.margins <= 0))
        group = int(np.searchsorted(index.pair_offsets, pair, side="right")) - 1
        raise DataError(
            f"{data.records.where(int(index.rows[group]))}: score_chosen - score_rejected is"
            f" {index.margins[pair]:g}; {loss.name} takes its logarithm, so that it must be > 0"
            " (columns score_chosen and score_rejected, or margin)"
        )
    if loss.coupled and not loss.unpaired and (index.soft_labels != 1).any():
        raise DataError(
            f"{data.records.name}: column 'soft_label' is not 1 everywhere; {loss.name} compares"
            " whole batches and has no soft labels"
        )
