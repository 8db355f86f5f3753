"""Several runs that differ in a few settings, trained together in one program.

    python -m dpojax.sweep --config=configs/tldr.py --workdir=DIR --sweep.loss.beta=0.03,0.1,0.3 [--sweep.KEY=A,B ...]

Every combination is a run: DIR/NAME holds what `dpojax.main` writes for it, checkpoint included. All share the data's order, the
SFT stage, the frozen base and the reference, whose pass over a micro-batch is made once; each equals its solo run up to
rounding. What may differ: loss.* (not objectives that couple a batch's pairs), optim.learning_rate, and the seed of adapters
and their dropout (--config.data.seed fixes the data's). The same command goes on from the last checkpoint.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dpojax import evaluate, sharding
from dpojax.checkpoint import Checkpoints
from dpojax.command import StopSignal, leave, run_command
from dpojax.config import Config, apply_override, from_config_dict, load_config_file, setting_kinds
from dpojax.data.pipeline import eval_batches
from dpojax.errors import ConfigError
from dpojax.flags import did_you_mean, nearest_setting
from dpojax.job import Job, Stop
from dpojax.lock import locked_workdir
from dpojax.main import join_run, known_flags, workdir_path
from dpojax.metrics import MetricsLog, accuracy_and_margin, say
from dpojax.models.lora import join
from dpojax.opening import Opened, open_inputs, open_run, write_settings
from dpojax.optim import make_optimizer, make_schedule
from dpojax.plain_data import read_json
from dpojax.policy import Policy, initial_adapters
from dpojax.run import finish_run, preference_stage
from dpojax.stages import Dispatched, Stage, start_state, state_layout, train_stage
from dpojax.train import TrainState, make_eval_step, make_sweep_step, new_state, reference_logps, sweep_gradients

FLAGS = ("config", "workdir", "allow_code", "together", "help")
MAY_DIFFER = re.compile(r"loss\..*|optim\.learning_rate|seed")


def train(
    workdir: pathlib.Path,
    config: str,
    overrides: Mapping[str, Any],
    *,
    sft_from: pathlib.Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One run to its end in a process of its own, as a person would start it; a finished one is only read.

    Args:
      workdir: the run's folder.
      config: as --config=.
      overrides: dotted setting -> value, as --config.KEY=VALUE.
      sft_from: the workdir of a run with the same SFT stage, whose checkpoint is taken; resuming compares the fingerprints.
      environment: variables besides those of this process.
    Returns: what summary.json holds.
    Raises: subprocess.CalledProcessError if the run fails; its messages are on stderr.
    """
    if sft_from is not None and sft_from != workdir and not (workdir / "sft").exists():
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.copytree(sft_from / "sft", workdir / "sft")
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    argv = [sys.executable, "-m", "dpojax.main", f"--config={config}", f"--workdir={workdir}", *flags]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})})
    return read_json(workdir / "summary.json")


# --- the runs of a sweep ----------------------------------------------------------------------------------------------


def combinations(values, grid: Mapping[str, Sequence[str]], overridden: frozenset[str] = frozenset()) -> dict[str, Config]:
    """Every combination of the grid's settings: name -> config.

    Raises: ConfigError for a setting that runs of one program cannot differ in.
    """
    for key in grid:
        if not MAY_DIFFER.fullmatch(key):
            near = nearest_setting(key, [k for k in setting_kinds() if MAY_DIFFER.fullmatch(k)])
            near = near.replace("did you mean ", "did you mean --sweep.")
            raise ConfigError(f"--sweep.{key}: runs of one program differ in loss.*, optim.learning_rate and seed alone{near}")
    found: dict[str, Config] = {}
    for chosen in itertools.product(*grid.values()):
        own = values.copy_and_resolve_references()
        for key, text in zip(grid, chosen, strict=True):
            apply_override(own, key, text, flag="sweep")
        name = ",".join(f"{k.rpartition('.')[2]}={v}" for k, v in zip(grid, chosen, strict=True))
        if name in found:
            raise ConfigError(f"--sweep: {name} stands there twice")
        found[name] = from_config_dict(own, overridden=overridden | frozenset(grid))
    for name, config in found.items():
        _check(name, config, "seed" in grid)
    if len({c.loss.make().unpaired for c in found.values()}) > 1:
        raise ConfigError("--sweep.loss.name: paired and unpaired objectives take different data; sweep them apart")
    return found


