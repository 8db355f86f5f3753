"""TrainState <-> disk: Orbax v1, asynchronous and atomic, with per-leaf checksums and fingerprints.

Orbax restores a flipped bit, another dtype or another run's weights without a word (it checks shapes
and keys only), so every checkpoint carries what is needed to refuse them.

Resume order:
  1. the newest committed step (a folder named by an integer that holds Orbax's commit file);
  2. its `meta`: step, config, fingerprints, model, checksums, and the digest of all that; a folder that is a copy
     under another number, or holds a symbolic link, is refused;
  3. every leaf's shape and dtype, then every fingerprint, is compared with this run's; a difference is refused
     unless it is allowed;
  4. `state` is restored into this run's shardings, whatever mesh it was saved from;
  5. every leaf's checksum is compared;
  6. the data continues at state.step: the order is a pure function of (seed, step).
"""

import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from dpojax.errors import CheckpointError

COMMITTED = "commit_success.txt"
MAX_FAILED_SAVES = 3


def _leaf_checksum(x: jax.Array) -> jax.Array:
    """Two 32-bit sums of the bits, each weighted by an odd function of the position.

    A sum does not care how the array is split, so that the value is the same on any mesh; an odd weight
    has an inverse modulo 2^32, so that a change of any single element always changes it.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, size).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        position = position * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = (position ^ (position >> 15)) * jnp.uint32(0x2C1B3C6D)
    return jnp.stack([jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32), jnp.sum(bits * (mixed | 1), dtype=jnp.uint32)])


_checksums = jax.jit(lambda tree: jax.tree.map(_leaf_checksum, tree))


def checksums(tree: Any) -> dict[str, str]:
    """A 64-bit checksum of every leaf, by its path; independent of sharding. Any single flipped bit changes it."""
    paths, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(tree)))
    return {jax.tree_util.keystr(path): f"{int(a):08x}{int(b):08x}" for path, (a, b) in paths}


def difference(saved: dict[str, str], found: dict[str, str]) -> str | None:
    """The first leaf whose checksum differs or that only one of both has; None if they are the same."""
    return next((k for k in sorted(saved | found) if saved.get(k) != found.get(k)), None)


class _Always:
    """Save exactly when asked."""

    def should_save(self, step, previous_steps, *, context):
        return True


class _CommittedSteps:
    """Step folders are plain integers that hold Orbax's commit file; anything else is not a checkpoint."""

    def __init__(self):
        self._names = ocp.path.step.standard_name_format()

    def build_name(self, step):
        return self._names.build_name(step)

    def find_all(self, base_path):
        return (m for m in self._names.find_all(base_path) if _is_step(m.path))

    def find_step(self, base_path, step):
        found = self._names.find_step(base_path, step)
        if not (found.path / COMMITTED).exists():
            raise ValueError(f"step {step} was never committed")
        return found


