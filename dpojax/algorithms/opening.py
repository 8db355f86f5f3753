"""What preference training starts from: the policy that is trained, its reference, rows, caches."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.algorithms.face import Inputs, Start
from dpojax.data.batches import PackGroups
from dpojax.data.open import Data
from dpojax.data.packing import PackShape
from dpojax.evaluation.samples import Sampling
from dpojax.models.config import ModelConfig
from dpojax.models.params import num_params
from dpojax.models.placed import (
    Policy,
    adapted,
    build_model,
    fitted,
    frozen_layout,
    kernel_name,
)
from dpojax.runtime.context import Job
from dpojax.runtime.log import duration
from dpojax.training import selfcheck
from dpojax.training.checksums import checksums
from dpojax.training.gradients import full_params
from dpojax.training.rows import batch_shape, describe_rows, packer
from dpojax.training.scores import make_token_logps_step
from dpojax.weights import reference_cache
from dpojax.weights.initial import initial_adapters
from dpojax.weights.reference import Reference, open_frozen, open_reference

LARGEST_CHECKED = 1e9  # parameters: self_check=auto skips larger models


class Opened(NamedTuple):
    """What preference training starts from."""

    data: Data
    policy: Policy  # fitted to the rows
    trained: Policy  # where the trained parameters lie: the same, or the adapters
    params: Any  # trained ones before the first step, which the stage's state takes
    base: Any  # frozen parameters under adapters, or None
    reference: Reference
    checksums: dict[str, str]  # of the policy's whole parameters before the stage
    groups: int  # per step
    train_pack: PackGroups
    eval_pack: PackGroups | None  # None: there are no held-out preferences
    sampler: Sampling | None
    check: selfcheck.CheckResult | None

    @property
    def full(self) -> Callable[[Any], Any]:
        """Trained parameters -> the policy's."""
        return full_params({"base": self.base})

    @property
    def frozen(self) -> dict[str, Any]:
        """The trees that no step changes, by role."""
        return {"reference": self.reference.params, "base": self.base}


def open_preferences(job: Job, inputs: Inputs, start: Start) -> Opened:
    """Opens everything that preference training needs, from what the stages before left.

    Nothing of the workdir is changed before it is known that the run may go on in it.
    Raises: DpojaxError for what a user can mend.
    """
    data = inputs.data
    groups = inputs.groups
    config = job.config
    params = start.params()
    weights = checksums(params)
    base = None
    if config.lora.rank:
        base = open_frozen(job, inputs.policy, params, config.lora.base_dtype, {})
    reference = open_reference(job, inputs.policy, params, base)
    indexes = [i for i in (data.train_index, data.eval_index) if i is not None]
    shape = batch_shape(job, inputs.policy, indexes, groups)
    kernel, reason = kernel_name(job, inputs.policy.config, shape.layout)
    why = f" ({reason})" if reason else ""
    job.say(f"{describe_rows(shape)}, attention {kernel}{why}")
    policy = fitted(job, inputs.policy, shape)
    pack = packer(job, data.train, data.train_index, shape)
    rounding = functools.partial(_say_rounding, job, policy, pack, groups)
    if reference.params is not None and reference.params is not base:
        rounding(reference.source, reference.params, config.reference.dtype)
    if reference.is_other:
        jax.tree.map(lambda x: x.delete(), reference.source)
    reference = reference._replace(source=None)
    trained = policy
    if config.lora.rank:
        rounding(params, base, config.lora.base_dtype)
        trained, params = start_adapters(job, policy, params)
    opened = Opened(
        data=data,
        policy=policy,
        trained=trained,
        params=params,
        base=base,
        reference=reference,
        checksums=weights,
        groups=groups,
        train_pack=pack,
        eval_pack=None,
        sampler=None,
        check=None,
    )
    opened = opened._replace(check=_self_check(job, opened, shape))
    opened = opened._replace(sampler=open_sampler(job, inputs))
    if start.resumed is None:
        # A checkpoint that is there is still to be read and compared, weights included.
        job.commit()
    return _with_packs(job, opened, shape)


def start_adapters(job: Job, policy: Policy, params: Any) -> tuple[Policy, Any]:
    """The adapters of a policy and their parameters; those of the policy are given up, because the
    base under them has its own.
    """
    jax.tree.map(lambda x: x.delete(), params)
    trained = adapted(job, policy)
    adapters = initial_adapters(job, trained)
    section = job.config.lora
    job.say(
        f"adapters: {sum(x.size for x in jax.tree.leaves(adapters)):,} parameters trained, rank"
        f" {section.rank} on {section.targets!r}"
    )
    return trained, adapters


class PlannedTrees(NamedTuple):
    """What a policy is trained beside, as shapes alone."""

    trained: Policy  # the policy itself, or its adapters
    frozen: dict[str, tuple[Any, Any]]  # (ShapeDtypeStructs, shardings) by role
    shared: dict[str, str]  # roles that are the same tree as another one


def planned_trees(job: Job, policy: Policy, *, reference: str) -> PlannedTrees:
    """The trees of a stage, as a run places them.

    Args:
      policy: fitted to the rows.
      reference: "own": a tree of its own; "base": that of the adapters; "": none is held.
    """
    c = job.config
    frozen: dict[str, tuple[Any, Any]] = {}
    shared: dict[str, str] = {}
    trained = policy
    if c.lora.rank:
        frozen["base"] = frozen_layout(job, policy, c.lora.base_dtype, {})
        trained = adapted(job, policy)
    if reference == "base":
        shared["reference"] = "base"
    elif reference == "own":
        r = c.reference
        frozen["reference"] = frozen_layout(job, policy, r.dtype, r.rules, r.memory)
    return PlannedTrees(trained, frozen, shared)


