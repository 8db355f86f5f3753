"""A run's stages, one after another: each starts from what the one before left."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from dpojax.algorithms.face import Algorithm, Inputs, OpenStage, Start
from dpojax.runtime.context import Job
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.findings import Findings
from dpojax.training.loop import train_stage
from dpojax.training.resume import finished_params, start_state
from dpojax.training.stage import Hook
from dpojax.training.state import POLICY, TrainState
from dpojax.weights.initial import initial_params


class Walked(NamedTuple):
    """The last stage of a run, trained."""

    algorithm: Algorithm
    opened: OpenStage
    state: TrainState
    findings: Findings


def walk(
    job: Job,
    inputs: Inputs,
    algorithms: Sequence[Algorithm],
    hooks: Sequence[Hook] = (),
) -> Walked:
    """Trains the stages from where they stand in the workdir.

    Nothing of the workdir is changed before each stage has said that it may go on there.

    Args:
      algorithms: those that this run has data and steps for, at least one.
      hooks: of the last stage's loop, besides its own.
    Raises: DpojaxError for what a user can mend.
    """
    resumed = [algorithm.check(job, inputs) for algorithm in algorithms]
    start = _first_start(job, inputs)
    trained: tuple[str, ...] = ()
    for place, algorithm in enumerate(algorithms[:-1]):
        opened = algorithm.open(job, inputs, Start(start, trained, resumed[place]))
        start = _passed_on(job, algorithms, place, opened)
        trained = (*trained, algorithm.name)
    last = algorithms[-1]
    opened = last.open(job, inputs, Start(start, trained, resumed[-1]))
    opened.stage.hooks.extend(hooks)
    state = train(job, algorithms, len(algorithms) - 1, opened)
    return Walked(last, opened, state, opened.findings(state))


def train(job: Job, algorithms: Sequence[Algorithm], place: int, opened: OpenStage) -> TrainState:
    """Trains one stage to its last step; rows of it and of later stages that it repeats are
    forgotten.
    """
    stage = opened.stage
    state = start_state(job, stage, opened.make_state, opened.layout, opened.params, opened.memory)
    job.commit()
    forget_rows(job, [algorithm.prefix for algorithm in algorithms], place, int(state.step))
    state = train_stage(job, stage, state)
    stage.checkpoints.close()
    return state


def forget_rows(job: Job, prefixes: Sequence[str], place: int, step: int) -> None:
    """Leaves the rows of the stages before this one, and its own up to `step`, where it resumes."""

    def keep(row: dict[str, Any]) -> bool:
        stage = stage_of_row(row, prefixes)
        if stage != place:
            return stage < place
        return step > 0 and row["step"] <= step

    job.log.rewind(keep)


def stage_of_row(row: dict[str, Any], prefixes: Sequence[str]) -> int:
    """Which stage wrote a row of metrics.jsonl: the one with the longest prefix of its keys."""
    matches = [
        (len(prefix), place)
        for place, prefix in enumerate(prefixes)
        if all(key.startswith(prefix) for key in row if key != "step")
    ]
    return max(matches)[1] if matches else len(prefixes)


def _first_start(job: Job, inputs: Inputs) -> Callable[[], Any]:
    """() -> the policy's parameters before any training."""

    def params() -> Any:
        return initial_params(job, inputs.policy, inputs.weights)

    return params


def _passed_on(
    job: Job, algorithms: Sequence[Algorithm], place: int, opened: OpenStage
) -> Callable[[], Any]:
    """Trains a stage that another one follows; returns () -> the policy's parameters after it.

    A stage that is complete is not trained and its optimizer's state not read.
    """
    trained = finished_params(job, opened.stage, opened.policy)
    if trained is None:
        trained = train(job, algorithms, place, opened).params[POLICY]
    else:
        jax.tree.map(lambda x: x.delete(), (opened.params, opened.memory))
        opened.stage.checkpoints.close()
    if opened.passed_on is not None:  # what was trained is no policy
        jax.tree.map(lambda x: x.delete(), trained)
        return opened.passed_on
    waiting = [trained]
    del trained

    def params() -> Any:
        """The first call hands out what training left; later ones read the checkpoint."""
        if waiting:
            return opened.full(waiting.pop())
        stage = opened.stage
        checkpoints = Checkpoints(stage.checkpoints.folder, keep=1)
        meta = checkpoints.meta(stage.num_steps)
        tree = checkpoints.restore_params(
            stage.num_steps, opened.policy.abstract, opened.policy.shardings, meta
        )
        checkpoints.close()
        return opened.full(tree)

    return params
