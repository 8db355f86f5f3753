"""A stage of training, SFT or DPO: its loop, what it logs, where it starts and what it saves. The step is in train.py."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax import checkpoint, sharding
from dpojax.checkpoint import Checkpoints, newest_step
from dpojax.config import OPTIMIZERS, Config, changed_settings, resolved_mode, to_dict
from dpojax.data.index import Dataset, Index
from dpojax.data.packing import PackedBatch, PackShape
from dpojax.data.pipeline import Lengths, PackGroups, StepSizes, make_shape, train_batches
from dpojax.datasets import Data
from dpojax.errors import CheckpointError, Interrupted, NumericsError
from dpojax.flops import forward_flops, layer_work, peak_flops
from dpojax.job import Job
from dpojax.metrics import accuracy_and_margin, duration, finite_json
from dpojax.models import ModelConfig
from dpojax.optim import make_optimizer, make_schedule
from dpojax.policy import Policy, fitted, frozen_layout, initial_params, kernel_name
from dpojax.programs import Program
from dpojax.train import (
    Balance,
    StepMetrics,
    TrainState,
    make_train_step,
    new_state,
    preference_gradients,
    sft_gradients,
)

NON_FINITE_LIMIT = 3  # non-finite steps in a row that end the run


class Dispatched(NamedTuple):
    """A step that the devices may still be working on."""

    step: int
    metrics: StepMetrics
    num_pairs: int
    num_tokens: int
    sizes: StepSizes
    end: Future[float]  # when the devices were done with it, of time.monotonic()


def _when_done(metrics: StepMetrics) -> float:
    jax.block_until_ready(metrics)
    return time.monotonic()


class Trace:
    """A trace of some steps in WORKDIR/profile: perfetto_trace.json.gz for ui.perfetto.dev, and what TensorBoard reads."""

    def __init__(self, job: Job, steps: int):
        self.job, self.steps, self.first = job, steps, 0
        self.running = False

    def before(self, step: int, start: int) -> None:
        """Starts with the third step of this process: the first ones compile and fill the pipeline."""
        if self.first == 0 and step >= start + 3:
            self.first, self.running = step, True
            jax.profiler.start_trace(self.job.workdir / "profile", create_perfetto_trace=self.job.main_process)

    def after(self, step: int, metrics: Any, *, last: bool) -> None:
        """Stops when its steps, or the stage, are done."""
        if self.running and (last or step >= self.first + self.steps - 1):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.running = False
            self.job.say(f"trace of steps {self.first} to {step}: {self.job.workdir / 'profile'}")


@dataclasses.dataclass
class Stage:
    """One of the two stages of training: what differs between SFT and DPO."""

    name: str
    prefix: str  # of its keys in metrics.jsonl
    num_steps: int
    step_program: Program
    batches: Callable[[int], Iterator[tuple[PackedBatch, StepSizes]]]
    schedule: Callable[[Any], Any]
    checkpoints: Checkpoints
    meta: dict[str, Any]
    data: Dataset
    groups: int  # per step
    epoch_groups: int
    evaluate: Callable[[int, TrainState], None]
    flops: Callable[[StepSizes], float]  # useful ones of a step
    num_tokens: int = 0  # trained on since step 0
    evaluation_due: bool = True  # before the next step: at step 0, and where a signal came before an evaluation
    pairs: int = 0  # trained on since step 0, without the first step of each process
    seconds: float = 0.0  # that they took
    compiled_s: float = 0.0  # that the step's program took to compile or load, up to the last finished step
    finished: int = 0  # steps of this process
    since_log: tuple[float, ...] = (0, 0, 0, 0, 0)  # steps, pairs, tokens, useful FLOPs, seconds
    step_times: list[float] = dataclasses.field(default_factory=list)  # s, of this process's steps but the first
    work: float = 0.0  # useful FLOPs of these steps
    tokens: int = 0  # of these steps
    trace: "Trace | None" = None
    bad_in_a_row: int = 0

    def finish(self, job: Job, done: Dispatched, clock: float) -> float:
        """Waits for a step, counts and logs it; `clock` is when the one before it was done. Returns when this one was."""
        now = done.end.result()
        # What compiling takes is no part of a step, nor of what is left.
        compiling = self.step_program.seconds - self.compiled_s
        self.compiled_s += compiling
        seconds = max(now - clock - compiling, 1e-9)
        self.num_tokens += done.num_tokens
        self.finished += 1
        if self.finished > 1:  # the first step of a process fills the pipeline
            self.pairs, self.seconds = self.pairs + done.num_pairs, self.seconds + seconds
        flops = self.flops(done.sizes)
        if self.finished > 1:
            self.step_times.append(seconds)
            self.work += flops
            self.tokens += done.num_tokens
        own = (1, done.num_pairs, done.num_tokens, flops, seconds)
        self.since_log = tuple(a + b for a, b in zip(self.since_log, own, strict=True))
        self._look_for_trouble(job, done)
        if _is_logged(job, self, done.step):
            self._log(job, done)
            self.since_log = (0, 0, 0, 0, 0)
        return now

    def _log(self, job: Job, done: Dispatched) -> None:
        """Writes a step's means, and the speed since the last logged step."""
        scalars = {k: float(v) for k, v in done.metrics.scalars.items()}
        steps, pairs, tokens, flops, seconds = self.since_log
        rate = (pairs or steps * self.groups) / seconds
        scalars |= {
            "learning_rate": float(self.schedule(done.step - 1 - int(done.metrics.skipped))),
            "epoch": done.step * self.groups / self.epoch_groups,
            "num_tokens": self.num_tokens,
            "pairs_per_second": rate,
            "tokens_per_second": tokens / seconds,
            "step_time_s": seconds / steps,
            "tokens_per_second_per_device": tokens / seconds / jax.device_count(),
            **useful(flops / seconds),
            "padding/packing": done.sizes.packing,
            "padding/rounding": done.sizes.rounding,
        }
        job.log.write(done.step, {self.prefix + k: v for k, v in scalars.items()})
        shown = f"{self.name} {done.step}/{self.num_steps}  loss {scalars['loss']:.4f}"
        if "rewards/accuracies" in scalars:
            shown += accuracy_and_margin(scalars)
        unit = "pairs" if done.num_pairs else "prompts"
        left = duration((self.num_steps - done.step) * seconds / steps)
        job.say(f"{shown}  grad {scalars['grad_norm']:.2f}  {rate:.1f} {unit}/s  ETA {left}")

    def speed(self) -> dict[str, float]:
        """What the steps of this process took, without the first, which compiles."""
        if not self.step_times:
            return {}
        found = {f"step_time_p{q}_s": float(np.quantile(self.step_times, q / 100)) for q in (50, 99)}
        seconds = sum(self.step_times)
        per_device = self.tokens / seconds / jax.device_count()
        return found | {"tokens_per_second_per_device": per_device} | useful(self.work / seconds)

    def _look_for_trouble(self, job: Job, done: Dispatched) -> None:
        """Names the rows of a step that is not finite or spikes; gives up after NON_FINITE_LIMIT non-finite ones in a row."""
        metrics, finite = done.metrics, bool(done.metrics.finite)
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        if finite and not bool(metrics.spike):
            return
        skipped = not finite or job.config.optim.skip_spikes
        losses, rows = np.asarray(metrics.losses), np.asarray(metrics.row_id)
        named = ~np.isfinite(losses) if not finite else losses >= 0.5 * losses[rows >= 0].max(initial=-np.inf)
        named &= rows >= 0
        by_loss = bool(named.any())
        own = sorted(set(rows[named if by_loss else rows >= 0].tolist()))
        loss, grad_norm = float(metrics.scalars["loss"]), float(metrics.scalars["grad_norm"])
        what = "a loss spike" if finite else "not finite"
        if not finite and math.isfinite(loss) and math.isfinite(grad_norm):
            what = "its update is not finite"
        note = {
            "stage": self.name,
            "step": done.step,
            "reason": "spike" if finite else what,
            "skipped": skipped,
            "loss": loss,
            "grad_norm": grad_norm,
            "rows": [self.data.records.where(r) for r in own],
            "row_ids": own,
            "named_by_loss": by_loss,  # False: the gradient alone was bad; all rows of the step are listed
        }
        job.write_file("quarantine.jsonl", finite_json(note) + "\n", append=True)
        effect = "parameters unchanged" if skipped else "trained on it (optim.skip_spikes=True skips it)"
        places = ", ".join(note["rows"][:4])
        job.say(f"{self.name} {done.step}: {what}, loss {note['loss']:.4g}; {effect}; {places} ... in quarantine.jsonl")
        if self.bad_in_a_row >= NON_FINITE_LIMIT:
            raise NumericsError(
                f"{self.name}: {NON_FINITE_LIMIT} steps in a row up to step {done.step} were not finite; lower the learning "
                f"rate, or look at the rows in {self._dump(job, done)}; the last good state is in {self.checkpoints.folder}"
            )

    def _dump(self, job: Job, done: Dispatched) -> Any:
        """What is known of the step that ended the run: every row with its loss, the scalars, and the settings."""
        name = f"dump-{self.name.lower()}-{done.step}.json"
        ids, losses = np.asarray(done.metrics.row_id).ravel(), np.asarray(done.metrics.losses).ravel()
        rows = [{"row": self.data.records.where(int(r)), "loss": float(x)} for r, x in zip(ids, losses, strict=True) if r >= 0]
        scalars = {k: float(v) for k, v in done.metrics.scalars.items()}
        found = {"stage": self.name, "step": done.step, "scalars": scalars, "rows": rows, "config": to_dict(job.config)}
        job.write_file(name, finite_json(found, indent=1) + "\n")
        return job.workdir / name

    def save(self, job: Job, step: int, state: TrainState, *, wait: bool) -> None:
        """Starts a checkpoint of `state`; with `wait`, tries until it is committed.

        Raises: CheckpointError when saves failed too often in a row.
        """
        totals = {"num_tokens": self.num_tokens, "pairs": self.pairs, "seconds": self.seconds}
        meta = {**self.meta, **totals, "evaluation_due": self.evaluation_due}
        while True:
            troubles = [self.checkpoints.save(step, state, meta), self.checkpoints.wait() if wait else None]
            for trouble in filter(None, troubles):
                job.say(f"warning: {trouble}; {'trying again' if wait else 'training goes on'}")
            if not wait or step in self.checkpoints.steps():
                return