class Checkpoints:
    """The checkpoints of one stage in one folder."""

    def __init__(self, folder: pathlib.Path, *, keep: int):
        """Opens `folder`, and says which of its entries are no checkpoints.

        Args:
          keep: how many of the newest steps stay.
        """
        for name in ("absl", "asyncio"):  # Orbax narrates, and drops futures that failed; its errors are passed on here
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.folder, self.failed, self._keep, self._pending = folder.resolve(), 0, keep, False
        folder.mkdir(parents=True, exist_ok=True)
        self.strays = sorted({p.name for p in folder.iterdir()} - set(map(str, committed_steps(folder))))
        self._open()

    def _open(self) -> None:
        registry = ocp.handlers.local_registry(include_global_registry=True)
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="meta")
        context = ocp.Context()
        context.checkpointables.registry = registry
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            context=context,
            save_decision_policy=_Always(),
            preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
            step_name_format=_CommittedSteps(),
        )

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return committed_steps(self.folder)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> str | None:
        """Starts saving; returns what went wrong with its start or with the save before it, or None.

        The arrays are copied to the host before it returns; writing goes on in the background.
        Raises: CheckpointError after MAX_FAILED_SAVES failures in a row.
        """
        meta = sealed({**meta, "step": step, "checksums": checksums(state)})
        trouble = self.wait()
        if step in self.steps():
            return trouble
        try:
            self._checkpointer.save_checkpointables_async(step, {"state": state, "meta": meta})
            self._pending = True
        except Exception as error:  # Orbax passes on whatever the file system raised
            return self._failure(error)
        return trouble

    def wait(self) -> str | None:
        """Waits until the last save is committed; returns what went wrong with it, or None."""
        if not self._pending:
            return None
        self._pending = False
        try:
            self._checkpointer.wait()
        except Exception as error:
            return self._failure(error)
        self.failed = 0
        return None

    def _failure(self, error: Exception) -> str:
        self.failed += 1
        message = f"a checkpoint in {self.folder} was not saved: {type(error).__name__}: {str(error).splitlines()[0]:.400}"
        if self.failed >= MAX_FAILED_SAVES:
            raise CheckpointError(f"{message}; {self.failed} saves failed in a row") from error
        return message

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` of a step. Raises CheckpointError if it cannot be read, changed on disk, or belongs to another step."""
        folder = self.folder / str(step)
        link = next((p for p in (folder, *folder.rglob("*")) if p.is_symlink()), None)
        if link is not None:
            raise CheckpointError(f"{folder}: {link.name} is a symbolic link; a checkpoint holds none{self._fallback(step)}")
        try:
            meta = self._checkpointer.load_checkpointables(step, {"meta": None})["meta"]
        except Exception as error:
            raise self._damaged(step, error) from error
        if not isinstance(meta, dict) or meta.get("digest") != sealed(meta)["digest"]:
            raise CheckpointError(f"{folder}: the bytes of its meta changed on disk{self._fallback(step)}")
        if meta["step"] != step:
            raise CheckpointError(f"{folder}: it is a copy of step {meta['step']} under another number{self._fallback(step)}")
        return meta

    def restore(self, step: int, abstract: Any, meta: dict[str, Any]) -> Any:
        """The state of a step in the shardings and dtypes of `abstract`, a tree of ShapeDtypeStructs.

        Call `compare_shapes` first. Raises: CheckpointError naming the leaf whose checksum differs, with the step
          to fall back to.
        """
        saved = self._saved(step)
        own = {_path(p) for p, _ in jax.tree_util.tree_flatten_with_path(abstract)[0]}
        if extra := sorted(set(saved) - own):
            raise CheckpointError(
                f"{self.folder / str(step)}: it holds {extra[0]}, which this run does not have; use the model and optimizer of that "
                "run, or another --workdir"
            )
        as_saved = jax.tree_util.tree_map_with_path(
            lambda p, x: jax.ShapeDtypeStruct(x.shape, saved[_path(p)].dtype, sharding=x.sharding), abstract
        )
        try:
            state = self._checkpointer.load_checkpointables(step, {"state": as_saved})["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        self._check(step, meta["checksums"], state)
        # In the dtypes as saved the checksums hold; another one, where it is allowed, comes after.
        return jax.tree.map(lambda x, to: x if x.dtype == to.dtype else x.astype(to.dtype), state, abstract)

    def _check(self, step: int, saved: dict[str, str], restored: Any) -> None:
        leaf = difference(saved, checksums(restored))
        if leaf is not None:
            raise CheckpointError(f"{self.folder / str(step)}: the bytes of {leaf} changed on disk{self._fallback(step)}")

    def _saved(self, step: int) -> dict[str, Any]:
        """Every leaf of a step's state as it lies on disk, with its shape and dtype, by its place."""
        try:
            saved = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        if not jax.tree.leaves(saved):
            raise self._damaged(step, ValueError("its metadata names no array"))
        return {_path(p): x for p, x in jax.tree_util.tree_flatten_with_path(saved)[0]}

    def restore_params(self, step: int, abstract: Any, shardings: Any, meta: dict[str, Any]) -> Any:
        """The parameters alone of a step, without reading the rest; arguments shaped like the parameters.

        They come in the dtypes of `abstract`. Raises: CheckpointError as `compare_shapes` and `restore`.
        """
        self.compare_shapes(step, {"params": abstract}, cast=True)
        saved = self._saved(step)
        target = jax.tree_util.tree_map_with_path(
            lambda p, x, s: jax.ShapeDtypeStruct(x.shape, saved[f"params/{_path(p)}"].dtype, sharding=s), abstract, shardings
        )
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                state = ocp.load_checkpointables(self.folder / str(step), {"state": {"params": target}})["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        params = state["params"]
        mine = {k.removeprefix(".params"): v for k, v in meta["checksums"].items() if k.startswith(".params")}
        self._check(step, mine, params)
        return jax.tree.map(lambda x, to: x if x.dtype == to.dtype else x.astype(to.dtype), params, abstract)

    def compare_shapes(self, step: int, abstract: Any, *, cast: bool) -> None:
        """Raises CheckpointError for the first leaf of `abstract` that the step lacks or holds in another shape or dtype.

        Args:
          cast: another dtype is allowed.
        """
        saved = self._saved(step)
        show = lambda x: "missing" if x is None else f"{np.dtype(x.dtype).name}{list(x.shape)}"
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
            found = saved.get(_path(path))
            same_shape = found is not None and tuple(found.shape) == tuple(leaf.shape)
            same_dtype = found is not None and np.dtype(found.dtype) == np.dtype(leaf.dtype)
            if same_shape and (same_dtype or cast):
                continue
            fix = "use the model and optimizer of that run, or another --workdir"
            if same_shape:
                fix = "use that run's model.param_dtype, or allow it with --config.checkpoint.allow_changed=dtype"
            raise CheckpointError(
                f"{self.folder / str(step)}: {_path(path)} is {show(found)}, this run's is {show(leaf)}; {fix}"
            )

    def _damaged(self, step: int, error: Exception) -> CheckpointError:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return CheckpointError(f"{self.folder / str(step)}: cannot be read: {cause!s:.500}{self._fallback(step)}")

    def _fallback(self, step: int) -> str:
        older = [s for s in self.steps() if s < step]
        if not older:
            return "; there is no older step: start again in another --workdir"
        return f"; to continue from the step before, add --config.checkpoint.restore_step={older[-1]}"

    def descends_from(self, step: int, fallback: int) -> bool:
        """Whether `step` was saved by a run that had fallen back to step `fallback`; False if it cannot be read."""
        try:
            return fallback in self.meta(step).get("fallbacks", [])
        except CheckpointError:
            return False

    def set_aside_after(self, step: int) -> list[str]:
        """Renames the steps after `step`, which a run that falls back writes anew; returns their new names."""
        multihost_utils.sync_global_devices("all processes have read the checkpoint")
        newer = [s for s in self.steps() if s > step]
        multihost_utils.sync_global_devices("all processes know the newer checkpoints")
        if not newer:
            return []
        self._checkpointer.close()
        names = {s: f"set-aside-{s}" for s in newer}
        if jax.process_index() == 0:
            for s, name in names.items():
                if (self.folder / name).exists():
                    shutil.rmtree(self.folder / name)
                (self.folder / str(s)).rename(self.folder / name)
        multihost_utils.sync_global_devices("the newer checkpoints are set aside")
        self._open()  # Orbax remembers the steps that it found
        return list(names.values())

    def remove_half_deleted(self) -> list[str]:
        """Removes the steps that a kill left half deleted.

        Returns: their names. Process 0 removes them.
        """
        newest = max(self.steps(), default=None)
        names = [p.name for p in self.folder.iterdir() if _is_half_deleted(p, newest)]
        multihost_utils.sync_global_devices("all processes have looked for half-deleted checkpoints")
        if jax.process_index() == 0:
            for name in names:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self.strays = [name for name in self.strays if name not in names]
        return names

    def close(self) -> None:
        """Waits for the last save and releases Orbax's threads."""
        self._checkpointer.close()


def _path(path: tuple) -> str:
    """A leaf's place as text, the same for a tree of ours and for the one that Orbax describes."""
    name = lambda entry: next(str(getattr(entry, a)) for a in ("key", "name", "idx") if hasattr(entry, a))
    return "/".join(map(name, path))


_PARTS = {"state", "meta", "_CHECKPOINT_METADATA", COMMITTED}


def _is_half_deleted(folder: pathlib.Path, newest: int | None) -> bool:
    """Whether a folder is what a deletion of a step leaves when it is cut off: parts of a checkpoint alone, and not all.

    Args:
      newest: the newest committed step, which nobody deletes: where it lacks a part, it is damaged.
    """
    if not folder.name.isdigit() or folder.is_symlink() or not folder.is_dir() or int(folder.name) == newest:
        return False
    names = {p.name for p in folder.iterdir()}
    return bool(names) and names < _PARTS


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` as it is read back from disk, with a digest of everything in it."""
    plain = json.loads(json.dumps({k: v for k, v in meta.items() if k != "digest"}))
    return {**plain, "digest": digest(plain)}


def _is_step(folder: Any) -> bool:
    """Whether a folder, of Orbax's or pathlib's kind, was committed, and is no link to another one."""
    place = pathlib.Path(folder)
    return (place / COMMITTED).is_file() and not place.is_symlink()


def committed_steps(folder: pathlib.Path) -> list[int]:
    """The steps in a checkpoints folder, oldest first: folders named by a number that hold Orbax's commit file."""
    if not folder.is_dir():
        return []  # somebody removed it during the run: the next save says what it meets
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and _is_step(p))


