"""A checkpoint is what it was when it was saved, or is refused: its meta, its number, links, and
what a deletion left.
"""

import json
import shutil

import jax.numpy as jnp
import pytest

from dpojax.errors import CheckpointError
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.step_folders import COMMITTED, newest_step

META = {"config": {"optim": {"name": "adamw"}}, "fields": {"rope_theta": 10000.0}, "sizes": (1, 2)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=9)
    for step in (2, 4):
        checkpoints.save(
            step,
            {"params": {"w": jnp.arange(step, dtype=jnp.float32)}, "step": jnp.int32(step)},
            META,
        )
        assert checkpoints.wait() is None
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def read(folder, step=4):
    return Checkpoints(folder, keep=9).meta(step)


def meta_file(folder):
    (file,) = [
        p for p in (folder / "4/meta").iterdir() if "rope_theta" in p.read_text(errors="replace")
    ]
    return file


def test_a_meta_comes_back_as_it_was(folder):
    meta = read(folder)
    assert meta["fields"] == META["fields"] and meta["step"] == 4 and meta["sizes"] == [1, 2]


def test_any_changed_byte_of_the_meta_is_refused_with_the_step_to_fall_back_to(folder):
    file = meta_file(folder)
    good = file.read_bytes()
    for at in range(0, len(good), max(1, len(good) // 40)):
        changed = bytearray(good)
        changed[at] ^= 1
        file.write_bytes(changed)
        if json.loads(good) == _parsed(changed):
            continue  # white space between two values
        with pytest.raises(CheckpointError, match=r"checkpoints/4: .*restore_step=2"):
            read(folder)


def _parsed(data):
    try:
        return json.loads(bytes(data))
    except ValueError:
        return None


def test_a_meta_without_its_seal_is_refused(folder):
    file = meta_file(folder)
    values = json.loads(file.read_text())
    del values["digest"]
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="meta changed on disk"):
        read(folder)


def test_a_copied_step_is_not_the_step_that_its_name_says(folder):
    shutil.copytree(folder / "4", folder / "99")
    assert newest_step(folder).name == "99"
    with pytest.raises(CheckpointError, match=r"99: it is a copy of step 4 .*restore_step=4"):
        read(folder, 99)


@pytest.mark.parametrize("place", ["", "state", "meta", "_CHECKPOINT_METADATA"])
def test_a_symbolic_link_is_refused(folder, tmp_path, place):
    inside = folder / "4" / place
    inside.rename(tmp_path / "elsewhere")
    inside.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        read(folder)


@pytest.mark.parametrize(
    "gone", [[COMMITTED], ["meta"], ["_CHECKPOINT_METADATA", COMMITTED, "meta"], ["state"]]
)
def test_what_a_deletion_left_of_an_old_step_is_removed(folder, gone):
    for name in gone:
        path = folder / "2" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    checkpoints = Checkpoints(folder, keep=9)
    assert (
        checkpoints.remove_half_deleted() == ["2"]
        and not (folder / "2").exists()
        and (folder / "4").exists()
    )
    assert checkpoints.strays == []


def test_what_is_no_checkpoint_stays(folder):
    (folder / "7").mkdir()
    (folder / "8").mkdir()
    (folder / "8/notes.txt").write_text("mine")
    (folder / "9").write_text("a file")
    (folder / "10").symlink_to(folder / "2")
    shutil.rmtree(folder / "4/meta")  # the newest one is damaged, and not half deleted
    checkpoints = Checkpoints(folder, keep=9)
    assert checkpoints.remove_half_deleted() == []
    assert {p.name for p in folder.iterdir()} == {"2", "4", "7", "8", "9", "10"}


def test_another_optimizers_state_is_named(folder):
    checkpoints = Checkpoints(folder, keep=9)
    abstract = {"params": {"w": jnp.zeros(4)}}
    with pytest.raises(CheckpointError, match="it holds step, which this run does not have"):
        checkpoints.restore(4, abstract, read(folder))


def test_a_folder_that_disappears_is_made_again_or_said(folder):
    checkpoints = Checkpoints(folder, keep=9)
    shutil.rmtree(folder.parent)
    state = {"params": {"w": jnp.zeros(4)}, "step": jnp.int32(6)}
    troubles = [checkpoints.save(6, state, META), checkpoints.wait()]
    assert checkpoints.steps() == ([] if any(troubles) else [6])
    checkpoints.close()
