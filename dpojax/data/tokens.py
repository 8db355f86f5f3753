"""Group -> TokenGroup: token ids with BOS, EOS and truncation. Text ends here.

BOS stands once, at the start of the prompt; EOS ends every response that was not cut. A response is
encoded as the continuation of its prompt: no dummy prefix, no BOS. Limits count BOS and EOS. Text by a chat
template holds its special tokens itself, BOS and ends of turns included; nothing is added to it.
"""

import copy
import functools
import hashlib
import json
import math
import pathlib
import re
import shutil
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from dpojax import sandbox
from dpojax.data.chat import TEMPLATE_FOLDER, ChatTemplate, Message, TemplateError, find_templates
from dpojax.data.groups import TokenGroup
from dpojax.data.tokenizer_files import ADDED, CONFIG, MAP, Named, TokenizerFiles, any_of, read_files
from dpojax.data.triples import Dropped, Group, keep_sound, rewrite_group
from dpojax.errors import ConfigError, DataError
from dpojax.plain_data import existing_path, number_fault, parse_json, read_bytes, read_json, read_text

Spans = list[tuple[int, int]]  # where each token starts and stops, characters


class Tokenizer(Protocol):
    """Text to ids and back. `encode_*` add no special token.

    `encode_chat` alone reads special tokens (`specials`) out of the text: that of a dialogue, or of the part of one after
    the text `before`. No token straddles the two; else the ids are those that the whole dialogue has there. With `spans`
    it returns where each token stands in the text, too.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int
    fingerprint: str
    folder: pathlib.Path | None  # where its file lies
    notes: tuple[str, ...]  # where its files contradict each other, and what is done

    def specials(self) -> dict[str, int]: ...
    def encode_chat(self, text: str, *, before: str = "", spans: bool = False) -> tuple[list[int], Spans]: ...
    def encode_prompt(self, text: str) -> list[int]: ...
    def encode_continuation(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def piece(self, token: int) -> str: ...
    def piece_id(self, piece: str) -> int | None: ...
    def save(self, folder: pathlib.Path) -> None: ...


class SentencePieceTokenizer:
    """A sentencepiece `.model`."""

    def __init__(self, model: bytes, name: str, folder: pathlib.Path | None = None):
        self.model, self.name, self.folder = model, name, folder
        self._load()

    def _load(self):
        # Two processors: a prompt gets the model's dummy prefix, a continuation does not.
        spec = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        try:
            self._prompt = sentencepiece.SentencePieceProcessor(model_proto=self.model)
            spec.ParseFromString(self.model)
        except Exception as error:  # RuntimeError from C++, DecodeError from protobuf
            raise ConfigError(f"tokenizer {self.name}: not a sentencepiece model, or a damaged one") from error
        spec.normalizer_spec.add_dummy_prefix = False
        self._continuation = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
        bos, eos, pad = self._prompt.bos_id(), self._prompt.eos_id(), self._prompt.pad_id()
        if eos < 0:
            raise ConfigError(f"tokenizer {self.name}: it has no EOS piece; responses could not end")
        files = read_files(self.folder)
        self.notes = files.notes
        for key in ("bos_token", "eos_token"):
            if key in files.names:
                self._require(files.names[key], key)
        if "eos_token" in files.names:
            eos = self._prompt.piece_to_id(files.names["eos_token"].text)
        self.bos_id, self.eos_id = (bos if bos >= 0 and files.flags.get("add_bos_token") is not False else None), eos
        self.pad_id = pad if pad >= 0 else eos
        self.vocab_size = self._prompt.vocab_size()
        self.fingerprint = hashlib.sha256(self.model).hexdigest()
        control = [i for i in range(self.vocab_size) if self._prompt.is_control(i)]
        self._specials = {self._prompt.id_to_piece(i): i for i in control}
        self._pattern = any_of(self._specials)
        # Whether every piece of text between special tokens gets a dummy prefix, or only the start of the dialogue.
        self._prefixes_all = files.flags.get("legacy") is True
        # Models that squeeze white space would also strip the space that a continuation starts with.
        self._squeezes = self._continuation.encode(" a") == self._continuation.encode("a")

    def __getstate__(self):
        return {"model": self.model, "name": self.name, "folder": self.folder}

    def __setstate__(self, state):
        self.__init__(**state)

    def specials(self) -> dict[str, int]:
        return self._specials

    def _require(self, name: Named, key: str) -> None:
        """Raises ConfigError if the model lacks a token that a file beside it names."""
        if self.piece_id(name.text) is None:
            raise ConfigError(f"{name.path}: {key} is {name.text!r}, which {self.name} does not have")

    def encode_chat(self, text: str, *, before: str = "", spans: bool = False) -> tuple[list[int], Spans]:
        ids: list[int] = []
        places: Spans = []
        place = 0
        plain = bool(before) and not self._ends_special(before)  # whether plain text stands in front
        for part in self._pattern.split(text):
            if part in self._specials:
                ids.append(self._specials[part])
                places.append((place, place + len(part)))
                plain = False
            elif part:
                starts = self._prefixes_all or not (before or place)
                encoder = self._prompt if starts and not plain else self._continuation
                if spans:
                    pieces = encoder.encode(part, return_type="proto").pieces
                    ids += [piece.id for piece in pieces]
                    places += _characters(part, [(piece.begin, piece.end) for piece in pieces], place)
                else:
                    ids += encoder.encode(part)
            place += len(part)
        return ids, places

    def _ends_special(self, text: str) -> bool:
        return any(text.endswith(special) for special in self._specials)

    def encode_prompt(self, text: str) -> list[int]:
        return self._prompt.encode(text)

    def encode_continuation(self, text: str) -> list[int]:
        if self._squeezes and text[:1].isspace():
            return self._prompt.encode(text)
        return self._continuation.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more rows than the tokenizer has pieces: such ids are no text.
        return self._prompt.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def piece(self, token: int) -> str:
        return self._prompt.id_to_piece(int(token)) if 0 <= token < self.vocab_size else f"<{token}>"

    def piece_id(self, piece: str) -> int | None:
        found = self._prompt.piece_to_id(piece)
        return None if found == self._prompt.unk_id() and piece != self._prompt.id_to_piece(found) else found

    def save(self, folder: pathlib.Path) -> None:
        if self.folder is not None:
            copy_companions(self.folder, folder)
        for other in ("tokenizer.json", "spiece.model"):  # of another tokenizer: they would be read in its place
            (folder / other).unlink(missing_ok=True)
        (folder / "tokenizer.model").write_bytes(self.model)


MAX_MADE = 4  # tokenizers that a process keeps
_made: dict[tuple, dict[str, Any]] = {}  # what is in a JsonTokenizer, by the state of its files


def _file_state(path: pathlib.Path) -> tuple:
    """Changes when the files that a tokenizer is made from change."""
    state: list[Any] = [str(path.absolute())]
    for file in (path, *(path.parent / name for name in (CONFIG, MAP, ADDED))):
        try:
            stat = file.stat()
        except OSError:  # it is not there, or reading it says what is wrong
            state.append(None)
        else:
            state.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return tuple(state)


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`, with BOS and EOS from the files beside it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.folder: pathlib.Path | None = path.parent
        state = _file_state(path)
        if state not in _made:
            self._load()
            while len(_made) >= MAX_MADE:
                _made.pop(next(iter(_made)))
            _made[state] = self.__dict__
        # A child of `dpojax.sandbox` gets the same tokenizer with every task, and making one takes up to a second.
        self.__dict__.update(_made[state])

    def _load(self):
        files = read_files(self.path.parent)
        try:
            text = read_text(self.path)
            spec = parse_json(text)
            self._prompt = self._continuation = tokenizers.Tokenizer.from_str(text)
            continuation = _without_prefix(spec)
            if continuation != spec:  # most have no prefix, and a second one takes its time to make
                self._continuation = tokenizers.Tokenizer.from_str(json.dumps(continuation))
            dialogue, notes = _for_dialogues(spec, files)
            self._chat_continuation = self._continuation
            if notes:  # transformers reads dialogues by other rules than this file's
                self._chat = tokenizers.Tokenizer.from_str(json.dumps(dialogue))
                self._chat_continuation = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(dialogue)))
            else:
                self._chat = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises bare Exception
            raise ConfigError(f"tokenizer {self.path}: not a tokenizer.json ({error})") from error
        _check_decoder(spec.get("decoder"), self.path)
        every = (self._prompt, self._continuation, self._chat, self._chat_continuation)
        all_of_them = list({id(tokenizer): tokenizer for tokenizer in every}.values())
        added = _add_tokens(all_of_them, files)
        _find_specials(self._chat)
        for tokenizer in all_of_them:
            tokenizer.no_truncation()
            tokenizer.no_padding()
        for tokenizer in (self._prompt, self._continuation):
            # Text that spells a special token is text: data cannot forge an end of response.
            tokenizer.encode_special_tokens = True
        known = self._chat.get_added_tokens_decoder()
        self._specials = {t.content: i for i, t in known.items() if t.special}
        self._added = {t.content: t for t in known.values() if t.special or not t.normalized}
        self._pattern = any_of(self._added)
        # Several pairs of a prompt, and rows that are read again, are encoded once.
        self._recent_ids = functools.lru_cache(maxsize=1024)(self._recent_chat_ids)
        self.vocab_size = self._prompt.get_vocab_size(with_added_tokens=True)
        bos, eos, pad = (self._id(n.text) if (n := files.names.get(f"{k}_token")) else None for k in ("bos", "eos", "pad"))
        # BOS where the tokenizer itself puts one: many files name a token that no text of theirs ever started with (GPT-2).
        adds = bos is not None and self._prompt.encode("a", add_special_tokens=True).ids[:1] == [bos]
        self.bos_id = bos if adds else None
        if adds is (not files.flags.get("add_bos_token", adds)):
            notes += (
                f"{files.place}: add_bos_token={files.flags['add_bos_token']}, and {self.path.name} puts "
                f"{'one' if adds else 'none'}: its way is followed, as transformers does",
            )
        if added:
            notes += (
                f"{files.place}: {', '.join(map(repr, added[:3]))}{' ...' if len(added) > 3 else ''} are tokens as this file "
                f"says, and not as {self.path.name} says, as transformers does",
            )
        self.notes = files.notes + notes
        if eos is None:
            known = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
            eos = next((i for i in map(self._id, known) if i is not None), None)
        if eos is None:
            raise ConfigError(f"tokenizer {self.path}: no EOS token; name eos_token in tokenizer_config.json beside it")
        self.eos_id = eos
        self.pad_id = eos if pad is None else pad
        more = [added] if added else []
        self.fingerprint = hashlib.sha256(text.encode() + repr((self.bos_id, self.eos_id, *more)).encode()).hexdigest()

    def _id(self, name: str | None) -> int | None:
        return None if name is None else self._prompt.token_to_id(name)

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        self.__init__(state["path"])

    def encode_prompt(self, text: str) -> list[int]:
        return self._prompt.encode(text, add_special_tokens=False).ids

    def encode_continuation(self, text: str) -> list[int]:
        return self._continuation.encode(text, add_special_tokens=False).ids

    def specials(self) -> dict[str, int]:
        return self._specials

    def encode_chat(self, text: str, *, before: str = "", spans: bool = False) -> tuple[list[int], Spans]:
        context = self._context(before) if before else ""
        if spans or len(text) > MAX_RECENT_CHARACTERS:
            return self._encode_chat(text, context, bool(before), spans)
        return list(self._recent_ids(text, context, bool(before))), []

    def _recent_chat_ids(self, text: str, context: str, goes_on: bool) -> list[int]:
        return self._encode_chat(text, context, goes_on, False)[0]

    def _encode_chat(self, text: str, context: str, goes_on: bool, spans: bool) -> tuple[list[int], Spans]:
        """The ids of a text after the special token `context`, or that goes on after plain text, or begins a dialogue."""
        if not goes_on:
            return _encode(self._chat, text, spans)
        if context:  # what follows a special token is encoded after it, and the token left out again
            ids, places = _encode(self._chat, context + text, spans)
            shift = len(context)
            return ids[1:], [(max(0, a - shift), max(0, b - shift)) for a, b in places[1:]]
        first = self._pattern.search(text)
        end = first.start() if first else len(text)
        lead = text[:end]
        if first and self._added[first.group()].lstrip:
            lead = lead.rstrip()
        ids, places = _encode(self._chat_continuation, lead, spans) if lead else ([], [])
        if first:
            more, more_places = _encode(self._chat, text[end:], spans)
            ids, places = ids + more, places + [(end + a, end + b) for a, b in more_places]
        return ids, places

    def _context(self, before: str) -> str:
        """The special token that `before` ends with, and the white space that it swallows; "" if plain text ends it."""
        start, token = 0, ""
        for found in self._pattern.finditer(before):
            start, token = found.start(), found.group()
        tail = before[start + len(token) :]
        if not token or (tail and not (tail.isspace() and self._added[token].rstrip)):
            return ""
        return before[start:]

    def decode(self, ids: Sequence[int]) -> str:
        # BOS and EOS by hand: `skip_special_tokens` leaves those that the vocabulary itself holds.
        text = [int(i) for i in ids if i not in (self.bos_id, self.eos_id)]  # ids without a piece decode to nothing
        return self._prompt.decode(text, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._prompt.id_to_token(int(token)) or f"<{token}>"

    def piece_id(self, piece: str) -> int | None:
        return self._id(piece)

    def save(self, folder: pathlib.Path) -> None:
        copy_companions(self.path.parent, folder)


MAX_DECODER_GROWTH = 100.0  # times the characters of the pieces; real decoders replace one by one
# What looks like a special token in a text, and what is plain text with some models.
CONTROL_TEXT = re.compile(r"<\|[^|<>\s]+\|>|<\uff5c[^\uff5c<>\s]+\uff5c>|</?s>|</?(?:bos|eos)>|<(?:start|end)_of_turn>")
ROLES = "user assistant system tool human bot model prompter prompt answer question response instruction input output context"
ROLE_TEXTS = tuple(f"<|{role}|>" for role in ROLES.split())
MAX_RECENT_CHARACTERS = 20_000  # of a text whose ids are kept for the next time
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model")  # in the order of preference
# What lies beside the weights and goes on unchanged from an import to an export.
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "spiece.model"),
    "dpojax.json",  # data.written: how the run that trained the weights wrote its text
)


def copy_companions(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies the tokenizer's files, all chat templates and generation_config.json, as they are."""
    more = sorted((source / TEMPLATE_FOLDER).glob("*.jinja"))
    if more:
        (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
    for name in (*COMPANIONS, *(f"{TEMPLATE_FOLDER}/{path.name}" for path in more)):
        if (source / name).is_file() and (source / name).resolve() != (folder / name).resolve():
            shutil.copyfile(source / name, folder / name)


def _without_prefix(spec: dict) -> dict:
    """The tokenizer.json `spec` changed so that nothing is put before the text.

    One that splits at white space and then marks every word has no way to write a continuation that is
    glued to the word before it; it stays as it is.
    """
    if '"WhitespaceSplit"' in json.dumps(spec.get("pre_tokenizer")):
        return spec

    def strip(node):
        if not isinstance(node, dict):
            return node
        for key in ("normalizers", "pretokenizers"):
            if key in node:
                node[key] = [strip(n) for n in node[key] if n.get("type") != "Prepend"]
        if node.get("type") == "Prepend":
            return None
        if node.get("type") == "Metaspace":
            node["prepend_scheme"] = "never"
            node.pop("add_prefix_space", None)
        if node.get("type") == "ByteLevel":
            node["add_prefix_space"] = False
        return node

    changed = {key: strip(copy.deepcopy(spec.get(key))) for key in ("normalizer", "pre_tokenizer")}
    return {**spec, **changed}


def _check_decoder(spec: Any, path: pathlib.Path) -> None:
    """Raises ConfigError for a decoder that can run long: ids become text in this process, many times a run."""
    nodes, growth = [spec], 1.0
    while nodes:
        node = nodes.pop()
        if not isinstance(node, dict):
            continue
        nodes += node.get("decoders") or []
        if node.get("type") != "Replace":
            continue
        pattern = node.get("pattern") or {}
        if "String" not in pattern:
            raise ConfigError(f"tokenizer {path}: its decoder holds a regular expression, {pattern!r:.80}, which is not run")
        growth *= max(1.0, len(node.get("content") or "") / max(1, len(pattern["String"])))
    if growth > MAX_DECODER_GROWTH:
        raise ConfigError(f"tokenizer {path}: its decoder makes texts up to {growth:.3g} times as long")


def _for_dialogues(spec: dict, files: TokenizerFiles) -> tuple[dict, tuple[str, ...]]:
    """The tokenizer.json `spec` changed to what transformers reads the text of a chat template with, and what to say of it.

    Llama's classes put a word's mark by Metaspace, in place of a file's older normalizer: at the start of the dialogue, and
    not after special tokens.
    They know no unknown piece: what the vocabulary cannot write is left out.
    """
    if files.flags.get("tokenizer_class") not in LLAMA_CLASSES or '"Prepend"' not in json.dumps(spec.get("normalizer")):
        return spec, ()
    if files.flags.get("add_prefix_space") is False:
        scheme = "never"
    elif files.flags.get("legacy") is True:
        scheme = "always"
    else:
        scheme = "first"
    changed = {
        "normalizer": None,
        "pre_tokenizer": dict(type="Metaspace", replacement="\u2581", prepend_scheme=scheme, split=False),
        "model": {**spec["model"], "unk_token": None, "fuse_unk": True, "byte_fallback": True},
    }
    said = (
        f"{files.place}: tokenizer_class {files.flags['tokenizer_class']} and the normalizer of tokenizer.json mark words "
        "in two ways; dialogues are read by the class's, as transformers does",
    )
    return {**spec, **changed}, said


def _add_tokens(all_of_them: Sequence[tokenizers.Tokenizer], files: TokenizerFiles) -> list[str]:
    """Adds the tokens that only the files beside a tokenizer.json know; those whose flags differ get theirs.

    Returns: the tokens that changed, in the order of the files.
    Raises: ConfigError for a token that cannot have the id that it is given, and for a BOS or EOS that is nowhere.
    """
    changed: list[str] = []
    known = all_of_them[0].get_added_tokens_decoder()
    for number, token, path in files.added:
        if repr(known.get(number)) == repr(token):
            continue
        changed.append(token.content)
        for tokenizer in all_of_them:
            tokenizer.add_tokens([token])
            given = tokenizer.token_to_id(token.content)
            if given != number:
                raise ConfigError(
                    f"{path}: the token {token.content!r} is to have the id {number}, and the tokenizer gives it {given}"
                )
    for key in ("bos_token", "eos_token"):
        name = files.names.get(key)
        if name is None:
            continue
        if all_of_them[0].token_to_id(name.text) is None:
            raise ConfigError(f"{name.path}: {key} is {name.text!r}, which the vocabulary does not have")
        special = {t.content for t in all_of_them[0].get_added_tokens_decoder().values() if t.special}
        if name.text not in special:
            changed.append(name.text)
            for tokenizer in all_of_them:
                tokenizer.add_special_tokens([tokenizers.AddedToken(name.text, normalized=False, special=True)])
    return changed


def _find_specials(tokenizer: tokenizers.Tokenizer) -> None:
    """Special tokens that the normalizer would change, and so hide in its text, are found in the text as it is."""
    normalizer = tokenizer.normalizer
    for token in tokenizer.get_added_tokens_decoder().values() if normalizer else ():
        if token.special and token.normalized and normalizer.normalize_str(token.content) != token.content:
            plain = tokenizers.AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
                special=True,
            )
            tokenizer.add_tokens([plain])


