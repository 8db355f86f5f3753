"""Where the reference's log-probs come from: every answer to that question.

reference.mode says which (config.schema.resolved_mode resolves auto):
  live     a frozen copy of the policy before the stage, or of reference.init
  adapter  the frozen base under the policy's adapters
  cached   log-probs of every response, computed once before the first step (reference_cache.py)
  none     nothing: the objective takes no reference
A TR-DPO reference starts as a live one and is then remembered by the state, which moves it. Else
the reference is an argument of the step, never part of the trained tree, the optimizer or a
checkpoint.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpojax.config.schema import frozen_dtype, resolved_mode
from dpojax.errors import ConfigError
from dpojax.models.placed import Policy, frozen_layout
from dpojax.models.quantise import store_as
from dpojax.runtime.context import Job
from dpojax.training.checksums import checksums
from dpojax.weights.initial import read_params
from dpojax.weights.open import ignored_fields, open_weights


class Reference(NamedTuple):
    """The reference of a stage."""

    mode: str  # live, adapter, cached, none
    params: Any  # as they are stored; None where there is none
    source: Any  # as they were before they were stored in fewer bits; the policy's, or those of
    # reference.init
    checksums: dict[str, str]  # of `source`
    dtype: str  # that `params` are stored in
    is_other: bool  # whether it is another model than the policy before the stage


def open_reference(job: Job, policy: Policy, params: Any, base: Any) -> Reference:
    """The reference of a stage that starts from `params`.

    Args:
      params: of the policy before the stage.
      base: the frozen tree under the policy's adapters; None: all parameters are trained.
    Raises: ConfigError for a reference.init of another architecture.
    """
    config = job.config
    mode = resolved_mode(config)
    is_other = bool(config.reference.init)
    source = params
    if is_other:
        source = reference_params(job, policy)
    if mode == "none":
        tree = None
    elif base is not None and mode != "live" and not is_other:
        tree = base
    else:
        c = config.reference
        tree = open_frozen(job, policy, source, c.dtype, c.rules, c.memory)
    return Reference(mode, tree, source, checksums(source), frozen_dtype(config), is_other)


def reference_params(job: Job, policy: Policy) -> Any:
    """The parameters of reference.init, in the policy's shardings.

    Raises: ConfigError for another architecture.
    """
    c = job.config
    weights = open_weights(
        c.reference.init, ignore=ignored_fields(c.model.ignore_fields), setting="reference.init"
    )
    ours = dataclasses.asdict(policy.config)
    theirs = dataclasses.asdict(weights.config)
    differ = [k for k in ours if ours[k] != theirs[k] and k not in ("init_std", "max_positions")]
    if differ:
        raise ConfigError(
            f"reference.init={c.reference.init!r}: {differ[0]} is {theirs[differ[0]]!r}, the"
            f" policy's is {ours[differ[0]]!r}; the reference must have the policy's architecture"
        )
    return read_params(job, policy, weights)


def open_frozen(
    job: Job, policy: Policy, params: Any, dtype: str, rules: dict[str, str], memory: str = "device"
) -> Any:
    """A frozen copy of all parameters.

    Args:
      dtype: that it is stored in, one of config.STORED.
      rules: of its shardings; empty: the policy's.
      memory: that it lies in: "device" or "pinned_host".
    """
    _, shardings = frozen_layout(job, policy, dtype, rules, memory)

    def stored(tree):
        return store_as(
            jax.tree.map(jnp.copy, tree), policy.config, dtype or job.config.model.param_dtype
        )

    if memory == "device":
        return jax.jit(stored, out_shardings=shardings)(params)
    _, here = frozen_layout(job, policy, dtype, rules)
    return jax.device_put(jax.jit(stored, out_shardings=here)(params), shardings)


def same_layout(tree: Any, params: Any) -> bool:
    """Whether both trees have the same structure, dtypes and shardings."""
    if jax.tree.structure(tree) != jax.tree.structure(params):
        return False
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True)
    return all(x.dtype == p.dtype and x.sharding == p.sharding for x, p in leaves)


def like(tree: Any, params: Any) -> Any:
    """The reference `tree` in the dtype and shardings of `params`, so that one program serves both.

    Of another structure (quantised, or the base of adapters) it stays as it is, and the program is
    compiled for it too.
    """
    if same_layout(tree, params) or jax.tree.structure(tree) != jax.tree.structure(params):
        return tree
    shardings = jax.tree.map(lambda p: p.sharding, params)
    dtype = jax.tree.leaves(params)[0].dtype
    return jax.jit(
        lambda t: jax.tree.map(lambda x: jnp.copy(x).astype(dtype), t), out_shardings=shardings
    )(tree)
