"""The tokenizer of a Hugging Face `tokenizer.json` with the files beside it."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers

from dpojax.data.tokenizer_files import (
    ADDED,
    CONFIG,
    MAP,
    TokenizerFiles,
    any_of,
    copy_companions,
    read_files,
)
from dpojax.data.tokenizer_json import (
    add_tokens,
    check_decoder,
    find_specials,
    for_dialogues,
    without_prefix,
)
from dpojax.data.tokenizers import Spans
from dpojax.errors import ConfigError
from dpojax.untrusted.plain_data import parse_json, read_text

MAX_RECENT_CHARACTERS = 20_000  # of a text whose ids are kept for the next time

MAX_KEPT = 4  # tokenizers that a process keeps

_kept: dict[tuple, "JsonTokenizer"] = {}  # by the path and the state of its files


def _file_state(path: pathlib.Path) -> tuple:
    """Changes when the files that a tokenizer is made from change."""
    state: list[Any] = [str(path), str(path.absolute())]
    for file in (path, *(path.parent / name for name in (CONFIG, MAP, ADDED))):
        try:
            stat = file.stat()
        except OSError:  # it is not there, or reading it says what is wrong
            state.append(None)
        else:
            state.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(state)


def open_json_tokenizer(path: pathlib.Path) -> "JsonTokenizer":
    """The tokenizer of a `tokenizer.json`: the one made before, while its files are the same.

    A sandbox's child gets the same tokenizer with every task, and making one takes up to a second.
    Raises: ConfigError if the file is no tokenizer's.
    """
    state = _file_state(path)
    if state not in _kept:
        tokenizer = JsonTokenizer(path)
        while len(_kept) >= MAX_KEPT:
            _kept.pop(next(iter(_kept)))
        _kept[state] = tokenizer
    return _kept[state]


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`, with BOS and EOS from the files beside it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.folder: pathlib.Path | None = path.parent
        files = read_files(self.path.parent)
        text, notes = self._make_tokenizers(files)
        same = list({id(each): each for each in self._every()}.values())
        added = add_tokens(same, files)
        find_specials(self._chat)
        for tokenizer in same:
            tokenizer.no_truncation()
            tokenizer.no_padding()
        for tokenizer in (self._prompt, self._continuation):
            # Text that spells a special token is text: data cannot forge an end of response.
            tokenizer.encode_special_tokens = True
        tokens = self._chat.get_added_tokens_decoder()
        self._specials = {t.content: i for i, t in tokens.items() if t.special}
        self._added = {t.content: t for t in tokens.values() if t.special or not t.normalized}
        self._pattern = any_of(self._added)
        # Several pairs of a prompt, and rows that are read again, are encoded once.
        self._recent_ids = functools.lru_cache(maxsize=1024)(self._recent_chat_ids)
        self.vocab_size = self._prompt.get_vocab_size(with_added_tokens=True)
        notes += self._find_ids(files)
        if added:
            listed = ", ".join(map(repr, added[:3]))
            if len(added) > 3:
                listed += " ..."
            notes += (
                f"{files.place}: {listed} are tokens as this file says, and not as"
                f" {self.path.name} says, as transformers does",
            )
        self.notes = files.notes + notes
        fields = (self.bos_id, self.eos_id)
        if added:
            fields = (*fields, added)
        self.fingerprint = hashlib.sha256(text.encode() + repr(fields).encode()).hexdigest()

    def _every(self) -> tuple[tokenizers.Tokenizer, ...]:
        return (self._prompt, self._continuation, self._chat, self._chat_continuation)

    def _make_tokenizers(self, files: TokenizerFiles) -> tuple[str, tuple[str, ...]]:
        """Makes the tokenizers of prompts, continuations and dialogues.

        Returns: the text of the file, and notes.
        """
        try:
            text = read_text(self.path)
            spec = parse_json(text)
            self._prompt = self._continuation = tokenizers.Tokenizer.from_str(text)
            continuation = without_prefix(spec)
            if continuation != spec:  # most have no prefix, and a second one takes its time to make
                self._continuation = tokenizers.Tokenizer.from_str(json.dumps(continuation))
            dialogue, notes = for_dialogues(spec, files)
            self._chat_continuation = self._continuation
            if notes:  # transformers reads dialogues by other rules than this file's
                self._chat = tokenizers.Tokenizer.from_str(json.dumps(dialogue))
                self._chat_continuation = tokenizers.Tokenizer.from_str(
                    json.dumps(without_prefix(dialogue))
                )
            else:
                self._chat = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise ConfigError(f"tokenizer {self.path}: not a tokenizer.json ({error})") from error
        check_decoder(spec.get("decoder"), self.path)
        return text, notes

    def _find_ids(self, files: TokenizerFiles) -> tuple[str, ...]:
        """Finds the ids of BOS, EOS and padding. Returns notes."""
        bos = self._named_id(files, "bos_token")
        eos = self._named_id(files, "eos_token")
        pad = self._named_id(files, "pad_token")
        # BOS where the tokenizer itself puts one: many files name a token that no text of theirs
        # ever started with (GPT-2).
        starts_with = self._prompt.encode("a", add_special_tokens=True).ids[:1]
        adds = bos is not None and starts_with == [bos]
        self.bos_id = None
        if adds:
            self.bos_id = bos
        notes = ()
        if adds is (not files.flags.get("add_bos_token", adds)):
            notes = (
                f"{files.place}: add_bos_token={files.flags['add_bos_token']}, and"
                f" {self.path.name} puts {'one' if adds else 'none'}: its way is followed, as"
                " transformers does",
            )
        if eos is None:
            usual = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
            eos = next((i for i in map(self.piece_id, usual) if i is not None), None)
        if eos is None:
            raise ConfigError(
                f"tokenizer {self.path}: no EOS token; name eos_token in tokenizer_config.json"
                " beside it"
            )
        self.eos_id = eos
        self.pad_id = eos
        if pad is not None:
            self.pad_id = pad
        return notes

    def _named_id(self, files: TokenizerFiles, key: str) -> int | None:
        """The id of the token that a file beside the tokenizer names under this key."""
        if key not in files.names:
            return None
        return self.piece_id(files.names[key].text)

    def __reduce__(self):
        return open_json_tokenizer, (self.path,)

    def encode_prompt(self, text: str) -> list[int]:
        return self._prompt.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        return self._continuation.encode(text, add_special_tokens=False).ids

    def specials(self) -> dict[str, int]:
        return self._specials

    def encode_chat(
        self, text: str, *, before: str = "", spans: bool = False
    ) -> tuple[list[int], Spans]:
        context = ""
        if before:
            context = self._context(before)
        if spans or len(text) > MAX_RECENT_CHARACTERS:
            return self._encode_chat(text, context, bool(before), spans)
        return list(self._recent_ids(text, context, bool(before))), []

    def _recent_chat_ids(self, text: str, context: str, goes_on: bool) -> list[int]:
        return self._encode_chat(text, context, goes_on, False)[0]

    def _encode_chat(
        self, text: str, context: str, goes_on: bool, spans: bool
    ) -> tuple[list[int], Spans]:
        """The ids of a part of a dialogue.

        It stands after the special token `context`, goes on after plain text, or begins a dialogue.
        """
        if not goes_on:
            return _encode(self._chat, text, spans)
        # what follows a special token is encoded after it, and the token left out again
        if context:
            ids, places = _encode(self._chat, context + text, spans)
            shift = len(context)
            return ids[1:], [(max(0, a - shift), max(0, b - shift)) for a, b in places[1:]]
        first = self._pattern.search(text)
        if first is None:
            return self._encode_plain(text, spans)
        end = first.start()
        plain = text[:end]
        if self._added[first.group()].lstrip:
            plain = plain.rstrip()
        ids, places = self._encode_plain(plain, spans)
        more, more_places = _encode(self._chat, text[end:], spans)
        return ids + more, places + [(end + a, end + b) for a, b in more_places]

    def _encode_plain(self, text: str, spans: bool) -> tuple[list[int], Spans]:
        """The ids of plain text that goes on after plain text."""
        if not text:
            return [], []
        return _encode(self._chat_continuation, text, spans)

    def _context(self, before: str) -> str:
        """The special token that `before` ends with, and the white space that it swallows.

        "" where plain text ends it.
        """
        start = 0
        token = ""
        for match in self._pattern.finditer(before):
            start = match.start()
            token = match.group()
        tail = before[start + len(token) :]
        if not token or (tail and not (tail.isspace() and self._added[token].rstrip)):
            return ""
        return before[start:]

    def decode(self, ids: Sequence[int]) -> str:
        # BOS and EOS by hand: `skip_special_tokens` leaves those that the vocabulary itself holds.
        # ids without a piece decode to nothing
        text = [int(i) for i in ids if i not in (self.bos_id, self.eos_id)]
        return self._prompt.decode(text, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._prompt.id_to_token(int(token)) or f"<{token}>"

    def piece_id(self, piece: str) -> int | None:
        return self._prompt.token_to_id(piece)

    def save(self, folder: pathlib.Path) -> None:
        copy_companions(self.path.parent, folder)


def _encode(tokenizer: tokenizers.Tokenizer, text: str, spans: bool) -> tuple[list[int], Spans]:
    if spans:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets
    # it counts no characters
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    return encoding.ids, []