def _encode(tokenizer: tokenizers.Tokenizer, text: str, spans: bool) -> tuple[list[int], Spans]:
    if spans:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets
    (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)  # it counts no characters
    return encoding.ids, []


def _characters(text: str, places: Spans, start: int) -> Spans:
    """Places in the UTF-8 bytes of `text` as places in its characters, from `start`."""
    data = text.encode()
    if len(data) == len(text):
        return [(start + a, start + b) for a, b in places]

    def at(byte: int) -> int:
        return start + len(data[:byte].decode(errors="ignore"))

    return [(at(a), at(b)) for a, b in places]


def _from_llama2c(data: bytes, path: str) -> bytes:
    """A llama2.c tokenizer.bin (longest piece; then score, length and text of each) as a sentencepiece model.

    The format is that of github.com/karpathy/llama2.c: pieces of a BPE model with byte fallback, white space written out.
    """
    spec, place = sentencepiece_model_pb2.ModelProto(), 4  # pyright: ignore[reportAttributeAccessIssue]
    kinds = {0: 2, 1: 3, 2: 3}  # <unk>, and the control pieces <s> and </s>
    while place < len(data):
        if place + 8 > len(data):
            raise ConfigError(f"tokenizer {path!r}: not a llama2.c tokenizer.bin: it is cut short")
        score, length = struct.unpack_from("<fi", data, place)
        text = data[place + 8 : place + 8 + length]
        place += 8 + length
        number = len(spec.pieces)
        if not 0 < length < 1000 or place > len(data) or not math.isfinite(score):
            raise ConfigError(f"tokenizer {path!r}: not a llama2.c tokenizer.bin: piece {number} is damaged")
        piece = text.decode("utf-8", errors="replace")
        byte = re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
        names = {0: "<unk>", 1: "<s>", 2: "</s>"}  # it keeps them with line breaks around them
        plain = names.get(number) or (piece if byte else piece.replace(" ", "\u2581"))
        spec.pieces.add(piece=plain, score=score, type=kinds.get(number, 6 if byte else 1))
    spec.trainer_spec.model_type, spec.trainer_spec.byte_fallback = 2, True
    spec.normalizer_spec.add_dummy_prefix, spec.normalizer_spec.remove_extra_whitespaces = True, False
    return spec.SerializeToString()