def useful(rate: float) -> dict[str, float]:
    """Useful TFLOP/s of all devices, and the share of what they could do, where that is known; `rate` in FLOP/s."""
    peak = peak_flops(jax.devices()[0].device_kind)
    share = {} if peak is None else {"useful_mfu": rate / (peak * jax.device_count())}
    return {"useful_tflops": rate / 1e12, **share}


def step_flops(config: ModelConfig, passes: int) -> Callable[[StepSizes], float]:
    """Useful FLOPs of a step: 3 passes' worth for a forward and backward pass, 2 where the weights are frozen, 1 more for a
    live reference.
    """
    return lambda sizes: passes * forward_flops(config, sizes.prompts, sizes.responses)


def _is_logged(job: Job, stage: Stage, step: int) -> bool:
    return step % job.config.log_every_steps == 0 or step == stage.num_steps


def train_stage(job: Job, stage: Stage, state: TrainState, ref_params: Any, base: Any = None) -> TrainState:
    """The loop: dispatches a step, then reads the one before it, so that the devices never wait for the host.

    Args:
      base: the frozen parameters under the state's adapters, if there are such.
    Raises: Interrupted after saving, where the run was asked to stop.
    """
    if stage.evaluation_due:  # nothing can be lost yet: a signal stops it at once
        stage.evaluate(int(state.step), state)
        stage.evaluation_due = False
    # A GPU's loops hold the thread that dispatches them: the end of a step is seen from another one.
    with job.stop, ThreadPoolExecutor(max_workers=1) as watch:
        return _train(job, stage, state, ref_params, base, watch)


