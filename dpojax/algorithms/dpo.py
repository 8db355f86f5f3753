"""Preference training: DPO (Rafailov et al. 2023, arXiv:2305.18290) and every other objective of
`loss.name`, on pairs or labelled responses, offline.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

from dpojax.algorithms.face import Algorithm, Inputs, MakeState, OpenStage, PlannedStep, Start
from dpojax.algorithms.opening import Opened, open_preferences, planned_trees
from dpojax.algorithms.preference import preference_gradients
from dpojax.algorithms.simple import (
    adapter_meta,
    origin,
    stage_fingerprints,
    state_maker,
    step_program,
    zero_memory,
)
from dpojax.config.load import changed_settings, to_dict
from dpojax.config.schema import Config, frozen_dtype, resolved_mode
from dpojax.data.open import Data
from dpojax.data.shapes import Lengths
from dpojax.errors import CheckpointError
from dpojax.evaluation.heldout import HeldOutPairs
from dpojax.evaluation.pair_findings import PANELS, pair_findings
from dpojax.models.placed import Policy, fitted, frozen_layout
from dpojax.runtime.compiled import Program
from dpojax.runtime.context import Job
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.checksums import compare_fingerprints, digest
from dpojax.training.findings import Findings
from dpojax.training.guards import Guard
from dpojax.training.optimizer import make_optimizer, make_schedule
from dpojax.training.resume import (
    Layout,
    check_optimizer,
    rate_settings,
    resumable_step,
    state_layout,
)
from dpojax.training.router_loss import Balance
from dpojax.training.rows import OfflineBatches, batch_shape, step_flops
from dpojax.training.stage import Stage
from dpojax.training.state import POLICY, TrainState
from dpojax.training.step_folders import newest_step
from dpojax.training.update import moving_reference
from dpojax.weights.reference import reference_params

FOLDER = "checkpoints"


def schedule_of(config: Config):
    """The learning rate of the preference stage."""
    c = config.optim
    return make_schedule(
        c.schedule,
        learning_rate=c.learning_rate,
        warmup_steps=c.warmup_steps,
        num_steps=config.num_steps,
    )


def saved_rate(config: dict[str, Any]):
    """The learning rate's settings in a saved config."""
    return rate_settings(config.get("optim", {}), config.get("num_steps"))


def useful_passes(config: Config) -> int:
    """Useful forward passes' worth of work of a step: see `training.rows.step_flops`."""
    trained = 2 if config.lora.rank else 3
    return trained + (resolved_mode(config) in ("live", "adapter"))


class PreferenceStep(NamedTuple):
    """The step of the preference stage, ready to be compiled."""

    program: Program
    make_state: MakeState
    layout: Layout


def preference_step(job: Job, policy: Policy) -> PreferenceStep:
    """The step; `policy` is fitted to the rows, and adapted under LoRA."""
    c = job.config
    loss = c.loss.objective
    optimizer = make_optimizer(c.optim, schedule_of(c), policy.axes)
    balance = None
    if c.model.router_loss_weight:
        balance = Balance(c.model.router_loss_weight, policy.config.num_layers)
    gradients = preference_gradients(
        policy.model,
        loss,
        chunk=c.model.logps_chunk_tokens,
        balance=balance,
        dropout_seed=c.seed if c.lora.rank and c.lora.dropout else None,
    )
    make_state = state_maker(optimizer, **zero_memory("reward_mean"))
    remembered = {}
    remember = None
    if loss.moving is not None:
        alpha, tau = loss.moving
        remember = moving_reference(alpha, tau)
        remembered["reference"] = frozen_layout(job, policy, c.reference.dtype, c.reference.rules)
    layout = state_layout(job, make_state, {POLICY: policy}, remembered)
    program = step_program(job, "dpo_step", gradients, optimizer, policy, layout, remember)
    return PreferenceStep(program, make_state, layout)


def objective_print(config: Config) -> dict[str, Any]:
    """What tells the objective of a run, in a checkpoint's fingerprints."""
    return {**dataclasses.asdict(config.loss), "source": config.loss.objective.source}


def is_wanted(config: Config, data: Data) -> bool:
    """Whether there are preferences; num_steps 0 evaluates on them alone."""
    return data.has_preferences


def check_preferences(job: Job, inputs: Inputs) -> int | None:
    """The checkpoint in the workdir that a run goes on from; None: step 0."""
    loss = objective_print(job.config)
    return check_workdir(job, stage_fingerprints(job, inputs.data.train, inputs.policy, loss=loss))


def check_workdir(job: Job, prints: dict[str, Any]) -> int | None:
    """The stage's checkpoint in the workdir, or None, before anything is read or written.

    Args:
      prints: those fingerprints of the stage that are known by then.
    Raises: CheckpointError if the checkpoint is another run's, as far as they tell.
    """
    folder = job.workdir / FOLDER
    c = job.config
    if not folder.is_dir():
        if c.checkpoint.restore_step >= 0:
            raise CheckpointError(
                f"checkpoint.restore_step={c.checkpoint.restore_step}: there is no folder {folder}"
            )
        return None
    checkpoints = Checkpoints(folder, keep=c.checkpoint.keep)
    try:
        step = resumable_step(
            checkpoints,
            wanted=c.checkpoint.restore_step,
            num_steps=c.num_steps,
            setting="num_steps",
        )
        if step is None:
            return None
        meta = checkpoints.meta(step)
        check_optimizer(c, checkpoints, meta)
    finally:
        checkpoints.close()
    saved = dict(meta["fingerprints"])
    # the base's checksum is known only after it was read
    if "lora" in saved and "lora" in prints:
        saved["lora"] = {k: v for k, v in saved["lora"].items() if k in prints["lora"]}
    compare_fingerprints(saved, prints, c.checkpoint.allowed())
    _check_sft(job, meta)
    return step