def load_tokenizer(path: str) -> Tokenizer:
    """Opens a `.model` or `tokenizer.json` file, a folder that holds one, or a llama2.c tokenizer `.bin`.

    It is tried in a child process with limits first (`dpojax.sandbox`).
    Raises: ConfigError if there is none, it is damaged, it has no EOS, or it goes past the limits.
    """
    if not sandbox.inside():
        try:
            sandbox.call(_try_tokenizer, path)
        except sandbox.SandboxError as error:
            raise ConfigError(f"tokenizer {path!r}: reading it {error}") from error
    return _open_tokenizer(path)


def _try_tokenizer(path: str) -> None:
    """Opens a tokenizer, and uses it once each way."""
    tokenizer = _open_tokenizer(path)
    ids = tokenizer.encode_prompt("A dog, 1 cat.\n") + tokenizer.encode_continuation(" Yes.")
    tokenizer.decode(ids)


def _open_tokenizer(path: str) -> Tokenizer:
    file = existing_path(path)
    if file is None:
        raise ConfigError(f"tokenizer {path!r:.300}: there is no such file or folder")
    if file.is_dir():
        found = [file / n for n in TOKENIZER_NAMES if (file / n).is_file()]
        if not found:
            raise ConfigError(f"tokenizer {path!r}: the folder holds neither tokenizer.json nor tokenizer.model")
        file = found[0]
    if file.suffix == ".json":
        return JsonTokenizer(file)
    model = read_bytes(file)
    if file.suffix == ".bin":
        return SentencePieceTokenizer(_from_llama2c(model, path), file.name, None)
    if not model:
        raise ConfigError(f"tokenizer {path!r}: the file is empty")
    return SentencePieceTokenizer(model, file.name, file.parent)


