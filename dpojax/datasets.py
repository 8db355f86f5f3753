"""config.data -> the datasets of a run, indexed: from files, or from the embedded world."""

import hashlib
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpojax.data import world
from dpojax.data.index import Dataset, Index, load_or_build_index
from dpojax.data.records import Records
from dpojax.data.sources import Part, open_named, open_sources
from dpojax.data.tokens import TOKENIZER_NAMES, Limits, Tokenizer, chat_template, load_tokenizer, mask_ids
from dpojax.data.triples import RowReader
from dpojax.errors import ConfigError, DataError
from dpojax.job import Job, same_everywhere
from dpojax.models import peft
from dpojax.objectives import Loss


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
    has_preferences: bool = True  # False: the SFT stage is all that the run has data for


def _open_dataset(job: Job, records: Records, tokenizer, *, kind: str, flip=0.0) -> tuple[Dataset, Index]:
    config = job.config.data
    chat = None if tokenizer is None or config.prompt_template else chat_template(tokenizer, config.chat_template)
    reader = RowReader(config.prompt_template, kind, chat, config.text_as_chat and chat is not None)
    limits = Limits(config.max_prompt_tokens, config.max_response_tokens)
    masked = frozenset() if kind == "sft" else mask_ids(config.mask_tokens, tokenizer)
    mask_template = config.mask_template and kind != "sft"
    data = Dataset(records, reader, tokenizer, limits, flip, job.config.data_seed, masked, mask_template)
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
            f"data.mask_tokens names {', '.join(repr(tokenizer.piece(i)) for i in absent)}, and no response of {records.name} holds it "
            "(text that spells a special token is read as plain text, unless a chat template wrote it); rows of ids have chosen_mask and rejected_mask"
        )
    counts, left_out = index.counts, [*index.dropped, *index.bad]
    notes = [f"{v} {k.removeprefix('dropped/')}" for k, v in counts.items() if k.startswith("dropped/") and v]
    notes += [f"{v} pairs by {k.removeprefix('dropped_pair/')}" for k, v in counts.items() if k.startswith("dropped_pair/")]
    notes += [f"{counts['bad_line']} bad lines"] if counts["bad_line"] else []
    name = f"left_out-{re.sub(r'[^A-Za-z0-9._-]', '_', records.name)}.txt"
    if left_out:
        job.write_file(name, "\n".join(left_out) + "\n")
    dropped = f"left out {', '.join(notes)}{f' (see {name})' if left_out else ''}; " if notes else ""
    turns, contents = counts.get("cut/turns", 0), counts.get("cut/content", 0)
    of_turns = f" ({turns} whole messages, {contents} by the start of a message)" if turns or contents else ""
    cut = f"cut {counts.get('cut/prompt', 0)} prompts{of_turns} and {counts.get('cut/response', 0)} pairs' responses"
    progress.close(f"{len(index.rows):,} of {records.size:,} rows usable; {dropped}{cut}")
    return data, index


class _Sources(NamedTuple):
    """What a run reads, before it is indexed."""

    tokenizer: Tokenizer | None
    train: Records
    eval: Records | None  # None: a share of `train`, or nothing
    eval_parts: tuple[Part, ...]
    sft: Records | None


def _open_sources(job: Job) -> _Sources:
    config = job.config
    want_sft = config.sft.num_steps > 0
    if config.embedded:
        made = world.make_world(config.data_seed)
        job.say(f"embedded world: {made.train.size:,} pairs, {made.eval.size} held out, {made.tokenizer.vocab_size} pieces")
        return _Sources(made.tokenizer, made.train, made.eval, (), made.demonstrations if want_sft else None)
    place = config.tokenizer or tokenizer_of(config.model.init)
    tokenizer = load_tokenizer(place) if place else None
    for note in tokenizer.notes if tokenizer else ():
        job.say(note)
    held_out, parts = open_named(config.data.eval, "data.eval") if config.data.eval else (None, ())
    train = open_sources(config.data.train, "data.train") if config.data.train else None
    sft = None
    if want_sft:
        sft = open_sources(config.sft.data, "sft.data") if config.sft.data else train
    if train is None:
        assert held_out is not None  # the config is refused otherwise
        train = held_out
    return _Sources(tokenizer, train, held_out, parts, sft)


