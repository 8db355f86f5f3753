"""What a policy's own answers to held-out prompts say while it trains: their KL and their reward.

Each evaluation leaves the values of every prompt in WORKDIR/on_policy.jsonl, so that two runs can
be compared prompt by prompt.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dpojax.evaluation.statistics import mean_with_error
from dpojax.runtime.context import Job
from dpojax.runtime.log import finite_json
from dpojax.training.findings import EVAL_COLOR, Line, Panel
from dpojax.training.stage import Evaluation
from dpojax.training.state import TrainState
from dpojax.untrusted.plain_data import read_whole_lines

FILE = "on_policy.jsonl"
KL = "eval_on_policy_kl"
REWARD = "eval_on_policy_reward"
ERROR = "_standard_error"


class OnPolicy(NamedTuple):
    """One sampled response to each of N held-out prompts, in the order of the prompts."""

    log_ratio: np.ndarray  # [N] log pi(y|x) - log ref(y|x), nats; its mean is the KL
    length: np.ndarray  # [N] tokens, EOS included
    reward: np.ndarray | None  # [N] by sample.reward; None: there is none

    def scalars(self) -> dict[str, float]:
        """The means with their standard errors, for metrics.jsonl."""
        value, error = mean_with_error(self.log_ratio)
        found = {KL: value, f"{KL}{ERROR}": error}
        if self.reward is not None:
            value, error = mean_with_error(self.reward)
            found |= {REWARD: value, f"{REWARD}{ERROR}": error}
        return found

    def words(self) -> str:
        """The same in words, for a line of progress."""
        scalars = self.scalars()
        text = f"KL {scalars[KL]:.2f} ± {scalars[f'{KL}{ERROR}']:.2f}"
        if self.reward is not None:
            text += f"  reward {scalars[REWARD]:+.3f} ± {scalars[f'{REWARD}{ERROR}']:.3f}"
        return f"{text} ({len(self.log_ratio)} prompts)"


def write_on_policy(job: Job, step: int, found: OnPolicy, *, stage: str = "") -> None:
    """Puts the values of every prompt in WORKDIR/on_policy.jsonl, in place of those that the run
    wrote there before it was killed.

    Args:
      stage: the prefix of its metrics.
    """
    if not job.main_process:
        return
    row: dict[str, Any] = {"stage": stage, "step": step}
    for name, values in found._asdict().items():
        if values is not None:
            row[name] = [float(f"{value:.9g}") for value in values]
    rows = [*_by_step(job.workdir, row).values()]
    job.write_file(FILE, "".join(finite_json(row) + "\n" for row in rows))


def read_on_policy(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The evaluations of a run, by step; [] where it made none.

    The last line of a stage and step counts.
    """
    return sorted(_by_step(workdir).values(), key=lambda row: row["step"])


def _by_step(workdir: pathlib.Path, *more: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """(stage, step) -> the last row of it: of the file, and those that are given."""
    rows = [*read_whole_lines(workdir / FILE), *more]
    return {(row["stage"], row["step"]): row for row in rows}


def on_policy_panels(prefix: str) -> tuple[Panel, Panel]:
    """KL and reward of held-out prompts over a stage's steps, for the report."""
    return (
        Panel(
            "on-policy KL(policy || reference), nats",
            (Line(f"{prefix}{KL}", "held-out prompts", EVAL_COLOR),),
            error=f"{prefix}{KL}{ERROR}",
        ),
        Panel(
            "reward of sampled answers to held-out prompts",
            (Line(f"{prefix}{REWARD}", "held-out prompts", EVAL_COLOR),),
            error=f"{prefix}{REWARD}{ERROR}",
        ),
    )


class OnPolicyHook(Evaluation):
    """Samples, scores and logs while a stage trains on samples of its own."""

    def __init__(
        self,
        job: Job,
        measure: Callable[[Any], OnPolicy],
        *,
        prefix: str,
        num_steps: int,
    ):
        """What is measured.

        Args:
          measure: trained parameters of the policy -> what its answers say.
          prefix: of the stage's keys in metrics.jsonl.
          num_steps: of the stage; it is measured after the last one too.
        """
        self.job = job
        self.measure = measure
        self.prefix = prefix
        self.num_steps = num_steps

    def run(self, step: int, state: TrainState) -> None:
        """Measures, logs and says."""
        found = self.measure(state.policy)
        scalars = {f"{self.prefix}{key}": value for key, value in found.scalars().items()}
        self.job.log.write(step, scalars)
        write_on_policy(self.job, step, found, stage=self.prefix)
        self.job.say(f"eval {step}  {found.words()}")