def _train(job: Job, stage: Stage, state: TrainState, ref_params: Any, base: Any, watch: ThreadPoolExecutor) -> TrainState:
    start = int(state.step)
    batches = stage.batches(start)
    pending: Dispatched | None = None
    clock = time.monotonic()
    for step in range(start + 1, stage.num_steps + 1):
        batch, sizes = next(batches)
        details = np.bool_(_is_logged(job, stage, step))
        if stage.trace:
            stage.trace.before(step, start)
        state, metrics = stage.step_program(state, ref_params, job.put(batch), details, base)
        end = watch.submit(_when_done, metrics)
        if stage.trace:
            stage.trace.after(step, metrics, last=step == stage.num_steps)
        if pending:
            clock = stage.finish(job, pending, clock)
        pending = Dispatched(step, metrics, int(batch.num_pairs), int(batch.num_tokens), sizes, end)
        exit_code = job.stop(step)
        evaluation_due = step % job.config.eval_every_steps == 0 or step == stage.num_steps
        checkpoint_due = step % job.config.checkpoint_every_steps == 0 or step == stage.num_steps
        if not (exit_code or evaluation_due or checkpoint_due):
            continue
        stage.finish(job, pending, clock)
        pending = None
        stage.evaluation_due = evaluation_due and bool(exit_code)
        if evaluation_due and not exit_code:
            stage.evaluate(step, state)
        if checkpoint_due or exit_code:
            stage.save(job, step, state, wait=bool(exit_code) or step == stage.num_steps)
        if exit_code:
            job.say(f"{stage.name}: stopped at step {step}, saved; the same command goes on from there")
            raise Interrupted(exit_code)
        clock = time.monotonic()
    return state


