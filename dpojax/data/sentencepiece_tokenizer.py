"""The tokenizer of a sentencepiece `.model`."""

import hashlib
import pathlib
from collections.abc import Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from dpojax.data.tokenizer_files import Named, any_of, copy_companions, read_files
from dpojax.data.tokenizers import Spans
from dpojax.errors import ConfigError


class SentencePieceTokenizer:
    """A sentencepiece `.model`."""

    def __init__(self, model: bytes, name: str, folder: pathlib.Path | None = None):
        self.model = model
        self.name = name
        self.folder = folder
        self._load()

    def _load(self):
        self._make_processors()
        eos = self._prompt.eos_id()
        if eos < 0:
            raise ConfigError(
                f"tokenizer {self.name}: it has no EOS piece; responses could not end"
            )
        files = read_files(self.folder)
        self.notes = files.notes
        for key in ("bos_token", "eos_token"):
            if key in files.names:
                self._require(files.names[key], key)
        if "eos_token" in files.names:
            eos = self._prompt.piece_to_id(files.names["eos_token"].text)
        self.bos_id = None
        if self._prompt.bos_id() >= 0 and files.flags.get("add_bos_token") is not False:
            self.bos_id = self._prompt.bos_id()
        self.eos_id = eos
        self.pad_id = eos
        if self._prompt.pad_id() >= 0:
            self.pad_id = self._prompt.pad_id()
        self.vocab_size = self._prompt.vocab_size()
        self.fingerprint = hashlib.sha256(self.model).hexdigest()
        control = [i for i in range(self.vocab_size) if self._prompt.is_control(i)]
        self._specials = {self._prompt.id_to_piece(i): i for i in control}
        self._pattern = any_of(self._specials)
        # Whether every piece of text between special tokens gets a dummy prefix, or only the start
        # of the dialogue.
        self._prefixes_all = files.flags.get("legacy") is True
        # Models that squeeze white space would also strip the space that a continuation starts
        # with.
        self._squeezes = self._continuation.encode(" a") == self._continuation.encode("a")

    def _make_processors(self) -> None:
        """Two processors: a prompt gets the model's dummy prefix, a continuation does not."""
        spec = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        try:
            self._prompt = sentencepiece.SentencePieceProcessor(model_proto=self.model)
            spec.ParseFromString(self.model)
        except Exception as error:  # RuntimeError from C++, DecodeError from protobuf
            raise ConfigError(
                f"tokenizer {self.name}: not a sentencepiece model, or a damaged one"
            ) from error
        spec.normalizer_spec.add_dummy_prefix = False
        self._continuation = sentencepiece.SentencePieceProcessor(
            model_proto=spec.SerializeToString()
        )

    def __getstate__(self):
        return {"model": self.model, "name": self.name, "folder": self.folder}

    def __setstate__(self, state):
        self.__init__(**state)

    def specials(self) -> dict[str, int]:
        return self._specials

    def _require(self, name: Named, key: str) -> None:
        """Raises ConfigError if the model lacks a token that a file beside it names."""
        if self.piece_id(name.text) is None:
            raise ConfigError(
                f"{name.path}: {key} is {name.text!r}, which {self.name} does not have"
            )

    def encode_chat(
        self, text: str, *, before: str = "", spans: bool = False
    ) -> tuple[list[int], Spans]:
        ids: list[int] = []
        places: Spans = []
        place = 0
        # whether plain text stands in front
        plain = bool(before) and not self._ends_special(before)
        for part in self._pattern.split(text):
            if part in self._specials:
                ids.append(self._specials[part])
                places.append((place, place + len(part)))
                plain = False
            elif part:
                starts = self._prefixes_all or not (before or place)
                encoder = self._continuation
                if starts and not plain:
                    encoder = self._prompt
                if spans:
                    pieces = encoder.encode(part, return_type="proto").pieces
                    ids += [piece.id for piece in pieces]
                    places += _characters(
                        part, [(piece.begin, piece.end) for piece in pieces], place
                    )
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
        if 0 <= token < self.vocab_size:
            return self._prompt.id_to_piece(int(token))
        return f"<{token}>"

    def piece_id(self, piece: str) -> int | None:
        token = self._prompt.piece_to_id(piece)
        is_unknown = token == self._prompt.unk_id()
        if is_unknown and piece != self._prompt.id_to_piece(token):
            return None
        return token

    def save(self, folder: pathlib.Path) -> None:
        if self.folder is not None:
            copy_companions(self.folder, folder)
        # another tokenizer's files would be read in its place
        for name in ("tokenizer.json", "spiece.model"):
            (folder / name).unlink(missing_ok=True)
        (folder / "tokenizer.model").write_bytes(self.model)


def _characters(text: str, places: Spans, start: int) -> Spans:
    """Places in the UTF-8 bytes of `text` as places in its characters, from `start`."""
    data = text.encode()
    if len(data) == len(text):
        return [(start + a, start + b) for a, b in places]

    def at(byte: int) -> int:
        return start + len(data[:byte].decode(errors="ignore"))

    return [(at(a), at(b)) for a, b in places]
