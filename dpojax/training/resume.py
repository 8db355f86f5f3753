"""Where a stage starts: its newest checkpoint that is this run's, or step 0.

The order of what is compared is at the top of checkpoint.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from dpojax.config.load import changed_settings, to_dict
from dpojax.config.schema import Config
from dpojax.data.dataset import Dataset
from dpojax.errors import CheckpointError
from dpojax.models.placed import Policy
from dpojax.runtime import sharding
from dpojax.runtime.context import Job
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.checksums import compare_fingerprints, digest
from dpojax.training.optimizer import make_schedule
from dpojax.training.stage import RateSettings, Stage
from dpojax.training.state import TrainState

RISE = 1.05  # a learning rate that is this much higher after a resume is said


class Layout(NamedTuple):
    """A training state, abstractly."""

    abstract: TrainState  # of ShapeDtypeStructs
    shardings: TrainState


def state_layout(
    job: Job,
    make_state: Callable[[Mapping[str, Any], Mapping[str, Any]], TrainState],
    policies: Mapping[str, Policy],
    memory: Mapping[str, tuple[Any, Any]],
) -> Layout:
    """The state's shapes and shardings.

    Args:
      make_state: (parameters by role, trees to remember by name) -> the state at step 0.
      policies: the placed model of each role.
      memory: (ShapeDtypeStructs, shardings) of the trees that are remembered.
    """
    shapes = {role: policy.abstract for role, policy in policies.items()}
    remembered = {name: abstract for name, (abstract, _) in memory.items()}
    abstract = jax.eval_shape(make_state, shapes, remembered)
    shardings = jax.tree.map(lambda x: job.replicated, abstract)
    opt_state = {
        role: sharding.state_shardings(
            abstract.opt_state[role], policies[role].abstract, policies[role].shardings, job.mesh
        )
        for role in abstract.opt_state
    }
    kept = {name: shardings for name, (_, shardings) in memory.items()}
    shardings = shardings._replace(
        params={role: policies[role].shardings for role in abstract.params},
        opt_state=opt_state,
        memory={**shardings.memory, **kept},
    )
    return Layout(abstract, shardings)


def resumable_step(
    checkpoints: Checkpoints, *, wanted: int, num_steps: int, setting: str
) -> int | None:
    """The checkpoint that a stage goes on from, or None to start at step 0.

    Args:
      wanted: checkpoint.restore_step; -1: the newest.
      num_steps: the stage's last step; `setting` is what sets it.
    Raises: CheckpointError if `wanted` does not exist, or the checkpoint is past the last step.
    """
    steps = checkpoints.steps()
    step: int | None = wanted
    if wanted < 0:
        step = steps[-1] if steps else None
    elif steps and steps[-1] > wanted and checkpoints.descends_from(steps[-1], wanted):
        step = steps[-1]  # the same command again: it has gone on from `wanted` already
    elif wanted not in steps:
        listed = "there is none"
        if steps:
            listed = f"there are the steps {', '.join(map(str, steps))}"
        raise CheckpointError(f"checkpoint.restore_step={wanted}: {listed} in {checkpoints.folder}")
    if step is not None and step > num_steps:
        raise CheckpointError(
            f"{setting}={num_steps}: {checkpoints.folder} has gone on to step {step}; set {step} or"
            " more, go back with --config.checkpoint.restore_step, or use another --workdir"
            " (model.init takes this one)"
        )
    return step


def stage_step(job: Job, stage: Stage) -> int | None:
    """The checkpoint that this stage goes on from, what a kill left half deleted being removed."""
    if removed := stage.checkpoints.remove_half_deleted():
        job.say(
            f"{stage.checkpoints.folder}: removed what was left of deleted checkpoints:"
            f" {', '.join(removed)}"
        )
    return resumable_step(
        stage.checkpoints,
        wanted=stage.restore_step,
        num_steps=stage.num_steps,
        setting=stage.steps_setting,
    )


def check_origin(job: Job, stage: Stage, meta: dict[str, Any]) -> None:
    """Compares a checkpoint's fingerprints and settings with this run's; says and records what
    changed and may.

    Raises: CheckpointError naming the first difference that is not allowed.
    """
    step = meta["step"]
    allowed = job.config.checkpoint.allowed()
    of_dtype = meta["config"]["model"]["param_dtype"] != job.config.model.param_dtype
    if "dtype" in allowed and of_dtype:
        # their weights are told by checksums, which differ in another dtype
        allowed |= {"reference", "init"}
    changed = compare_fingerprints(meta["fingerprints"], stage.meta["fingerprints"], allowed)
    if changed:
        job.say(f"resuming with another {', '.join(changed)}, as allowed")
    _warn_of_rising_rate(job, stage, meta)
    settings = changed_settings(meta["config"], to_dict(job.config))
    if settings:
        job.say(
            f"resuming with other settings than step {step} was saved with: {'; '.join(settings)}"
        )
    changes = meta.get("changed", [])
    if changed or settings:
        changes = [*changes, {"step": step, "names": changed, "settings": settings}]
    stage.meta["changed"] = changes


def check_optimizer(config: Config, checkpoints: Checkpoints, meta: dict[str, Any]) -> None:
    """Raises CheckpointError where the checkpoint holds another optimizer's state."""
    then = meta["config"]["optim"]["name"]
    now = config.optim.name
    if then != now:
        raise CheckpointError(
            f"{checkpoints.folder / str(meta['step'])}: made with another optimizer: optim.name"
            f" was {then!r} then, is {now!r} now, and takes none of its state; set"
            f" --config.optim.name={then}, or another --workdir"
        )


