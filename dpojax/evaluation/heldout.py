"""Policy and reference -> metrics of held-out pairs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpojax.data.batches import PackGroups, eval_batches
from dpojax.data.packing import PackedBatch
from dpojax.data.sources import Part
from dpojax.errors import NumericsError
from dpojax.evaluation.on_policy import write_on_policy
from dpojax.evaluation.samples import Sampling
from dpojax.models.decoder import Model
from dpojax.objectives.loss import Loss
from dpojax.runtime.compiled import Program
from dpojax.runtime.context import Job
from dpojax.runtime.log import accuracy_and_margin
from dpojax.training.gradients import step_results, step_scores
from dpojax.training.metrics import pair_scalars
from dpojax.training.pairs import PairResults
from dpojax.training.stage import Evaluation
from dpojax.training.state import TrainState


class HeldOutPairs(Evaluation):
    """Evaluates held-out pairs while a stage trains, logs the metrics, and remembers the last ones.

    Without such pairs it does nothing.
    """

    def __init__(self, job: Job, model: Model, full: Callable[[Any], Any], ref: Any):
        """Prepares the program.

        Args:
          model: fitted to the rows.
          full: trained parameters of the policy -> all of its parameters.
          ref: the reference's parameters; None where there are none, rows carry their log-probs, or
            the state remembers it.
        """
        self.job = job
        self.full = full
        self.ref = ref
        self.loss = job.config.loss.objective
        step = make_eval_step(model, self.loss, chunk=job.config.model.logps_chunk_tokens)
        self.program = job.program("eval_step", step, out_shardings=job.replicated)
        self.pack: PackGroups | None = None
        self.parts: Sequence[Part] = ()
        self.groups = 1
        self.sampler: Sampling | None = None
        self.results: PairResults | None = None
        self.scalars: dict[str, float] = {}

    def open(
        self,
        pack: PackGroups | None,
        parts: Sequence[Part],
        groups: int,
        sampler: Sampling | None,
    ) -> None:
        """What is evaluated.

        Args:
          pack: of the held-out rows; None: there are none.
          parts: their named parts.
          groups: of a batch.
          sampler: for the on-policy KL; None: that is not measured.
        """
        self.pack = pack
        self.parts = parts
        self.groups = groups
        if self.job.config.sample.kl_prompts:
            self.sampler = sampler

    def run(self, step: int, state: TrainState) -> None:
        """Evaluates and logs."""
        self.evaluate(step, state, log=True)

    def evaluate(self, step: int, state: TrainState, *, log: bool) -> None:
        """Evaluates; without `log` nothing is written to metrics.jsonl."""
        if self.pack is None:
            return
        job = self.job
        ref = state.memory.get("reference", self.ref)
        params = self.full(state.policy)
        shift = state.memory["reward_mean"]
        self.results = evaluate_pairs(job, self.program, params, ref, shift, self.pack, self.groups)
        self.scalars = eval_scalars(self.results, self.loss, self.parts)
        own = ""
        sampled = None
        if self.sampler is not None and ref is not None:
            sampled = self.sampler.on_policy(params, ref)
            self.scalars |= sampled.scalars()
            own = f"  {sampled.words()}"
        if log:
            job.log.write(step, self.scalars)
            if sampled is not None:
                write_on_policy(job, step, sampled)
        unit = "responses" if self.loss.unpaired else "pairs"
        job.say(
            f"eval {step}  loss {self.scalars['eval_loss']:.4f}"
            f"{accuracy_and_margin(self.scalars, 'eval_')}{own}  on {len(self.results.loss)}"
            f" held-out {unit}"
        )


def evaluate_pairs(
    job: Job, program: Program, params, ref, shift, pack: PackGroups, groups: int
) -> PairResults:
    """Per-pair results of the held-out pairs, flat, padding removed; `shift` is the state's
    reward_mean.
    """

    def results_of(batch: PackedBatch) -> PairResults:
        return program(params, ref, batch, shift)

    results = heldout_results(job, results_of, pack, groups)
    check_finite(results, pack)
    return results


def heldout_results(
    job: Job, results_of: Callable[[PackedBatch], Any], pack: PackGroups, groups: int
) -> Any:
    """What is known of each held-out pair, flat, padding removed, on the host.

    Args:
      results_of: a batch on the devices -> a NamedTuple of arrays [M, A, P], whose row_id is -1 at
        padding.
      groups: of a batch.
    """
    parts = []
    count = pack.index.groups_within(job.config.data.eval_max_pairs)
    progress = job.progress("evaluation", count, "prompts")
    for i, (batch, _) in enumerate(eval_batches(pack, num_groups=groups, count=count)):
        progress(i * groups)
        found = jax.device_get(results_of(job.put(batch)))
        used = found.row_id >= 0
        parts.append(jax.tree.map(lambda x, used=used: np.asarray(x)[used], found))
    progress.clear()
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def check_finite(results: PairResults, pack: PackGroups) -> None:
    """Raises NumericsError naming the first held-out row with a log-prob that is not finite."""
    logps = {
        "policy's": (results.policy_chosen, results.policy_rejected),
        "reference's": (results.ref_chosen, results.ref_rejected),
    }
    for model, both in logps.items():
        for values in both:
            if values is None:
                continue
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                row = pack.data.records.where(int(results.row_id[bad[0]]))
                raise NumericsError(
                    f"{row}: the {model} log-prob of a response is {values[bad[0]]}, and of"
                    f" {len(bad)} of {len(values)} held-out responses it is no finite number;"
                    " compute in float32 (model.dtype), or lower the learning rate"
                )


def eval_scalars(r: PairResults, loss: Loss, parts: Sequence[Part] = ()) -> dict[str, float]:
    """The metrics of the training step with the prefix eval_, over the held-out pairs; of a named
    part with eval_NAME_.
    """
    found = _scalars(r, loss, "eval_")
    for part in parts:
        inside = (r.row_id >= part.start) & (r.row_id < part.stop)
        found |= _scalars(
            jax.tree.map(lambda x, inside=inside: x[inside], r), loss, f"eval_{part.name}_"
        )
    return found


def _scalars(r: PairResults, loss: Loss, prefix: str) -> dict[str, float]:
    means = pair_scalars(r, unpaired=loss.unpaired, mismatched=loss.needs("mismatched"))
    scalars = {"loss": np.mean(r.loss), **means}
    return {f"{prefix}{k}": float(v) for k, v in scalars.items()}


def make_eval_step(model: Model, loss: Loss, *, chunk: int, ref_logps: bool = False):
    """The evaluation (params, ref_params, batch, shift) -> PairResults, [M, A, P]; shift is the
    state's reward_mean.

    Args:
      ref_logps: the second argument is the reference's token log-probs [M, A, T], or None, and not
        its parameters.
    """

    def step(params, ref_params, batch: PackedBatch, shift) -> PairResults:
        if ref_logps:
            ref_params, batch = None, batch._replace(ref_logps=ref_params)
        scores = step_scores(model, loss, params, ref_params, batch, chunk=chunk, details=True)
        return step_results(loss, batch, scores, shift)

    return step