def newest_step(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest committed step in a step folder, a checkpoints folder or a workdir; None if there is none."""
    if (folder / COMMITTED).is_file():
        return folder
    for place in (folder, folder / "checkpoints", folder / "sft"):  # of SFT alone, or before the first one of DPO
        if place.is_dir() and (steps := committed_steps(place)):
            return place / str(steps[-1])
    return None


def compare_fingerprints(saved: dict[str, Any], now: dict[str, Any], allow: Collection[str]) -> list[str]:
    """The names that changed and may; raises CheckpointError for the first that may not, saying what is different."""
    now = json.loads(json.dumps(now))  # as the saved ones: tuples became lists
    changed = [name for name in now if saved.get(name) != now[name]]
    for name in changed:
        if name not in allow:
            then, today = saved.get(name), now[name]
            if isinstance(then, dict) and isinstance(today, dict):
                keys = [k for k in {**then, **today} if then.get(k) != today.get(k)]
                then, today = ({k: d.get(k) for k in keys} for d in (then, today))
            raise CheckpointError(
                f"the checkpoint was made with another {name}: {then!s:.300} then, {today!s:.300} now; "
                f"restore it, use another --workdir, or allow it with --config.checkpoint.allow_changed={name}"
            )
    return changed


def digest(value: Any) -> str:
    """A short name for plain data: changes with anything in it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
