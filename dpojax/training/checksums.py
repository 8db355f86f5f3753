"""What tells two states, or two runs, apart: checksums of arrays, digests and fingerprints."""

import hashlib
import json
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from dpojax.errors import CheckpointError


def _leaf_checksum(x: jax.Array) -> jax.Array:
    """Two 32-bit sums of the bits, each weighted by an odd function of the position.

    A sum does not care how the array is split, so that the value is the same on any mesh; an odd
    weight has an inverse modulo 2^32, so that a change of any single element always changes it.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, size).astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis, length in enumerate(x.shape):
        position = position * jnp.uint32(length) + jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis
        )
    mixed = (position ^ (position >> 15)) * jnp.uint32(0x2C1B3C6D)
    return jnp.stack(
        [
            jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32),
            jnp.sum(bits * (mixed | 1), dtype=jnp.uint32),
        ]
    )


_checksums = jax.jit(lambda tree: jax.tree.map(_leaf_checksum, tree))


def checksums(tree: Any) -> dict[str, str]:
    """A 64-bit checksum of every leaf, by its path; independent of sharding.

    Any single flipped bit changes it.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(_checksums(tree)))
    return {jax.tree_util.keystr(path): f"{int(a):08x}{int(b):08x}" for path, (a, b) in paths}


def difference(saved: dict[str, str], found: dict[str, str]) -> str | None:
    """The first leaf whose checksum differs or that only one of both has; None if they are the
    same.
    """
    return next((k for k in sorted(saved | found) if saved.get(k) != found.get(k)), None)


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` as it is read back from disk, with a digest of everything in it."""
    plain = json.loads(json.dumps({k: v for k, v in meta.items() if k != "digest"}))
    return {**plain, "digest": digest(plain)}


def compare_fingerprints(
    saved: dict[str, Any], now: dict[str, Any], allow: Collection[str]
) -> list[str]:
    """The names that changed and may; raises CheckpointError for the first that may not, saying
    what is different.
    """
    now = json.loads(json.dumps(now))  # as the saved ones: tuples became lists
    changed = [name for name in now if saved.get(name) != now[name]]
    for name in changed:
        if name not in allow:
            then = saved.get(name)
            today = now[name]
            if isinstance(then, dict) and isinstance(today, dict):
                keys = [k for k in {**then, **today} if then.get(k) != today.get(k)]
                then, today = ({k: d.get(k) for k in keys} for d in (then, today))
            raise CheckpointError(
                f"the checkpoint was made with another {name}: {then!s:.300} then, {today!s:.300}"
                " now; restore it, use another --workdir, or allow it with"
                f" --config.checkpoint.allow_changed={name}"
            )
    return changed


def digest(value: Any) -> str:
    """A short name for plain data: changes with anything in it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
