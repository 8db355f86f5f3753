"""Online DPO: the policy draws responses, a reward labels them, and any pairwise objective trains.

Guo et al. 2024 (OAIF, arXiv:2402.04792). With soft labels the fixed point is that of offline DPO
under Bradley-Terry preferences; with argmax labels there is none, and beta sets the speed alone.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpojax.algorithms.dpo import objective_print, preference_step, saved_rate, schedule_of
from dpojax.algorithms.face import Algorithm, Inputs, OpenStage, PlannedStep, Start
from dpojax.algorithms.online import OnlineBatches, Pairing
from dpojax.algorithms.policy_gradient import is_wanted
from dpojax.algorithms.rewards import open_rewards
from dpojax.algorithms.sampled import (
    SampledPolicy,
    heldout_hooks,
    open_sampled,
    plan_trees,
    planned_rollout,
    planned_shape,
    sampled_findings,
    sampled_lengths,
)
from dpojax.algorithms.simple import stage_fingerprints, stage_meta
from dpojax.data.shapes import Lengths
from dpojax.data.token_groups import TokenPair
from dpojax.errors import ConfigError
from dpojax.evaluation.on_policy import on_policy_panels
from dpojax.evaluation.pass_rate import pass_rate_panel
from dpojax.models.placed import Policy, fitted
from dpojax.runtime.context import Job
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.findings import Findings, Line, Panel
from dpojax.training.guards import Guard
from dpojax.training.rows import step_flops
from dpojax.training.stage import Stage
from dpojax.training.state import POLICY, TrainState

NAME = "online_dpo"
PREFIX = f"{NAME}_"

PANELS = (
    pass_rate_panel(PREFIX),
    *on_policy_panels(PREFIX),
    Panel("online DPO: loss", (Line(f"{PREFIX}loss", "train"),)),
    Panel(
        "online DPO: label agrees with the implicit reward",
        (Line(f"{PREFIX}rewards/accuracies", "train"),),
        level=0.5,
    ),
    Panel("online DPO: margin of implicit rewards", (Line(f"{PREFIX}rewards/margins", "train"),)),
)


def pair_places(rewards: np.ndarray, pairs: str) -> list[tuple[int, int]]:
    """Which responses of a prompt are compared, the better one first where they differ.

    Responses without a reward (NaN) are in no pair.

    Args:
      rewards: [K].
      pairs: "all", or "extremes": the best and the worst one.
    """
    order = [int(k) for k in np.argsort(-rewards, kind="stable") if not np.isnan(rewards[k])]
    if len(order) < 2:
        return []
    if pairs == "extremes":
        return [(order[0], order[-1])]
    return [(order[i], order[j]) for i in range(len(order)) for j in range(i + 1, len(order))]


def labelled_pairs(
    rewards: np.ndarray, *, pairs: str, labels: str, draws: np.random.Generator
) -> tuple[TokenPair, ...]:
    """The pairs of a prompt's responses with their labels.

    Args:
      rewards: [K], as log-odds: sigmoid(r_i - r_j) is the probability that i is preferred.
      pairs: see `pair_places`.
      labels: "soft": that probability; "sampled": 1 with it, else the pair is turned round;
        "argmax": 1, and ties are left out.
      draws: for sampled labels.
    """
    found = []
    for better, worse in pair_places(rewards, pairs):
        difference = float(rewards[better] - rewards[worse])
        if labels == "argmax" and difference == 0:
            continue
        probability = 1.0 / (1.0 + np.exp(-difference))
        chosen, rejected = better, worse
        if labels == "sampled" and draws.random() >= probability:
            chosen, rejected = worse, better
        label = float(probability) if labels == "soft" else 1.0
        margin = float(rewards[chosen] - rewards[rejected])
        found.append(TokenPair(chosen, rejected, weight=1.0, soft_label=label, margin=margin))
    return tuple(found)


def make_pairing(job: Job) -> Pairing:
    """(step, rewards [prompts, K]) -> the labelled pairs of each prompt."""
    section = job.config.online_dpo

    def pairing(step: int, rewards: np.ndarray) -> list[tuple[TokenPair, ...]]:
        draws = np.random.default_rng([job.config.seed, step])
        options: dict[str, Any] = dict(pairs=section.pairs, labels=section.labels, draws=draws)
        found = [labelled_pairs(row, **options) for row in rewards]
        if not any(found):
            raise ConfigError(
                f"online_dpo, step {step}: no two responses of any prompt have different rewards:"
                " there is nothing to compare; draw more (online_dpo.num_samples), or take"
                " online_dpo.labels=soft, which keeps ties"
            )
        return found

    return pairing


def pairs_of_prompt(num_samples: int, pairs: str) -> int:
    """Pairs of a prompt, at most."""
    return 1 if pairs == "extremes" else num_samples * (num_samples - 1) // 2


def open_online_dpo(job: Job, inputs: Inputs, start: Start) -> OpenStage:
    """The stage, from what the stages before it left."""
    c = job.config
    section = c.online_dpo
    objective = c.loss.objective
    if objective.unpaired or objective.moving is not None:
        raise ConfigError(
            f"loss.name is {c.loss.name!r}; online_dpo takes an objective of pairs with a fixed"
            " reference, or none: sigmoid, ipo, hinge, ..."
        )
    batches = OnlineBatches(
        job,
        inputs,
        open_rewards(job, inputs),
        num_samples=section.num_samples,
        pairing=make_pairing(job),
        num_pairs=pairs_of_prompt(section.num_samples, section.pairs),
        temperature=section.temperature,
    )
    with_reference = objective.uses_reference or c.sample.num_prompts > 0
    opened = open_sampled(job, inputs, start, batches.shape, with_reference=with_reference)
    batches.full = opened.full
    step = preference_step(job, opened.trained)
    prints = stage_fingerprints(
        job,
        inputs.data.train,
        opened.trained,
        loss=objective_print(c),
        online_dpo=dataclasses.asdict(section),
        init={POLICY: opened.init},
    )
    frozen = dict(opened.frozen)
    if not objective.uses_reference:
        frozen["reference"] = None
    stage = Stage(
        name="Online DPO",
        prefix=PREFIX,
        num_steps=c.num_steps,
        steps_setting="num_steps",
        program=step.program,
        batches=batches,
        frozen=frozen,
        schedule=schedule_of(c),
        rate_settings=saved_rate,
        checkpoints=Checkpoints(job.workdir / NAME, keep=c.checkpoint.keep),
        meta=stage_meta(job, inputs, opened.trained, prints),
        records=inputs.data.train.records,
        groups=inputs.groups,
        epoch_groups=len(inputs.data.train_index.rows),
        flops=step_flops(opened.trained.config, 4 if with_reference else 3),
        guard=Guard(),
        hooks=heldout_hooks(job, inputs, opened, prefix=PREFIX),
    )
    params = opened.params
    opened = opened._replace(params=None)  # the state takes their memory
    return OpenStage(
        stage=stage,
        policy=opened.trained,
        make_state=step.make_state,
        layout=step.layout,
        params={POLICY: params},
        memory={},
        full=opened.full,
        findings=functools.partial(findings_of, job, inputs, opened),
    )


def findings_of(job: Job, inputs: Inputs, opened: SampledPolicy, state: TrainState) -> Findings:
    """What the stage found out."""
    c = job.config
    section = c.online_dpo
    settings: Sequence[str] = (
        f"{c.loss.name}, beta {c.loss.beta:g}",
        f"{inputs.groups} prompts x {section.num_samples} samples a step, {section.labels} labels",
        f"{c.optim.name} at {c.optim.learning_rate:g}",
    )
    return sampled_findings(
        opened,
        title="Online DPO",
        settings=tuple(settings),
        scalars={},
        state=state,
    )


def plan_online_dpo(job: Job, policy: Policy, lengths: Lengths) -> PlannedStep:
    """The stage's step from shapes alone, for samples as long as the responses of the data."""
    c = job.config
    samples = c.online_dpo.num_samples
    pairs = pairs_of_prompt(samples, c.online_dpo.pairs)
    shape = planned_shape(job, lengths, num_samples=samples, num_pairs=pairs)
    policy = fitted(job, policy, shape)
    with_reference = c.loss.objective.uses_reference
    trees = plan_trees(job, policy, with_reference=with_reference)
    step = preference_step(job, trees.trained)
    return PlannedStep(
        program=step.program,
        layout=step.layout,
        frozen=trees.frozen,
        shared=trees.shared,
        with_ref=False,
        passes=(2 if c.lora.rank else 3) + with_reference,
        shape=shape,
        lengths=sampled_lengths(lengths, c, num_samples=samples),
        scorings=int(with_reference),
        unit="prompts",
        rollout=planned_rollout(job, policy, lengths, num_samples=samples),
    )


ALGORITHM = Algorithm(
    name=NAME,
    prefix=PREFIX,
    folder=NAME,
    num_steps=lambda config: config.num_steps,
    wanted=is_wanted,
    check=lambda job, inputs: None,  # its open stage compares, before anything is written
    open=open_online_dpo,
    panels=PANELS,
    plan=plan_online_dpo,
)
