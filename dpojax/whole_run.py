"""A whole run, or several in one program: inputs, the stages of config.stages, the report."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dpojax.algorithms.face import Algorithm
from dpojax.algorithms.inputs import open_inputs, write_settings
from dpojax.algorithms.sweep import Sweep
from dpojax.algorithms.table import stage_algorithms
from dpojax.algorithms.walk import walk
from dpojax.config.load import apply_override, from_config_dict, load_config_file, to_dict
from dpojax.config.schema import Config
from dpojax.data.open import Data
from dpojax.errors import ConfigError
from dpojax.evaluation.summary import Finished, finish_run
from dpojax.runtime.context import Job, Stop
from dpojax.runtime.log import MetricsLog
from dpojax.runtime.mesh import config_mesh
from dpojax.runtime.workdir import locked_workdir
from dpojax.training.runs import RunLogs
from dpojax.training.trace import Trace
from dpojax.untrusted.plain_data import read_json
from dpojax.weights.run_export import export_policy


def run(
    config: Config, workdir: pathlib.Path, stop: Stop, *, profile_steps: int = 0
) -> dict[str, Any]:
    """Runs `config` in `workdir`, from where it stands there; returns the summary.

    Args:
      profile_steps: how many steps of the last stage are traced; 0: none.
    Raises: DpojaxError for what a user can mend; Interrupted after saving.
    """
    began = time.monotonic()
    mesh = config_mesh(config.mesh)
    log = MetricsLog(workdir, enabled=jax.process_index() == 0)
    job = Job(config, workdir, mesh, log, stop)
    axes = " x ".join(f"{k} {v}" for k, v in mesh.shape.items())
    job.say(
        f"devices: {jax.device_count()} {jax.devices()[0].device_kind}, mesh {axes},"
        f" {jax.process_count()} process(es)"
    )
    algorithms = stage_algorithms(config)
    summary = finished_summary(job, algorithms)
    if summary is not None:
        return summary
    inputs = open_inputs(job)
    wanted = wanted_stages(job.config, inputs.data, algorithms)
    hooks = (Trace(job, profile_steps),) if profile_steps else ()
    walked = walk(job, inputs, wanted, hooks)
    if job.config.export and walked.findings.policy_params is not None:
        params = walked.findings.policy_params()
        export_policy(job, inputs.data, walked.opened.policy.config, inputs.weights, params)
    # A run without steps of its last stage says so: SFT's own are in sft_steps.
    is_last = walked.algorithm is algorithms[-1]
    finished = Finished(
        meter=walked.opened.stage.meter,
        findings=walked.findings,
        panels=[panel for algorithm in wanted for panel in algorithm.panels],
        num_steps=int(walked.state.step) if is_last else 0,
        began=began,
    )
    return finish_run(job, inputs.data, inputs.policy.config, finished)


class NeverStop:
    """A run from Python ends with its last step, or with the interpreter's own interrupt."""

    def __enter__(self) -> "NeverStop":
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def __call__(self, step: int) -> int:
        return 0


def run_config(config: Any, workdir: str | pathlib.Path, **overrides: Any) -> dict[str, Any]:
    """A whole run, as `python -m dpojax.main` makes it; returns what summary.json holds.

    Args:
      config: a ConfigDict, or a path or name as --config takes it: "tldr", "configs/hh.py:paper".
      workdir: where everything goes; the same call goes on from the last checkpoint in it.
      overrides: settings, with "__" for the dot: optim__learning_rate=1e-5.
    Raises: ConfigError, DataError, CheckpointError, NumericsError, each naming what to mend.

    >>> settings = {"num_steps": 1, "sft__num_steps": 0, "sample__num_prompts": 0}
    >>> # base's data are the embedded world
    >>> summary = dpojax.run("base", workdir / "here", **settings)  # doctest: +ELLIPSIS
    devices: ...
    >>> summary["num_steps"], (workdir / "here" / "report.html").is_file()
    (1, True)
    """
    jax.config.update("jax_threefry_partitionable", True)  # draws do not depend on the mesh
    if isinstance(config, str | pathlib.Path):
        config = load_config_file(str(config))
    values = config.copy_and_resolve_references()
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    for key, value in settings.items():
        apply_override(values, key, str(value))
    folder = pathlib.Path(workdir)
    with locked_workdir(folder):
        return run(from_config_dict(values, overridden=frozenset(settings)), folder, NeverStop())


