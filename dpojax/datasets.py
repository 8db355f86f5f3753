"""config.data -> the datasets of a run, indexed: from files, or from the embedded world."""

import hashlib
import pathlib
import re
from typing import NamedTuple

import numpy as np

from dpojax.data import world
from dpojax.data.index import Dataset, Index, load_or_build_index
from dpojax.data.records import Records, open_records
from dpojax.data.tokens import TOKENIZER_NAMES, Limits, Tokenizer, chat_template, load_tokenizer, mask_ids
from dpojax.data.triples import RowReader
from dpojax.errors import ConfigError, DataError
from dpojax.job import Job, same_everywhere
from dpojax.models import peft
from dpojax.objectives import Loss


class Data(NamedTuple):
    """The datasets of a run, indexed."""

    tokenizer: Tokenizer | None
    train: Dataset
    train_index: Index
    eval: Dataset
    eval_index: Index
    sft: Dataset | None
    sft_index: Index | None


def _open_dataset(job: Job, records: Records, tokenizer, *, kind: str, flip=0.0) -> tuple[Dataset, Index]:
    config = job.config.data
    chat = None if tokenizer is None or config.prompt_template else chat_template(tokenizer, config.chat_template)
    reader = RowReader(config.prompt_template, kind, chat)
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
        write=job.main_process,
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
    cut = f"cut {counts.get('cut/prompt', 0)} prompts and {counts.get('cut/response', 0)} pairs' responses"
    progress.close(f"{len(index.rows):,} of {records.size:,} rows usable; {dropped}{cut}")
    return data, index


def open_data(job: Job) -> Data:
    """The run's datasets.

    Raises: ConfigError for missing files or processes that see different data, DataError for their contents.
    """
    config = job.config
    want_sft = config.sft.num_steps > 0
    sft_records = None
    if config.data.train:
        place = config.tokenizer or tokenizer_of(config.model.init)
        tokenizer = load_tokenizer(place) if place else None
        train, evaluation = open_records(config.data.train), open_records(config.data.eval)
        if want_sft:
            sft_records = open_records(config.sft.data) if config.sft.data else train
    else:
        made = world.make_world(config.data_seed)
        tokenizer, train, evaluation = made.tokenizer, made.train, made.eval
        sft_records = made.demonstrations if want_sft else None
        job.say(f"embedded world: {train.size:,} pairs, {evaluation.size} held out, {tokenizer.vocab_size} pieces")
    opened = [r.fingerprint for r in (train, evaluation, sft_records) if r] + [tokenizer.fingerprint if tokenizer else ""]
    same_everywhere("data or tokenizer", hashlib.sha256(repr(opened).encode()).hexdigest())
    sft = _open_dataset(job, sft_records, tokenizer, kind="sft") if sft_records else (None, None)
    loss = config.loss.make()
    kind = "unpaired" if loss.unpaired else "pairs"
    found = []
    for records, flip in ((train, config.data.flip_labels), (evaluation, 0.0)):
        data, index = _open_dataset(job, records, tokenizer, kind=kind, flip=flip)
        _check_pairs(data, index, loss)
        found += [data, index.with_mismatched(config.data_seed) if loss.needs("mismatched") else index]
    return Data._make([tokenizer, *found, *sft])


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
