"""A whole run: data -> SFT -> DPO -> evaluation -> report. `main.py` calls `run`; the loop is in stages.py."""

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import sys
import time
from typing import Any

import jax

import dpojax
from dpojax import checkpoint, evaluate, programs, report, sharding
from dpojax.checkpoint import Checkpoints
from dpojax.config import Config, frozen_dtype, to_dict
from dpojax.data.tokens import copy_companions
from dpojax.datasets import Data
from dpojax.errors import ConfigError
from dpojax.job import Job, Stop
from dpojax.metrics import MetricsLog, accuracy_and_margin, duration, finite_json, peak_memory, say
from dpojax.models import hf, lora, peft
from dpojax.models.table import num_params
from dpojax.opening import Opened, open_inputs, open_run
from dpojax.plain_data import read_json
from dpojax.policy import Policy, reference_params
from dpojax.stages import (
    Stage,
    Trace,
    batch_stream,
    known_fingerprints,
    objective_print,
    origin,
    params_before_dpo,
    preference_passes,
    preference_program,
    preference_schedule,
    start_state,
    step_flops,
    train_stage,
)
from dpojax.train import TrainState, make_eval_step, new_state

HARDLY_MOVED = 5e-3  # mean rewards below it: at beta 0.1 a response is within 0.05 nats of the reference


def run(config: Config, workdir: pathlib.Path, stop: Stop, *, profile_steps: int = 0) -> dict[str, Any]:
    """Runs `config` in `workdir`, from where it stands there; returns the summary.

    Args:
      profile_steps: how many steps of the preference stage are traced; 0: none.

    Raises: DpojaxError for what a user can mend; Interrupted after saving.
    """
    began = time.monotonic()
    mesh = sharding.config_mesh(config.mesh)
    job = Job(config, workdir, mesh, MetricsLog(workdir, enabled=jax.process_index() == 0), stop)
    axes = " x ".join(f"{k} {v}" for k, v in mesh.shape.items())
    job.say(f"devices: {jax.device_count()} {jax.devices()[0].device_kind}, mesh {axes}, {jax.process_count()} process(es)")
    finished = _finished(job)
    if finished is not None:
        return finished
    inputs = open_inputs(job)
    config = job.config
    if not inputs.data.has_preferences:
        return _sft_alone(job, inputs.data, inputs.policy, began)
    opened = open_run(job, inputs, objective_print(config))
    data, policy, params, full, ref, base = (getattr(opened, k) for k in ("data", "policy", "params", "full", "ref", "base"))
    moving, sampler = config.loss.make().moving, opened.sampler
    evaluation = _Evaluation(job, opened, None if moving else ref)
    stage, optimizer = preference_stage(job, opened)
    stage.evaluate = evaluation
    state = start_state(
        job, stage, params, functools.partial(new_state, optimizer), opened.trained, moving_ref=ref if moving else None
    )
    job.commit()
    del params  # the state has taken their memory
    ref = None if moving else ref
    start = int(state.step)
    job.log.rewind(sft_step=10**12, step=start if start else -1)
    stage.trace = Trace(job, profile_steps) if profile_steps else None
    state = train_stage(job, stage, state, ref, base)
    stage.checkpoints.close()
    if evaluation.results is None:  # resumed after the last step, whose evaluation is in the log already
        evaluation(int(state.step), state, log=False)

    samples = None
    if sampler is not None:
        # A cached or moving reference gave up its first parameters during training.
        first = ref if ref is not None or config.reference.init else base
        if first is None:
            first = reference_params(job, policy) if config.reference.init else params_before_dpo(job, data, policy)
        samples = sampler.compare(full(state.params), first)
    if config.export:
        _export(job, data, policy, full(state.params), adapters=bool(config.lora.rank))
    found = evaluation.scalars | {"skipped_steps": int(state.skipped)}
    return finish_run(job, opened, stage, int(state.step), found, evaluation.results, samples, began)


