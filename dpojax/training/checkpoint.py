"""TrainState <-> disk: Orbax v1, asynchronous and atomic, with per-leaf checksums and fingerprints.

Orbax restores a flipped bit, another dtype or another run's weights without a word (it checks
shapes and keys only), so every checkpoint carries what is needed to refuse them.

Resume order:
  1. the newest committed step (a folder named by an integer that holds Orbax's commit file);
  2. its `meta`: step, config, fingerprints, model, checksums, and the digest of all that; a folder
     that is a copy under another number, or holds a symbolic link, is refused;
  3. every leaf's shape and dtype, then every fingerprint, is compared with this run's; a difference
     is refused unless it is allowed;
  4. `state` is restored into this run's shardings, whatever mesh it was saved from;
  5. every leaf's checksum is compared;
  6. the data continues at state.step: the order is a pure function of (seed, step).
"""

import logging
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from dpojax.errors import CheckpointError
from dpojax.training.checksums import checksums, difference, sealed
from dpojax.training.step_folders import COMMITTED, committed_steps, is_half_deleted, is_step

MAX_FAILED_SAVES = 3


class _Always:
    """Save exactly when asked."""

    def should_save(self, step, previous_steps, *, context):
        return True


class _CommittedSteps:
    """Step folders are plain integers that hold Orbax's commit file; anything else is not a
    checkpoint.
    """

    def __init__(self):
        self._names = ocp.path.step.standard_name_format()

    def build_name(self, step):
        return self._names.build_name(step)

    def find_all(self, base_path):
        return (m for m in self._names.find_all(base_path) if is_step(m.path))

    def find_step(self, base_path, step):
        found = self._names.find_step(base_path, step)
        if not (found.path / COMMITTED).exists():
            raise ValueError(f"step {step} was never committed")
        return found


