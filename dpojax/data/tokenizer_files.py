"""The files beside a tokenizer -> its special tokens' names and its flags.

And the tokens that only these files add.

tokenizer_config.json, special_tokens_map.json and added_tokens.json say things that the tokenizer's
own file does not say, or says otherwise. Where they contradict each older, transformers' present
way (5.24) is followed.
"""

import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import Any, NamedTuple

import tokenizers

from dpojax.data.chat import TEMPLATE_FOLDER
from dpojax.errors import ConfigError
from dpojax.untrusted.plain_data import read_json

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

FLAGS = ("add_bos_token", "add_prefix_space", "legacy", "tokenizer_class")


class Named(NamedTuple):
    """A special token, and the file that names it."""

    text: str
    path: pathlib.Path


class AddedToken(NamedTuple):
    """A token with its id, and the file that adds it."""

    id: int
    token: tokenizers.AddedToken
    path: pathlib.Path


class TokenizerFiles(NamedTuple):
    """What the files beside a tokenizer say."""

    names: dict[str, Named]  # by NAMES
    flags: dict[str, Any]  # by FLAGS
    added: tuple[AddedToken, ...]  # in the order of their ids
    notes: tuple[str, ...]  # where they contradict each older
    place: pathlib.Path | None  # of the config


def read_files(folder: pathlib.Path | None) -> TokenizerFiles:
    """What the files in `folder` say; nothing where there are none.

    Raises ConfigError for a damaged file.
    """
    if folder is None:
        return TokenizerFiles({}, {}, (), (), None)
    config, named = (
        read_json(folder / file) if (folder / file).is_file() else {} for file in (CONFIG, MAP)
    )
    names = _names(config, folder / CONFIG)
    notes = []
    for key, older in _names(named, folder / MAP).items():
        first = names.setdefault(key, older)
        if first.text == older.text:
            continue
        # transformers reads the older file only where the config holds no table of tokens.
        if "added_tokens_decoder" not in config:
            names[key] = older
        notes.append(
            f"{folder}: {key} is {first.text!r} in {CONFIG} and {older.text!r} in {MAP}; taken:"
            f" {names[key].text!r}"
        )
    flags = {key: config[key] for key in FLAGS if config.get(key) is not None}
    for key in ("add_bos_token", "add_prefix_space", "legacy"):
        if not isinstance(flags.get(key, True), bool):
            raise ConfigError(
                f"{folder / CONFIG}: {key} is {flags[key]!r:.60}; it must be true or false"
            )
    if "added_tokens_decoder" in config:
        added = _decoder(config["added_tokens_decoder"], folder / CONFIG)
    elif (folder / ADDED).is_file():
        added = _legacy(
            read_json(folder / ADDED), folder / ADDED, {named.text for named in names.values()}
        )
    else:
        added = []
    return TokenizerFiles(
        names,
        flags,
        tuple(sorted(added, key=lambda token: token.id)),
        tuple(notes),
        folder / CONFIG,
    )


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern with one group that finds any of the texts, the longest first.

    Without texts it finds nothing.
    """
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _names(values: dict[str, Any], path: pathlib.Path) -> dict[str, Named]:
    """The special tokens of a file, each a text or an object with its content."""
    names = {}
    for key in NAMES:
        value = values.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            names[key] = Named(text, path)
        elif value is not None:
            raise ConfigError(f"{path}: {key} is {value!r:.60}; it must be a text")
    return names


def _decoder(values: Any, path: pathlib.Path) -> list[AddedToken]:
    """added_tokens_decoder: tokens with their flags, by id."""
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    added = []
    try:
        for key, value in (values or {}).items():
            given = {field: value[field] for field in fields if field in value}
            added.append(AddedToken(int(key), tokenizers.AddedToken(**given), path))
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{path}: added_tokens_decoder is {values!r:.80}; it must be a table of tokens by id"
        ) from error
    return added


def _legacy(values: dict[str, Any], path: pathlib.Path, special: set[str]) -> list[AddedToken]:
    """added_tokens.json: ids by token. Those that are named as special tokens are special."""
    added = []
    for content, number in values.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ConfigError(
                f"{path}: the id of {content!r} is {number!r:.60}; it must be a whole number"
            )
        token = tokenizers.AddedToken(
            content, normalized=content not in special, special=content in special
        )
        added.append(AddedToken(number, token, path))
    return added


# What lies beside the weights and goes on unchanged from an import to an export.
COMPANIONS = (
    *(
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ),
    *(
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "spiece.model",
    ),
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