def _warn_of_rising_rate(job: Job, stage: Stage, meta: dict[str, Any]) -> None:
    """Says where other settings make the learning rate jump at the step of the resume."""
    step = meta["step"]
    then = stage.rate_settings(meta["config"])
    if then is None:
        return
    before = make_schedule(
        then.schedule,
        learning_rate=then.learning_rate,
        warmup_steps=then.warmup_steps,
        num_steps=then.num_steps,
    )
    old = float(before(max(0, step - 1)))
    new = float(stage.schedule(step))
    if new > RISE * max(old, float(before(step))):
        job.say(
            f"warning: the learning rate rises from {old:.3g} to {new:.3g} at step {step}: the"
            f" schedule then ended at step {then.num_steps}, now at step {stage.num_steps}"
        )


def rate_settings(section: dict[str, Any], num_steps: Any) -> RateSettings | None:
    """The settings of a learning rate in a section of a saved config; None where it lacks one."""
    values = (
        section.get("schedule"),
        section.get("learning_rate"),
        section.get("warmup_steps"),
        num_steps,
    )
    if any(value is None for value in values):
        return None
    return RateSettings(*values)


def start_state(
    job: Job,
    stage: Stage,
    make_state: Callable[[Mapping[str, Any], Mapping[str, Any]], TrainState],
    layout: Layout,
    params: Mapping[str, Any],
    memory: Mapping[str, Any],
) -> TrainState:
    """The stage's newest checkpoint, or step 0.

    Args:
      make_state: as `state_layout`'s.
      params: by role, before the first step; the state takes their memory.
      memory: trees to remember, by name; the state takes theirs too.
    """
    if stage.checkpoints.strays:
        job.say(
            f"{stage.checkpoints.folder}: not checkpoints, left alone:"
            f" {', '.join(stage.checkpoints.strays)}"
        )
    step = stage_step(job, stage)
    if step is None:
        start = jax.jit(make_state, out_shardings=layout.shardings, donate_argnums=(0, 1))
        return start(dict(params), dict(memory))
    jax.tree.map(lambda x: x.delete(), (dict(params), dict(memory)))
    meta = stage.checkpoints.meta(step)
    check_optimizer(job.config, stage.checkpoints, meta)
    cast = "dtype" in job.config.checkpoint.allowed()
    stage.checkpoints.compare_shapes(step, layout.abstract, cast=cast)
    check_origin(job, stage, meta)
    targets = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        layout.abstract,
        layout.shardings,
    )
    state = stage.checkpoints.restore(step, targets, meta)
    moved = stage.checkpoints.set_aside_after(step)
    if moved:
        job.say(f"{stage.checkpoints.folder}: the newer steps are set aside as {', '.join(moved)}")
    fallbacks = set(meta.get("fallbacks", []))
    if step == job.config.checkpoint.restore_step:
        fallbacks.add(step)
    stage.meta["fallbacks"] = sorted(fallbacks)
    stage.meter.restore(meta)
    stage.hooks_due = meta["evaluation_due"]
    job.say(f"{stage.name}: resumed at step {step} of {stage.num_steps}, every checksum equal")
    return state


def finished_params(job: Job, stage: Stage, policy: Policy) -> Any:
    """The policy's parameters of a stage whose last step is saved, without its optimizer's state;
    None where it is not.
    """
    if stage_step(job, stage) != stage.num_steps:
        return None
    meta = stage.checkpoints.meta(stage.num_steps)
    check_origin(job, stage, meta)
    return stage.checkpoints.restore_params(
        stage.num_steps, policy.abstract, policy.shardings, meta
    )


def fingerprints(job: Job, data: Dataset, policy: Policy, **more: Any) -> dict[str, Any]:
    """What a resumed run must share with the one that saved; readable where it is short."""
    c = job.config
    content = data.records.fingerprint
    if data.flip_labels:
        content += f" flipped {data.flip_labels}"
    if c.data.eval_share:
        content += f" without {c.data.eval_share}"
    chat = data.reader.chat
    return {
        "data": content,
        "tokenizer": data.tokenizer.fingerprint if data.tokenizer else "none",
        "model": {**dataclasses.asdict(policy.config), "dtype": c.model.dtype},
        "layout": {
            "layout": "shared" if c.data.layout == "auto" else c.data.layout,
            "max_prompt_tokens": c.data.max_prompt_tokens,
            "max_response_tokens": c.data.max_response_tokens,
            "prompt_template": c.data.prompt_template,
            "mask_ids": sorted(data.mask_ids),
            "mask_template": data.mask_template,
            "chat_template": None if chat is None else digest(chat.identity()),
            "text_as_chat": data.reader.text_as_chat,
        },
        "seed": {"seed": c.seed, "data": c.data_seed, "shuffle": c.data.shuffle},
        **more,
    }
