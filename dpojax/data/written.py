"""How a run writes and cuts its text: dpojax.json.

It lies beside the tokenizer, in a workdir and in an export.

A model answers as trained only to prompts that are written as in training. Templates, limits and
masks therefore travel with the weights, and generate, score and audit read them from there.
"""

import json
import pathlib
from typing import Any, NamedTuple

from dpojax.errors import ConfigError
from dpojax.untrusted.plain_data import read_json

FILE = "dpojax.json"


class Writing(NamedTuple):
    """The settings of config.data that make token ids of a row, by the same names."""

    prompt_template: str = ""
    text_as_chat: bool = False
    max_prompt_tokens: int = 0  # 0: none is cut
    max_response_tokens: int = 0
    mask_tokens: str = ""
    mask_template: bool = False

    def save(self, folder: pathlib.Path) -> None:
        """Writes the file into a tokenizer's folder."""
        (folder / FILE).write_text(json.dumps(self._asdict(), indent=2) + "\n", encoding="utf-8")


def read_writing(folder: str | pathlib.Path) -> Writing | None:
    """What lies beside a tokenizer; None if no run of dpojax wrote it.

    Raises: ConfigError for a damaged file.
    """
    path = pathlib.Path(folder)
    path = path / FILE if path.is_dir() else path.parent / FILE
    if not path.is_file():
        return None
    values: dict[str, Any] = read_json(path)
    kinds = {key: type(default) for key, default in Writing._field_defaults.items()}
    for key, value in values.items():
        if key not in kinds or type(value) is not kinds[key] or (kinds[key] is int and value < 0):
            raise ConfigError(
                f"{path}: {key} is {value!r:.60}; it holds {', '.join(kinds)} as a run writes them"
            )
    return Writing(**values)
