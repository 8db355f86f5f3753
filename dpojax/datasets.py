"""config.data -> the datasets of a run, indexed: from files, or from the embedded world."""

import hashlib
import pathlib
import re
from typing import NamedTuple

from dpojax.data import world
from dpojax.data.index import Dataset, Index, load_or_build_index
from dpojax.data.records import Records, open_records
from dpojax.data.tokens import TOKENIZER_NAMES, Limits, Tokenizer, load_tokenizer
from dpojax.data.triples import RowReader
from dpojax.errors import ConfigError
from dpojax.job import Job, same_everywhere


class Data(NamedTuple):
    """The datasets of a run, indexed."""

    tokenizer: Tokenizer | None
    train: Dataset
    train_index: Index
    eval: Dataset
    eval_index: Index
    sft: Dataset | None
    sft_index: Index | None


def _open_dataset(job: Job, records: Records, tokenizer, *, responses_only=False, flip=0.0) -> tuple[Dataset, Index]:
    config = job.config.data
    reader = RowReader(config.prompt_template, responses_only)
    limits = Limits(config.max_prompt_tokens, config.max_response_tokens)
    data = Dataset(records, reader, tokenizer, limits, flip, job.config.seed)
    progress = job.progress(f"reading {records.name}", records.size, "rows")
    index = load_or_build_index(
        data,
        job.workdir / "cache",
        on_bad_line=config.on_bad_line,
        max_bad_share=config.max_bad_share,
        write=job.main_process,
        progress=progress,
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
    sft_records, only = None, False
    if config.data.train:
        place = config.tokenizer or _tokenizer_of(config.model.init)
        tokenizer = load_tokenizer(place) if place else None
        train, evaluation = open_records(config.data.train), open_records(config.data.eval)
        if want_sft:
            sft_records, only = (open_records(config.sft.data), True) if config.sft.data else (train, True)
    else:
        made = world.make_world(config.seed)
        tokenizer, train, evaluation = made.tokenizer, made.train, made.eval
        sft_records = made.demonstrations if want_sft else None
        job.say(f"embedded world: {train.size:,} pairs, {evaluation.size} held out, {tokenizer.vocab_size} pieces")
    opened = [r.fingerprint for r in (train, evaluation, sft_records) if r] + [tokenizer.fingerprint if tokenizer else ""]
    same_everywhere("data or tokenizer", hashlib.sha256(repr(opened).encode()).hexdigest())
    sft = _open_dataset(job, sft_records, tokenizer, responses_only=only) if sft_records else (None, None)
    train_data, train_index = _open_dataset(job, train, tokenizer, flip=config.data.flip_labels)
    eval_data, eval_index = _open_dataset(job, evaluation, tokenizer)
    for data, index in ((train_data, train_index), (eval_data, eval_index)):
        if not len(index.chosen):
            raise ConfigError(f"{data.records.name}: its rows hold responses but no preferences; it can serve as sft.data")
    return Data(tokenizer, train_data, train_index, eval_data, eval_index, *sft)


def _tokenizer_of(init: str) -> str:
    """The tokenizer beside model.init's weights, or "" if there is none."""
    if not init or "\0" in init:
        return ""
    folder = pathlib.Path(init)
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer", folder.parent.parent / "tokenizer"):
        if any((place / name).is_file() for name in TOKENIZER_NAMES):
            return str(place)
    return ""