def open_data(job: Job) -> Data:
    """The run's datasets.

    Raises: ConfigError for missing files or processes that see different data, DataError for their contents.
    """
    config = job.config
    tokenizer, train_records, eval_records, parts, sft_records = sources = _open_sources(job)
    opened = [r.fingerprint for r in sources[1:] if isinstance(r, Records)] + [tokenizer.fingerprint if tokenizer else ""]
    same_everywhere("data or tokenizer", hashlib.sha256(repr(opened).encode()).hexdigest())
    sft, sft_index = _open_dataset(job, sft_records, tokenizer, kind="sft") if sft_records else (None, None)
    loss = config.loss.make()
    kind = "unpaired" if loss.unpaired else "pairs"

    def open_preferences(records: Records, flip: float = 0.0) -> tuple[Dataset, Index]:
        data, index = _open_dataset(job, records, tokenizer, kind=kind, flip=flip)
        _check_pairs(data, index, loss)
        if loss.unpaired and len(set((index.soft_labels > 0.5).tolist())) == 1:
            label = "desirable" if index.soft_labels[0] > 0.5 else "undesirable"
            job.say(
                f"warning: all responses of {records.name} are {label}: {loss.name} compares both kinds; what is logged of the other "
                "kind is null"
            )
        return data, index

    # Where nothing is trained on preferences, those that are evaluated stand for the training data.
    train, train_index = (None, None)
    if config.num_steps:
        train, train_index = open_preferences(train_records, config.data.flip_labels)
    elif eval_records is None and sft is None:
        eval_records = train_records
    evaluation, eval_index = (None, None)
    if eval_records is not None:
        evaluation, eval_index = open_preferences(eval_records)
        eval_index = _first_of_each(eval_index, parts, config.data.eval_max_pairs)
    if train is None or train_index is None:
        train, train_index = evaluation, eval_index
    elif config.data.eval_share:
        held_out = train_index.drawn_prompts(config.data.eval_share, config.data_seed)
        evaluation, eval_index = train, train_index
        if config.data.flip_labels:
            evaluation, eval_index = open_preferences(train_records)
        eval_index = _only(eval_index, held_out, True)
        train_index = _only(train_index, held_out, False)
        if sft_index is not None and sft_records is train_records:
            sft_index = _only(sft_index, held_out, False)
        job.say(
            f"held out: {len(held_out):,} prompts of {train_records.name} with {len(eval_index.rows):,} rows "
            f"(data.eval_share={config.data.eval_share:g})"
        )
    if train is None or train_index is None:
        assert sft is not None and sft_index is not None
        return Data(tokenizer, sft, sft_index, None, None, (), sft, sft_index, has_preferences=False)
    if loss.needs("mismatched"):
        train_index = train_index.with_mismatched(config.data_seed)
        eval_index = None if eval_index is None else eval_index.with_mismatched(config.data_seed)
    return Data(tokenizer, train, train_index, evaluation, eval_index, parts, sft, sft_index)


def _only(index: Index, prompts: np.ndarray, inside: bool) -> Index:
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


def _check_pairs(data: Dataset, index: Index, loss: Loss) -> None:
    """Raises ConfigError where the rows hold no preferences, DataError where they lack what the objective takes."""
    if not len(index.chosen):
        raise ConfigError(
            f"{data.records.name}: its rows hold responses but no preferences; it can serve as sft.data, and with a column "
            "'label' for an unpaired objective (loss.name=kto)"
        )
    if loss.needs("scores") and (index.margins <= 0).any():
        pair = int(np.argmax(index.margins <= 0))
        group = int(np.searchsorted(index.pair_offsets, pair, side="right")) - 1
        raise DataError(
            f"{data.records.where(int(index.rows[group]))}: score_chosen - score_rejected is {index.margins[pair]:g}; "
            f"{loss.name} takes its logarithm, so that it must be > 0 (columns score_chosen and score_rejected, or margin)"
        )
    if loss.coupled and not loss.unpaired and (index.soft_labels != 1).any():
        raise DataError(
            f"{data.records.name}: column 'soft_label' is not 1 everywhere; {loss.name} compares whole batches and has no soft labels"
        )


def _pieces(tokenizer: Tokenizer, count: int) -> list[str | None]:
    """The text of the ids up to `count`; None where the tokenizer has no such piece."""
    known = min(count, tokenizer.vocab_size)
    return [tokenizer.piece(i) for i in range(known)] + [None] * (count - known)


def check_shared_tokenizer(
    tokenizer: Tokenizer | None, path: str, sets: Sequence[tuple[Dataset, Index]], *, setting: str
) -> None:
    """Two models can be compared on the same ids where these mean the same text to both.

    Only ids that occur in the rows count: files of one tokenizer differ in their names, formats and unused pieces.

    Args:
      tokenizer: which the rows are read with; None: they are token ids.
      path: of the other model. One without a tokenizer beside it is taken at its word.
      sets: the rows on which they are compared.
      setting: that names `path`.
    Raises: ConfigError naming the first row with an id that means something else to the other model.
    """
    place = tokenizer_of(path)
    if tokenizer is None or not place:
        return
    other = load_tokenizer(place)
    count = 1 + max(int(index.largest_id) for _, index in sets)
    both = zip(_pieces(tokenizer, count), _pieces(other, count), strict=True)
    differ = np.asarray([i for i, (ours, theirs) in enumerate(both) if ours != theirs], np.int32)
    if not len(differ):
        return
    for data, index in sets:
        for row in map(int, index.rows):
            group, _ = data.token_group(row)
            ids = np.concatenate([group.prompt, *group.responses])
            foreign = ids[np.isin(ids, differ)]
            if len(foreign):
                token = int(foreign[0])
                theirs = _pieces(other, token + 1)[token]
                raise ConfigError(
                    f"{setting}={path!r}: the two models do not share a tokenizer: the id {token} is {tokenizer.piece(token)!r} "
                    f"here and {theirs!r} in {place}, and {data.records.where(row)} holds it; their log-probs of the same ids are "
                    "of different texts"
                )


def tokenizer_of(init: str) -> str:
    """The tokenizer beside model.init's weights, or "" if there is none."""
    if not init or "\0" in init:
        return ""
    folder = pathlib.Path(init)
    if (folder / peft.CONFIG).is_file() and not any((folder / name).is_file() for name in TOKENIZER_NAMES):
        return tokenizer_of(str(peft.base_folder(folder, peft.read_settings(folder))))
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer", folder.parent.parent / "tokenizer"):
        if any((place / name).is_file() for name in TOKENIZER_NAMES):
            return str(place)
    return ""