def _check(name: str, config: Config, seeds: bool) -> None:
    loss, both = config.loss.make(), "run it alone with dpojax.main"
    if loss.coupled or loss.moving or loss.needs("kl") or loss.needs("mismatched") or loss.unpaired:
        raise ConfigError(f"{name}: {loss.name} couples the pairs of a batch, moves its reference or needs more of it; {both}")
    if config.model.router_loss_weight:
        raise ConfigError(f"{name}: model.router_loss_weight={config.model.router_loss_weight}: not in a sweep; {both}")
    if seeds and (not config.lora.rank or config.data.seed < 0 or config.sft.num_steps or not config.model.init):
        raise ConfigError(
            "--sweep.seed: runs share data, SFT stage and reference, so that a seed is that of adapters: set lora.rank, "
            "model.init and --config.data.seed"
        )


class Sweep(Stage):
    """The preference stage of N runs: metrics are [N], and each goes to its run's own log."""

    jobs: list[Job]
    troubled: set[int]
    schedules: list[Any]

    def _log(self, job: Job, done: Dispatched) -> None:
        steps, pairs, tokens, _, seconds = self.since_log
        common = {
            "epoch": done.step * self.groups / self.epoch_groups,
            "num_tokens": self.num_tokens,
            "pairs_per_second": pairs / seconds,  # of each run
            "tokens_per_second": tokens / seconds,
            "step_time_s": seconds / steps,  # of all runs together
            "padding/packing": done.sizes.packing,
            "padding/rounding": done.sizes.rounding,
        }
        scalars = {k: np.asarray(v) for k, v in done.metrics.scalars.items()}
        skipped = np.asarray(done.metrics.skipped)
        for n, own in enumerate(self.jobs):
            rate = float(self.schedules[n](done.step - 1 - int(skipped[n])))
            own.log.write(done.step, {**{k: float(v[n]) for k, v in scalars.items()}, "learning_rate": rate, **common})
        loss = scalars["loss"]
        job.say(
            f"{self.name} {done.step}/{self.num_steps}  loss {loss.min():.4f} to {loss.max():.4f}  {len(loss)} runs, "
            f"{seconds / steps:.2f} s a step"
        )

    def _look_for_trouble(self, job: Job, done: Dispatched) -> None:
        """A run whose step is not finite keeps its parameters, and the others go on; it is said once."""
        bad = ~np.asarray(done.metrics.finite) | np.asarray(done.metrics.spike)
        for n in set(np.flatnonzero(bad).tolist()) - self.troubled:
            self.troubled.add(n)
            loss = float(np.asarray(done.metrics.scalars["loss"])[n])
            job.say(f"{self.jobs[n].workdir.name}: step {done.step} is not finite or spikes, loss {loss:.4g}; the others go on")


def _objectives(runs: Mapping[str, Config]) -> list[dict[str, Any]]:
    """What tells the runs of a sweep, for the checkpoint's fingerprints."""
    return [{"loss": dataclasses.asdict(c.loss), "rate": c.optim.learning_rate, "seed": c.seed} for c in runs.values()]


def _completed(config: Config, shared: Config) -> Config:
    """A run's config with what data and weights told of the shared one: steps, warmup and limits."""
    optim = dataclasses.replace(config.optim, warmup_steps=shared.optim.warmup_steps, warmup_ratio=0.0)
    return dataclasses.replace(config, num_steps=shared.num_steps, num_epochs=0.0, data=shared.data, optim=optim)


def _each(job: Job, together: str):
    """How the runs of a step are computed: side by side, or one after another."""
    # A CPU has no idle units to fill: larger matrix products gain nothing there, and batched ones lose.
    side_by_side = jax.default_backend() != "cpu" or bool(job.config.lora.rank)
    if together == "vmap" or (together == "auto" and side_by_side):
        return jax.vmap
    return lambda function: lambda *xs: jax.lax.map(lambda x: function(*x), xs)


