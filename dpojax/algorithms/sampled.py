"""What a stage that samples between two steps starts from: policy, adapters, reference."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.algorithms.face import Inputs, PlannedRollout, Start
from dpojax.algorithms.online import prompts_at_once, sampled_shape
from dpojax.algorithms.opening import PlannedTrees, open_sampler, planned_trees, start_adapters
from dpojax.config.schema import Config
from dpojax.data.packing import PackShape
from dpojax.data.shapes import Lengths
from dpojax.evaluation.on_policy import OnPolicy, OnPolicyHook
from dpojax.evaluation.pass_rate import pass_rate_hooks
from dpojax.evaluation.samples import Sampling
from dpojax.generation.decoding import (
    SampleSettings,
    compile_sampler,
    decoding_shardings,
    make_sampler,
)
from dpojax.generation.sampler import prompt_width
from dpojax.models.placed import Policy, fitted
from dpojax.runtime import sharding
from dpojax.runtime.context import Job
from dpojax.runtime.mesh import num_shards
from dpojax.training.checksums import checksums, digest
from dpojax.training.findings import Findings
from dpojax.training.gradients import full_params
from dpojax.training.stage import Hook
from dpojax.training.state import TrainState
from dpojax.weights.reference import open_frozen, reference_params


class SampledPolicy(NamedTuple):
    """A policy that is trained on its own samples, and what it is held to."""

    policy: Policy  # all of it, fitted to the rows
    trained: Policy  # where the trained parameters lie: the same, or the adapters
    params: Any  # trained ones before the first step, which the stage's state takes
    frozen: dict[str, Any]  # trees by role that no step changes; None where there is none
    init: str  # digest of the policy's parameters before the stage
    sampler: Sampling | None  # of held-out prompts, at the end

    @property
    def full(self) -> Callable[[Any], Any]:
        """Trained parameters -> the policy's."""
        return full_params(self.frozen)


def open_sampled(
    job: Job, inputs: Inputs, start: Start, shape: PackShape, *, with_reference: bool
) -> SampledPolicy:
    """The policy before the stage, with its adapters where config.lora asks for them.

    The reference is reference.init, else the policy as the stage found it: under adapters their
    base, without a copy.

    Args:
      shape: of the rows.
      with_reference: whether anything reads one.
    """
    c = job.config
    params = start.params()
    init = digest(checksums(params))
    policy = fitted(job, inputs.policy, shape)
    trained = policy
    base = None
    reference = None
    if c.lora.rank:
        base = open_frozen(job, inputs.policy, params, c.lora.base_dtype, {})
    if with_reference and c.reference.init:
        source = reference_params(job, inputs.policy)
        reference = _reference(job, inputs, source)
        jax.tree.map(lambda x: x.delete(), source)
    elif with_reference:
        reference = base if base is not None else _reference(job, inputs, params)
    if base is not None:
        trained, params = start_adapters(job, policy, params)
    return SampledPolicy(
        policy=policy,
        trained=trained,
        params=params,
        frozen={"reference": reference, "base": base},
        init=init,
        sampler=open_sampler(job, inputs),
    )


def _reference(job: Job, inputs: Inputs, params: Any) -> Any:
    c = job.config.reference
    return open_frozen(job, inputs.policy, params, c.dtype, c.rules, c.memory)


def heldout_hooks(job: Job, inputs: Inputs, opened: SampledPolicy, *, prefix: str) -> list[Hook]:
    """What measures a policy on held-out prompts while it trains: pass@1 where answers can be
    verified, KL and reward of its own answers where sample.kl_prompts asks for them.

    Args:
      prefix: of the stage's keys in metrics.jsonl.
    """
    c = job.config
    hooks = pass_rate_hooks(
        job, inputs.data, opened.policy, prefix=prefix, num_steps=c.num_steps, full=opened.full
    )
    sampler = opened.sampler
    reference = opened.frozen["reference"]
    if sampler is None or reference is None or not c.sample.kl_prompts:
        return [*hooks]

    def measure(trained: Any) -> OnPolicy:
        return sampler.on_policy(opened.full(trained), reference)

    return [*hooks, OnPolicyHook(job, measure, prefix=prefix, num_steps=c.num_steps)]