# --- where a stage starts ---------------------------------------------------------------------------------------------


def state_layout(job: Job, policy: Policy, make_state: Callable[..., TrainState], *, moving: bool) -> tuple[Any, Any]:
    """(ShapeDtypeStructs, shardings) of the training state; with a reference of its own where that is moving."""
    abstract = jax.eval_shape(make_state, policy.abstract)
    shardings = sharding.state_shardings(abstract, policy.abstract, policy.shardings, job.mesh)
    if not moving:
        return abstract, shardings
    ref_abstract, ref_shardings = frozen_layout(job, policy, job.config.reference.dtype, job.config.reference.rules)
    return abstract._replace(ref=ref_abstract), shardings._replace(ref=ref_shardings)


def resumable_step(checkpoints: Checkpoints, *, wanted: int, num_steps: int, setting: str) -> int | None:
    """The checkpoint that a stage goes on from, or None to start at step 0.

    Args:
      wanted: checkpoint.restore_step; -1: the newest.
      num_steps: the stage's last step; `setting` is what sets it.
    Raises: CheckpointError if `wanted` does not exist, or the checkpoint is past the last step.
    """
    steps = checkpoints.steps()
    step = wanted
    if wanted < 0:
        step = steps[-1] if steps else None
    elif steps and steps[-1] > wanted and checkpoints.descends_from(steps[-1], wanted):
        step = steps[-1]  # the same command again: it has gone on from `wanted` already
    elif wanted not in steps:
        there = f"there are the steps {', '.join(map(str, steps))}" if steps else "there is none"
        raise CheckpointError(f"checkpoint.restore_step={wanted}: {there} in {checkpoints.folder}")
    if step is not None and step > num_steps:
        raise CheckpointError(
            f"{setting}={num_steps}: {checkpoints.folder} has gone on to step {step}; set {step} or more, go back with "
            "--config.checkpoint.restore_step, or use another --workdir (model.init takes this one)"
        )
    return step


