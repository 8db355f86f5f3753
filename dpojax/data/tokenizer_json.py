"""A tokenizer.json as its file says it, changed to what continuations and dialogues need."""

import copy
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers

from dpojax.data.tokenizer_files import TokenizerFiles
from dpojax.errors import ConfigError

MAX_DECODER_GROWTH = 100.0  # times the characters of the pieces; real decoders replace one by one

LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")


def without_prefix(spec: dict) -> dict:
    """The tokenizer.json `spec` changed so that nothing is put before the text.

    One that splits at white space and then marks every word has no way to write a continuation that
    is glued to the word before it; it stays as it is.
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


def check_decoder(spec: Any, path: pathlib.Path) -> None:
    """Raises ConfigError for a decoder that can run long.

    Ids become text in this process, many times a run.
    """
    nodes = [spec]
    growth = 1.0
    while nodes:
        node = nodes.pop()
        if not isinstance(node, dict):
            continue
        nodes += node.get("decoders") or []
        if node.get("type") != "Replace":
            continue
        pattern = node.get("pattern") or {}
        if "String" not in pattern:
            raise ConfigError(
                f"tokenizer {path}: its decoder holds a regular expression, {pattern!r:.80}, which"
                " is not run"
            )
        growth *= max(1.0, len(node.get("content") or "") / max(1, len(pattern["String"])))
    if growth > MAX_DECODER_GROWTH:
        raise ConfigError(
            f"tokenizer {path}: its decoder makes texts up to {growth:.3g} times as long"
        )


def for_dialogues(spec: dict, files: TokenizerFiles) -> tuple[dict, tuple[str, ...]]:
    """The tokenizer.json `spec` as transformers reads the text of a chat template, and notes of it.

    Llama's classes put a word's mark by Metaspace, in place of a file's older normalizer: at the
    start of the dialogue, and not after special tokens.
    They know no unknown piece: what the vocabulary cannot write is left out.
    """
    if files.flags.get("tokenizer_class") not in LLAMA_CLASSES or '"Prepend"' not in json.dumps(
        spec.get("normalizer")
    ):
        return spec, ()
    if files.flags.get("add_prefix_space") is False:
        scheme = "never"
    elif files.flags.get("legacy") is True:
        scheme = "always"
    else:
        scheme = "first"
    changed = {
        "normalizer": None,
        "pre_tokenizer": dict(
            type="Metaspace", replacement="\u2581", prepend_scheme=scheme, split=False
        ),
        "model": {**spec["model"], "unk_token": None, "fuse_unk": True, "byte_fallback": True},
    }
    note = (
        f"{files.place}: tokenizer_class {files.flags['tokenizer_class']} and the normalizer of"
        " tokenizer.json mark words in two ways; dialogues are read by the class's, as"
        " transformers does"
    )
    return {**spec, **changed}, (note,)


def add_tokens(same: Sequence[tokenizers.Tokenizer], files: TokenizerFiles) -> list[str]:
    """Adds the tokens that the files beside a tokenizer.json say.

    Only they know these tokens, or give them other flags.

    Args:
      same: tokenizers of one vocabulary; each gets the tokens.
    Returns: the tokens that changed, in the order of the files.
    Raises: ConfigError for a token that cannot have the id that it is given, and for a BOS or EOS
      that is nowhere.
    """
    changed: list[str] = []
    known = same[0].get_added_tokens_decoder()
    for number, token, path in files.added:
        if repr(known.get(number)) == repr(token):
            continue
        changed.append(token.content)
        for tokenizer in same:
            tokenizer.add_tokens([token])
            given = tokenizer.token_to_id(token.content)
            if given != number:
                raise ConfigError(
                    f"{path}: the token {token.content!r} is to have the id {number}, and the"
                    f" tokenizer gives it {given}"
                )
    for key in ("bos_token", "eos_token"):
        name = files.names.get(key)
        if name is None:
            continue
        if same[0].token_to_id(name.text) is None:
            raise ConfigError(
                f"{name.path}: {key} is {name.text!r}, which the vocabulary does not have"
            )
        special = {t.content for t in same[0].get_added_tokens_decoder().values() if t.special}
        if name.text not in special:
            changed.append(name.text)
            for tokenizer in same:
                tokenizer.add_special_tokens(
                    [tokenizers.AddedToken(name.text, normalized=False, special=True)]
                )
    return changed


def find_specials(tokenizer: tokenizers.Tokenizer) -> None:
    """Makes the tokenizer find special tokens in the text as it is.

    The normalizer would change some of them, and so hide them in its text.
    """
    normalizer = tokenizer.normalizer
    if not normalizer:
        return
    for token in tokenizer.get_added_tokens_decoder().values():
        if (
            token.special
            and token.normalized
            and normalizer.normalize_str(token.content) != token.content
        ):
            plain = tokenizers.AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
                special=True,
            )
            tokenizer.add_tokens([plain])