def sampled_findings(
    opened: SampledPolicy,
    *,
    title: str,
    settings: tuple[str, ...],
    scalars: Mapping[str, Any],
    state: TrainState,
) -> Findings:
    """What the stage found out: samples of policy and reference, side by side."""
    samples = None
    reference = opened.frozen["reference"]
    if opened.sampler is not None and reference is not None:
        samples = opened.sampler.compare(opened.full(state.policy), reference)
    return Findings(
        title=title,
        settings=settings,
        unit="responses",
        scalars={"skipped_steps": int(state.skipped), **scalars},
        samples=samples,
        policy_params=lambda: opened.full(state.policy),
    )


# --- for devices that are not here ----------------------------------------------------------------


def sampled_lengths(lengths: Lengths, config: Config, *, num_samples: int) -> Lengths:
    """The same prompts with as many samples, as long as the responses of the data.

    The longest prompt with the longest samples is among them.
    """
    rng = np.random.default_rng(1)
    most = config.sample.max_new_tokens
    known = np.concatenate([np.asarray(ys) for ys in lengths.responses]).clip(1, most)
    drawn = rng.choice(known, (len(lengths.prompts), num_samples))
    drawn[np.argmax(lengths.prompts)] = most
    return Lengths(lengths.prompts, drawn.tolist())


def planned_shape(job: Job, lengths: Lengths, *, num_samples: int, num_pairs: int) -> PackShape:
    """The rows of a step of batch_size prompts, whatever is sampled."""
    return sampled_shape(
        job.config,
        prompt_tokens=int(max(lengths.prompts)),
        num_prompts=job.config.batch_size,
        num_samples=num_samples,
        num_pairs=num_pairs,
        num_shards=num_shards(job.mesh),
    )


def planned_rollout(
    job: Job, policy: Policy, lengths: Lengths, *, num_samples: int
) -> PlannedRollout:
    """The sampler of a stage from shapes alone, for prompts as long as the longest."""
    c = job.config
    shards = num_shards(job.mesh)
    settings = SampleSettings(
        max_new_tokens=c.sample.max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_ids=(0,),
        pad_id=0,
        num_samples=num_samples,
    )
    sampler = make_sampler(policy.model, settings)
    compiled: Any = compile_sampler(policy.model, settings, job.mesh, job.program, name="rollout")
    params = sharding.placed_shapes(policy.abstract, policy.shardings)
    serve = compiled.serve.compile(params)
    served = sharding.placed_shapes(jax.eval_shape(sampler.serve, params), serve.output_shardings)
    prompts = prompts_at_once(c.sample.batch_size, c.batch_size, num_samples, shards)
    width = prompt_width([[0] * int(max(lengths.prompts))])
    ids = jax.ShapeDtypeStruct((prompts, width), np.int32)
    keys = jax.ShapeDtypeStruct((prompts * num_samples, 2), np.uint32)
    decoding = jax.eval_shape(sampler.start, params, ids, ids, keys)
    return PlannedRollout(
        program=compiled.extend,
        served=served,
        decoding=sharding.placed_shapes(decoding, decoding_shardings(job.mesh)),
        batches=-(-c.batch_size // prompts),
        tokens=c.sample.max_new_tokens,
    )


def plan_trees(job: Job, policy: Policy, *, with_reference: bool) -> PlannedTrees:
    """The trees that `open_sampled` opens, as shapes alone."""
    reference = ""
    if with_reference:
        shares_base = job.config.lora.rank and not job.config.reference.init
        reference = "base" if shares_base else "own"
    return planned_trees(job, policy, reference=reference)