def _stacked(job: Job, policy: Policy, count: int) -> Policy:
    """The trained parameters of N runs as one tree of [N, ...] leaves, each run spread as the one is."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), policy.abstract)
    spread = jax.tree.map(lambda s: NamedSharding(job.mesh, P(None, *s.spec)), policy.shardings)
    return policy._replace(abstract=abstract, shardings=spread)


def _stage(job: Job, opened: Opened, jobs: list[Job], together: str) -> tuple[Sweep, Any, Policy]:
    """The stage, what makes its first state, and the stacked policy."""
    c, count, losses = job.config, len(jobs), [j.config.loss.make() for j in jobs]
    # A run's state has the structure of a solo run's, whose optimizer holds its schedule.
    unit = make_schedule(c.optim.schedule, learning_rate=1.0, warmup_steps=c.optim.warmup_steps, num_steps=c.num_steps)
    optimizer = make_optimizer(c.optim, unit, opened.trained.axes)
    stacked = _stacked(job, opened.trained, count)

    def make_state(params: Any, ref: Any = None) -> TrainState:
        made = jax.vmap(functools.partial(new_state, optimizer))(params)
        return made._replace(step=jnp.zeros((), jnp.int32), ref=ref)

    seeds = np.asarray([j.config.seed for j in jobs]) if c.lora.rank and c.lora.dropout else None
    gradients = sweep_gradients(
        opened.policy.model,
        losses,
        chunk=c.model.logps_chunk_tokens,
        each=_each(job, together),
        dropout_seeds=seeds,
    )
    constrain = lambda tree: jax.lax.with_sharding_constraint(tree, stacked.shardings)
    rates = np.asarray([j.config.optim.learning_rate for j in jobs], np.float32)
    options = dict(spike_factor=c.optim.spike_factor, skip_spikes=c.optim.skip_spikes)
    step = make_sweep_step(gradients, optimizer, constrain, rates, **options)
    _, shardings = state_layout(job, stacked, make_state, moving=False)
    program = job.program("sweep_step", step, donate_argnums=0, out_shardings=(shardings, job.replicated))
    solo, _ = preference_stage(job, opened)
    fields = {f.name: getattr(solo, f.name) for f in dataclasses.fields(Stage)}
    prints = {**solo.meta["fingerprints"], "loss": _objectives({j.workdir.name: j.config for j in jobs})}
    flops = lambda sizes: solo.flops(sizes) * count  # the shared reference counts for each run: it is what a solo run needs
    checkpoints = Checkpoints(job.workdir / "checkpoints", keep=c.checkpoint.keep)
    fields |= {"step_program": program, "flops": flops, "checkpoints": checkpoints}
    stage = Sweep(**fields | {"meta": {**solo.meta, "fingerprints": prints}})
    stage.jobs, stage.troubled = jobs, set()
    stage.schedules = [
        make_schedule(
            c.optim.schedule,
            learning_rate=j.config.optim.learning_rate,
            warmup_steps=c.optim.warmup_steps,
            num_steps=c.num_steps,
        )
        for j in jobs
    ]
    return stage, make_state, stacked


class _Evaluation:
    """(step, state) -> metrics of the held-out pairs of every run, in its log; the reference scores them once."""

    def __init__(self, job: Job, opened: Opened, jobs: list[Job]):
        self.job, self.opened, self.jobs = job, opened, jobs
        self.losses = [j.config.loss.make() for j in jobs]
        chunk = job.config.model.logps_chunk_tokens
        steps = [make_eval_step(opened.policy.model, loss, chunk=chunk, ref_logps=True) for loss in self.losses]

        def every(full, params, ref_logps, batch):
            """The pairs' results of all runs; one after another, so that one run's activations exist at a time."""
            branches = [lambda p, step=step: step(full(p), ref_logps, batch, jnp.float32(0)) for step in steps]
            if len(branches) == 1:
                return jax.lax.map(branches[0], params)
            one = lambda n_params: jax.lax.switch(n_params[0], branches, n_params[1])
            return jax.lax.map(one, (jnp.arange(len(branches)), params))

        def whole(params, ref, batch, base):
            full = (lambda p: p) if base is None else functools.partial(join, base)
            return every(full, params, reference_logps(opened.policy.model, ref, batch, chunk), batch)

        self.program = job.program("sweep_eval_step", whole, out_shardings=job.replicated)
        self.results: list[Any] = []
        self.scalars: list[dict[str, float]] = []

    def __call__(self, step: int, state: TrainState, *, log: bool = True) -> None:
        opened, job = self.opened, self.job
        assert opened.eval_pack is not None  # `run_sweep` asks for held-out preferences
        parts, count = [], opened.eval_pack.index.groups_within(job.config.data.eval_max_pairs)
        for batch, _ in eval_batches(opened.eval_pack, num_groups=opened.groups, count=count):
            found = jax.device_get(self.program(state.params, opened.ref, job.put(batch), opened.base))
            used = found.row_id[0] >= 0
            parts.append(jax.tree.map(lambda x, used=used: np.asarray(x)[:, used], found))
        together = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *parts)
        self.results = [jax.tree.map(lambda x, n=n: x[n], together) for n in range(len(self.jobs))]
        self.scalars = [
            evaluate.eval_scalars(r, loss, opened.data.eval_parts) for r, loss in zip(self.results, self.losses, strict=True)
        ]
        sampler = opened.sampler if job.config.sample.kl_prompts else None
        for n, (own, scalars) in enumerate(zip(self.jobs, self.scalars, strict=True)):
            if sampler is not None and opened.ref is not None:
                value, error = sampler.kl(opened.full(run_params(state, n)), opened.ref)
                scalars |= {"eval_on_policy_kl": value, "eval_on_policy_kl_standard_error": error}
            if log:
                own.log.write(step, scalars)
            kl = f"  KL {scalars['eval_on_policy_kl']:.2f}" if "eval_on_policy_kl" in scalars else ""
            job.say(
                f"eval {step}  {own.workdir.name}: loss {scalars['eval_loss']:.4f}{accuracy_and_margin(scalars, 'eval_')}{kl}"
            )


def run_params(state: TrainState, n: int) -> Any:
    """The trained parameters of run n."""
    return jax.tree.map(lambda x: x[n], state.params)


def run_state(state: TrainState, n: int) -> TrainState:
    """The state of run n, as a solo run has it."""
    return jax.tree.map(lambda x: x[n], state._replace(step=jnp.broadcast_to(state.step, state.skipped.shape)))


def run_sweep(runs: Mapping[str, Config], workdir: pathlib.Path, stop: Stop, *, together: str = "auto") -> dict[str, dict]:
    """Trains the runs in one program; returns their summaries by name.

    Args:
      runs: from `combinations`.
      together: "vmap" (side by side), "loop" (one after another), "auto".
    Raises: as `run.run`.
    """
    began = time.monotonic()
    shared = next(iter(runs.values()))
    mesh = sharding.config_mesh(shared.mesh)
    enabled = jax.process_index() == 0
    job = Job(shared, workdir, mesh, MetricsLog(workdir, enabled=False), stop)
    job.say(f"devices: {jax.device_count()} {jax.devices()[0].device_kind}; {len(runs)} runs in one program: {', '.join(runs)}")
    inputs = open_inputs(job)
    if not inputs.data.has_preferences or inputs.data.eval is None or not job.config.num_steps:
        raise ConfigError(
            "--sweep: runs are compared by held-out preferences; set data.eval (or data.eval_share) and num_steps"
        )
    opened = open_run(job, inputs, _objectives(runs))
    jobs = []
    for name, config in runs.items():
        folder = workdir / name
        own = Job(config, folder, mesh, MetricsLog(folder, enabled=enabled), stop, job.programs)
        own.config = _completed(config, job.config)
        own.write(functools.partial(folder.mkdir, parents=True, exist_ok=True))
        own.write(functools.partial(write_settings, own, opened.data, opened.policy))
        jobs.append(own)
    stage, make_state, stacked = _stage(job, opened, jobs, together)
    evaluation = _Evaluation(job, opened, jobs)
    stage.evaluate = evaluation
    if shared.lora.rank:
        each = [initial_adapters(own, opened.trained) for own in jobs]
        params = jax.jit(lambda *trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees), out_shardings=stacked.shardings)(*each)
    else:
        copies = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (len(jobs), *x.shape)), tree)
        params = jax.jit(copies, out_shardings=stacked.shardings)(opened.params)
    jax.tree.map(lambda x: x.delete(), opened.params)
    state = start_state(job, stage, params, make_state, stacked)
    for each_job in (job, *jobs):
        each_job.commit()
    for own in jobs:
        own.log.rewind(sft_step=10**12, step=int(state.step) or -1)
    state = train_stage(job, stage, state, opened.ref, opened.base)
    stage.checkpoints.close()
    if not evaluation.results:
        evaluation(int(state.step), state, log=False)
    return {
        name: _finish(own, opened, stage, state, n, evaluation, began)
        for n, (name, own) in enumerate(zip(runs, jobs, strict=True))
    }


def _finish(own: Job, opened: Opened, stage: Sweep, state: TrainState, n: int, evaluation: _Evaluation, began: float) -> dict:
    """A run's checkpoint, samples, summary and report."""
    mine, _ = preference_stage(own, opened)
    mine.num_tokens, mine.evaluation_due = stage.num_tokens, False
    if int(state.step) not in mine.checkpoints.steps():
        mine.save(own, int(state.step), run_state(state, n), wait=True)
    mine.checkpoints.close()
    samples = None
    first = opened.ref if opened.ref is not None else opened.base
    if opened.sampler is not None and first is not None:
        samples = opened.sampler.compare(opened.full(run_params(state, n)), first)
    mine.pairs, mine.seconds, mine.step_times = stage.pairs, stage.seconds, stage.step_times
    mine.work, mine.tokens = stage.work / len(stage.jobs), stage.tokens
    scalars = evaluation.scalars[n] | {"skipped_steps": int(state.skipped[n]), "runs_together": len(stage.jobs)}
    return finish_run(own, opened, mine, int(state.step), scalars, evaluation.results[n], samples, began)


