"""Every row's verdict and token lengths, computed once: what packing is planned from.

Stored under a key made from the data's content, the tokenizer, the limits and the template, so that
every process plans the same steps and tokenises only its own rows.
"""

import collections
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpojax.data.dataset import Dataset
from dpojax.data.groups import DROPPED, Dropped
from dpojax.data.token_groups import TokenGroup, TokenPair
from dpojax.data.tokens import Cut
from dpojax.errors import ConfigError, DataError


class Index(NamedTuple):
    """The usable groups of a dataset, in file order: n groups.

    Ragged fields are flat with offsets.
    """

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
    # rows, dropped/<reason>, dropped_pair/<reason>, cut/prompt, cut/turns, cut/content,
    # cut/response, bad_line
    counts: dict[str, int]
    bad: tuple[str, ...]  # the message of each line that could not be read
    # "file:line: reason" of each row without a usable pair, and of each pair left out of a group
    dropped: tuple[str, ...]
    # [n, 2] the answer to another prompt that is the group's last response: its source row and its
    # number there
    mismatched: np.ndarray | None = None

    def responses(self, i: int) -> list[int]:
        """|y_k| of group i."""
        return self.response_lengths[
            self.response_offsets[i] : self.response_offsets[i + 1]
        ].tolist()

    def counted(self, i: int) -> list[int]:
        """|y_k| of group i without formatting tokens."""
        return self.counted_lengths[
            self.response_offsets[i] : self.response_offsets[i + 1]
        ].tolist()

    def pairs(self, i: int) -> list[TokenPair]:
        """The pairs of group i."""
        return [
            TokenPair(
                chosen=int(self.chosen[p]),
                rejected=int(self.rejected[p]),
                weight=float(self.weights[p]),
                soft_label=float(self.soft_labels[p]),
                margin=float(self.margins[p]),
            )
            for p in range(self.pair_offsets[i], self.pair_offsets[i + 1])
        ]

    def totals(self) -> np.ndarray:
        """[n] tokens of each group: |x| + |y_1| + ..."""
        if not len(self.response_lengths):  # prompts alone
            return self.prompt_lengths
        return self.prompt_lengths + np.add.reduceat(
            self.response_lengths, self.response_offsets[:-1]
        )

    def sequence_lengths(self) -> np.ndarray:
        """[n] positions of each group: |x| + max |y_k|."""
        if not len(self.response_lengths):
            return self.prompt_lengths
        return self.prompt_lengths + np.maximum.reduceat(
            self.response_lengths, self.response_offsets[:-1]
        )

    def groups_within(self, max_pairs: int) -> int:
        """How many of the first groups hold at most `max_pairs` pairs; at least one.

        0: any number of pairs.
        """
        if not max_pairs:
            return len(self.rows)
        return max(1, int(np.sum(self.pair_offsets[1:] <= max_pairs)))

    def first(self, count: int) -> "Index":
        """The first `count` groups alone."""
        return self.select(np.arange(count))

    def select(self, groups: np.ndarray) -> "Index":
        """These groups alone, in this order, by their numbers [m]."""
        responses, response_offsets = _ragged(self.response_offsets, groups)
        pairs, pair_offsets = _ragged(self.pair_offsets, groups)
        mismatched = None
        if self.mismatched is not None:
            mismatched = self.mismatched[groups]
        return self._replace(
            rows=self.rows[groups],
            prompt_lengths=self.prompt_lengths[groups],
            response_offsets=response_offsets,
            response_lengths=self.response_lengths[responses],
            counted_lengths=self.counted_lengths[responses],
            pair_offsets=pair_offsets,
            prompt_hashes=self.prompt_hashes[groups],
            chosen=self.chosen[pairs],
            rejected=self.rejected[pairs],
            weights=self.weights[pairs],
            soft_labels=self.soft_labels[pairs],
            margins=self.margins[pairs],
            mismatched=mismatched,
        )

    def drawn_prompts(self, share: float, seed: int) -> np.ndarray:
        """The hashes [m] of a share of the prompts, one at least.

        They are drawn by `seed` alone: not by the order of the rows.

        Raises: ConfigError if there is but one prompt.
        """
        prompts = np.unique(self.prompt_hashes)
        if len(prompts) < 2:
            raise ConfigError(
                f"data.eval_share={share:g}: all rows have the same prompt; name a file in"
                " data.eval"
            )
        count = min(len(prompts) - 1, max(1, round(share * len(prompts))))
        order = np.random.Generator(np.random.Philox(key=[seed, 1])).permutation(len(prompts))
        return prompts[order[:count]]

    def with_mismatched(self, seed: int) -> "Index":
        """Every group gets one more response, an answer to another prompt.

        Its pairs point to it as `rejected`.

        The answers are dealt out by a shuffle of the groups that depends on `seed` alone, so that
        they are fixed before training; of a group with several responses any may be the one, good
        or bad.
        Raises: ConfigError if all prompts are the same.
        """
        rng = np.random.Generator(np.random.Philox(key=[seed, len(self.rows)]))
        donor = _groups_of_other_prompts(self.prompt_hashes, rng)
        num_responses = np.diff(self.response_offsets)
        answer = (rng.random(len(donor)) * num_responses[donor]).astype(np.int64)
        drawn = self.response_offsets[donor] + answer
        ends = self.response_offsets[1:]
        return self._replace(
            response_offsets=self.response_offsets + np.arange(len(ends) + 1),
            response_lengths=np.insert(self.response_lengths, ends, self.response_lengths[drawn]),
            counted_lengths=np.insert(self.counted_lengths, ends, self.counted_lengths[drawn]),
            rejected=np.repeat(num_responses, np.diff(self.pair_offsets)),
            mismatched=np.stack([self.rows[donor], answer], axis=1),
        )


