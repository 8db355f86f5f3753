"""Several runs that differ in a few settings, as one stage of one program.

All share the data's order, the stages before, the frozen base and the reference, whose pass over a
micro-batch is made once; each equals its solo run up to rounding.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.algorithms import dpo
from dpojax.algorithms.face import Algorithm, Inputs, OpenStage, Start
from dpojax.algorithms.opening import Opened, open_preferences
from dpojax.algorithms.preference import sweep_gradients
from dpojax.algorithms.simple import (
    constrain_to,
    origin,
    spikes,
    stage_fingerprints,
    state_maker,
    zero_memory,
)
from dpojax.algorithms.walk import Walked
from dpojax.evaluation.heldout_runs import HeldOutRows, HeldOutRuns
from dpojax.evaluation.pair_findings import PANELS, pair_findings
from dpojax.evaluation.summary import Finished, finish_run
from dpojax.models.placed import Policy
from dpojax.runtime.context import Job
from dpojax.training import runs
from dpojax.training.findings import Findings
from dpojax.training.optimizer import make_optimizer
from dpojax.training.resume import state_layout
from dpojax.training.state import POLICY, TrainState
from dpojax.weights.initial import initial_adapters


class Sweep:
    """The runs, and the preference stage that trains them together."""

    def __init__(self, jobs: Sequence[Job], together: str):
        """Takes each run's job, and how they are computed."""
        self.jobs = jobs
        self.together = together
        # what tells the runs, in the checkpoint's fingerprints
        self.prints = [
            {"loss": dataclasses.asdict(c.loss), "rate": c.optim.learning_rate, "seed": c.seed}
            for c in (job.config for job in jobs)
        ]
        self.algorithm: Algorithm = dpo.ALGORITHM._replace(check=self.check, open=self.open)

    def check(self, job: Job, inputs: Inputs) -> int | None:
        """As `dpo.check_preferences`, of these runs."""
        data = inputs.data.train
        prints = stage_fingerprints(job, data, inputs.policy, loss=self.prints)
        return dpo.check_workdir(job, prints)

    def open(self, job: Job, inputs: Inputs, start: Start) -> OpenStage:
        """The stage of all runs."""
        opened = open_preferences(job, inputs, start)
        stacked = runs.stacked_policy(job, opened.trained, len(self.jobs))
        step = self._step(job, opened, stacked)
        stage = dpo.preference_stage(job, opened, step, self.prints)
        stage.meta |= origin(opened.trained, inputs.weights)
        run_flops = stage.flops
        # The shared reference counts for each run: it is what a solo run needs.
        stage.flops = lambda sizes: run_flops(sizes) * len(self.jobs)
        schedules = [dpo.schedule_of(run.config) for run in self.jobs]
        stage.report = runs.RunsReport(self.jobs, schedules)
        stage.guard = runs.RunsGuard(self.jobs)
        assert opened.eval_pack is not None  # `run_sweep` asks for held-out preferences
        rows = HeldOutRows(opened.eval_pack, opened.data.eval_parts, opened.groups)
        evaluation = HeldOutRuns(job, self.jobs, opened.policy.model, opened.frozen, rows)
        if opened.sampler is not None and job.config.sample.kl_prompts:
            evaluation.kl = (opened.sampler, lambda s, n: opened.full(runs.run_params(s, n)))
        stage.hooks.append(evaluation)
        params = self._first_params(opened, stacked)
        self.start = start
        self.opened = opened._replace(params=None)  # the state takes their memory
        self.evaluation = evaluation
        self.step = step
        return OpenStage(
            stage=stage,
            policy=stacked,
            make_state=step.make_state,
            layout=step.layout,
            params={POLICY: params},
            memory={},
            full=opened.full,
            findings=lambda state: Findings("", (), "pairs", {}),  # each run has its own
        )

    def _step(self, job: Job, opened: Opened, stacked: Policy) -> dpo.PreferenceStep:
        c = job.config
        # A run's state has the structure of a solo run's, whose optimizer holds its schedule.
        unit = dataclasses.replace(c, optim=dataclasses.replace(c.optim, learning_rate=1.0))
        optimizer = make_optimizer(c.optim, dpo.schedule_of(unit), opened.trained.axes)
        run_maker = state_maker(optimizer, **zero_memory("reward_mean"))

        def make_state(params: Mapping[str, Any], trees: Mapping[str, Any]) -> TrainState:
            state = jax.vmap(lambda tree: run_maker(tree, trees))(dict(params))
            return state._replace(step=jnp.zeros((), jnp.int32))

        seeds = None
        if c.lora.rank and c.lora.dropout:
            seeds = np.asarray([run.config.seed for run in self.jobs])
        gradients = sweep_gradients(
            opened.policy.model,
            [run.config.loss.objective for run in self.jobs],
            chunk=c.model.logps_chunk_tokens,
            each=runs.run_map(job, self.together),
            dropout_seeds=seeds,
        )
        layout = state_layout(job, make_state, {POLICY: stacked}, {})
        rates = np.asarray([run.config.optim.learning_rate for run in self.jobs], np.float32)
        constrain = constrain_to({POLICY: stacked})
        step = runs.make_runs_step(
            gradients, {POLICY: optimizer}, constrain, rates, spikes=spikes(c)
        )
        placed = (layout.shardings, job.replicated)
        program = job.program("sweep_step", step, donate_argnums=0, out_shardings=placed)
        return dpo.PreferenceStep(program, make_state, layout)

    def _first_params(self, opened: Opened, stacked: Policy) -> Any:
        """The trained parameters of all runs before the first step."""
        if opened.base is not None:
            trees = [initial_adapters(run, opened.trained) for run in self.jobs]
        else:
            trees = [opened.params] * len(self.jobs)

        def stack(*trees: Any) -> Any:
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

        params = jax.jit(stack, out_shardings=stacked.shardings)(*trees)
        jax.tree.map(lambda x: x.delete(), opened.params)
        return params

    def finish(self, inputs: Inputs, walked: Walked, n: int, began: float) -> dict[str, Any]:
        """Run n's checkpoint, samples, summary and report."""
        job = self.jobs[n]
        opened = self.opened
        step = int(walked.state.step)
        self._save(n, walked)
        if not self.evaluation.results:  # resumed after the last step, whose evaluation is logged
            self.evaluation.evaluate(step, walked.state, log=False)
        policy = opened.full(runs.run_params(walked.state, n))
        samples = None
        if opened.sampler is not None:
            first = dpo.first_reference(job, inputs, self.start, opened)
            samples = opened.sampler.compare(policy, first)
        scalars = self.evaluation.scalars[n] | {
            "skipped_steps": int(walked.state.skipped[n]),
            "runs_together": len(self.jobs),
            "self_check": opened.check._asdict() if opened.check else None,
        }
        results = self.evaluation.results[n]
        findings = pair_findings(
            job.config, results, scalars=scalars, samples=samples, policy_params=lambda: policy
        )
        meter = walked.opened.stage.meter.share(len(self.jobs))
        finished = Finished(meter, findings, PANELS, step, began)
        return finish_run(job, opened.data, opened.policy.config, finished)

    def _save(self, n: int, walked: Walked) -> None:
        """Run n's checkpoint, as a solo run would have left it."""
        job = self.jobs[n]
        state = runs.run_state(walked.state, n)
        solo = dpo.preference_stage(job, self.opened, self.step, dpo.objective_print(job.config))
        solo.meta |= {k: v for k, v in walked.opened.stage.meta.items() if k in ("model", "fields")}
        solo.meter.num_tokens = walked.opened.stage.meter.num_tokens
        solo.hooks_due = False
        if int(state.step) not in solo.checkpoints.steps():
            solo.save(job, int(state.step), state, wait=True)
        solo.checkpoints.close()
