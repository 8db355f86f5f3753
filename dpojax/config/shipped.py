"""The configs that come with dpojax, by name: `tldr` is configs/tldr.py.

In a checkout they lie in the folder configs/ beside the package, in an installation in the package.
"""

import ast
import pathlib
import re

from dpojax.errors import did_you_mean

_PACKAGE = pathlib.Path(__file__).parents[1]


def shipped_folder() -> pathlib.Path:
    """The folder of the shipped configs: dpojax/configs of an installation, or configs/ of a
    checkout.
    """
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def shipped_names() -> list[str]:
    """The names that --config takes."""
    return sorted(file.stem for file in shipped_folder().glob("*.py"))


def shipped_file(name: str) -> pathlib.Path | None:
    """The file of a shipped config; None for a path, or a name that none has."""
    return shipped_folder() / f"{name}.py" if name in shipped_names() else None


def shipped_headlines() -> dict[str, str]:
    """The first sentence of every shipped config, by its name; no config is executed."""
    headlines = {}
    for name in shipped_names():
        tree = ast.parse((shipped_folder() / f"{name}.py").read_text(encoding="utf-8"))
        paragraph = (ast.get_docstring(tree) or "").split("\n\n")[0]
        headlines[name] = paragraph.replace("\n", " ")
    return headlines


def nearest_config(path: str) -> str:
    """What may have been meant by a path or a name that is not there, to end a message with.

    The files beside a missing path come first; a path whose folder is missing too is near the
    shipped config of its name, as `configs/tldr.py` is outside a checkout.
    """
    names = shipped_names()
    file = pathlib.Path(path)
    beside = _configs_in(file.parent)
    if not _is_name(path):
        near = did_you_mean(file.name, beside).removeprefix("; did you mean ")
        if near:
            return f"; did you mean {file.with_name(near.removesuffix('?'))}?"
        return did_you_mean(file.stem, names)
    listed = f", and no config of that name: there are {', '.join(names)}"
    return listed + (did_you_mean(path, names) or did_you_mean(f"{path}.py", beside))


def _is_name(path: str) -> bool:
    return re.fullmatch(r"\w+", path) is not None


def _configs_in(folder: pathlib.Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir() if p.suffix in (".py", ".json"))
    except (OSError, ValueError):  # no such folder, or text that can name none
        return []