def chat_template(tokenizer: Tokenizer, file: str = "") -> ChatTemplate | None:
    """The tokenizer's own chat template, or that of a file; None if there is none.

    Raises: ConfigError if it cannot be read.
    """
    tool_use = ""
    if file:
        path = pathlib.Path(file)
        if "\0" in file or not path.is_file():
            is_folder = "\0" not in file and path.is_dir()
            what = "it is a folder; name the .jinja file in it" if is_folder else "there is no such file"
            raise ConfigError(f"data.chat_template={file!r}: {what}")
        source, name = read_text(path), f"data.chat_template={file!r}"
    else:
        templates = {} if tokenizer.folder is None else find_templates(tokenizer.folder)
        name = f"the chat template in {tokenizer.folder}"
        if templates and "default" not in templates:
            raise ConfigError(
                f"{tokenizer.folder}: it holds the chat templates {', '.join(sorted(templates))}, and none is the default; "
                "name a file in data.chat_template"
            )
        source, tool_use = templates.get("default"), templates.get("tool_use", "")
    if source is None:
        return None
    files = read_files(tokenizer.folder)
    names = {key: named.text for key, named in files.names.items()}
    if tokenizer.bos_id is not None:
        names.setdefault("bos_token", tokenizer.piece(tokenizer.bos_id))
    names.setdefault("eos_token", tokenizer.piece(tokenizer.eos_id))
    template = ChatTemplate(source, tuple(sorted(names.items())), tuple(tokenizer.specials()), name, tool_use)
    _check_control_texts(template, tokenizer, files)
    return template