def _groups_of_other_prompts(prompt_hashes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[n] for every group, a group with another prompt.

    Raises: ConfigError if all prompts are the same.
    """
    # 1. Order by prompt: groups of one prompt lie together, in random order.
    prompts, prompt_of = np.unique(prompt_hashes, return_inverse=True)
    count = len(prompt_of)
    if len(prompts) == 1:
        raise ConfigError(
            "the objective compares with answers to other prompts, and all prompts of the data"
            " are the same"
        )
    order = np.lexsort((rng.permutation(count), rng.permutation(len(prompts))[prompt_of]))
    ordered = prompt_of[order]
    # 2. Shift by the number of the prompt's groups, so that each takes from behind all of them.
    sizes = np.bincount(prompt_of)[ordered]
    is_start = np.r_[True, np.diff(ordered) != 0]
    starts = np.flatnonzero(is_start)[np.cumsum(is_start) - 1]
    place = np.arange(count) - starts  # of a group among those of its prompt
    shifted = (starts + sizes + place % (count - sizes)) % count
    # 3. Back to the order of the file.
    donor = np.empty(count, np.int64)
    donor[order] = order[shifted]
    return donor


STORED_TEXTS = ("counts", "bad", "dropped")

# What is dealt out for an objective is not stored: it depends on the run's seed.
STORED_ARRAYS = tuple(name for name in Index._fields if name not in (*STORED_TEXTS, "mismatched"))


def _ragged(offsets: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of the elements of some groups in a flat field.

    Second, the offsets of these groups after they are taken.
    """
    sizes = np.diff(offsets)[groups]
    new_offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(offsets.dtype)
    places = np.arange(new_offsets[-1]) + np.repeat(offsets[:-1][groups] - new_offsets[:-1], sizes)
    return places, new_offsets


def check_bad_lines(
    name: str, index_bad: Sequence[str], size: int, *, on_bad_line: str, max_bad_share: float
) -> None:
    """Raises DataError if the lines that cannot be read are more than the settings tolerate."""
    if index_bad and on_bad_line == "error":
        raise DataError(index_bad[0])
    if len(index_bad) > max_bad_share * size:
        raise DataError(
            f"{index_bad[-1]} ({name} has {len(index_bad)} bad lines in {size} rows, more than"
            f" data.max_bad_share={max_bad_share})"
        )


def build_index(data: Dataset, *, on_bad_line: str, max_bad_share: float, progress) -> Index:
    """Reads and tokenises every row once.

    Args:
      on_bad_line: "error" raises at the first row that cannot be read; "skip" counts up to
        `max_bad_share`.
      progress: called with the number of rows read so far.
    Raises: DataError as above, and if no usable row is left.
    """
    name = data.records.name
    size = data.records.size
    counts: collections.Counter = collections.Counter(rows=size)
    rows = []
    groups = _Lengths()
    bad = []
    dropped = []
    for row, read in data.read_groups(range(size)):
        progress(row)
        if isinstance(read, Dropped):
            counts[f"dropped/{read.reason}"] += 1
            dropped.append(f"{data.records.where(row)}: {DROPPED[read.reason]}")
            continue
        if isinstance(read, DataError):
            bad.append(str(read))
            check_bad_lines(name, bad, size, on_bad_line=on_bad_line, max_bad_share=max_bad_share)
            continue
        counts.update(_cuts(read.cut))
        for reason in read.cut.dropped:
            dropped.append(f"{data.records.where(row)}: a pair of the group: {DROPPED[reason]}")
        if data.mask_ids:
            for response in read.tokens.responses:
                counts.update(f"masked/{i}" for i in response.tolist() if i in data.mask_ids)
        rows.append(row)
        groups.add(read.tokens)
    counts["bad_line"] = len(bad)
    if not rows:
        reasons = ", ".join(
            f"{k.removeprefix('dropped/')} {v}"
            for k, v in counts.items()
            if k.startswith("dropped/")
        )
        raise DataError(f"{name}: none of its {size} rows is usable ({reasons or 'bad lines'})")
    return groups.index(rows, counts=dict(counts), bad=tuple(bad), dropped=tuple(dropped))


def _cuts(cut: Cut) -> collections.Counter:
    """What was cut of a group, as it is counted."""
    counts: collections.Counter = collections.Counter()
    counts["cut/prompt"] = cut.prompt > 0
    counts["cut/turns"] = cut.turns
    counts["cut/content"] = cut.content > 0
    counts["cut/response"] = any(cut.responses)
    counts.update(f"dropped_pair/{reason}" for reason in cut.dropped)
    return counts


class _Lengths:
    """The lengths and pairs of groups as they are read, for an Index."""

    def __init__(self):
        self.prompts = []
        self.responses = []
        self.counted = []
        self.hashes = []
        self.pairs: list[TokenPair] = []
        self.response_offsets = [0]
        self.pair_offsets = [0]
        self.largest_id = 0

    def add(self, group: TokenGroup) -> None:
        """One more group."""
        sizes = [len(response) for response in group.responses]
        self.prompts.append(len(group.prompt))
        self.responses.extend(sizes)
        if group.counted is None:
            self.counted.extend(sizes)
        else:
            self.counted.extend(int(counted.sum()) for counted in group.counted)
        self.hashes.append(zlib.crc32(group.prompt.tobytes()))
        self.response_offsets.append(len(self.responses))
        self.pairs.extend(group.pairs)
        self.pair_offsets.append(len(self.pairs))
        largest = max(int(ids.max()) for ids in (group.prompt, *group.responses))
        self.largest_id = max(self.largest_id, largest)

    def index(
        self, rows: list[int], *, counts: dict[str, int], bad: tuple, dropped: tuple
    ) -> Index:
        """The index of the groups, which came from these rows of the source."""

        def integers(values):
            return np.asarray(values, np.int64)

        def floats(values):
            return np.asarray(values, np.float64)

        return Index(
            rows=integers(rows),
            prompt_lengths=integers(self.prompts),
            response_offsets=integers(self.response_offsets),
            response_lengths=integers(self.responses),
            counted_lengths=integers(self.counted),
            pair_offsets=integers(self.pair_offsets),
            chosen=integers([pair.chosen for pair in self.pairs]),
            rejected=integers([pair.rejected for pair in self.pairs]),
            weights=floats([pair.weight for pair in self.pairs]),
            soft_labels=floats([pair.soft_label for pair in self.pairs]),
            margins=floats([pair.margin for pair in self.pairs]),
            prompt_hashes=integers(self.hashes),
            largest_id=integers(self.largest_id),
            counts=counts,
            bad=bad,
            dropped=dropped,
        )