def _resumable(job: Job, stage: Stage) -> int | None:
    if removed := stage.checkpoints.remove_half_deleted():
        job.say(f"{stage.checkpoints.folder}: removed what was left of deleted checkpoints: {', '.join(removed)}")
    wanted = job.config.checkpoint.restore_step if stage.name == "DPO" else -1
    setting = "num_steps" if stage.name == "DPO" else "sft.num_steps"
    return resumable_step(stage.checkpoints, wanted=wanted, num_steps=stage.num_steps, setting=setting)


def check_workdir(job: Job, prints: dict[str, Any]) -> int | None:
    """The preference stage's checkpoint in the workdir, or None, before anything is read or written.

    Args:
      prints: those fingerprints of the stage that are known by then, as `known_fingerprints` gives them.
    Raises: CheckpointError if the checkpoint is another run's, as far as they tell.
    """
    folder = job.workdir / "checkpoints"
    c = job.config
    if not folder.is_dir():
        if c.checkpoint.restore_step >= 0:
            raise CheckpointError(f"checkpoint.restore_step={c.checkpoint.restore_step}: there is no folder {folder}")
        return None
    checkpoints = Checkpoints(folder, keep=c.checkpoint.keep)
    try:
        step = resumable_step(checkpoints, wanted=c.checkpoint.restore_step, num_steps=c.num_steps, setting="num_steps")
        if step is None:
            return None
        meta = checkpoints.meta(step)
        check_optimizer(c, checkpoints, meta)
    finally:
        checkpoints.close()
    allowed = c.checkpoint.allowed()
    saved = dict(meta["fingerprints"])
    if "lora" in saved and "lora" in prints:  # the base's checksum is known only after it was read
        saved["lora"] = {key: value for key, value in saved["lora"].items() if key in prints["lora"]}
    checkpoint.compare_fingerprints(saved, prints, allowed)
    sft_then, sft_now = meta["config"]["sft"], dataclasses.asdict(c.sft)
    if c.sft.num_steps and sft_then != sft_now and newest_step(job.workdir / "sft") is None and "sft" not in allowed:
        different = "; ".join(changed_settings(sft_then, sft_now, "sft."))
        raise CheckpointError(
            f"{folder} was made after another SFT stage, whose checkpoint is not in {job.workdir / 'sft'}: {different}; "
            "restore these settings, or use another --workdir"
        )
    return step


def check_origin(job: Job, stage: Stage, meta: dict[str, Any]) -> None:
    """Compares a checkpoint's fingerprints and settings with this run's; says and records what changed and may.

    Raises: CheckpointError naming the first difference that is not allowed.
    """
    allowed, step = job.config.checkpoint.allowed(), meta["step"]
    if "dtype" in allowed and meta["config"]["model"]["param_dtype"] != job.config.model.param_dtype:
        allowed |= {"reference", "init"}  # their weights are told by checksums, which are others in another dtype
    changed = checkpoint.compare_fingerprints(meta["fingerprints"], stage.meta["fingerprints"], allowed)
    if changed:
        job.say(f"resuming with another {', '.join(changed)}, as allowed")
    _warn_of_rising_rate(job, stage, meta)
    settings = changed_settings(meta["config"], to_dict(job.config))
    if settings:
        job.say(f"resuming with other settings than step {step} was saved with: {'; '.join(settings)}")
    now = [{"step": step, "names": changed, "settings": settings}] if changed or settings else []
    stage.meta["changed"] = [*meta.get("changed", []), *now]


def check_optimizer(config: Config, checkpoints: Checkpoints, meta: dict[str, Any]) -> None:
    """Raises CheckpointError where the checkpoint holds another optimizer's state."""
    then, now = meta["config"]["optim"]["name"], config.optim.name
    if then != now:
        raise CheckpointError(
            f"{checkpoints.folder / str(meta['step'])}: made with another optimizer: optim.name was {then!r} then, is {now!r} "
            f"now, and takes none of its state; set --config.optim.name={then}, or another --workdir"
        )


