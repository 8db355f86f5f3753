"""A folder or a file -> its tokenizer, its chat template, and the ids that end a response."""

import math
import pathlib
import re
import struct

from sentencepiece import sentencepiece_model_pb2

from dpojax.data.chat import ChatTemplate, find_templates
from dpojax.data.json_tokenizer import open_json_tokenizer
from dpojax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from dpojax.data.template_sandbox import TemplateError
from dpojax.data.tokenizer_files import TokenizerFiles, read_files
from dpojax.data.tokenizers import CONTROL_TEXT, ROLE_TEXTS, TOKENIZER_NAMES, Tokenizer
from dpojax.errors import ConfigError
from dpojax.untrusted import sandbox
from dpojax.untrusted.plain_data import (
    existing_path,
    number_fault,
    read_bytes,
    read_json,
    read_text,
)


def _from_llama2c(data: bytes, path: str) -> bytes:
    """A llama2.c tokenizer.bin as a sentencepiece model.

    The file holds the longest piece's size; then score, length and text of each piece.

    The format is that of github.com/karpathy/llama2.c: pieces of a BPE model with byte fallback,
    white space written out.
    """
    spec = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    place = 4  # pyright: ignore[reportAttributeAccessIssue]
    kinds = {0: 2, 1: 3, 2: 3}  # <unk>, and the control pieces <s> and </s>
    while place < len(data):
        if place + 8 > len(data):
            raise ConfigError(f"tokenizer {path!r}: not a llama2.c tokenizer.bin: it is cut short")
        score, length = struct.unpack_from("<fi", data, place)
        text = data[place + 8 : place + 8 + length]
        place += 8 + length
        number = len(spec.pieces)
        if not 0 < length < 1000 or place > len(data) or not math.isfinite(score):
            raise ConfigError(
                f"tokenizer {path!r}: not a llama2.c tokenizer.bin: piece {number} is damaged"
            )
        piece = text.decode("utf-8", errors="replace")
        byte = re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
        names = {0: "<unk>", 1: "<s>", 2: "</s>"}  # it keeps them with line breaks around them
        plain = names.get(number) or (piece if byte else piece.replace(" ", "\u2581"))
        spec.pieces.add(piece=plain, score=score, type=kinds.get(number, 6 if byte else 1))
    spec.trainer_spec.model_type = 2
    spec.trainer_spec.byte_fallback = True
    spec.normalizer_spec.add_dummy_prefix = True
    spec.normalizer_spec.remove_extra_whitespaces = False
    return spec.SerializeToString()


def load_tokenizer(path: str) -> Tokenizer:
    """Opens a tokenizer.

    `.model`, `tokenizer.json`, a folder that holds one of them, or a llama2.c tokenizer `.bin`.

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
        files = [file / n for n in TOKENIZER_NAMES if (file / n).is_file()]
        if not files:
            raise ConfigError(
                f"tokenizer {path!r}: the folder holds neither tokenizer.json nor tokenizer.model"
            )
        file = files[0]
    if file.suffix == ".json":
        return open_json_tokenizer(file)
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
            what = (
                "it is a folder; name the .jinja file in it"
                if is_folder
                else "there is no such file"
            )
            raise ConfigError(f"data.chat_template={file!r}: {what}")
        source = read_text(path)
        name = f"data.chat_template={file!r}"
    else:
        templates = {} if tokenizer.folder is None else find_templates(tokenizer.folder)
        name = f"the chat template in {tokenizer.folder}"
        if templates and "default" not in templates:
            raise ConfigError(
                f"{tokenizer.folder}: it holds the chat templates {', '.join(sorted(templates))},"
                " and none is the default; name a file in data.chat_template"
            )
        source = templates.get("default")
        tool_use = templates.get("tool_use", "")
    if source is None:
        return None
    files = read_files(tokenizer.folder)
    names = {key: named.text for key, named in files.names.items()}
    if tokenizer.bos_id is not None:
        names.setdefault("bos_token", tokenizer.piece(tokenizer.bos_id))
    names.setdefault("eos_token", tokenizer.piece(tokenizer.eos_id))
    template = ChatTemplate(
        source, tuple(sorted(names.items())), tuple(tokenizer.specials()), name, tool_use
    )
    _check_control_texts(template, tokenizer, files)
    return template


def _check_control_texts(
    template: ChatTemplate, tokenizer: Tokenizer, files: TokenizerFiles
) -> None:
    """Raises ConfigError for a special text that is not read as one token.

    The template writes it, and the tokenizer does not know it.

    These are the tokens that the tokenizer's files name, and what looks like a token in two example
    dialogues. Names of roles are none: several models spell their turns in plain text (<|user|>).
    """
    for key, named in files.names.items():
        if tokenizer.piece_id(named.text) is None and re.search(
            rf"\b{key}\b", template.source + template.tool_use
        ):
            raise ConfigError(
                f"{template.name}: it writes {key}, {named.text!r} in {named.path}, which the"
                " vocabulary lacks"
            )
    for _, token, path in files.added:
        if (
            tokenizer.piece_id(token.content) is None
            and token.content in template.source + template.tool_use
        ):
            raise ConfigError(
                f"{template.name}: it writes {token.content!r}, which {path} names and the"
                f" tokenizer in {tokenizer.folder} does not have; save the tokenizer with a"
                " tokenizer.json"
            )
    try:
        written = "".join(sandbox.call(_example_texts, template))
    except sandbox.SandboxError as error:
        raise ConfigError(f"{template.name}: it {error}") from error
    for text in dict.fromkeys(CONTROL_TEXT.findall(written)):
        if text.lower() not in ROLE_TEXTS and len(tokenizer.encode_chat(text, before="a")[0]) != 1:
            raise ConfigError(
                f"{template.name}: it writes {text!r}, which is no token of the tokenizer in"
                f" {tokenizer.folder}; take the tokenizer that the template was made for, or"
                " another template (data.chat_template)"
            )


def _example_texts(template: ChatTemplate) -> list[str]:
    """A dialogue as the template writes it, with and without a system turn.

    Those that the template refuses are left out.
    """
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
    """The tokens that end a response.

    EOS, those of generation_config.json, and what the chat template puts after an answer.

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
    stop_ids = [tokenizer.eos_id]
    path = None
    if tokenizer.folder is not None:
        path = tokenizer.folder / "generation_config.json"
    if path is not None and path.is_file():
        ends = read_json(path).get("eos_token_id")
        if ends is None:
            ends = []
        if not isinstance(ends, list):
            ends = [ends]
        for end in ends:
            if number_fault(end, int) or end < 0:
                raise ConfigError(
                    f"{path}: eos_token_id is {ends!r:.80}; it must be a token id, or a list of"
                    " them"
                )
        stop_ids += ends
    if template is not None:
        try:
            (words,) = template.split(
                [{"role": "user", "content": "Hello"}],
                [{"role": "assistant", "content": "Good day"}],
            )
        except TemplateError:
            # one that takes other dialogues alone, or cannot be split: rows will say so
            return tuple(dict.fromkeys(stop_ids))
        ids, spans = tokenizer.encode_chat(words.response, before=words.prompt, spans=True)
        special = set(tokenizer.specials().values())
        end = words.content[1] if words.content else 0
        stop_ids += [
            i for i, (start, _) in zip(ids, spans, strict=True) if i in special and start >= end
        ][:1]
    return tuple(dict.fromkeys(stop_ids))
