"""What the loop is given: one stage's step, batches, frozen trees, checkpoints and hooks."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import jax

from dpojax.data.records import Records
from dpojax.data.shapes import StepSizes
from dpojax.runtime.compiled import Program
from dpojax.runtime.context import Job
from dpojax.runtime.log import accuracy_and_margin, duration
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.meter import Amounts, Meter, useful
from dpojax.training.state import TrainState
from dpojax.training.update import StepMetrics


class Batches(Protocol):
    """(step, state before it) -> the step's batch on the host, and its sizes.

    Offline algorithms ignore the state; online ones sample from it here.
    """

    def __call__(self, step: int, state: TrainState) -> tuple[Any, StepSizes]: ...


class Hook:
    """Something that happens beside the steps; each method does nothing unless it is overridden."""

    def before(self, step: int, state: TrainState) -> None:
        """Before a step is dispatched."""

    def after(self, step: int, metrics: StepMetrics, *, last: bool) -> None:
        """After a step was dispatched; the devices may still be working on it."""

    def due(self, step: int) -> bool:
        """Whether `run` wants the state after this step; 0: the state before the first one."""
        return False

    def run(self, step: int, state: TrainState) -> None:
        """With the state after a step that is due."""


class Evaluation(Hook):
    """Something that is measured every eval_every_steps, and after the last step.

    Attributes:
      job: whose run it is; a subclass sets it.
      num_steps: of the stage; None: num_steps of the run.
    """

    job: Job
    num_steps: int | None = None

    def due(self, step: int) -> bool:
        """See the class."""
        c = self.job.config
        last = c.num_steps if self.num_steps is None else self.num_steps
        return step % c.eval_every_steps == 0 or step == last


class Dispatched(NamedTuple):
    """A step that the devices may still be working on."""

    step: int
    metrics: StepMetrics
    num_pairs: int
    num_tokens: int
    sizes: StepSizes
    end: Future[float]  # when the devices were done with it, of time.monotonic()


class RateSettings(NamedTuple):
    """What makes a learning rate out of a step."""

    schedule: str
    learning_rate: float
    warmup_steps: int
    num_steps: int


@dataclasses.dataclass
class Stage:
    """One stage of training. The loop, resume and the log know nothing else of an algorithm."""

    name: str  # as people read it
    prefix: str  # of its keys in metrics.jsonl
    num_steps: int
    steps_setting: str  # the setting that says how many
    program: Program  # (state, frozen, batch, details) -> (state, StepMetrics)
    batches: Batches
    frozen: dict[str, Any]  # trees by role that no step changes
    schedule: Callable[[Any], Any]  # steps taken -> learning rate
    # a config as plain data -> its settings of the rate; None where it lacks one
    rate_settings: Callable[[dict[str, Any]], RateSettings | None]
    checkpoints: Checkpoints
    meta: dict[str, Any]  # of every checkpoint
    records: Records  # the rows that are trained on, to name them
    groups: int  # per step
    epoch_groups: int
    flops: Callable[[StepSizes], float]  # useful ones of a step
    unit: str = "pairs"  # what a batch's pairs are, as people read it
    hooks: list[Hook] = dataclasses.field(default_factory=list)
    restore_step: int = -1  # the checkpoint to go on from; -1: the newest
    report: "Callable[[Job, Stage, Dispatched], None]" = lambda job, stage, done: report_step(
        job, stage, done
    )
    guard: "Callable[[Job, Stage, Dispatched], None]" = lambda job, stage, done: None
    meter: Meter = dataclasses.field(default_factory=Meter)
    compiled_s: float = 0.0  # that the program took to compile or load, up to the last step
    # before the next step: at step 0, and where a signal came before an evaluation
    hooks_due: bool = True

    def is_logged(self, job: Job, step: int) -> bool:
        """Whether this step's metrics are written."""
        return step % job.config.log_every_steps == 0 or step == self.num_steps

    def finish(self, job: Job, done: Dispatched, clock: float) -> float:
        """Waits for a step, counts it and reports it.

        Args:
          clock: when the step before it was done. Returns: when this one was.
        """
        now = done.end.result()
        # What compiling takes is no part of a step, nor of what is left.
        compiling = self.program.seconds - self.compiled_s
        self.compiled_s += compiling
        step = Amounts(
            steps=1,
            pairs=done.num_pairs,
            tokens=done.num_tokens,
            flops=self.flops(done.sizes),
            seconds=max(now - clock - compiling, 1e-9),
        )
        self.meter.add(step)
        self.guard(job, self, done)
        if self.is_logged(job, done.step):
            self.report(job, self, done)
        return now

    def save(self, job: Job, step: int, state: TrainState, *, wait: bool) -> None:
        """Starts a checkpoint of `state`; with `wait`, tries until it is committed.

        Raises: CheckpointError when saves failed too often in a row.
        """
        meta = {**self.meta, **self.meter.totals(), "evaluation_due": self.hooks_due}
        while True:
            troubles = [self.checkpoints.save(step, state, meta)]
            if wait:
                troubles.append(self.checkpoints.wait())
            for trouble in filter(None, troubles):
                job.say(f"warning: {trouble}; {'trying again' if wait else 'training goes on'}")
            if not wait or step in self.checkpoints.steps():
                return


def report_step(job: Job, stage: Stage, done: Dispatched) -> None:
    """Writes a step's means, and the speed since the last reported step; says them in a line."""
    scalars = {k: float(v) for k, v in done.metrics.scalars.items()}
    amounts = stage.meter.take()
    unit = stage.unit if done.num_pairs else "prompts"
    rate = (amounts.pairs or amounts.steps * stage.groups) / amounts.seconds
    taken = done.step - 1 - int(done.metrics.skipped)
    rows = scalars | {
        "learning_rate": float(stage.schedule(taken)),
        "pairs_per_second": rate,
        **step_amounts(stage, done, amounts),
    }
    job.log.write(done.step, {stage.prefix + k: v for k, v in rows.items()})
    shown = f"{stage.name} {done.step}/{stage.num_steps}  loss {scalars['loss']:.4f}"
    if "rewards/accuracies" in scalars:
        shown += accuracy_and_margin(scalars)
    if "objective/scores" in scalars:
        shown += f"  reward {scalars['objective/scores']:+.3f}"
    if "objective/kl" in scalars:
        shown += f"  KL {scalars['objective/kl']:.3f}"
    left = duration((stage.num_steps - done.step) * amounts.seconds / amounts.steps)
    job.say(f"{shown}  grad {scalars['grad_norm']:.2f}  {rate:.1f} {unit}/s  ETA {left}")


def step_amounts(stage: Stage, done: Dispatched, amounts: Amounts) -> dict[str, float]:
    """What is logged of a step beside its own metrics."""
    return {
        "epoch": done.step * stage.groups / stage.epoch_groups,
        "num_tokens": stage.meter.num_tokens,
        "tokens_per_second": amounts.tokens / amounts.seconds,
        "step_time_s": amounts.seconds / amounts.steps,
        "tokens_per_second_per_device": amounts.tokens / amounts.seconds / jax.device_count(),
        **useful(amounts.flops / amounts.seconds),
        "padding/packing": done.sizes.packing,
        "padding/rounding": done.sizes.rounding,
    }