def wanted_stages(config: Config, data: Data, algorithms: Sequence[Algorithm]) -> list[Algorithm]:
    """The algorithms that the run has data and steps for.

    Raises: ConfigError where there is none.
    """
    wanted = [algorithm for algorithm in algorithms if algorithm.wanted(config, data)]
    if not wanted:
        names = ", ".join(algorithm.name for algorithm in algorithms)
        raise ConfigError(
            f"stages is {config.stages!r}: there are neither data nor steps for {names}; set"
            " num_steps or sft.num_steps, or name another stage"
        )
    return wanted


def finished_summary(job: Job, algorithms: Sequence[Algorithm]) -> dict[str, Any] | None:
    """The summary of a run that is complete already, or None."""
    path = job.workdir / "summary.json"
    report = job.workdir / "report.html"
    if not path.is_file() or not report.is_file():
        return None
    try:
        summary = read_json(path)
        settings = read_json(job.workdir / "run.json", infinite=True)
    except ConfigError:  # they are written anew
        return None
    steps = summary.get("num_steps")
    is_same = settings == to_dict(job.config)
    if is_same and isinstance(steps, int) and steps >= algorithms[-1].num_steps(job.config):
        job.say(
            f"{job.workdir}: finished, {summary['num_steps']} steps; a larger --config.num_steps"
            f" goes on; {report}"
        )
        return summary
    return None


def run_sweep(
    configs: Mapping[str, Config], workdir: pathlib.Path, stop: Stop, *, together: str = "auto"
) -> dict[str, dict]:
    """Trains the runs in one program; returns their summaries by name.

    Args:
      configs: from `config.grid.combinations`.
      together: "vmap" (side by side), "loop" (one after another), "auto".
    Raises: as `whole_run.run`.
    """
    began = time.monotonic()
    shared = next(iter(configs.values()))
    mesh = config_mesh(shared.mesh)
    is_main = jax.process_index() == 0
    job = Job(shared, workdir, mesh, MetricsLog(workdir, enabled=False), stop)
    job.say(
        f"devices: {jax.device_count()} {jax.devices()[0].device_kind}; {len(configs)} runs in one"
        f" program: {', '.join(configs)}"
    )
    inputs = open_inputs(job)
    if not inputs.data.has_preferences or inputs.data.eval is None or not job.config.num_steps:
        raise ConfigError(
            "--sweep: runs are compared by held-out preferences; set data.eval (or data.eval_share)"
            " and num_steps"
        )
    members = []
    for name, config in configs.items():
        folder = workdir / name
        log = MetricsLog(folder, enabled=is_main)
        member = Job(config, folder, mesh, log, stop, job.programs)
        member.config = completed(config, job.config)
        job.write(functools.partial(folder.mkdir, parents=True, exist_ok=True))
        member.write(functools.partial(write_settings, member, inputs.data, inputs.weights))
        job.write(member.commit)
        members.append(member)
    job.log = RunLogs(members)
    sweep = Sweep(members, together)
    before = [a for a in stage_algorithms(shared)[:-1] if a.wanted(job.config, inputs.data)]
    walked = walk(job, inputs, [*before, sweep.algorithm])
    return {name: sweep.finish(inputs, walked, n, began) for n, name in enumerate(configs)}


def completed(config: Config, shared: Config) -> Config:
    """A run's config with what data and weights told of the shared one: steps, warmup, limits."""
    optim = dataclasses.replace(
        config.optim, warmup_steps=shared.optim.warmup_steps, warmup_ratio=0.0
    )
    return dataclasses.replace(
        config, num_steps=shared.num_steps, num_epochs=0.0, data=shared.data, optim=optim
    )
