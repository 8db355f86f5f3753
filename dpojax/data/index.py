"""Every row's verdict and token lengths, computed once: what packing is planned from.

Stored under a key made from the data's content, the tokenizer, the limits and the template, so that
every process plans the same steps and tokenises only its own rows.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpojax.data.groups import TokenGroup, TokenPair
from dpojax.data.records import Records, Row
from dpojax.data.tokens import Cut, Limits, Tokenizer, tokenize
from dpojax.data.triples import DROPPED, Dropped, Group, RowReader
from dpojax.errors import ConfigError, DataError
from dpojax.plain_data import check_output, parse_json
from dpojax.sandbox import SandboxError, spread

MANY_ROWS = 4000  # of these on, several processes read: each takes a second to start
# What numpy and zipfile raise for a stored index that is damaged.
DAMAGED = (
    *(OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, MemoryError),  # NotImplementedError too
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
VERSION = 7  # raise it when a change of this package changes lengths or verdicts


class Index(NamedTuple):
    """The usable groups of a dataset, in file order; ragged fields are flat with offsets. n groups."""

    rows: np.ndarray  # [n] source row
    prompt_lengths: np.ndarray  # [n]
    response_offsets: np.ndarray  # [n + 1] into response_lengths
    response_lengths: np.ndarray
    counted_lengths: np.ndarray  # without formatting tokens
    pair_offsets: np.ndarray  # [n + 1] into chosen, rejected, weights, soft_labels and margins
    chosen: np.ndarray  # response number within its group
    rejected: np.ndarray
    weights: np.ndarray
    soft_labels: np.ndarray
    margins: np.ndarray
    prompt_hashes: np.ndarray  # [n] equal for equal prompts
    largest_id: np.ndarray  # [] the largest token id
    counts: dict[
        str, int
    ]  # rows, dropped/<reason>, dropped_pair/<reason>, cut/prompt, cut/turns, cut/content, cut/response, bad_line
    bad: tuple[str, ...]  # the message of each line that could not be read
    dropped: tuple[str, ...]  # "file:line: reason" of each row without a usable pair, and of each pair left out of a group
    # [n, 2] source row and response number of what stands as the last response of the group: an answer to another prompt
    mismatched: np.ndarray | None = None

    def responses(self, i: int) -> list[int]:
        """|y_k| of group i."""
        return self.response_lengths[self.response_offsets[i] : self.response_offsets[i + 1]].tolist()

    def counted(self, i: int) -> list[int]:
        """|y_k| of group i without formatting tokens."""
        return self.counted_lengths[self.response_offsets[i] : self.response_offsets[i + 1]].tolist()

    def pairs(self, i: int) -> list[TokenPair]:
        """The pairs of group i."""
        own = slice(self.pair_offsets[i], self.pair_offsets[i + 1])
        fields = (self.chosen, self.rejected, self.weights, self.soft_labels, self.margins)
        return [TokenPair(*values) for values in zip(*(f[own].tolist() for f in fields), strict=True)]

    def totals(self) -> np.ndarray:
        """[n] tokens of each group: |x| + |y_1| + ..."""
        return self.prompt_lengths + np.add.reduceat(self.response_lengths, self.response_offsets[:-1])

    def sequence_lengths(self) -> np.ndarray:
        """[n] positions of each group: |x| + max |y_k|."""
        return self.prompt_lengths + np.maximum.reduceat(self.response_lengths, self.response_offsets[:-1])

    def groups_within(self, max_pairs: int) -> int:
        """How many of the first groups hold at most `max_pairs` (0 = any number of) pairs; at least one."""
        return int(np.sum(self.pair_offsets[1:] <= max_pairs)) or 1 if max_pairs else len(self.rows)

    def first(self, count: int) -> "Index":
        """The first `count` groups alone."""
        return self.select(np.arange(count))

    def select(self, groups: np.ndarray) -> "Index":
        """These groups alone, in this order, by their numbers [m]."""
        responses, response_offsets = _ragged(self.response_offsets, groups)
        pairs, pair_offsets = _ragged(self.pair_offsets, groups)
        return self._replace(
            rows=self.rows[groups],
            prompt_lengths=self.prompt_lengths[groups],
            response_offsets=response_offsets,
            response_lengths=self.response_lengths[responses],
            counted_lengths=self.counted_lengths[responses],
            pair_offsets=pair_offsets,
            prompt_hashes=self.prompt_hashes[groups],
            mismatched=None if self.mismatched is None else self.mismatched[groups],
            **{k: getattr(self, k)[pairs] for k in ("chosen", "rejected", "weights", "soft_labels", "margins")},
        )

    def drawn_prompts(self, share: float, seed: int) -> np.ndarray:
        """The hashes [m] of a share of the prompts, one at least, drawn by `seed` alone: not by the order of the rows.

        Raises: ConfigError if there is but one prompt.
        """
        prompts = np.unique(self.prompt_hashes)
        if len(prompts) < 2:
            raise ConfigError(f"data.eval_share={share:g}: all rows have the same prompt; name a file in data.eval")
        count = min(len(prompts) - 1, max(1, round(share * len(prompts))))
        order = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(len(prompts))
        return prompts[order[:count]]

    def with_mismatched(self, seed: int) -> "Index":
        """Every group gets one more response, an answer to another prompt, and its pairs point to it as `rejected`.

        The answers are dealt out by a shuffle of the groups that depends on `seed` alone, so that they are fixed before
        training; of a group with several responses any may be the one, good or bad.
        Raises: ConfigError if all prompts are the same.
        """
        count = len(self.rows)
        rng = np.random.Generator(np.random.Philox(key=[seed, count]))
        # Groups of one prompt lie together, in random order; those of a prompt take from what follows them.
        kinds, inverse = np.unique(self.prompt_hashes, return_inverse=True)
        if len(kinds) == 1:
            raise ConfigError("the objective compares with answers to other prompts, and all prompts of the data are the same")
        order = np.lexsort((rng.permutation(count), rng.permutation(len(kinds))[inverse]))
        sizes = np.bincount(inverse)[inverse[order]]
        starts = np.r_[True, np.diff(inverse[order]) != 0]
        first = np.flatnonzero(starts)[np.cumsum(starts) - 1]
        place = np.arange(count) - first
        other = np.empty(count, np.int64)
        other[order] = order[(first + sizes + place % (count - sizes)) % count]
        own = np.diff(self.response_offsets)
        answer = (rng.random(count) * own[other]).astype(np.int64)
        first, ends = self.response_offsets[other] + answer, self.response_offsets[1:]
        return self._replace(
            response_offsets=self.response_offsets + np.arange(count + 1),
            response_lengths=np.insert(self.response_lengths, ends, self.response_lengths[first]),
            counted_lengths=np.insert(self.counted_lengths, ends, self.counted_lengths[first]),
            rejected=np.repeat(own, np.diff(self.pair_offsets)),
            mismatched=np.stack([self.rows[other], answer], axis=1),
        )


class Read(NamedTuple):
    """A row as it was read."""

    text: Group
    tokens: TokenGroup
    cut: Cut


def _read_item(data: "Dataset", item: tuple[Row, int, str]) -> Read | Exception:
    """A row of `Dataset.read_groups`; an exception is a verdict."""
    try:
        text, tokens, cut = data.read_row(*item)
        # What is written of messages stays; the messages themselves need not be sent on.
        return Read(text._replace(answers=None, dialogue=None), tokens, cut)
    except (Dropped, DataError, ConfigError) as verdict:
        return verdict


def _verdict(result: Any, where: str) -> Read | Dropped | DataError:
    """A result of the sandbox, or the verdict in its place. Raises what is none."""
    if isinstance(result, SandboxError):
        return DataError(f"{where}: the chat template or tokenizer {result} on this row")
    if isinstance(result, Exception) and not isinstance(result, Dropped | DataError):
        raise result
    return result


def _nowhere(row: int) -> Any:
    raise AssertionError(f"row {row}: the records are elsewhere")


STORED_ARRAYS = Index._fields[:-4]  # without counts, bad, dropped and mismatched


def _ragged(offsets: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the elements of some groups in a flat field, and the offsets of these groups after they are taken."""
    sizes = np.diff(offsets)[groups]
    new_offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(offsets.dtype)
    places = np.arange(new_offsets[-1]) + np.repeat(offsets[:-1][groups] - new_offsets[:-1], sizes)
    return places, new_offsets


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Records with the way to token groups; picklable, so that worker processes can hold it."""

    records: Records
    reader: RowReader
    tokenizer: Tokenizer | None
    limits: Limits
    flip_labels: float = 0.0
    seed: int = 0
    mask_ids: frozenset[int] = frozenset()  # formatting tokens, which count in no log-prob
    mask_template: bool = False  # and all that a chat template puts around an answer

    def text_group(self, row: int) -> Group:
        """The group of a source row, labels flipped where `flip_labels` says so."""
        return self._text_group(self.records.get(row), row, self.records.where(row))

    def _text_group(self, values: Row, row: int, where: str) -> Group:
        group = self.reader.read(values, where)
        if self.flip_labels and np.random.Generator(np.random.Philox(key=[self.seed, row])).random() < self.flip_labels:
            if self.reader.kind == "unpaired":
                pairs = tuple(p._replace(soft_label=1 - p.soft_label) for p in group.pairs)
            else:
                pairs = tuple(p._replace(chosen=p.rejected, rejected=p.chosen, margin=-p.margin) for p in group.pairs)
            group = group._replace(pairs=pairs)
        return group

    def token_group(self, row: int) -> tuple[TokenGroup, Cut]:
        """The token ids of a source row, in no bounded time: of one that `read_groups` got through.

        Raises: Dropped or DataError.
        """
        _, group, cut = self.read_row(self.records.get(row), row, self.records.where(row))
        return group, cut

    def read_row(self, values: Row, row: int, where: str) -> tuple[Group, TokenGroup, Cut]:
        """What the columns `values` of a row are, as text and as token ids. Raises Dropped or DataError."""
        group = self._text_group(values, row, where)
        if isinstance(group.prompt, str):
            if self.tokenizer is None:
                raise DataError(f"{where}: the rows are text; set tokenizer")
            try:
                "".join((group.prompt, *map(str, group.responses))).encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{where}: {error.object[error.start]!r} is half a character (a lone surrogate)") from error
        try:
            return group, *tokenize(group, self.tokenizer, self.limits, row, self.mask_ids, self.mask_template)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def read_groups(self, rows: Iterable[int]) -> "Iterator[tuple[int, Read | Dropped | DataError]]":
        """Every row with its groups, or the verdict in their place, in order.

        Template and tokenizer are those of strangers: they work in a child process with limits (`dpojax.sandbox`).
        """
        under_way: collections.deque[tuple[int, str, DataError | None]] = collections.deque()

        def items() -> Iterator[tuple[Row, int, str]]:
            for row in rows:
                where = self.records.where(row)
                try:
                    values = self.records.get(row)
                except DataError as error:
                    under_way.append((row, where, error))
                    continue
                under_way.append((row, where, None))
                yield values, row, where

        # The child gets the rows one by one; it has no use for the file.
        reading = dataclasses.replace(self, records=self.records._replace(get=_nowhere, where=_nowhere))
        trusted = self.reader.chat is None and (self.tokenizer is None or self.tokenizer.folder is None)
        step = functools.partial(_read_item, reading)
        children = 1 if self.records.size < MANY_ROWS else min(4, os.cpu_count() or 1)
        for result in map(step, items()) if trusted else spread(_read_item, reading, items(), children=children):
            while (damaged := under_way[0][2]) is not None:
                yield under_way.popleft()[0], damaged
            row, where, _ = under_way.popleft()
            yield row, _verdict(result, where)
        for row, _, damaged in under_way:
            assert damaged is not None
            yield row, damaged

    def fingerprint(self) -> str:
        """Changes with anything that changes a token or a label."""
        parts: list[Any] = [VERSION, self.records.fingerprint, self.tokenizer and self.tokenizer.fingerprint]
        parts += [list(self.limits), self.reader.prompt_template, self.reader.kind, sorted(self.mask_ids)]
        parts += [self.flip_labels, self.seed if self.flip_labels else 0, self.mask_template]
        parts += [self.reader.chat and [self.reader.text_as_chat, self.reader.chat.identity()]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def check_bad_lines(name: str, index_bad: Sequence[str], size: int, *, on_bad_line: str, max_bad_share: float) -> None:
    """Raises DataError if the lines that cannot be read are more than the settings tolerate."""
    if index_bad and on_bad_line == "error":
        raise DataError(index_bad[0])
    if len(index_bad) > max_bad_share * size:
        raise DataError(
            f"{index_bad[-1]} ({name} has {len(index_bad)} bad lines in {size} rows, more than data.max_bad_share={max_bad_share})"
        )


def build_index(data: Dataset, *, on_bad_line: str, max_bad_share: float, progress) -> Index:
    """Reads and tokenises every row once.

    Args:
      on_bad_line: "error" raises at the first row that cannot be read; "skip" counts up to `max_bad_share`.
      progress: called with the number of rows read so far.
    Raises: DataError as above, and if no usable row is left.
    """
    name, size = data.records.name, data.records.size
    counts: collections.Counter = collections.Counter(rows=size)
    rows, prompts, responses, counted, hashes, pairs = [], [], [], [], [], []
    response_offsets, pair_offsets, bad, dropped, largest = [0], [0], [], [], 0
    for row, found in data.read_groups(range(size)):
        progress(row)
        if isinstance(found, Dropped):
            counts[f"dropped/{found.reason}"] += 1
            dropped.append(f"{data.records.where(row)}: {DROPPED[found.reason]}")
            continue
        if isinstance(found, DataError):
            bad.append(str(found))
            check_bad_lines(name, bad, size, on_bad_line=on_bad_line, max_bad_share=max_bad_share)
            continue
        group, cut = found.tokens, found.cut
        counts["cut/prompt"] += cut.prompt > 0
        counts["cut/turns"] += cut.turns
        counts["cut/content"] += cut.content > 0
        counts["cut/response"] += any(cut.responses)
        counts.update(f"dropped_pair/{reason}" for reason in cut.dropped)
        dropped += [f"{data.records.where(row)}: a pair of the group: {DROPPED[reason]}" for reason in cut.dropped]
        rows.append(row)
        prompts.append(len(group.prompt))
        responses.extend(map(len, group.responses))
        for response in group.responses if data.mask_ids else ():
            counts.update(f"masked/{i}" for i in response.tolist() if i in data.mask_ids)
        counted.extend(map(len, group.responses) if group.counted is None else (int(c.sum()) for c in group.counted))
        hashes.append(zlib.crc32(group.prompt.tobytes()))
        response_offsets.append(len(responses))
        largest = max(largest, int(group.prompt.max()), *(int(r.max()) for r in group.responses))
        pairs.extend(group.pairs)
        pair_offsets.append(len(pairs))
    counts["bad_line"] = len(bad)
    if not rows:
        reasons = ", ".join(f"{k.removeprefix('dropped/')} {v}" for k, v in counts.items() if k.startswith("dropped/"))
        raise DataError(f"{name}: none of its {size} rows is usable ({reasons or 'bad lines'})")
    whole = lambda values: np.asarray(values, np.int64)
    chosen, rejected, *numbers = zip(*pairs, strict=True) if pairs else [()] * 5
    groups = map(whole, (rows, prompts, response_offsets, responses, counted, pair_offsets, chosen, rejected))
    numbers = (np.asarray(n, np.float64) for n in numbers)
    texts = (dict(counts), tuple(bad), tuple(dropped))
    return Index._make([*groups, *numbers, whole(hashes), whole(largest), *texts, None])


def load_or_build_index(
    data: Dataset,
    folder: pathlib.Path,
    *,
    on_bad_line: str,
    max_bad_share: float,
    write: Callable[[Callable[[], None]], None],
    progress,
) -> Index:
    """The index from `folder`, or a new one stored there; the tolerance for bad lines is applied to both.

    Args:
      write: called with the function that stores a new index: when and whether it runs is the caller's to say.
      progress: called with the number of rows read so far.
    """
    path = folder / f"index-{data.fingerprint()}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                counts, bad, dropped = parse_json(str(file["texts"]), shape=list)
                index = Index._make([*(file[a] for a in STORED_ARRAYS), dict(counts), tuple(bad), tuple(dropped), None])
        except DAMAGED:
            pass  # a damaged cache is made anew
        else:
            check_bad_lines(
                data.records.name, index.bad, data.records.size, on_bad_line=on_bad_line, max_bad_share=max_bad_share
            )
            return index
    index = build_index(data, on_bad_line=on_bad_line, max_bad_share=max_bad_share, progress=progress)
    write(functools.partial(_store, index, path))
    return index


def _store(index: Index, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp.npz")
    texts = json.dumps([index.counts, index.bad, index.dropped])
    np.savez(temporary, **{name: getattr(index, name) for name in STORED_ARRAYS}, texts=texts)
    temporary.replace(path)
