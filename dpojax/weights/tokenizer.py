"""The tokenizer beside weights, and whether two models share one."""

import pathlib
from collections.abc import Sequence

import numpy as np

from dpojax.data.dataset import Dataset
from dpojax.data.index import Index
from dpojax.data.open_tokenizer import load_tokenizer
from dpojax.data.tokenizers import TOKENIZER_NAMES, Tokenizer
from dpojax.errors import ConfigError
from dpojax.weights import peft


def _pieces(tokenizer: Tokenizer, count: int) -> list[str | None]:
    """The text of the ids up to `count`; None where the tokenizer has no such piece."""
    known = min(count, tokenizer.vocab_size)
    return [tokenizer.piece(i) for i in range(known)] + [None] * (count - known)


def check_shared_tokenizer(
    tokenizer: Tokenizer | None, path: str, sets: Sequence[tuple[Dataset, Index]], *, setting: str
) -> None:
    """Checks that the ids in the rows mean the same text to both models.

    Ids that no row holds do not count: files of one tokenizer differ in names, formats and unused
    pieces.

    Args:
      tokenizer: which the rows are read with; None: they are token ids.
      path: of the other model. One without a tokenizer beside it is taken at its word.
      sets: the rows on which they are compared.
      setting: that names `path`.
    Raises: ConfigError naming the first row with an id that means something else to the other
      model.
    """
    place = tokenizer_of(path)
    if tokenizer is None or not place:
        return
    foreign = load_tokenizer(place)
    count = 1 + max(int(index.largest_id) for _, index in sets)
    pieces = zip(_pieces(tokenizer, count), _pieces(foreign, count), strict=True)
    differ = np.asarray([i for i, (ours, theirs) in enumerate(pieces) if ours != theirs], np.int32)
    if not len(differ):
        return
    for data, index in sets:
        for row in map(int, index.rows):
            group, _ = data.token_group(row)
            ids = np.concatenate([group.prompt, *group.responses])
            differing = ids[np.isin(ids, differ)]
            if len(differing):
                token = int(differing[0])
                theirs = _pieces(foreign, token + 1)[token]
                raise ConfigError(
                    f"{setting}={path!r}: the two models do not share a tokenizer: the id {token}"
                    f" is {tokenizer.piece(token)!r} here and {theirs!r} in {place}, and"
                    f" {data.records.where(row)} holds it; their log-probs of the same ids are of"
                    " different texts"
                )


def tokenizer_of(init: str) -> str:
    """The tokenizer beside model.init's weights, or "" if there is none."""
    if not init or "\0" in init:
        return ""
    folder = pathlib.Path(init)
    if (folder / peft.CONFIG).is_file() and not any(
        (folder / name).is_file() for name in TOKENIZER_NAMES
    ):
        return tokenizer_of(str(peft.base_folder(folder, peft.read_settings(folder))))
    for place in (
        folder,
        folder / "tokenizer",
        folder.parent / "tokenizer",
        folder.parent.parent / "tokenizer",
    ):
        if any((place / name).is_file() for name in TOKENIZER_NAMES):
            return str(place)
    return ""
