"""A reward model -> how it ranks held-out pairs: accuracy, by length, and calibration."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.config.schema import Config
from dpojax.data.batches import PackGroups
from dpojax.data.packing import PackedBatch
from dpojax.data.sources import Part
from dpojax.errors import NumericsError
from dpojax.evaluation.heldout import heldout_results
from dpojax.evaluation.pair_findings import accuracy_rows
from dpojax.evaluation.plots import plot_reliability
from dpojax.evaluation.statistics import wilson
from dpojax.models.decoder import Model
from dpojax.objectives.reward import bradley_terry_loss, reliability
from dpojax.runtime.context import Job
from dpojax.training.findings import (
    CHOSEN_COLOR,
    EVAL_COLOR,
    REJECTED_COLOR,
    Before,
    Card,
    Findings,
    Line,
    Panel,
    Section,
)
from dpojax.training.micro_batches import each_micro_batch
from dpojax.training.pairs import gather_pairs
from dpojax.training.rewards import make_rewards_step
from dpojax.training.stage import Evaluation
from dpojax.training.state import TrainState

PREFIX = "reward_model_"
EVAL = f"{PREFIX}eval_"

PANELS = (
    Panel(
        "reward model: loss",
        (Line(f"{PREFIX}loss", "train"), Line(f"{EVAL}loss", "held out", EVAL_COLOR)),
    ),
    Panel(
        "reward model: accuracy",
        (Line(f"{PREFIX}accuracy", "train"), Line(f"{EVAL}accuracy", "held out", EVAL_COLOR)),
        level=0.5,
    ),
    Panel(
        "reward model: rewards, held out",
        (
            Line(f"{EVAL}chosen_reward", "chosen", CHOSEN_COLOR),
            Line(f"{EVAL}rejected_reward", "rejected", REJECTED_COLOR),
        ),
    ),
)

BEFORE = (
    Before("loss", f"{EVAL}loss", "{:.4f}"),
    Before("accuracy", f"{EVAL}accuracy", "{:.1%}"),
    Before("margin", f"{EVAL}margin", "{:+.3f}"),
    Before("calibration error (ECE)", f"{EVAL}ece", "{:.3f}"),
)


class RewardResults(NamedTuple):
    """The rewards of held-out pairs, [B] each."""

    row_id: np.ndarray  # row of the source
    chosen: np.ndarray  # r(x, y_w)
    rejected: np.ndarray  # r(x, y_l)
    loss: np.ndarray  # nats
    chosen_lengths: np.ndarray  # tokens
    rejected_lengths: np.ndarray

    @property
    def margins(self) -> np.ndarray:
        """r(x, y_w) - r(x, y_l)."""
        return self.chosen - self.rejected

    @property
    def differences(self) -> np.ndarray:
        """Tokens by which the chosen response is longer."""
        return self.chosen_lengths - self.rejected_lengths


def make_eval_step(model: Model, *, centring: float):
    """The evaluation (params, batch) -> RewardResults, [M, A, P]."""
    rewards_of = make_rewards_step(model)

    def of_pairs(mb: PackedBatch, rewards):
        chosen, rejected = gather_pairs(mb, rewards)
        loss = bradley_terry_loss(
            chosen,
            rejected,
            margin=mb.margin.reshape(-1),
            soft_label=mb.soft_label.reshape(-1),
            centring=centring,
        )
        chosen_lengths, rejected_lengths = gather_pairs(mb, mb.lengths)
        results = (chosen, rejected, loss, chosen_lengths, rejected_lengths)
        return tuple(x.reshape(mb.valid.shape) for x in results)

    def step(params: Any, batch: PackedBatch) -> RewardResults:
        results = each_micro_batch(of_pairs, batch, rewards_of(params, batch))
        # micro-batches out of use hold no pairs
        row_id: Any = jnp.where(batch.valid, batch.row_id, -1)
        return RewardResults(row_id, *results)

    return step


class HeldOutRewards(Evaluation):
    """Evaluates held-out pairs while the stage trains, and remembers the last results.

    Without such pairs it does nothing.
    """

    def __init__(self, job: Job, model: Model, num_steps: int, *, centring: float):
        """Prepares the program.

        Args:
          model: with the scalar head, fitted to the rows.
          num_steps: of the stage; the last one is evaluated.
        """
        self.job = job
        self.num_steps = num_steps
        step = make_eval_step(model, centring=centring)
        self.program = job.program("reward_eval_step", step, out_shardings=job.replicated)
        self.pack: PackGroups | None = None
        self.parts: Sequence[Part] = ()
        self.groups = 1
        self.results: RewardResults | None = None
        self.scalars: dict[str, float] = {}

    def open(self, pack: PackGroups, parts: Sequence[Part], groups: int) -> None:
        """What is evaluated: held-out rows, their named parts, and how many groups at a time."""
        self.pack = pack
        self.parts = parts
        self.groups = groups

    def run(self, step: int, state: TrainState) -> None:
        """Evaluates and logs."""
        self.evaluate(step, state, log=True)

    def evaluate(self, step: int, state: TrainState, *, log: bool) -> None:
        """Evaluates; without `log` nothing is written to metrics.jsonl."""
        if self.pack is None:
            return
        results_of = functools.partial(self.program, state.policy)
        results: RewardResults = heldout_results(self.job, results_of, self.pack, self.groups)
        _check_finite(results, self.pack)
        self.results = results
        self.scalars = eval_scalars(results, self.parts)
        if log:
            rows = {f"{PREFIX}{name}": value for name, value in self.scalars.items()}
            self.job.log.write(step, rows)
        s = self.scalars
        self.job.say(
            f"eval {step}  loss {s['eval_loss']:.4f}  accuracy {s['eval_accuracy']:.1%}"
            f"  margin {s['eval_margin']:+.3f}  calibration error {s['eval_ece']:.3f}  on"
            f" {len(results.loss)} held-out pairs"
        )


def _check_finite(results: RewardResults, pack: PackGroups) -> None:
    """Raises NumericsError naming the first held-out row whose reward is not finite."""
    bad = np.flatnonzero(~(np.isfinite(results.chosen) & np.isfinite(results.rejected)))
    if len(bad):
        row = pack.data.records.where(int(results.row_id[bad[0]]))
        raise NumericsError(
            f"{row}: the reward of a response is not finite, and so it is for {len(bad)} of"
            f" {len(results.loss)} held-out pairs; compute in float32 (model.dtype), or lower"
            " reward_model.learning_rate"
        )


def eval_scalars(results: RewardResults, parts: Sequence[Part] = ()) -> dict[str, float]:
    """Metrics of held-out pairs, with eval_ before their names; of a named part with eval_NAME_."""
    found = _scalars(results, "eval_")
    for part in parts:
        inside = (results.row_id >= part.start) & (results.row_id < part.stop)
        if inside.any():
            own = jax.tree.map(lambda x, inside=inside: x[inside], results)
            found |= _scalars(own, f"eval_{part.name}_")
    return found


def _scalars(results: RewardResults, prefix: str) -> dict[str, float]:
    margins = results.margins
    right = np.heaviside(margins, 0.5)
    rate = wilson(float(right.sum()), len(right))
    scalars = {
        "loss": float(results.loss.mean()),
        "accuracy": rate.value,
        "accuracy_low": rate.low,
        "accuracy_high": rate.high,
        "margin": float(margins.mean()),
        "chosen_reward": float(results.chosen.mean()),
        "rejected_reward": float(results.rejected.mean()),
        "ece": reliability(margins).ece,
    }
    for name, mask in length_splits(results).items():
        if mask.any():
            scalars[f"accuracy_{name}"] = float(right[mask].mean())
    return {f"{prefix}{name}": value for name, value in scalars.items()}


def length_splits(results: RewardResults) -> dict[str, np.ndarray]:
    """Which pairs have a chosen response that is longer, and which a shorter one."""
    return {
        "chosen_longer": results.differences > 0,
        "chosen_shorter": results.differences < 0,
    }


def reward_findings(
    config: Config, heldout: HeldOutRewards, *, scalars: dict[str, Any], params: Any
) -> Findings:
    """The findings of a reward model's stage.

    Args:
      heldout: after its last evaluation.
      scalars: of the stage, for summary.json, besides those of the held-out pairs.
      params: of the reward model.
    """
    results = heldout.results
    cards: tuple[Card, ...] = ()
    sections: tuple[Section, ...] = ()
    if results is not None:
        rows = accuracy_rows(results.margins, results.differences)
        _, count, rate, interval = rows[0]
        calibration = reliability(results.margins)
        cards = (
            Card(rate, "held-out accuracy", f"{interval} on {count} pairs"),
            Card(f"{calibration.ece:.3f}", "calibration error (ECE)", "0: as sure as it is right"),
        )
        figure = plot_reliability(calibration, results)
        head = ("held-out pairs", "pairs", "accuracy", "95 % interval")
        sections = (Section("Held-out pairs", figure, head, rows),)
    section = config.reward_model
    return Findings(
        title="Bradley-Terry reward model",
        settings=(
            f"{config.batch_size} pairs a step",
            f"{config.optim.name} at {section.learning_rate:g}",
            *((f"centring {section.centring:g}",) if section.centring else ()),
        ),
        unit="pairs",
        scalars={**scalars, **heldout.scalars},
        note=(
            "Differences of rewards are log-odds that a response is preferred: P(y beats y') ="
            " sigmoid(r(x, y) - r(x, y')). What is added to all responses of a prompt is left open."
        ),
        cards=cards,
        before=BEFORE,
        sections=sections,
        policy_params=lambda: params,
    )