def results_table(summaries: Mapping[str, dict[str, Any]]) -> str:
    """The runs of a sweep as a Markdown table: name -> what summary.json holds."""
    keys = ("eval_loss", "eval_objective/accuracy", "win_rate", "kl")
    lines = [f"| run | {' | '.join(keys)} |", "|---|" + "---|" * len(keys)]
    for name, summary in summaries.items():
        cells = [f"{summary[k]:.4f}" if summary.get(k) is not None else "" for k in keys]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(path: pathlib.Path, table: str) -> None:
    """Writes the table whole or not at all, and says where; a folder that cannot be written stops nothing."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(table + "\n", encoding="utf-8")
        temporary.replace(path)
        say(f"\n{path}")
    except OSError as error:
        say(f"warning: {path} cannot be written ({error.strerror or error})")


# --- the command line -------------------------------------------------------------------------------------------------


def _flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    for flag in argv:
        if flag == "--allow_code":
            yield "allow_code", ""
            continue
        name, equals, value = flag.partition("=")
        if not name.startswith("--") or not equals:
            raise ConfigError(f"{flag!r} is not understood; flags look like --sweep.KEY=A,B and --config.KEY=VALUE")
        yield name.removeprefix("--"), value


def _unknown_flag(name: str, value: str) -> str:
    """Why a flag is not understood, and what there is."""
    if name == "together":
        near = did_you_mean(value, ("auto", "vmap", "loop"))
        return f"--together={value}: it must be auto, vmap or loop{near}"
    if name.partition(".")[0] != "sweep" and did_you_mean(name.partition(".")[0], ["sweep"]):
        return f"flag --{name} is unknown; did you mean --sweep.{name.partition('.')[2] or 'KEY'}?"
    return f"flag --{name} is unknown; --sweep.KEY=A,B names what differs; {known_flags(name, FLAGS)}"


def sweep(argv: Sequence[str], stop: StopSignal) -> int:
    """Runs the command line; returns the exit code. Raises DpojaxError for what a user can mend."""
    if not argv or {"--help", "-h"} & set(argv):
        print(f"{__doc__}\n--together=auto|vmap|loop says whether the runs of a step are computed side by side.")
        return 0
    spec, workdir, together, overrides, grid, allow_code = "", None, "auto", {}, {}, False
    for name, value in _flags(argv):
        if name == "config":
            spec = value
        elif name == "workdir":
            workdir = value
        elif name == "allow_code" and not value:
            allow_code = True
        elif name == "together" and value in ("auto", "vmap", "loop"):
            together = value
        elif name.startswith("config."):
            overrides[name.removeprefix("config.")] = value
        elif name.startswith("sweep."):
            grid[name.removeprefix("sweep.")] = value.split(",")
        else:
            raise ConfigError(_unknown_flag(name, value))
    if not spec or not grid:
        raise ConfigError("--config=FILE and at least one --sweep.KEY=A,B are needed")
    values = load_config_file(spec, allow_code=allow_code, overridden={**overrides, **grid})
    for key, text in overrides.items():
        apply_override(values, key, text)
    runs = combinations(values, grid, frozenset(overrides))
    folder = workdir_path(workdir or f"runs/{pathlib.Path(spec.partition(':')[0]).stem}-sweep", spec)
    join_run(list(runs.values()))
    stop.processes = jax.process_count()
    with contextlib.ExitStack() as locks:
        for place in (folder, *(folder / name for name in runs)):
            locks.enter_context(locked_workdir(place))
        found = run_sweep(runs, folder, stop, together=together)
    table = results_table(found)
    if jax.process_index() == 0:
        say(f"\n{table}")
        write_table(folder / "sweep.md", table)
    return 0


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return run_command(functools.partial(sweep, argv))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