def finish_run(
    job: Job, opened: Opened, stage: Stage, step: int, found: dict[str, Any], results: Any, samples: Any, began: float
) -> dict[str, Any]:
    """Writes summary.json and report.html, and says what came out.

    Args:
      found: scalars of the held-out pairs.
      results: of the held-out pairs; samples: of policy and reference, or None.
      began: when the run did, of time.monotonic().
    """
    data, check = opened.data, opened.check
    summary = {
        "num_steps": step,
        "pairs_per_second": stage.pairs / stage.seconds if stage.seconds else None,
        **stage.speed(),
        **peak_memory(),
        "seconds_compiling": sum(p.seconds for p in job.programs.values()),
        **found,
        **(evaluate.judge_samples(job, samples) if samples else {}),
        "seconds": time.monotonic() - began,
        "run": describe_run(job, opened.policy, began),
        "programs": _programs(job),
        "train_rows": data.train_index.counts,
        "eval_rows": {} if data.eval_index is None else data.eval_index.counts,
        "self_check": check._asdict() if check else None,
    }
    return _leave_report(job, summary, results, samples)


def _leave_report(job: Job, summary: dict[str, Any], results: Any, samples: Any) -> dict[str, Any]:
    """Writes summary.json and report.html, and says what came out; returns the summary."""
    if job.main_process:
        _write_summary(job, summary)
        page = report.render_report(job.workdir.name, job.config, summary, job.log.rows(), results, samples)
        job.write_file("report.html", page)
        _say_results(summary, job.workdir / "report.html", job)
    job.log.close()
    return summary


def _programs(job: Job) -> dict[str, dict[str, Any]]:
    """What was compiled or loaded, by program, for summary.json and the report."""
    return {p.name: {"compiled": p.compiled, "loaded": p.loaded, "seconds": p.seconds} for p in job.programs.values()}


