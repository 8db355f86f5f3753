"""Held-out pairs under every run of a sweep, which the reference scores once."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data.batches import PackGroups, eval_batches
from dpojax.data.sources import Part
from dpojax.evaluation.heldout import eval_scalars, make_eval_step
from dpojax.evaluation.on_policy import write_on_policy
from dpojax.evaluation.samples import Sampling
from dpojax.models.decoder import Model
from dpojax.models.lora import join
from dpojax.objectives.loss import Loss
from dpojax.runtime.context import Job
from dpojax.runtime.log import accuracy_and_margin
from dpojax.training.pairs import PairResults
from dpojax.training.scores import reference_logps
from dpojax.training.stage import Evaluation
from dpojax.training.state import TrainState


class HeldOutRows(NamedTuple):
    """The held-out rows of a sweep."""

    pack: PackGroups
    parts: Sequence[Part]
    groups: int  # of a batch


def make_runs_step(model: Model, losses: Sequence[Loss], chunk: int):
    """(parameters of N runs, frozen trees, batch) -> PairResults [N, M, A, P].

    The runs are computed one after another, so that the activations of one exist at a time.
    """
    steps = [make_eval_step(model, loss, chunk=chunk, ref_logps=True) for loss in losses]

    def step(params, frozen, batch):
        base = frozen["base"]
        ref_logps = reference_logps(model, frozen["reference"], batch, chunk)

        def run_step(tree, step):
            policy = tree if base is None else join(base, tree)
            return step(policy, ref_logps, batch, jnp.float32(0))

        branches = [functools.partial(run_step, step=step) for step in steps]
        if len(branches) == 1:
            return jax.lax.map(branches[0], params)

        def numbered(run):
            return jax.lax.switch(run[0], branches, run[1])

        return jax.lax.map(numbered, (jnp.arange(len(branches)), params))

    return step


class HeldOutRuns(Evaluation):
    """Evaluates every run, each in its own log, and remembers the last results."""

    def __init__(
        self,
        job: Job,
        jobs: Sequence[Job],
        model: Model,
        frozen: dict[str, Any],
        rows: HeldOutRows,
    ):
        """Prepares the program.

        Args:
          job: that the runs share; jobs: of each run.
          frozen: "reference" and "base", each a tree or None.
        """
        self.job = job
        self.jobs = jobs
        self.frozen = frozen
        self.rows = rows
        self.losses = [run.config.loss.objective for run in jobs]
        step = make_runs_step(model, self.losses, job.config.model.logps_chunk_tokens)
        self.program = job.program("sweep_eval_step", step, out_shardings=job.replicated)
        # (sampler, (state, run) -> the run's whole policy), where the KL is measured
        self.kl: tuple[Sampling, Callable[[TrainState, int], Any]] | None = None
        self.results: list[PairResults] = []
        self.scalars: list[dict[str, float]] = []

    def run(self, step: int, state: TrainState) -> None:
        """Evaluates and logs."""
        self.evaluate(step, state, log=True)

    def evaluate(self, step: int, state: TrainState, *, log: bool) -> None:
        """Evaluates; without `log` nothing is written."""
        self._score(state)
        for n, job in enumerate(self.jobs):
            scalars = self.scalars[n]
            own = ""
            sampled = None
            reference = self.frozen["reference"]
            if self.kl is not None and reference is not None:
                sampler, policy = self.kl
                sampled = sampler.on_policy(policy(state, n), reference)
                scalars |= sampled.scalars()
                own = f"  {sampled.words()}"
            if log:
                job.log.write(step, scalars)
                if sampled is not None:
                    write_on_policy(job, step, sampled)
            self.job.say(
                f"eval {step}  {job.workdir.name}: loss {scalars['eval_loss']:.4f}"
                f"{accuracy_and_margin(scalars, 'eval_')}{own}"
            )

    def _score(self, state: TrainState) -> None:
        """The results of every run, flat, padding removed; and their scalars."""
        rows = self.rows
        parts = []
        count = rows.pack.index.groups_within(self.job.config.data.eval_max_pairs)
        for batch, _ in eval_batches(rows.pack, num_groups=rows.groups, count=count):
            batch = self.job.put(batch)
            results = jax.device_get(self.program(state.policy, self.frozen, batch))
            used = results.row_id[0] >= 0
            parts.append(jax.tree.map(lambda x, used=used: np.asarray(x)[:, used], results))
        together = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *parts)
        self.results = [jax.tree.map(lambda x, n=n: x[n], together) for n in range(len(self.jobs))]
        self.scalars = [
            eval_scalars(results, loss, rows.parts)
            for results, loss in zip(self.results, self.losses, strict=True)
        ]