def _check_control_texts(template: ChatTemplate, tokenizer: Tokenizer, files: TokenizerFiles) -> None:
    """Raises ConfigError for a special text that the template writes and the tokenizer does not read as one token.

    These are the tokens that the tokenizer's files name, and what looks like a token in two example dialogues. Names of
    roles are none: several models spell their turns in plain text (<|user|>).
    """
    for key, named in files.names.items():
        if tokenizer.piece_id(named.text) is None and re.search(rf"\b{key}\b", template.source + template.tool_use):
            raise ConfigError(f"{template.name}: it writes {key}, {named.text!r} in {named.path}, which the vocabulary lacks")
    for _, token, path in files.added:
        if tokenizer.piece_id(token.content) is None and token.content in template.source + template.tool_use:
            raise ConfigError(
                f"{template.name}: it writes {token.content!r}, which {path} names and the tokenizer in {tokenizer.folder} "
                "does not have; save the tokenizer with a tokenizer.json"
            )
    try:
        written = "".join(sandbox.call(_example_texts, template))
    except sandbox.SandboxError as error:
        raise ConfigError(f"{template.name}: it {error}") from error
    for text in dict.fromkeys(CONTROL_TEXT.findall(written)):
        if text.lower() not in ROLE_TEXTS and len(tokenizer.encode_chat(text, before="a")[0]) != 1:
            raise ConfigError(
                f"{template.name}: it writes {text!r}, which is no token of the tokenizer in {tokenizer.folder}; take the "
                "tokenizer that the template was made for, or another template (data.chat_template)"
            )


