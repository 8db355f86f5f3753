"""Text to ids and back: the face of a tokenizer, which two formats have.

`sentencepiece_tokenizer.py` reads sentencepiece's models, `json_tokenizer.py` a tokenizer.json;
`open_tokenizer.py` finds which of them a folder holds.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Protocol

Spans = list[tuple[int, int]]  # where each token starts and stops, characters


class Tokenizer(Protocol):
    """Text to ids and back. `encode_*` add no special token.

    `encode_chat` alone reads special tokens (`specials`) out of the text: that of a dialogue, or of
    the part of one after the text `before`. No token straddles the two; else the ids are those that
    the whole dialogue has there. With `spans` it returns where each token stands in the text, too.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int
    fingerprint: str
    folder: pathlib.Path | None  # where its file lies
    notes: tuple[str, ...]  # where its files contradict each other, and what is done

    def specials(self) -> dict[str, int]: ...
    def encode_chat(
        self, text: str, *, before: str = "", spans: bool = False
    ) -> tuple[list[int], Spans]: ...
    def encode_prompt(self, text: str) -> list[int]: ...
    def encode_continuation(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, token: int) -> str: ...
    def piece_id(self, piece: str) -> int | None: ...
    def save(self, folder: pathlib.Path) -> None: ...


# What looks like a special token in a text, and what is plain text with some models.
CONTROL_TEXT = re.compile(
    r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>\s]+\uff5c>|</?s>|</?(?:bos|eos)>|<(?:start|end)_of_turn>"
)

ROLES = (
    "user assistant system tool human bot model prompter prompt answer question response"
    " instruction input output context"
)

ROLE_TEXTS = tuple(f"<|{role}|>" for role in ROLES.split())

# in the order of preference
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model")