def describe_run(job: Job, policy: Policy, began: float) -> dict[str, Any]:
    """What was run, on what, with what and when: as data for summary.json and the report.

    Args:
      began: when the run did, of time.monotonic().
    """
    c = job.config
    size = num_params(policy.config) / 1e6
    source = c.model.init or c.model.shape or "random weights"
    started = datetime.datetime.now().astimezone() - datetime.timedelta(seconds=time.monotonic() - began)
    libraries = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)"
    return {
        "model": f"{source}, {policy.config.family}, {size:,.2f}M parameters, {c.model.dtype} compute, {c.model.param_dtype} stored",
        "devices": f"{devices}, {platform.platform()}",
        "versions": {"dpojax": dpojax.__version__, "Python": platform.python_version(), **libraries},
        "command": shlex.join(sys.orig_argv),
        "started": started.isoformat(timespec="seconds"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cores": os.cpu_count(),
    }


class _Evaluation:
    """(step, state) -> metrics of the held-out pairs, logged; remembers the last ones. Without such pairs: nothing."""

    def __init__(self, job: Job, opened: Opened, ref: Any):
        self.job, self.full, self.ref, self.groups = job, opened.full, ref, opened.groups
        self.pack, self.parts = opened.eval_pack, opened.data.eval_parts
        self.sampler = opened.sampler if job.config.sample.kl_prompts else None
        self.loss = job.config.loss.make()
        step = make_eval_step(opened.policy.model, self.loss, chunk=job.config.model.logps_chunk_tokens)
        self.program = job.program("eval_step", step, out_shardings=job.replicated)
        self.results: Any = None
        self.scalars: dict[str, float] = {}

    def __call__(self, step: int, state: TrainState, *, log: bool = True) -> None:
        if self.pack is None:
            return
        ref = self.ref if state.ref is None else state.ref
        params = self.full(state.params)
        self.results = evaluate.evaluate_pairs(self.job, self.program, params, ref, state.reward_mean, self.pack, self.groups)
        self.scalars = evaluate.eval_scalars(self.results, self.loss, self.parts)
        kl = ""
        if self.sampler is not None and ref is not None:
            value, error = self.sampler.kl(params, ref)
            self.scalars |= {"eval_on_policy_kl": value, "eval_on_policy_kl_standard_error": error}
            kl = f"  KL {value:.2f} ± {error:.2f} ({self.sampler.kl_count} prompts)"
        if log:
            self.job.log.write(step, self.scalars)
        self.job.say(
            f"eval {step}  loss {self.scalars['eval_loss']:.4f}{accuracy_and_margin(self.scalars, 'eval_')}{kl}  "
            f"on {len(self.results.loss)} held-out "
            f"{'responses' if self.loss.unpaired else 'pairs'}"
        )


def preference_stage(job: Job, opened: Opened) -> tuple[Stage, Any]:
    """The preference stage and its optimizer."""
    c, data, policy, groups = job.config, opened.data, opened.trained, opened.groups
    weights, own_weights = opened.weights, opened.own_weights
    schedule = preference_schedule(c)
    program, optimizer = preference_program(job, policy)
    adapter = {}
    if c.lora.rank:
        adapter = {
            "adapter": {
                "rank": c.lora.rank,
                "targets": c.lora.targets,
                "scale": c.lora.alpha / c.lora.rank,
                "base_dtype": c.lora.base_dtype,
            }
        }
    prints = known_fingerprints(job, data.train, policy, objective_print(c))
    prints["reference"] = {"weights": checkpoint.digest(weights), "dtype": frozen_dtype(c)}
    if c.lora.rank:
        prints["lora"] |= {"base": checkpoint.digest(own_weights)}
    stage = Stage(
        name="DPO",
        prefix="",
        num_steps=c.num_steps,
        step_program=program,
        batches=batch_stream(job, opened.train_pack, groups, c.num_steps),
        schedule=schedule,
        checkpoints=Checkpoints(job.workdir / "checkpoints", keep=c.checkpoint.keep),
        meta={"config": to_dict(c), "fingerprints": prints, "model": dataclasses.asdict(policy.config)}
        | origin(policy)
        | adapter,
        data=data.train,
        groups=groups,
        epoch_groups=len(data.train_index.rows),
        evaluate=lambda step, state: None,
        flops=step_flops(policy.config, preference_passes(c)),
    )
    return stage, optimizer


def _sft_alone(job: Job, data: Data, policy: Policy, began: float) -> dict[str, Any]:
    """A run whose data hold no preferences and whose num_steps is 0: the SFT stage is all of it."""
    params = params_before_dpo(job, data, policy)
    job.commit()
    if job.config.export:
        _export(job, data, policy, params, adapters=False)
    losses = [row["sft_loss"] for row in job.log.rows() if row.get("sft_loss") is not None]
    summary = {
        "num_steps": 0,
        "sft_steps": job.config.sft.num_steps,
        "sft_loss": losses[-1] if losses else None,
        "pairs_per_second": None,
        **peak_memory(),
        "seconds_compiling": sum(p.seconds for p in job.programs.values()),
        "seconds": time.monotonic() - began,
        "run": describe_run(job, policy, began),
        "programs": _programs(job),
        "train_rows": data.train_index.counts,
        "eval_rows": {},
        "self_check": None,
    }
    return _leave_report(job, summary, None, None)


def _finished(job: Job) -> dict[str, Any] | None:
    """The summary of a run that is complete already, or None."""
    path = job.workdir / "summary.json"
    if not path.is_file() or not (job.workdir / "report.html").is_file():
        return None
    try:
        summary = read_json(path)
        same = read_json(job.workdir / "run.json", infinite=True) == to_dict(job.config)
    except ConfigError:  # they are written anew
        return None
    steps = summary.get("num_steps")
    if same and isinstance(steps, int) and steps >= job.config.num_steps:
        job.say(
            f"{job.workdir}: finished, {summary['num_steps']} steps; a larger --config.num_steps goes on; {job.workdir / 'report.html'}"
        )
        return summary
    return None


def _export(job: Job, data: Data, policy: Policy, params, *, adapters: bool) -> None:
    """WORKDIR/export, a Hugging Face directory with adapters merged; and the adapters as PEFT's, in WORKDIR/adapter."""
    c, tokenizer = job.config, job.workdir / "tokenizer"
    weights = policy.weights
    fields = None if weights is None else weights.fields
    if fields is None:
        own = data.tokenizer
        ids = dict(bos_id=own.bos_id, eos_id=own.eos_id) if own else dict(bos_id=None, eos_id=None)
        fields = hf.llama_fields(policy.config, **ids)
    if adapters:
        _export_adapters(job, data, policy, params)
        params = jax.jit(lambda tree: lora.merge(tree, policy.config, c.lora.alpha / c.lora.rank))(params)
    progress = job.progress("export", hf.num_tensors(policy.config), "tensors")
    hf.export_params(
        params,
        policy.config,
        job.workdir / "export",
        fields=fields,
        dtype=c.model.param_dtype,
        companions=tokenizer,
        write=job.main_process,
        progress=progress,
    )
    progress.close(str(job.workdir / "export"))


def _export_adapters(job: Job, data: Data, policy: Policy, params) -> None:
    """The adapters in WORKDIR/adapter, where PEFT can open their base; else no such folder, and a line that says why.

    Over an adapter they are written together with it, on its base: the ranks add up.
    """
    c, weights, folder = job.config, policy.weights, job.workdir / "adapter"
    reason = ""
    if data.sft is not None:
        reason = "they stand on the result of the SFT stage"
    elif weights is None:
        reason = "they stand on random weights"
    elif weights.base is None:
        reason = f"they stand on {c.model.init}, which is no Hugging Face directory and no plain adapter of one"
    if job.main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier export, perhaps on another base
    if reason:
        job.say(f"the adapters are not exported alone: {reason}; {job.workdir / 'export'} holds the merged weights")
        return
    assert weights is not None and weights.base is not None
    adapters = {"layers": {k: v for k, v in params["layers"].items() if k.endswith((lora.LORA_A, lora.LORA_B))}}
    adapters, scale = jax.jit(lambda tree: tree, out_shardings=job.replicated)(adapters), c.lora.alpha / c.lora.rank
    if weights.adapters is not None:
        adapters, scale = lora.stack(*weights.adapters(), adapters, scale)
    if job.main_process:
        peft.export_adapters(adapters, policy.config, folder, scale=scale, base=str(weights.base))
        copy_companions(job.workdir / "tokenizer", folder)  # the base's may write its text otherwise


def _write_summary(job: Job, summary: dict[str, Any]) -> None:
    job.write_file("summary.json", finite_json(summary, indent=2) + "\n")


def _say_results(summary: dict[str, Any], path: pathlib.Path, job: Job) -> None:
    job.say(programs.totals(job.programs))
    if "win_rate" in summary:
        say(
            f"win rate over the reference {summary['win_rate']:.1%} [{summary['win_rate_low']:.1%}, {summary['win_rate_high']:.1%}], "
            f"length-controlled {summary['win_rate_length_controlled']:.1%}"
        )
    if "kl" in summary:
        say(
            f"KL(policy || reference) {summary['kl']:.2f} ± {summary['kl_standard_error']:.2f} nats over "
            f"{summary['num_samples']} prompts; "
            f"mean length {summary['mean_length']:.1f} vs {summary['reference_mean_length']:.1f} tokens"
        )
    if "step_time_p50_s" in summary:
        mfu = f", {summary['useful_mfu']:.1%} of the peak" if "useful_mfu" in summary else ""
        rate = f"{summary['pairs_per_second']:.1f} pairs/s, " if summary["pairs_per_second"] else ""
        say(
            f"step {summary['step_time_p50_s']:.3f} s (median), {summary['step_time_p99_s']:.3f} s (99th percentile); {rate}"
            f"{summary['useful_tflops']:.3g} useful TFLOP/s{mfu}; compiling and loading {duration(summary['seconds_compiling'])}; "
            + ", ".join(
                f"{k.removeprefix('peak_').removesuffix('_gib').replace('_', ' ')} {v:.2f} GiB"
                for k, v in summary.items()
                if k.startswith("peak_")
            )
        )
    rewards = [abs(summary[key]) for key in ("eval_rewards/chosen", "eval_rewards/rejected") if summary.get(key) is not None]
    if summary["num_steps"] and rewards and max(rewards) < HARDLY_MOVED:
        say(
            f"note: the policy hardly moved: rewards of held-out responses are {max(rewards):.1e} at most; more steps move it, or a "
            f"higher optim.learning_rate than {job.config.optim.learning_rate:g} (small models take 1e-5 to 1e-4)"
        )
    say(f"done in {duration(summary['seconds'])}: {path}")