def _example_texts(template: ChatTemplate) -> list[str]:
    """A dialogue as the template writes it, with and without a system turn; without those that it refuses."""
    user = {"role": "user", "content": "Hello"}
    turns = [user, {"role": "assistant", "content": "Good day"}, user]
    texts = []
    for messages in (turns, [{"role": "system", "content": "Be kind."}, *turns]):
        try:
            texts.append(template.render(messages, add_generation_prompt=True))
        except TemplateError:
            continue  # one that takes other dialogues alone: rows will say so
    return texts


def stop_ids(tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[int, ...]:
    """The tokens that end a response: EOS, those of generation_config.json, and what the chat template puts after an answer.

    Raises: ConfigError where the template goes past the limits of `dpojax.sandbox`.
    """
    if template is None:
        return _stop_ids((tokenizer, template))
    try:
        return sandbox.call(_stop_ids, (tokenizer, template))
    except sandbox.SandboxError as error:
        raise ConfigError(f"{template.name}: it {error}") from error


def _stop_ids(both: tuple[Tokenizer, ChatTemplate | None]) -> tuple[int, ...]:
    tokenizer, template = both
    found = [tokenizer.eos_id]
    path = None if tokenizer.folder is None else tokenizer.folder / "generation_config.json"
    if path is not None and path.is_file():
        ends = read_json(path).get("eos_token_id")
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        for end in ends:
            if number_fault(end, int) or end < 0:
                raise ConfigError(f"{path}: eos_token_id is {ends!r:.80}; it must be a token id, or a list of them")
        found += ends
    if template is not None:
        try:
            (words,) = template.split([{"role": "user", "content": "Hello"}], [{"role": "assistant", "content": "Good day"}])
        except TemplateError:
            return tuple(dict.fromkeys(found))  # one that takes other dialogues alone, or cannot be split: rows will say so
        ids, spans = tokenizer.encode_chat(words.response, before=words.prompt, spans=True)
        special, end = set(tokenizer.specials().values()), words.content[1] if words.content else 0
        found += [i for i, (start, _) in zip(ids, spans, strict=True) if i in special and start >= end][:1]
    return tuple(dict.fromkeys(found))


class Limits(NamedTuple):
    """The longest prompt (BOS included) and response (EOS included), in tokens."""

    prompt: int
    response: int


class Cut(NamedTuple):
    """What was taken from a group: by truncation, in tokens, and pairs."""

    prompt: int
    responses: tuple[int, ...]
    dropped: tuple[str, ...]  # the reason of each pair that was left out while others of its group stay
    whole: tuple[tuple[int, int, int], ...] = ()  # tokens of prompt, chosen and rejected of every pair before it
    turns: int = 0  # messages of a dialogue that were left out whole
    content: int = 0  # tokens that the first messages that are left lost of their contents


def prompt_ids(prompt: str | Sequence[int], tokenizer: Tokenizer | None, limit: int) -> tuple[list[int], int]:
    """The prompt's ids and how many were cut: from the left, BOS kept."""
    if not isinstance(prompt, str):
        return list(prompt), 0  # ready ids are used as they are
    assert tokenizer is not None
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = tokenizer.encode_prompt(prompt)
    cut = max(0, len(first) + len(ids) - limit)
    return first + ids[cut:], cut


class Fitted(NamedTuple):
    """A dialogue's prompt within its limit."""

    ids: list[int]
    group: Group  # written anew where messages were cut
    cut: int  # tokens that the prompt lost
    turns: int  # messages that were left out whole
    content: int  # tokens of `cut` that were the start of a content


def chat_prompt(group: Group, tokenizer: Tokenizer, limit: int) -> Fitted:
    """The ids of a dialogue's prompt, cut where it is too long so that the template around it stays whole.

    The oldest turns after the system's go first, each from a user's message up to the next; then the start of the content
    of the first message that is left.

    Raises: DataError if what cannot be cut is longer than the limit: the template's own text, tools and system messages.
    """
    assert isinstance(group.prompt, str) and group.dialogue is not None
    ids, _ = tokenizer.encode_chat(group.prompt)
    if len(ids) <= limit:
        return Fitted(ids, group, 0, 0, 0)
    messages = list(group.dialogue.messages)
    head = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    users = [i for i in range(head, len(messages)) if messages[i]["role"] == "user"]

    def rewrite(rest: Sequence[Message]) -> tuple[list[int], Group]:
        written = rewrite_group(group, [*messages[:head], *rest])
        return tokenizer.encode_chat(str(written.prompt))[0], written

    starts = [i for i in users if i > head]  # where the first turn that stays may start
    written = group
    rest, low, high = messages[head:], 0, len(starts)
    while low < high:  # the fewest turns that must go; the last one stays
        middle = (low + high) // 2
        shorter, candidate = rewrite(messages[starts[middle] :])
        if len(shorter) <= limit:
            high = middle
        else:
            low = middle + 1
    if starts:
        rest = messages[starts[min(low, len(starts) - 1)] :]
        shorter, written = rewrite(rest)
    else:
        shorter = ids
    turns = len(messages) - head - len(rest)
    uncut = len(shorter)
    if uncut > limit:
        shorter, written = _cut_content(rest, rewrite, tokenizer, uncut - limit, limit)
    return Fitted(shorter, written, len(ids) - len(shorter), turns, uncut - len(shorter))


def _cut_content(rest: Sequence[Message], rewrite, tokenizer: Tokenizer, over: int, limit: int):
    """The prompt without the start of its contents, `over` tokens or as many more as it takes; some of the last one stays."""
    rest = list(rest)
    for place, message in enumerate(rest):
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            continue
        ids, _ = tokenizer.encode_chat(content, before="a")
        while over < len(ids):
            rest[place] = {**message, "content": _without_start(content, ids, over, tokenizer).lstrip()}
            shorter, written = rewrite(rest)
            if len(shorter) <= limit:
                return shorter, written
            over += len(shorter) - limit
        rest[place] = {**message, "content": ""}
        over -= len(ids)
    raise DataError(
        f"the prompt is longer than {limit} tokens, also without the contents of its turns: its system text, its tools "
        "and the template cannot be cut; raise data.max_prompt_tokens, or leave the row out"
    )


def _without_start(text: str, ids: Sequence[int], count: int, tokenizer: Tokenizer) -> str:
    """The text of the tokens of `text` after the first `count`."""
    end = tokenizer.decode(ids[count:])
    if text.endswith(end) and end:
        return end
    _, spans = tokenizer.encode_chat(text, before="a", spans=True)  # slower, but right where a character is cut in two
    return text[spans[count][0] :]


def response_ids(response: str | Sequence[int], tokenizer: Tokenizer | None, limit: int) -> tuple[list[int], int]:
    """The response's ids, EOS at the end unless it was cut, and how many were cut: from the right."""
    if not isinstance(response, str):
        return list(response), 0  # ready ids are used as they are
    assert tokenizer is not None
    ids = [*tokenizer.encode_continuation(response), tokenizer.eos_id]
    return ids[:limit], max(0, len(ids) - limit)


def chat_response_ids(
    response: str, content: tuple[int, int] | None, tokenizer: Tokenizer, limit: int, *, before: str, mask: bool
) -> tuple[list[int], int, np.ndarray | None]:
    """As `response_ids`, of a chat template's text after the text `before`.

    With `mask` also which tokens are the message's own words.
    """
    ids, spans = tokenizer.encode_chat(response, before=before, spans=mask)
    own = None
    if mask:
        start, stop = content or (0, len(response))
        own = np.asarray([a < stop and b > start for a, b in spans], bool)[:limit]
    return ids[:limit], max(0, len(ids) - limit), own


def mask_ids(names: str, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The ids of comma-separated pieces. Raises ConfigError for one that the tokenizer does not have."""
    wanted = [n for n in names.split(",") if n]
    if wanted and tokenizer is None:
        raise ConfigError(
            f"data.mask_tokens={names!r}: the rows are token ids; give them chosen_mask and rejected_mask columns"
        )
    found = set()
    for name in wanted:
        assert tokenizer is not None
        piece = tokenizer.piece_id(name)
        if piece is None:
            raise ConfigError(f"data.mask_tokens: the tokenizer has no piece {name!r}")
        found.add(piece)
    return frozenset(found)


def _counted(responses: Sequence[np.ndarray], masks: Sequence[Sequence[int]] | None, masked: frozenset[int]):
    """Which tokens of each response count: those that neither the row nor the settings mask. None: all."""
    if not masked and masks is None:
        return None
    counted = tuple(~np.isin(r, list(masked)) for r in responses)
    if masks is not None:
        counted = tuple(c & np.asarray(m, bool) for c, m in zip(counted, masks, strict=True))
    return counted


def tokenize(
    group: Group,
    tokenizer: Tokenizer | None,
    limits: Limits,
    row: int,
    masked: frozenset[int] = frozenset(),
    mask_template: bool = False,
) -> tuple[TokenGroup, Cut]:
    """Token ids of a group; `masked` are the ids of formatting tokens, `mask_template`: and all that a chat template adds.

    Raises: Dropped if truncation made the two sides of a pair the same, or nothing is left to predict from; DataError where
      the words of a message are to be told from what a template adds, and it changed them.
    """
    turns = content_cut = 0
    if group.contents is None:
        prompt, prompt_cut = prompt_ids(group.prompt, tokenizer, limits.prompt)
        responses, cuts = zip(*(response_ids(r, tokenizer, limits.response) for r in group.responses), strict=True)
    else:
        assert tokenizer is not None
        prompt, group, prompt_cut, turns, content_cut = chat_prompt(group, tokenizer, limits.prompt)
        if mask_template and None in (group.contents or ()):
            raise DataError(
                "data.mask_template: the words of a message cannot be told from the chat template's own: it changes them, or "
                "writes other fields than the content"
            )
        texts = zip(map(str, group.responses), group.contents or (), strict=True)
        options = dict(before=str(group.prompt), mask=mask_template)
        found = [chat_response_ids(text, content, tokenizer, limits.response, **options) for text, content in texts]
        responses, cuts, own = zip(*found, strict=True)
        if mask_template:
            group = group._replace(masks=tuple(tuple(o.tolist()) for o in own))
    if not prompt:
        raise Dropped("empty_prompt")
    arrays = [np.asarray(r, np.int32) for r in responses]
    counted = _counted(arrays, group.masks, masked)
    # What holds only formatting tokens has nothing to score, as if it were empty.
    scored = responses if counted is None else [r if c.any() else () for r, c in zip(responses, counted, strict=True)]
    sizes = [len(response) + lost for response, lost in zip(arrays, cuts, strict=True)]
    whole = tuple((len(prompt) + prompt_cut, sizes[pair.chosen], sizes[pair.rejected]) for pair in group.pairs)
    try:
        sound = keep_sound(scored, group.pairs, had_pairs=bool(group.pairs))
    except Dropped as verdict:
        if prompt_cut or any(cuts):
            verdict.whole = whole
        raise
    arrays = tuple(arrays[i] for i in sound.kept)
    counted = None if counted is None else tuple(counted[i] for i in sound.kept)
    cut = Cut(prompt_cut, cuts, group.dropped + sound.reasons, whole, turns, content_cut)
    return TokenGroup(np.asarray(prompt, np.int32), arrays, sound.pairs, row, counted=counted), cut
