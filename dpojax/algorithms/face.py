"""What every algorithm is to the rest of dpojax: the one door through which all of them enter.

`config.stages` names algorithms; whole_run.py opens them one after another (walk.py). Loop,
checkpoints, resume, logs, report and plan know no algorithm by its name.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpojax.config.schema import Config
from dpojax.data.open import Data
from dpojax.data.packing import PackShape
from dpojax.data.shapes import Lengths
from dpojax.models.placed import Policy
from dpojax.runtime.compiled import Program
from dpojax.runtime.context import Job
from dpojax.training.findings import Findings, Panel
from dpojax.training.resume import Layout
from dpojax.training.stage import Stage
from dpojax.training.state import TrainState
from dpojax.weights.open import Weights

MakeState = Callable[[Mapping[str, Any], Mapping[str, Any]], TrainState]


class Inputs(NamedTuple):
    """What is known of a run before any parameter is read."""

    data: Data
    policy: Policy  # for rows of any shape
    weights: Weights | None  # that the policy starts from; None: random ones
    groups: int  # prompts per step, of data.train


class Start(NamedTuple):
    """Where a stage starts."""

    # () -> the policy's parameters before the stage, in the policy's shardings; each call reads or
    # computes them anew, and the caller may give them up
    params: Callable[[], Any]
    stages: tuple[str, ...]  # that were trained before this one
    resumed: int | None  # the checkpoint in the workdir that the stage goes on from; None: step 0


class OpenStage(NamedTuple):
    """A stage that is ready for the loop."""

    stage: Stage
    policy: Policy  # where the trained parameters of the policy lie: all of them, or its adapters
    make_state: MakeState  # (parameters by role, trees to remember) -> the state at step 0
    layout: Layout  # of the state
    params: dict[str, Any]  # by role, before the first step; the state takes their memory
    memory: dict[str, Any]  # trees to remember, by name; the state takes these as well
    full: Callable[[Any], Any]  # trained parameters of the policy -> all of its parameters
    findings: Callable[[TrainState], Findings]  # after the last step
    # () -> the policy's parameters for the next stage, where this one trains something else; None:
    # those that it trained
    passed_on: Callable[[], Any] | None = None


class PlannedRollout(NamedTuple):
    """What draws a step's samples before it, for devices that may not be here: shapes alone."""

    program: Program  # (served parameters, decoding, until) -> decoding
    served: Any  # the parameters as decoding reads them: a second copy, ShapeDtypeStructs
    decoding: Any  # caches and responses of a batch, ShapeDtypeStructs
    batches: int  # of a step, one after another
    tokens: int  # of the longest response


class PlannedStep(NamedTuple):
    """A stage's step for devices that may not be here: shapes alone."""

    program: Program
    layout: Layout
    frozen: dict[str, tuple[Any, Any]]  # (ShapeDtypeStructs, shardings) by role
    shared: dict[str, str]  # roles that are the same tree as another one
    with_ref: bool  # whether batches carry the reference's log-probs
    passes: int  # useful forward passes' worth of work: see training.rows.step_flops
    shape: PackShape
    lengths: Lengths  # of the groups that are trained on
    scorings: int  # forward passes of a step without a gradient
    updates: int = 1  # from a step's groups
    has_value_net: bool = False  # beside the policy, of about its size
    unit: str = "pairs"  # that a step has batch_size of
    rollout: PlannedRollout | None = None  # of stages that sample


class Algorithm(NamedTuple):
    """One way of training: what it opens, how it steps, and what is drawn of it."""

    name: str  # in config.stages
    prefix: str  # of its keys in metrics.jsonl
    folder: str  # of its checkpoints, in the workdir
    num_steps: Callable[[Config], int]
    wanted: Callable[[Config, Data], bool]  # whether a run has data and steps for it
    # The checkpoint that it would go on from, before anything of the workdir is changed; raises
    # CheckpointError where that is another run's.
    check: Callable[[Job, Inputs], int | None]
    open: Callable[[Job, Inputs, Start], OpenStage]
    panels: tuple[Panel, ...]  # of its metrics, in the report
    # what `python -m dpojax.plan` compiles; None: there is no plan for it
    plan: Callable[[Job, Policy, Lengths], PlannedStep] | None = None