def _warn_of_rising_rate(job: Job, stage: Stage, meta: dict[str, Any]) -> None:
    """Says where other settings make the learning rate jump at the step that a run is resumed at."""
    saved, steps = meta["config"], meta["step"]
    if stage.name == "DPO":
        then, num_steps = saved.get("optim", {}), saved.get("num_steps")
    else:
        then, num_steps = saved.get("sft", {}), saved.get("sft", {}).get("num_steps")
    names = ("schedule", "learning_rate", "warmup_steps")
    if num_steps is None or any(then.get(name) is None for name in names):
        return
    before = make_schedule(
        then["schedule"], learning_rate=then["learning_rate"], warmup_steps=then["warmup_steps"], num_steps=num_steps
    )
    old, new = float(before(max(0, steps - 1))), float(stage.schedule(steps))
    own_warmup = float(before(steps))
    if new > 1.05 * max(old, own_warmup):
        job.say(
            f"warning: the learning rate rises from {old:.3g} to {new:.3g} at step {steps}: the schedule then ended at step "
            f"{num_steps}, now at step {stage.num_steps}"
        )


def start_state(job: Job, stage: Stage, params: Any, make_state, policy: Policy, *, moving_ref: Any = None) -> TrainState:
    """The stage's newest checkpoint, or step 0 from `params`, which are given up: the state takes their memory.

    Args:
      make_state: (params, moving_ref) -> the state at step 0.
      moving_ref: the reference where it belongs to the state (TR-DPO), given up as well; else None.
    """
    abstract, shardings = state_layout(job, policy, make_state, moving=moving_ref is not None)
    if stage.checkpoints.strays:
        job.say(f"{stage.checkpoints.folder}: not checkpoints, left alone: {', '.join(stage.checkpoints.strays)}")
    step = _resumable(job, stage)
    if step is None:
        start = jax.jit(make_state, out_shardings=shardings, donate_argnums=(0, 1))
        return start(params, moving_ref)
    jax.tree.map(lambda x: x.delete(), (params, moving_ref))
    meta = stage.checkpoints.meta(step)
    check_optimizer(job.config, stage.checkpoints, meta)
    stage.checkpoints.compare_shapes(step, abstract, cast="dtype" in job.config.checkpoint.allowed())
    check_origin(job, stage, meta)
    targets = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    state = stage.checkpoints.restore(step, targets, meta)
    moved = stage.checkpoints.set_aside_after(step)
    if moved:
        job.say(f"{stage.checkpoints.folder}: the newer steps are set aside as {', '.join(moved)}")
    fallbacks = [*meta.get("fallbacks", []), *([step] if step == job.config.checkpoint.restore_step else [])]
    stage.meta["fallbacks"] = sorted(set(fallbacks))
    for name in ("num_tokens", "pairs", "seconds", "evaluation_due"):
        setattr(stage, name, meta[name])
    job.say(f"{stage.name}: resumed at step {step} of {stage.num_steps}, every checksum equal")
    return state


def origin(policy: Policy) -> dict[str, Any]:
    """What an export of a checkpoint must know besides the model: the fields of the config.json that it came from."""
    return {} if policy.weights is None or policy.weights.fields is None else {"fields": policy.weights.fields}


def known_fingerprints(job: Job, data: Dataset, policy: Policy, loss: Any) -> dict[str, Any]:
    """The preference stage's fingerprints, but for the checksums of the weights that it starts from.

    Args:
      loss: what tells its objective.
    """
    c = job.config
    lora = {"lora": dataclasses.asdict(c.lora)} if c.lora.rank else {}
    batch = {"batch_size": c.batch_size, "batch_groups": c.batch_groups}
    return fingerprints(job, data, policy, **lora, loss=loss, batch=batch)


def objective_print(config: Config) -> dict[str, Any]:
    """What tells the objective of a run."""
    return {**dataclasses.asdict(config.loss), "source": config.loss.make().source}