def _check_sft(job: Job, meta: dict[str, Any]) -> None:
    """Raises CheckpointError where the checkpoint stands on another SFT stage that is gone."""
    c = job.config
    then = meta["config"]["sft"]
    now = dataclasses.asdict(c.sft)
    folder = job.workdir / "sft"
    is_there = newest_step(folder) is not None
    if not c.sft.num_steps or then == now or is_there or "sft" in c.checkpoint.allowed():
        return
    different = "; ".join(changed_settings(then, now, "sft."))
    raise CheckpointError(
        f"{job.workdir / FOLDER} was made after another SFT stage, whose checkpoint is not in"
        f" {folder}: {different}; restore these settings, or use another --workdir"
    )


def preference_stage(job: Job, opened: Opened, step: PreferenceStep, loss_print: Any) -> Stage:
    """The preference stage of one run.

    Args:
      loss_print: what tells the objective, for the checkpoint's fingerprints.
    """
    c = job.config
    prints = stage_fingerprints(job, opened.data.train, opened.trained, loss=loss_print)
    reference = opened.reference
    prints["reference"] = {
        "weights": digest(reference.checksums),
        "dtype": frozen_dtype(c),
    }
    meta = {"config": to_dict(c), "fingerprints": prints, **adapter_meta(job)}
    if c.lora.rank:
        prints["lora"] |= {"base": digest(opened.checksums)}
    frozen = opened.frozen
    if c.loss.objective.moving is not None:
        frozen["reference"] = None  # the state remembers it
    return Stage(
        name="DPO",
        prefix="",
        num_steps=c.num_steps,
        steps_setting="num_steps",
        program=step.program,
        batches=OfflineBatches(job, opened.train_pack, opened.groups, c.num_steps),
        frozen=frozen,
        schedule=schedule_of(c),
        rate_settings=saved_rate,
        checkpoints=Checkpoints(job.workdir / FOLDER, keep=c.checkpoint.keep),
        meta=meta,
        records=opened.data.train.records,
        groups=opened.groups,
        epoch_groups=len(opened.data.train_index.rows),
        flops=step_flops(opened.trained.config, useful_passes(c)),
        restore_step=c.checkpoint.restore_step,
        guard=Guard(),
    )


def open_dpo(job: Job, inputs: Inputs, start: Start) -> OpenStage:
    """The preference stage, from what the stages before it left."""
    c = job.config
    opened = open_preferences(job, inputs, start)
    step = preference_step(job, opened.trained)
    stage = preference_stage(job, opened, step, objective_print(c))
    stage.meta |= origin(opened.trained, inputs.weights)
    memory = {}
    if c.loss.objective.moving is not None:
        memory["reference"] = opened.reference.params
        opened = opened._replace(reference=opened.reference._replace(params=None))
    heldout = HeldOutPairs(job, opened.policy.model, opened.full, opened.reference.params)
    heldout.open(opened.eval_pack, opened.data.eval_parts, opened.groups, opened.sampler)
    stage.hooks.append(heldout)
    params = opened.params
    opened = opened._replace(params=None)  # the state takes their memory
    return OpenStage(
        stage=stage,
        policy=opened.trained,
        make_state=step.make_state,
        layout=step.layout,
        params={POLICY: params},
        memory=memory,
        full=opened.full,
        findings=functools.partial(preference_findings, job, inputs, start, opened, heldout),
    )


def preference_findings(
    job: Job, inputs: Inputs, start: Start, opened: Opened, heldout: HeldOutPairs, state: TrainState
) -> Findings:
    """What the stage found out: held-out pairs, and samples of policy and reference."""
    if heldout.results is None:  # resumed after the last step, whose evaluation is in the log
        heldout.evaluate(int(state.step), state, log=False)
    samples = None
    if opened.sampler is not None:
        first = first_reference(job, inputs, start, opened)
        samples = opened.sampler.compare(opened.full(state.policy), first)
    return pair_findings(
        job.config,
        heldout.results,
        scalars=heldout.scalars
        | {
            "skipped_steps": int(state.skipped),
            "self_check": opened.check._asdict() if opened.check else None,
        },
        samples=samples,
        policy_params=lambda: opened.full(state.policy),
    )


def first_reference(job: Job, inputs: Inputs, start: Start, opened: Opened) -> Any:
    """The reference's parameters before the first step: a cached or moving one gave them up."""
    if opened.reference.params is not None:
        return opened.reference.params
    if opened.reference.is_other:
        return reference_params(job, inputs.policy)
    if opened.base is not None:
        return opened.base
    return start.params()


def plan_dpo(job: Job, policy: Policy, lengths: Lengths) -> PlannedStep:
    """The stage's step from shapes alone, for data of such lengths."""
    c = job.config
    shape = batch_shape(job, policy, [lengths], c.batch_size)
    policy = fitted(job, policy, shape)
    mode = resolved_mode(c)
    reference = ""
    if mode == "adapter":
        reference = "base"
    elif mode == "live" and c.loss.objective.moving is None:
        reference = "own"
    trees = planned_trees(job, policy, reference=reference)
    step = preference_step(job, trees.trained)
    return PlannedStep(
        program=step.program,
        layout=step.layout,
        frozen=trees.frozen,
        shared=trees.shared,
        with_ref=mode == "cached",
        passes=useful_passes(c),
        shape=shape,
        lengths=lengths,
        scorings=int(mode in ("live", "adapter")),
    )


ALGORITHM = Algorithm(
    name="dpo",
    prefix="",
    folder=FOLDER,
    num_steps=lambda config: config.num_steps,
    wanted=is_wanted,
    check=check_preferences,
    open=open_dpo,
    panels=PANELS,
    plan=plan_dpo,
)
