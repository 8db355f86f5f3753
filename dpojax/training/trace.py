"""A trace of some steps, for Perfetto (ui.perfetto.dev) and TensorBoard."""

from typing import Any

import jax

from dpojax.runtime.context import Job
from dpojax.training.stage import Hook

FIRST_STEP = 3  # of a process: the ones before it compile and fill the pipeline


class Trace(Hook):
    """Writes WORKDIR/profile: perfetto_trace.json.gz, and what TensorBoard reads."""

    def __init__(self, job: Job, steps: int):
        """Traces so many steps of this process."""
        self.job = job
        self.steps = steps
        self.seen = 0  # steps of this process
        self.first = 0  # traced step
        self.running = False

    def before(self, step: int, state: Any) -> None:
        """Starts with the third step of this process."""
        self.seen += 1
        if self.first == 0 and self.seen >= FIRST_STEP:
            self.first = step
            self.running = True
            jax.profiler.start_trace(
                self.job.workdir / "profile", create_perfetto_trace=self.job.main_process
            )

    def after(self, step: int, metrics: Any, *, last: bool) -> None:
        """Stops when its steps, or the stage, are done."""
        if self.running and (last or step >= self.first + self.steps - 1):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            self.running = False
            place = self.job.workdir / "profile"
            self.job.say(f"trace of steps {self.first} to {step}: {place}")