def fingerprints(job: Job, data: Dataset, policy: Policy, **more: Any) -> dict[str, Any]:
    """What a resumed run must share with the one that saved; readable where it is short."""
    c = job.config
    held_out = f" without {c.data.eval_share}" if c.data.eval_share else ""
    return {
        "data": data.records.fingerprint + (f" flipped {data.flip_labels}" if data.flip_labels else "") + held_out,
        "tokenizer": data.tokenizer.fingerprint if data.tokenizer else "none",
        "model": {**dataclasses.asdict(policy.config), "dtype": c.model.dtype},
        "layout": {
            "layout": "shared" if c.data.layout == "auto" else c.data.layout,
            "max_prompt_tokens": c.data.max_prompt_tokens,
            "max_response_tokens": c.data.max_response_tokens,
            "prompt_template": c.data.prompt_template,
            "mask_ids": sorted(data.mask_ids),
            "mask_template": data.mask_template,
            "chat_template": None if data.reader.chat is None else checkpoint.digest(data.reader.chat.identity()),
            "text_as_chat": data.reader.text_as_chat,
        },
        "seed": {"seed": c.seed, "data": c.data_seed, "shuffle": c.data.shuffle},
        **more,
    }


# --- what both stages are made of -------------------------------------------------------------------------------------


def packer(job: Job, data: Dataset, index: Index, shape: PackShape, lookup=None) -> PackGroups:
    """Positions of groups -> this process's part of a batch."""
    pad = data.tokenizer.pad_id if data.tokenizer else 0
    return PackGroups(data, index, shape, tuple(sharding.local_shards(job.mesh)), pad, lookup)


def batch_shape(job: Job, policy: Policy, indexes: Sequence[Index | Lengths], groups: int) -> PackShape:
    """The static shape of the batches of `groups` groups from any of `indexes`, or from data of such lengths."""
    c = job.config.data
    kernel, _ = kernel_name(job, policy.config, c.layout)
    layout = c.layout
    if layout == "auto" and (kernel != "splash" or any(policy.config.windows)):
        layout = "shared"  # slots are for splash, and no place for windows
    num_shards, platform = sharding.num_shards(job.mesh), job.mesh.devices.flat[0].platform
    return make_shape(
        indexes,
        layout=layout,
        work=layer_work(policy.config, platform, num_shards=num_shards),
        bound_groups=kernel == "cudnn",
        num_groups=groups,
        num_shards=num_shards,
        micro_batch_tokens=c.micro_batch_tokens,
        row_tokens=c.row_tokens,
    )


def describe_rows(shape: PackShape) -> str:
    """The rows of a micro-batch, for people."""
    slots = "" if shape.slots is None else f" of {shape.slots[0]} + {shape.num_lanes} x {shape.slots[1]}"
    return (
        f"rows: {shape.shard_rows} x {shape.row_tokens} tokens a micro-batch on each of {shape.num_shards} data shard(s), "
        f"layout {shape.layout}{slots}"
    )


def batch_stream(job: Job, pack: PackGroups, groups: int, num_steps: int):
    """First step -> the batches from there on."""
    c = job.config
    return lambda start: train_batches(
        pack, num_groups=groups, seed=c.data_seed, shuffle=c.data.shuffle, start=start, stop=num_steps, workers=c.data.workers
    )


def train_program(job: Job, name: str, policy: Policy, optimizer, gradients, *, moving=None) -> Program:
    """The jitted step of a stage: explicit shardings, the state donated. Arguments as `train.make_train_step`'s."""
    constrain = lambda tree: jax.lax.with_sharding_constraint(tree, policy.shardings)
    c = job.config.optim
    step = make_train_step(
        gradients, optimizer, constrain, spike_factor=c.spike_factor, skip_spikes=c.skip_spikes, moving=moving
    )
    _, state = state_layout(job, policy, functools.partial(new_state, optimizer), moving=moving is not None)
    return job.program(name, step, donate_argnums=0, out_shardings=(state, job.replicated))


# --- the preference stage ---------------------------------------------------------------------------------------------