class Checkpoints:
    """The checkpoints of one stage in one folder."""

    def __init__(self, folder: pathlib.Path, *, keep: int | None):
        """Opens `folder`, and says which of its entries are no checkpoints.

        Args:
          keep: how many of the newest steps stay; None: all of them.
        """
        # Orbax narrates, and drops futures that failed; its errors are passed on here
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self.folder = folder.resolve()
        self.failed = 0
        self._keep = keep
        self._pending = False
        folder.mkdir(parents=True, exist_ok=True)
        self.strays = sorted(
            {p.name for p in folder.iterdir()} - set(map(str, committed_steps(folder)))
        )
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
        """Starts saving; returns what went wrong with its start or with the save before it, or
        None.

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
        message = (
            f"a checkpoint in {self.folder} was not saved: {type(error).__name__}:"
            f" {str(error).splitlines()[0]:.400}"
        )
        if self.failed >= MAX_FAILED_SAVES:
            raise CheckpointError(f"{message}; {self.failed} saves failed in a row") from error
        return message

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` of a step.

        Raises CheckpointError if it cannot be read, changed on disk, or belongs to another step.
        """
        folder = self.folder / str(step)
        link = next((p for p in (folder, *folder.rglob("*")) if p.is_symlink()), None)
        if link is not None:
            raise CheckpointError(
                f"{folder}: {link.name} is a symbolic link; a checkpoint holds"
                f" none{self._fallback(step)}"
            )
        try:
            meta = self._checkpointer.load_checkpointables(step, {"meta": None})["meta"]
        except Exception as error:
            raise self._damaged(step, error) from error
        if not isinstance(meta, dict) or meta.get("digest") != sealed(meta)["digest"]:
            raise CheckpointError(
                f"{folder}: the bytes of its meta changed on disk{self._fallback(step)}"
            )
        if meta["step"] != step:
            raise CheckpointError(
                f"{folder}: it is a copy of step {meta['step']} under another"
                f" number{self._fallback(step)}"
            )
        return meta

    def restore(self, step: int, abstract: Any, meta: dict[str, Any]) -> Any:
        """The state of a step in the shardings and dtypes of `abstract`, a tree of
        ShapeDtypeStructs.

        Call `compare_shapes` first. Raises: CheckpointError naming the leaf whose checksum differs,
        with the step
          to fall back to.
        """
        saved = self._saved(step)
        own = {_path(p) for p, _ in jax.tree_util.tree_flatten_with_path(abstract)[0]}
        if extra := sorted(set(saved) - own):
            raise CheckpointError(
                f"{self.folder / str(step)}: it holds {extra[0]}, which this run does not have; use"
                " the model and optimizer of that run, or another --workdir"
            )
        as_saved = jax.tree_util.tree_map_with_path(
            lambda p, x: jax.ShapeDtypeStruct(x.shape, saved[_path(p)].dtype, sharding=x.sharding),
            abstract,
        )
        try:
            state = self._checkpointer.load_checkpointables(step, {"state": as_saved})["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        self._check(step, meta["checksums"], state)
        # In the dtypes as saved the checksums hold; another one, where it is allowed, comes after.
        return jax.tree.map(
            lambda x, to: x if x.dtype == to.dtype else x.astype(to.dtype), state, abstract
        )

    def _check(self, step: int, saved: dict[str, str], restored: Any) -> None:
        leaf = difference(saved, checksums(restored))
        if leaf is not None:
            raise CheckpointError(
                f"{self.folder / str(step)}: the bytes of {leaf} changed on"
                f" disk{self._fallback(step)}"
            )

    def _saved(self, step: int) -> dict[str, Any]:
        """Every leaf of a step's state as it lies on disk, with its
        shape and dtype, by its place.
        """
        try:
            saved = self._checkpointer.checkpointables_metadata(step).metadata["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        if not jax.tree.leaves(saved):
            raise self._damaged(step, ValueError("its metadata names no array"))
        return {_path(p): x for p, x in jax.tree_util.tree_flatten_with_path(saved)[0]}

    def restore_params(self, step: int, abstract: Any, shardings: Any, meta: dict[str, Any]) -> Any:
        """The policy's parameters alone of a step, without reading the rest; arguments shaped like
        them.

        They come in the dtypes of `abstract`. Raises: CheckpointError as `compare_shapes` and
        `restore`.
        """
        saved = self._saved(step)
        place = _policy_place(saved)
        self.compare_shapes(step, _nested(place, abstract), cast=True)
        prefix = "/".join(place)
        target = jax.tree_util.tree_map_with_path(
            lambda p, x, s: jax.ShapeDtypeStruct(
                x.shape, saved[f"{prefix}/{_path(p)}"].dtype, sharding=s
            ),
            abstract,
            shardings,
        )
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        try:
            with context:
                state = ocp.load_checkpointables(
                    self.folder / str(step), {"state": _nested(place, target)}
                )["state"]
        except Exception as error:
            raise self._damaged(step, error) from error
        params = state
        for name in place:
            params = params[name]
        start = "".join([f".{place[0]}", *(f"[{name!r}]" for name in place[1:])])
        checksums = {
            k.removeprefix(start): v for k, v in meta["checksums"].items() if k.startswith(start)
        }
        self._check(step, checksums, params)
        return jax.tree.map(
            lambda x, to: x if x.dtype == to.dtype else x.astype(to.dtype), params, abstract
        )

    def compare_shapes(self, step: int, abstract: Any, *, cast: bool) -> None:
        """Raises CheckpointError for the first leaf of `abstract` that the step lacks or holds in
        another shape or dtype.

        Args:
          cast: another dtype is allowed.
        """
        saved = self._saved(step)
        places = {_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(abstract)[0]}
        if any(p.startswith(f"{POLICY_PLACE}/") for p in places) and not _has_roles(saved):
            raise CheckpointError(
                f"{self.folder / str(step)}: dpojax 0.1 wrote it, whose states had no roles, and"
                " its optimizer's state cannot go on here; start from its weights with"
                " --config.model.init=WORKDIR and another --workdir"
            )

        def show(x):
            return "missing" if x is None else f"{np.dtype(x.dtype).name}{list(x.shape)}"

        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
            found = saved.get(_path(path))
            same_shape = found is not None and tuple(found.shape) == tuple(leaf.shape)
            same_dtype = found is not None and np.dtype(found.dtype) == np.dtype(leaf.dtype)
            if same_shape and (same_dtype or cast):
                continue
            fix = "use the model and optimizer of that run, or another --workdir"
            if same_shape:
                fix = (
                    "use that run's model.param_dtype, or allow it with"
                    " --config.checkpoint.allow_changed=dtype"
                )
            raise CheckpointError(
                f"{self.folder / str(step)}: {_path(path)} is {show(found)}, this run's is"
                f" {show(leaf)}; {fix}"
            )

    def _damaged(self, step: int, error: Exception) -> CheckpointError:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return CheckpointError(
            f"{self.folder / str(step)}: cannot be read: {cause!s:.500}{self._fallback(step)}"
        )

    def _fallback(self, step: int) -> str:
        older = [s for s in self.steps() if s < step]
        if not older:
            return "; there is no older step: start again in another --workdir"
        return (
            f"; to continue from the step before, add --config.checkpoint.restore_step={older[-1]}"
        )

    def descends_from(self, step: int, fallback: int) -> bool:
        """Whether `step` was saved by a run that had fallen back to step `fallback`; False if it
        cannot be read.
        """
        try:
            return fallback in self.meta(step).get("fallbacks", [])
        except CheckpointError:
            return False

    def set_aside_after(self, step: int) -> list[str]:
        """Renames the steps after `step`, which a run that falls back writes anew; returns their
        new names.
        """
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
        names = [p.name for p in self.folder.iterdir() if is_half_deleted(p, newest)]
        multihost_utils.sync_global_devices(
            "all processes have looked for half-deleted checkpoints"
        )
        if jax.process_index() == 0:
            for name in names:
                shutil.rmtree(self.folder / name, ignore_errors=True)
        self.strays = [name for name in self.strays if name not in names]
        return names

    def close(self) -> None:
        """Waits for the last save and releases Orbax's threads."""
        self._checkpointer.close()


POLICY_PLACE = "params/policy"  # of the policy's parameters in a state


def _has_roles(saved: Mapping[str, Any]) -> bool:
    """Whether a saved state holds its parameters by role; dpojax 0.1 held the policy's alone."""
    return any(place.startswith(f"{POLICY_PLACE}/") for place in saved)


def _policy_place(saved: Mapping[str, Any]) -> list[str]:
    """Where the policy's parameters lie in a saved state, from the outside in."""
    if _has_roles(saved):
        return ["params", "policy"]
    return ["params"]


def _nested(place: Sequence[str], tree: Any) -> Any:
    """The tree under these names, the first outermost."""
    for name in reversed(place):
        tree = {name: tree}
    return tree


def _path(path: tuple) -> str:
    """A leaf's place as text, the same for a tree of ours and for the one that Orbax describes."""

    def name(entry):
        return next(str(getattr(entry, a)) for a in ("key", "name", "idx") if hasattr(entry, a))

    return "/".join(map(name, path))
