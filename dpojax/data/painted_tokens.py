"""A group of prompt and responses as text, token by token, for a person."""

import numpy as np

from dpojax.data.token_groups import TokenGroup
from dpojax.data.tokenizers import Tokenizer

# How a terminal shows each part; "off" ends a colour.
COLOR = {
    "prompt": "\x1b[90m",
    "chosen": "\x1b[32m",
    "rejected": "\x1b[31m",
    "special": "\x1b[7m",
    "off": "\x1b[0m",
}


class _Painter:
    """Tokens as text, in colours or with brackets around special tokens."""

    def __init__(self, tokenizer: Tokenizer | None, *, color: bool):
        self.tokenizer = tokenizer
        self.color = color
        self.special: set[int | None] = set()
        if tokenizer is not None:
            self.special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}

    def _piece(self, token: int, kind: str) -> str:
        piece = str(token)
        if self.tokenizer is not None:
            piece = self.tokenizer.piece(token)
        piece = piece.replace("\n", "\\n")
        if token not in self.special:
            return piece
        if self.color:
            return COLOR["special"] + piece + COLOR["off"] + COLOR[kind]
        return f"[{piece}]"

    def paint(self, kind: str, ids: np.ndarray) -> str:
        """A line of tokens; `kind` is a colour of COLOR."""
        text = " ".join(self._piece(token, kind) for token in ids.tolist())
        if self.color:
            return COLOR[kind] + text + COLOR["off"]
        return f"{kind}: {text}"


def show_group(group: TokenGroup, tokenizer: Tokenizer | None, *, color: bool) -> str:
    """A group token by token: the prompt, which carries no loss, then each response, whose tokens
    all carry loss.
    """
    painter = _Painter(tokenizer, color=color)
    preferred = {0}
    if group.pairs:
        first = group.pairs[0]
        preferred = {first.chosen}
        if first.chosen == first.rejected:  # a labelled response
            preferred = {pair.chosen for pair in group.pairs if pair.soft_label > 0.5}
    lines = [painter.paint("prompt", group.prompt)]
    for k, response in enumerate(group.responses):
        kind = "rejected"
        if k in preferred:
            kind = "chosen"
        lines.append(painter.paint(kind, response))
    return "\n".join(lines)