def preference_schedule(config: Config):
    """The learning rate of the preference stage."""
    c = config.optim
    return make_schedule(c.schedule, learning_rate=c.learning_rate, warmup_steps=c.warmup_steps, num_steps=config.num_steps)


def preference_passes(config: Config) -> int:
    """Useful forward passes' worth of work of a step: see `step_flops`."""
    return (2 if config.lora.rank else 3) + (resolved_mode(config) in ("live", "adapter"))


def preference_program(job: Job, policy: Policy) -> tuple[Program, Any]:
    """The step of the preference stage, and its optimizer; `policy` is fitted to the rows, and adapted under LoRA."""
    c, weight = job.config, job.config.model.router_loss_weight
    loss, optimizer = c.loss.make(), make_optimizer(c.optim, preference_schedule(c), policy.axes)
    gradients = preference_gradients(
        policy.model,
        loss,
        chunk=c.model.logps_chunk_tokens,
        balance=Balance(weight, policy.config.num_layers) if weight else None,
        dropout_seed=c.seed if c.lora.rank and c.lora.dropout else None,
    )
    return train_program(job, "dpo_step", policy, optimizer, gradients, moving=loss.moving), optimizer


# --- SFT --------------------------------------------------------------------------------------------------------------


def run_sft(job: Job, data: Data, policy: Policy) -> Any:
    """The supervised stage, from where it stands: returns the parameters after it."""
    c = job.config
    assert data.sft is not None and data.sft_index is not None
    groups = min(c.sft.batch_size, len(data.sft_index.rows))
    shape = batch_shape(job, policy, [data.sft_index], groups)
    fit = fitted(job, policy, shape)
    schedule = make_schedule(
        c.sft.schedule, learning_rate=c.sft.learning_rate, warmup_steps=c.sft.warmup_steps, num_steps=c.sft.num_steps
    )
    own_b2 = c.sft.b2 is not None and "b2" in OPTIMIZERS[c.optim.name]
    optim = dataclasses.replace(c.optim, b2=c.sft.b2) if own_b2 else c.optim
    optimizer = make_optimizer(optim, schedule, policy.axes)
    gradients = sft_gradients(fit.model, chunk=c.model.logps_chunk_tokens)
    params = initial_params(job, policy)
    prints = fingerprints(
        job, data.sft, policy, sft=dataclasses.asdict(c.sft), init=checkpoint.digest(checkpoint.checksums(params))
    )
    stage = Stage(
        name="SFT",
        prefix="sft_",
        num_steps=c.sft.num_steps,
        step_program=train_program(job, "sft_step", policy, optimizer, gradients),
        batches=batch_stream(job, packer(job, data.sft, data.sft_index, shape), groups, c.sft.num_steps),
        schedule=schedule,
        checkpoints=Checkpoints(job.workdir / "sft", keep=1),
        meta={"config": to_dict(c), "fingerprints": prints, "model": dataclasses.asdict(policy.config)} | origin(policy),
        data=data.sft,
        groups=groups,
        epoch_groups=len(data.sft_index.rows),
        evaluate=lambda step, state: None,
        flops=step_flops(policy.config, 3),
    )
    if _resumable(job, stage) == c.sft.num_steps:
        # Complete: the optimizer's state is not needed any more.
        jax.tree.map(lambda x: x.delete(), params)
        meta = stage.checkpoints.meta(c.sft.num_steps)
        check_origin(job, stage, meta)
        params = stage.checkpoints.restore_params(c.sft.num_steps, policy.abstract, policy.shardings, meta)
    else:
        state = start_state(job, stage, params, functools.partial(new_state, optimizer), policy)
        job.commit()
        job.log.rewind(sft_step=int(state.step), step=-1)
        params = train_stage(job, stage, state, None).params
    stage.checkpoints.close()
    return params


def params_before_dpo(job: Job, data: Data, policy: Policy) -> Any:
    """The policy's parameters at step 0 of DPO, which are the reference's: after SFT where there is such a stage."""
    return run_sft(job, data, policy) if data.sft is not None else initial_params(job, policy)
