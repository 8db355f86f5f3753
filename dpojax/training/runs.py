"""Several runs in one state: its leaves are [N, ...], but for the step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from dpojax.data.packing import PackedBatch
from dpojax.models.placed import Policy
from dpojax.runtime.context import Job
from dpojax.runtime.log import MetricsLog
from dpojax.training.gradients import Gradients
from dpojax.training.guards import Guard
from dpojax.training.stage import Dispatched, Stage, step_amounts
from dpojax.training.state import TrainState
from dpojax.training.update import Spikes, StepMetrics, make_update


def one_after_another(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like `jax.vmap`, but the runs are computed in a loop."""

    def mapped(*arguments: Any) -> Any:
        return jax.lax.map(lambda run: function(*run), arguments)

    return mapped


def run_map(job: Job, together: str) -> Callable[..., Any]:
    """How the runs of a step are computed: side by side, or one after another.

    Args:
      together: "vmap", "loop" or "auto".
    """
    # A CPU has no idle units to fill: larger matrix products gain nothing there, batched ones lose.
    side_by_side = jax.default_backend() != "cpu" or bool(job.config.lora.rank)
    if together == "vmap" or (together == "auto" and side_by_side):
        return jax.vmap
    return one_after_another


def stacked_policy(job: Job, policy: Policy, count: int) -> Policy:
    """The trained parameters of N runs as one tree of [N, ...] leaves, each run spread alike."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), policy.abstract
    )
    shardings = jax.tree.map(lambda s: NamedSharding(job.mesh, P(None, *s.spec)), policy.shardings)
    return policy._replace(abstract=abstract, shardings=shardings)


def run_params(state: TrainState, n: int) -> Any:
    """The policy's trained parameters of run n."""
    return jax.tree.map(lambda x: x[n], state.policy)


def run_state(state: TrainState, n: int) -> TrainState:
    """The state of run n, as a solo run has it."""
    steps = jnp.broadcast_to(state.step, state.skipped.shape)
    return jax.tree.map(lambda x: x[n], state._replace(step=steps))


def make_runs_step(
    gradients: Callable[..., Gradients],
    optimizers: Mapping[str, optax.GradientTransformation],
    constrain_params: Callable[[Any], Any],
    rates: Float[Array, " N"] | np.ndarray,
    *,
    spikes: Spikes,
):
    """Like `update.make_train_step`, of N runs.

    Args:
      gradients: of all runs: see `algorithms.preference.sweep_gradients`.
      optimizers: by role, of a run with learning rate 1.
      rates: learning rate of every run.
    """
    update = make_update(optimizers, spikes=spikes)
    axes = TrainState(params=0, opt_state=0, step=None, skipped=0, loss_average=0, memory=0)

    def run_update(state: TrainState, gradients: Gradients, rate):
        return update(state, gradients, rate=rate)

    def step(
        state: TrainState, frozen, batch: PackedBatch, details
    ) -> tuple[TrainState, StepMetrics]:
        of_runs = gradients(state, frozen, batch, details, constrain_params)
        updated = jax.vmap(run_update, in_axes=(axes, 0, 0))
        new_state, metrics = updated(state, of_runs, jnp.asarray(rates))
        return new_state._replace(step=state.step + 1), metrics

    return step


class RunLogs(MetricsLog):
    """The log of all runs together: it writes nothing itself, and rewinds each run's."""

    def __init__(self, jobs: Sequence[Job]):
        """Takes the runs, whose logs are written by `RunsReport`."""
        super().__init__(jobs[0].workdir.parent, enabled=False)
        self.jobs = jobs

    def rewind(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Forgets the rows that are written anew, in every run's log."""
        for job in self.jobs:
            job.log.rewind(keep)


class RunsReport:
    """Writes each run's metrics to its own log, and says a line of all."""

    def __init__(self, jobs: Sequence[Job], schedules: Sequence[Callable[[Any], Any]]):
        """Takes the runs and their learning rates."""
        self.jobs = jobs
        self.schedules = schedules

    def __call__(self, job: Job, stage: Stage, done: Dispatched) -> None:
        """Of a step whose metrics are [N]."""
        amounts = stage.meter.take()
        scalars = {k: np.asarray(v) for k, v in done.metrics.scalars.items()}
        skipped = np.asarray(done.metrics.skipped)
        common = step_amounts(stage, done, amounts)
        common["pairs_per_second"] = amounts.pairs / amounts.seconds  # of each run
        for n, run in enumerate(self.jobs):
            rate = float(self.schedules[n](done.step - 1 - int(skipped[n])))
            values = {name: float(value[n]) for name, value in scalars.items()}
            run.log.write(done.step, {**values, "learning_rate": rate, **common})
        loss = scalars["loss"]
        job.say(
            f"{stage.name} {done.step}/{stage.num_steps}  loss {loss.min():.4f} to"
            f" {loss.max():.4f}  {len(loss)} runs, {amounts.seconds / amounts.steps:.2f} s a step"
        )


class RunsGuard(Guard):
    """A run whose step is not finite keeps its parameters and the others go on; it is said once."""

    def __init__(self, jobs: Sequence[Job]):
        """Takes the runs."""
        super().__init__()
        self.jobs = jobs
        self.troubled: set[int] = set()

    def __call__(self, job: Job, stage: Stage, done: Dispatched) -> None:
        """Names the runs of a step that is not finite or spikes."""
        bad = ~np.asarray(done.metrics.finite) | np.asarray(done.metrics.spike)
        for n in set(np.flatnonzero(bad).tolist()) - self.troubled:
            self.troubled.add(n)
            loss = float(np.asarray(done.metrics.scalars["loss"])[n])
            job.say(
                f"{self.jobs[n].workdir.name}: step {done.step} is not finite or spikes, loss"
                f" {loss:.4g}; the others go on"
            )
