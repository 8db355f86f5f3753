"""Group -> TokenGroup: token ids with BOS, EOS and truncation. Text ends here.

BOS stands once, at the start of the prompt; EOS ends every response that was not cut. A response is
encoded as the continuation of its prompt: no dummy prefix, no BOS. Limits count BOS and EOS. Text by a chat
template holds its special tokens itself, BOS and ends of turns included; nothing is added to it.
"""

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
from dpojax.data.chat import ChatTemplate, TemplateError, find_template
from dpojax.data.groups import TokenGroup
from dpojax.data.triples import Dropped, Group, keep_sound
from dpojax.errors import ConfigError, DataError
from dpojax.plain_data import read_json


class Tokenizer(Protocol):
    """Text to ids and back. `encode_*` add no special token.

    `encode_chat` alone reads special tokens (`specials`) out of the text; it returns where each token stands in it, too.
    With `continuation` the text goes on after other text, and not after a special token.
    """

    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int
    fingerprint: str
    folder: pathlib.Path | None  # where its file lies

    def specials(self) -> dict[str, int]: ...
    def encode_chat(self, text: str, *, continuation: bool) -> tuple[list[int], list[tuple[int, int]]]: ...
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
            raise ConfigError(f"tokenizer {self.name}: not a sentencepiece model ({error})") from error
        spec.normalizer_spec.add_dummy_prefix = False
        self._continuation = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
        bos, eos, pad = self._prompt.bos_id(), self._prompt.eos_id(), self._prompt.pad_id()
        if eos < 0:
            raise ConfigError(f"tokenizer {self.name}: it has no EOS piece; responses could not end")
        named = {} if self.folder is None else _special_names(self.folder)
        if "eos_token" in named and (own := self.piece_id(named["eos_token"])) is not None:
            eos = own
        self.bos_id, self.eos_id = (bos if bos >= 0 and named.get("add_bos_token") != "False" else None), eos
        self.pad_id = pad if pad >= 0 else eos
        self.vocab_size = self._prompt.vocab_size()
        self.fingerprint = hashlib.sha256(self.model).hexdigest()
        control = [i for i in range(self.vocab_size) if self._prompt.is_control(i)]
        self._specials = {self._prompt.id_to_piece(i): i for i in control}
        # Models that squeeze white space would also strip the space that a continuation starts with.
        self._squeezes = self._continuation.encode(" a") == self._continuation.encode("a")

    def __getstate__(self):
        return {"model": self.model, "name": self.name, "folder": self.folder}

    def __setstate__(self, state):
        self.__init__(**state)

    def specials(self) -> dict[str, int]:
        return self._specials

    def encode_chat(self, text: str, *, continuation: bool) -> tuple[list[int], list[tuple[int, int]]]:
        specials = self.specials()
        ids, spans, place = [], [], 0
        for part in re.split(f"({'|'.join(map(re.escape, specials))})", text):
            if part in specials:
                ids.append(specials[part])
                spans.append((place, place + len(part)))
            elif part:
                plain = self._continuation if continuation or ids else self._prompt
                found, data = plain.encode(part, return_type="proto").pieces, part.encode()
                ids += [p.id for p in found]
                at = lambda byte, data=data, place=place: place + len(data[:byte].decode(errors="ignore"))
                spans += [(at(p.begin), at(p.end)) for p in found]
            place += len(part)
        return ids, spans

    def encode_prompt(self, text: str) -> list[int]:
        return self._prompt.encode(text)

    def encode_continuation(self, text: str) -> list[int]:
        if self._squeezes and text[:1].isspace():
            return self._prompt.encode(text)
        return self._continuation.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._prompt.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        return self._prompt.id_to_piece(int(token))

    def piece_id(self, piece: str) -> int | None:
        found = self._prompt.piece_to_id(piece)
        return None if found == self._prompt.unk_id() and piece != self._prompt.id_to_piece(found) else found

    def save(self, folder: pathlib.Path) -> None:
        if self.folder is not None:
            copy_companions(self.folder, folder)
        for other in ("tokenizer.json", "spiece.model"):  # of another tokenizer: they would be read in its place
            (folder / other).unlink(missing_ok=True)
        (folder / "tokenizer.model").write_bytes(self.model)


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`, with BOS and EOS from the files beside it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.folder: pathlib.Path | None = path.parent
        self._load()

    def _load(self):
        try:
            text = self.path.read_text(encoding="utf-8")
            spec = json.loads(text)
            self._prompt = tokenizers.Tokenizer.from_str(text)
            self._continuation = tokenizers.Tokenizer.from_str(json.dumps(_without_prefix(spec)))
        except Exception as error:  # the Rust side raises bare Exception
            raise ConfigError(f"tokenizer {self.path}: not a tokenizer.json ({error})") from error
        _check_decoder(spec.get("decoder"), self.path)
        for tokenizer in (self._prompt, self._continuation):
            # Text that spells a special token is text: data cannot forge an end of response.
            tokenizer.encode_special_tokens = True
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._text, self._chat = text, None
        self._specials = {t.content: i for i, t in self._prompt.get_added_tokens_decoder().items() if t.special}
        self.vocab_size = self._prompt.get_vocab_size(with_added_tokens=True)
        names = _special_names(self.path.parent)
        bos = self._id(names.get("bos_token"))
        # BOS where the tokenizer itself puts one: many files name a token that no text of theirs ever started with (GPT-2).
        adds = self._prompt.encode("a", add_special_tokens=True).ids[:1] == [bos]
        self.bos_id = bos if names.get("add_bos_token", str(adds)) == "True" else None
        eos = self._id(names.get("eos_token"))
        if eos is None:
            known = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")
            eos = next((i for i in map(self._id, known) if i is not None), None)
        if eos is None:
            raise ConfigError(f"tokenizer {self.path}: no EOS token; name eos_token in tokenizer_config.json beside it")
        self.eos_id = eos
        pad = self._id(names.get("pad_token"))
        self.pad_id = eos if pad is None else pad
        self.fingerprint = hashlib.sha256(text.encode() + repr((self.bos_id, self.eos_id)).encode()).hexdigest()

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

    def encode_chat(self, text: str, *, continuation: bool) -> tuple[list[int], list[tuple[int, int]]]:
        if self._chat is None:  # made when first asked for: most runs have no chat template
            self._chat = tokenizers.Tokenizer.from_str(self._text)
            self._chat.no_truncation()
            self._chat.no_padding()
        ids, spans, start = [], [], 0
        if continuation:  # as far as the first special token; what follows one is written as everywhere
            places = [text.find(s) for s in self.specials()]
            start = min((p for p in places if p >= 0), default=len(text))
            first = self._continuation.encode(text[:start], add_special_tokens=False)
            ids, spans = first.ids, first.offsets
        rest = self._chat.encode(text[start:], add_special_tokens=False)
        return ids + rest.ids, spans + [(start + a, start + b) for a, b in rest.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        # BOS and EOS by hand: `skip_special_tokens` leaves those that the vocabulary itself holds.
        text = [int(i) for i in ids if i not in (self.bos_id, self.eos_id)]
        return self._prompt.decode(text, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._prompt.id_to_token(int(token)) or f"<{token}>"

    def piece_id(self, piece: str) -> int | None:
        return self._id(piece)

    def save(self, folder: pathlib.Path) -> None:
        copy_companions(self.path.parent, folder)


MAX_DECODER_GROWTH = 100.0  # times the characters of the pieces; real decoders replace one by one
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "spiece.model")  # in the order of preference
# What lies beside the weights and goes on unchanged from an import to an export.
COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "spiece.model"),
)


def copy_companions(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies the tokenizer's files and generation_config.json, as they are."""
    for name in COMPANIONS:
        if (source / name).is_file() and (source / name).resolve() != (folder / name).resolve():
            shutil.copyfile(source / name, folder / name)


def _added_tokens(folder: pathlib.Path) -> list[str]:
    """The tokens that a folder's files add to a sentencepiece model. Raises ConfigError for a damaged file."""
    found: list[str] = []
    for name, key in (("added_tokens.json", None), ("tokenizer_config.json", "added_tokens_decoder")):
        if (folder / name).is_file():
            values = read_json(folder / name)
            try:
                values = values if key is None else (values.get(key) or {}).values()
                found += [v["content"] if isinstance(v, dict) else v for v in values]
            except (AttributeError, TypeError, KeyError) as error:
                raise ConfigError(f"{folder / name}: not a table of tokens ({error})") from error
    return found


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

    return {**spec, "normalizer": strip(spec.get("normalizer")), "pre_tokenizer": strip(spec.get("pre_tokenizer"))}


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


def _special_names(folder: pathlib.Path) -> dict[str, str]:
    """bos_token, eos_token, pad_token and add_bos_token from the files that Hugging Face keeps beside tokenizer.json."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / file).is_file():
            values = read_json(folder / file)
            for key in ("bos_token", "eos_token", "pad_token"):
                value = values.get(key)
                value = value.get("content") if isinstance(value, dict) else value
                if isinstance(value, str):
                    names[key] = value
            if isinstance(values.get("add_bos_token"), bool):
                names["add_bos_token"] = str(values["add_bos_token"])
    return names


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
    file = pathlib.Path(path)
    if file.is_dir():
        found = [file / n for n in TOKENIZER_NAMES if (file / n).is_file()]
        if not found:
            raise ConfigError(f"tokenizer {path!r}: the folder holds neither tokenizer.json nor tokenizer.model")
        file = found[0]
    if not file.is_file():
        raise ConfigError(f"tokenizer {path!r}: there is no such file or folder")
    if file.suffix == ".json":
        return JsonTokenizer(file)
    model = file.read_bytes()
    if file.suffix == ".bin":
        return SentencePieceTokenizer(_from_llama2c(model, path), file.name, None)
    if not model:
        raise ConfigError(f"tokenizer {path!r}: the file is empty")
    return SentencePieceTokenizer(model, file.name, file.parent)


def chat_template(tokenizer: Tokenizer, file: str = "") -> ChatTemplate | None:
    """The tokenizer's own chat template, or that of a file; None if there is none.

    Raises: ConfigError if it cannot be read.
    """
    if file:
        path = pathlib.Path(file)
        if "\0" in file or not path.is_file():
            raise ConfigError(f"data.chat_template={file!r}: there is no such file")
        source, name = path.read_text(encoding="utf-8"), f"data.chat_template={file!r}"
    else:
        source = None if tokenizer.folder is None else find_template(tokenizer.folder)
        name = f"the chat template in {tokenizer.folder}"
    if source is None:
        return None
    names = {} if tokenizer.folder is None else _special_names(tokenizer.folder)
    names.pop("add_bos_token", None)
    if isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.folder is not None:
        lost = [t for t in _added_tokens(tokenizer.folder) if tokenizer.piece_id(t) is None and t in source]
        if lost:
            raise ConfigError(
                f"{name}: it writes {lost[0]!r}, which the sentencepiece model in {tokenizer.folder} does not have (its added tokens "
                "are not read); save the tokenizer with a tokenizer.json"
            )
    if tokenizer.bos_id is not None:
        names.setdefault("bos_token", tokenizer.piece(tokenizer.bos_id))
    names.setdefault("eos_token", tokenizer.piece(tokenizer.eos_id))
    return ChatTemplate(source, tuple(sorted(names.items())), tuple(tokenizer.specials()), name)


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
        own = read_json(path).get("eos_token_id")
        found += own if isinstance(own, list) else [own] if isinstance(own, int) else []
    if template is not None:
        try:
            words = template.split([{"role": "user", "content": "Hello"}], {"role": "assistant", "content": "Good day"})
        except TemplateError:
            return tuple(dict.fromkeys(found))  # one that takes other dialogues alone, or cannot be split: rows will say so
        ids, spans = tokenizer.encode_chat(words.response, continuation=True)
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


def prompt_ids(
    prompt: str | Sequence[int], tokenizer: Tokenizer | None, limit: int, *, chat: bool = False
) -> tuple[list[int], int]:
    """The prompt's ids and how many were cut: from the left, BOS kept."""
    if not isinstance(prompt, str):
        return list(prompt), 0  # ready ids are used as they are
    assert tokenizer is not None
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    if chat:
        ids, _ = tokenizer.encode_chat(prompt, continuation=False)
        first = first if ids[:1] == first else []
        ids = ids[len(first) :]
    else:
        ids = tokenizer.encode_prompt(prompt)
    cut = max(0, len(first) + len(ids) - limit)
    return first + ids[cut:], cut


def response_ids(response: str | Sequence[int], tokenizer: Tokenizer | None, limit: int) -> tuple[list[int], int]:
    """The response's ids, EOS at the end unless it was cut, and how many were cut: from the right."""
    if not isinstance(response, str):
        return list(response), 0  # ready ids are used as they are
    assert tokenizer is not None
    ids = [*tokenizer.encode_continuation(response), tokenizer.eos_id]
    return ids[:limit], max(0, len(ids) - limit)


def chat_response_ids(
    response: str, content: tuple[int, int] | None, tokenizer: Tokenizer, limit: int, *, after: int
) -> tuple[list[int], int, np.ndarray]:
    """As `response_ids`, of a chat template's text after the token `after`, with which tokens are the message's own words."""
    ids, spans = tokenizer.encode_chat(response, continuation=after not in tokenizer.specials().values())
    start, stop = content or (0, len(response))
    own = np.asarray([a < stop and b > start for a, b in spans], bool)
    return ids[:limit], max(0, len(ids) - limit), own[:limit]


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
    prompt, prompt_cut = prompt_ids(group.prompt, tokenizer, limits.prompt, chat=group.contents is not None)
    if group.contents is None:
        responses, cuts = zip(*(response_ids(r, tokenizer, limits.response) for r in group.responses), strict=True)
    else:
        assert tokenizer is not None
        if mask_template and None in group.contents:
            raise DataError(
                "data.mask_template: the chat template changes the words of a message, so that they cannot be told from its own"
            )
        texts, after = zip(map(str, group.responses), group.contents, strict=True), prompt[-1]
        found = [chat_response_ids(r, c, tokenizer, limits.response, after=after) for r, c in texts]
        responses, cuts, own = zip(*found, strict=True)
        if mask_template:
            group = group._replace(masks=tuple(tuple(o.tolist()) for o in own))
    if not prompt:
        raise Dropped("empty_prompt")
    arrays = [np.asarray(r, np.int32) for r in responses]
    counted = _counted(arrays, group.masks, masked)
    # What holds only formatting tokens has nothing to score, as if it were empty.
    scored = responses if counted is None else [r if c.any() else () for r, c in zip(responses, counted, strict=True)]
    sound = keep_sound(scored, group.pairs, had_pairs=bool(group.pairs))
    arrays = tuple(arrays[i] for i in sound.kept)
    counted = None if counted is None else tuple(counted[i] for i in sound.kept)
    cut = Cut(prompt_cut, cuts, group.dropped + sound.reasons)
    return TokenGroup(np.asarray(prompt, np.int32), arrays, sound.pairs, row, counted=counted), cut
