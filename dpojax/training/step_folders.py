"""Which folders hold checkpoints: steps by their number, stages by their name."""

import pathlib
from typing import Any

COMMITTED = "commit_success.txt"  # Orbax's

_PARTS = {"state", "meta", "_CHECKPOINT_METADATA", COMMITTED}


def is_half_deleted(folder: pathlib.Path, newest: int | None) -> bool:
    """Whether a folder is what a deletion of a step leaves when it is cut off: parts of a
    checkpoint alone, and not all.

    Args:
      newest: the newest committed step, which nobody deletes: where it lacks a part, it is damaged.
    """
    if (
        not folder.name.isdigit()
        or folder.is_symlink()
        or not folder.is_dir()
        or int(folder.name) == newest
    ):
        return False
    names = {p.name for p in folder.iterdir()}
    return bool(names) and names < _PARTS


def is_step(folder: Any) -> bool:
    """Whether a folder, of Orbax's or pathlib's kind, was committed,
    and is no link to another one.
    """
    place = pathlib.Path(folder)
    return (place / COMMITTED).is_file() and not place.is_symlink()


def committed_steps(folder: pathlib.Path) -> list[int]:
    """The steps in a checkpoints folder, oldest first: folders named by a number that hold Orbax's
    commit file.
    """
    if not folder.is_dir():
        return []  # somebody removed it during the run: the next save says what it meets
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and is_step(p))


def stage_folders(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The folders of checkpoints in a workdir, of the last stage first.

    Each stage has its own: `checkpoints` is the preference stage's, `sft` SFT's, and others are
    named by their stage.
    """
    if not workdir.is_dir():
        return []
    folders = [p for p in workdir.iterdir() if p.is_dir() and committed_steps(p)]

    def age(folder: pathlib.Path) -> tuple[bool, float]:
        """SFT comes before the stages that start from it; others are told by their newest step."""
        newest = folder / str(committed_steps(folder)[-1])
        return folder.name != "sft", (newest / COMMITTED).stat().st_mtime

    return sorted(folders, key=age, reverse=True)


def newest_step(folder: pathlib.Path, *, besides: str = "") -> pathlib.Path | None:
    """The newest committed step in a step folder, a checkpoints folder or a workdir; None if there
    is none.

    Args:
      besides: the name of a stage's folder in a workdir that is passed over.
    """
    if (folder / COMMITTED).is_file():
        return folder
    stages = [place for place in stage_folders(folder) if place.name != besides]
    for place in (folder, *stages):
        if steps := committed_steps(place):
            return place / str(steps[-1])
    return None
