"""Which prompts are drawn together, how they are packed, and which rows go on: plain numpy.

Legend: R prompts of a batch, G samples of each, B = R G rows, A data shards, L packed row length, P
prompt columns of the cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUND_TOKENS = 64  # lengths of packed rows are multiples of it


def rounded(tokens: int) -> int:
    """At least so many tokens, at most an eighth and ROUND_TOKENS more.

    The sizes are few, and so are the programs that are compiled.
    """
    step = max(ROUND_TOKENS, 2 ** max(0, (tokens - 1).bit_length() - 4))
    return -(-tokens // step) * step


def least_half(needed: int, whole: int) -> int:
    """`whole`, or the least of its halves that holds what is needed.

    The batches of a call have few sizes so, and share their programs.
    """
    while whole % 2 == 0 and whole // 2 >= needed:
        whole //= 2
    return whole


class PackedPrompts(NamedTuple):
    """The prompts of a batch, one row a data shard."""

    tokens: np.ndarray  # [A, L]
    group: np.ndarray  # [A, L]; 1, 2, ... for the prompts of a row, 0 for padding
    places: np.ndarray  # [R, P]; the column of each token of a prompt, L where there is none


def row_tokens(lengths: Sequence[int], shards: int) -> int:
    """The tokens of the fullest row of a batch of prompts of these lengths."""
    each = len(lengths) // shards
    return max(sum(lengths[i * each : (i + 1) * each]) for i in range(shards))


def pack_prompts(
    prompts: Sequence[Sequence[int]], *, shards: int, width: int, pad_id: int, length: int = 0
) -> PackedPrompts:
    """Prompts one behind the other, without padding between them.

    The first R / A prompts stand in the first row, the next ones in the second.

    Args:
      width: P, at least the longest prompt.
      length: L, at least the tokens of each row; 0: `rounded` ones.
    """
    each = len(prompts) // shards
    length = length or rounded(row_tokens(list(map(len, prompts)), shards))
    tokens = np.full((shards, length), pad_id, np.int32)
    group = np.zeros((shards, length), np.int32)
    places = np.full((len(prompts), width), length, np.int32)
    for row in range(shards):
        end = 0
        for number in range(each):
            prompt = prompts[row * each + number]
            columns = np.arange(end, end + len(prompt))
            tokens[row, columns] = prompt
            group[row, columns] = number + 1
            places[row * each + number, : len(prompt)] = columns
            end += len(prompt)
    return PackedPrompts(tokens, group, places)


def batch_order(lengths: Sequence[int], *, batch_size: int, shards: int) -> list[list[int]]:
    """Which prompts are drawn together: those of similar lengths, the longest first.

    Each batch is dealt out to the shards, so that they have similar numbers of tokens. The last
    prompt fills the last batch up: all batches have one shape.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batches = []
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        numbers += numbers[-1:] * (batch_size - len(numbers))
        dealt: list[list[int]] = [[] for _ in range(shards)]
        for deal, first in enumerate(range(0, batch_size, shards)):
            hand = numbers[first : first + shards]
            if deal % 2:  # to and fro, so that no shard has the longest of every deal
                hand = hand[::-1]
            for shard, number in zip(dealt, hand, strict=True):
                shard.append(number)
        batches.append([number for shard in dealt for number in shard])
    return batches


def first_places(numbers: Sequence[int]) -> np.ndarray:
    """Whether each number stands for the first time: later ones fill a batch up."""
    is_first = np.zeros(len(numbers), bool)
    is_first[np.unique(numbers, return_index=True)[1]] = True
    return is_first


class Compaction(NamedTuple):
    """A smaller decoding: its prompts and rows by their places in the larger one."""

    prompts: np.ndarray  # [R']
    rows: np.ndarray  # [B']
    live: np.ndarray  # [B']; False for a place that is left over


def _halvings(size: int) -> list[int]:
    """The size, its half, and so on down to 1."""
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def compacted(live: np.ndarray, shards: int) -> Compaction | None:
    """The rows that go on, where half of the places hold them; None where they do not.

    A prompt whose samples do not fit beside each other gets several places, each with its cache.

    Args:
      live: rows that have not ended, [R, G].
      shards: the number of prompts stays a multiple of it.
    """
    prompts, samples = live.shape
    counts = live.sum(axis=1)
    sizes: list[tuple[int, int]] = []  # prompts and samples of each
    for each in _halvings(samples):
        needed = int((-(-counts // each)).sum())
        fitting = [n for n in _halvings(prompts) if n >= needed and n % shards == 0]
        if fitting:
            sizes.append((fitting[-1], each))
    # The first of the smallest has the fewest copies of prompts.
    places, each = min(sizes, key=lambda size: size[0] * size[1], default=(prompts, samples))
    if 2 * places * each > live.size:
        return None
    taken = np.zeros(places, np.int32)
    rows = np.zeros((places, each), np.int32)
    goes_on = np.zeros((places, each), bool)
    place = 0
    for prompt in np.flatnonzero(counts):
        left = np.flatnonzero(live[prompt])
        for first in range(0, len(left), each):
            part = left[first : first + each]
            taken[place] = prompt
            rows[place, : len(part)] = prompt * samples + part
            goes_on[place, : len(part)] = True
            place += 1
    return Compaction(taken, rows.reshape(-1), goes_on.reshape(-1))