def open_sampler(job: Job, inputs: Inputs) -> Sampling | None:
    """What samples held-out prompts for the report; None where nothing asks for it, or there are
    none, which is said.
    """
    if not job.config.sample.num_prompts or inputs.data.tokenizer is None:
        return None
    if inputs.data.eval is None:
        job.say(
            "no held-out prompts: nothing is sampled for the report (data.eval or data.eval_share"
            " gives some)"
        )
        return None
    return Sampling(job, inputs.data, inputs.policy)


def _with_packs(job: Job, opened: Opened, shape: PackShape) -> Opened:
    """With what packs training and held-out rows; a cached reference gives up its parameters."""
    data = opened.data
    reference = opened.reference
    train_cache = None
    eval_cache = None
    if reference.mode == "cached":
        train_cache, eval_cache = reference_cache.open_caches(
            job, data, opened.policy, reference.params, reference.checksums, shape, opened.groups
        )
        reference = reference._replace(params=None)
    eval_pack = None
    if data.eval is not None and data.eval_index is not None:
        eval_pack = packer(job, data.eval, data.eval_index, shape, eval_cache)
    return opened._replace(
        reference=reference,
        train_pack=packer(job, data.train, data.train_index, shape, train_cache),
        eval_pack=eval_pack,
    )


def _say_rounding(
    job: Job,
    policy: Policy,
    pack: PackGroups,
    groups: int,
    params: Any,
    frozen: Any,
    dtype: str,
) -> None:
    """What storing a frozen tree in fewer bits does to its log-probs, on the first groups of the
    training data.
    """
    if not dtype or dtype == job.config.model.param_dtype:
        return
    step = make_token_logps_step(policy.model, chunk=job.config.model.logps_chunk_tokens)
    values = []
    for tree in (params, frozen):
        program = job.program("rounding_pass", step, out_shardings=job.replicated)

        def token_logps(batch, program=program, tree=tree):
            return np.asarray(program(tree, job.put(batch)))

        count = min(groups, len(pack.index.rows))
        values.append(
            reference_cache.compute(
                pack, token_logps, num_groups=groups, count=count, progress=lambda n: None
            )
        )
    moved = np.abs(values[0] - values[1])
    job.say(
        f"{dtype} instead of {job.config.model.param_dtype}: a token's log-prob moves by"
        f" {moved.mean():.1e} nats, at most {moved.max():.1e} ({moved.size:,} tokens)"
    )


def _plain_models(job: Job, config: ModelConfig, shape: PackShape) -> selfcheck.PlainModels:
    """What the start-up check compares the run's model with."""
    exact = build_model(job, config, kernel="causal", dtype="float32")
    if job.config.model.dtype == "float32":
        return selfcheck.PlainModels(exact, None, None)
    rounded = build_model(job, config, kernel="causal")
    # on plain XLA: some kernels take bfloat16 alone
    packed = build_model(job, config, shape, dtype="float32")
    return selfcheck.PlainModels(exact, rounded, packed)


def _self_check(job: Job, opened: Opened, shape: PackShape) -> selfcheck.CheckResult | None:
    """Runs the self-check where the config and the model's size ask for it, and says its result."""
    c = job.config
    config = opened.policy.config
    if c.self_check == "off":
        job.say("self-check: skipped (off)")
        return None
    if c.self_check == "auto" and num_params(config) > LARGEST_CHECKED:
        job.say("self-check: skipped (over 1B parameters; self_check=full runs it)")
        return None
    start = time.monotonic()
    reference = opened.reference
    params = opened.full(opened.params)
    ref = reference.params
    trained_dtype = c.model.param_dtype
    if c.lora.rank:
        trained_dtype = c.lora.base_dtype or trained_dtype
    # The closed forms hold for an identical reference alone: one that is rounded otherwise, or that
    # is another model, is replaced by the policy.
    if ref is not None and (reference.dtype != trained_dtype or reference.is_other):
        ref = params
    result = selfcheck.self_check(
        opened.policy.model,
        _plain_models(job, config, shape),
        params,
        ref,
        opened.train_pack,
        c.loss.objective,
        selfcheck.CheckedRun(
            depth=config.num_layers,
            chunk=c.model.logps_chunk_tokens,
            put=job.put,
            program=job.program,
        ),
    )
    closed = "no closed form"
    if result.expected is not None:
        closed = f"= {result.expected:.6f}"
    rounding = ""
    if result.rounding_nats:
        rounding = f"; {c.model.dtype} moves a token by {result.rounding_nats:.0e}"
    job.say(
        f"self-check: loss {result.loss:.6f} {closed} at policy == reference; noise floor of the"
        f" log-ratios {result.noise_nats:.0e} nats; {result.num_tokens} tokens of packed rows are"
        f" within {result.layout_nats:.0e} nats of plain sequences (rounding explains"
        f" {result.allowed_nats:.0e}{rounding}); no mask leaks"
        f" ({duration(time.monotonic() - start)})"
    )
    for warning in result.warnings:
        job.say(f"warning: self-check: {warning}")
    return result
