"""The loop: dispatches a step, then reads the one before it: devices never wait for the host."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from dpojax.errors import Interrupted
from dpojax.runtime.context import Job
from dpojax.training.stage import Dispatched, Stage
from dpojax.training.state import TrainState
from dpojax.training.update import StepMetrics


def train_stage(job: Job, stage: Stage, state: TrainState) -> TrainState:
    """Trains a stage from `state` to its last step.

    Raises: Interrupted after saving, where the run was asked to stop.
    """
    start = int(state.step)
    if stage.hooks_due:  # nothing can be lost yet: a signal stops it at once
        for hook in stage.hooks:
            if hook.due(start):
                hook.run(start, state)
        stage.hooks_due = False
    # A GPU's loops hold the thread that dispatches them: another one sees the end of a step.
    with job.stop, ThreadPoolExecutor(max_workers=1) as watch:
        return _train(job, stage, state, watch)


def _when_done(metrics: StepMetrics) -> float:
    jax.block_until_ready(metrics)
    return time.monotonic()


def _train(job: Job, stage: Stage, state: TrainState, watch: ThreadPoolExecutor) -> TrainState:
    start = int(state.step)
    pending: Dispatched | None = None
    clock = time.monotonic()
    for step in range(start + 1, stage.num_steps + 1):
        last = step == stage.num_steps
        batch, sizes = stage.batches(step, state)
        for hook in stage.hooks:
            hook.before(step, state)
        details = np.bool_(stage.is_logged(job, step))
        state, metrics = stage.program(state, stage.frozen, job.put(batch), details)
        end = watch.submit(_when_done, metrics)
        for hook in stage.hooks:
            hook.after(step, metrics, last=last)
        if pending is not None:
            clock = stage.finish(job, pending, clock)
        pending = Dispatched(step, metrics, int(batch.num_pairs), int(batch.num_tokens), sizes, end)
        exit_code = job.stop(step)
        due = [hook for hook in stage.hooks if hook.due(step)]
        checkpoint_due = step % job.config.checkpoint_every_steps == 0 or last
        if not (exit_code or due or checkpoint_due):
            continue
        stage.finish(job, pending, clock)
        pending = None
        stage.hooks_due = bool(due) and bool(exit_code)
        if not exit_code:
            for hook in due:
                hook.run(step, state)
        if checkpoint_due or exit_code:
            stage.save(job, step, state, wait=bool(exit_code) or last)
        if exit_code:
            job.say(
                f"{stage.name}: stopped at step {step}, saved; the same command goes on from there"
            )
            raise Interrupted(exit_code)
        clock = time.monotonic()
    return state
