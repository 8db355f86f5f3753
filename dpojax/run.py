"""A whole run: data -> SFT -> DPO -> evaluation -> report. `main.py` calls `run`; the loop is in stages.py."""

import dataclasses
import json
import math
import pathlib
import time
from typing import Any

import jax

from dpojax import checkpoint, evaluate, reference, report, selfcheck, sharding, winrate
from dpojax.checkpoint import Checkpoints
from dpojax.config import Config, resolved_mode, to_dict
from dpojax.data.packing import PackShape
from dpojax.data.pipeline import groups_per_step
from dpojax.datasets import Data, open_data
from dpojax.flops import token_flops
from dpojax.job import Job, Stop
from dpojax.metrics import MetricsLog, duration, say
from dpojax.models import hf
from dpojax.models.table import num_params
from dpojax.optim import make_optimizer, make_schedule
from dpojax.policy import Policy, open_policy
from dpojax.stages import (
    Stage,
    batch_shape,
    batch_stream,
    fingerprints,
    packer,
    params_before_dpo,
    start_state,
    train_program,
    train_stage,
)
from dpojax.train import TrainState, make_eval_step, preference_gradients


def run(config: Config, workdir: pathlib.Path, stop: Stop) -> dict[str, Any]:
    """Runs `config` in `workdir`, from where it stands there; returns the summary.

    Raises: DpojaxError for what a user can mend; Interrupted after saving.
    """
    began = time.monotonic()
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    job = Job(config, workdir, mesh, MetricsLog(workdir, enabled=jax.process_index() == 0), stop)
    axes = " x ".join(f"{k} {v}" for k, v in mesh.shape.items())
    job.say(f"devices: {jax.device_count()} {jax.devices()[0].device_kind}, mesh {axes}, {jax.process_count()} process(es)")
    finished = _finished(job)
    if finished is not None:
        return finished
    if config.sample.num_prompts and evaluate.reward_name(config):
        winrate.load_reward(evaluate.reward_name(config))  # a misspelt one fails now, not after training
    data = open_data(job)
    policy = open_policy(job, data)
    _write_settings(job, data)

    params = params_before_dpo(job, data, policy)
    weights = checkpoint.checksums(params)
    mode, moving = resolved_mode(config), config.loss.make().moving
    ref = None if mode == "none" else reference.open_live(job, policy, params)
    groups = groups_per_step(data.train_index, batch_size=config.batch_size, batch_groups=config.batch_groups)
    shape = batch_shape(job, [data.train_index, data.eval_index], groups)
    job.say(
        f"rows: {shape.shard_rows} x {shape.row_tokens} tokens a micro-batch on each of {shape.num_shards} data shard(s), "
        f"layout {shape.layout}"
    )
    check = _self_check(job, data, policy, params, ref, shape)
    caches: tuple[Any, Any] = (None, None)
    if mode == "cached":
        caches, ref = reference.open_caches(job, data, policy, ref, weights, shape, groups), None
    sampler = evaluate.Sampling(job, data, policy) if config.sample.num_prompts and data.tokenizer is not None else None
    eval_pack = packer(job, data.eval, data.eval_index, shape, caches[1])
    evaluation = _Evaluation(job, policy, None if moving else ref, eval_pack, groups, sampler)
    train_pack = packer(job, data.train, data.train_index, shape, caches[0])
    stage, optimizer = _dpo_stage(job, data, policy, weights, batch_stream(job, train_pack, groups, config.num_steps), groups)
    stage.evaluate = evaluation
    state = start_state(job, stage, params, optimizer, policy, moving_ref=ref if moving else None)
    del params  # the state has taken their memory
    ref = None if moving else ref
    start = int(state.step)
    job.log.rewind(sft_step=10**12, step=start if start else -1)
    state = train_stage(job, stage, state, ref)
    stage.checkpoints.close()
    if evaluation.results is None:  # resumed after the last step, whose evaluation is in the log already
        evaluation(int(state.step), state, log=False)

    samples = None
    if sampler is not None:
        # A cached or moving reference gave up its first parameters during training.
        samples = sampler.compare(state.params, params_before_dpo(job, data, policy) if ref is None else ref)
    if config.export:
        _export(job, data, policy, state.params)
    summary = {
        "num_steps": int(state.step),
        "pairs_per_second": stage.pairs / stage.seconds if stage.seconds else None,
        "skipped_steps": int(state.skipped),
        **evaluation.scalars,
        **(evaluate.judge_samples(job, samples) if samples else {}),
        "seconds": time.monotonic() - began,
        "programs": {p.name: {"compiled": p.compiled, "seconds": p.seconds} for p in job.programs.values()},
        "train_rows": data.train_index.counts,
        "eval_rows": data.eval_index.counts,
        "self_check": check._asdict() if check else None,
    }
    if job.main_process:
        _write_summary(job, summary)
        page = report.render_report(workdir.name, config, summary, job.log.rows(), evaluation.results, samples)
        job.write_file("report.html", page)
        _say_results(summary, workdir / "report.html", job)
    job.log.close()
    return summary


class _Evaluation:
    """(step, state) -> metrics of the held-out pairs, logged; remembers the last ones."""

    def __init__(self, job: Job, policy: Policy, ref: Any, pack, groups: int, sampler: evaluate.Sampling | None):
        self.job, self.ref, self.pack, self.groups = job, ref, pack, groups
        self.sampler = sampler if job.config.sample.kl_prompts else None
        self.loss = job.config.loss.make()
        step = make_eval_step(policy.model, self.loss, chunk=job.config.model.logps_chunk_tokens)
        self.program = job.program("eval_step", step, out_shardings=job.replicated)
        self.results: Any = None
        self.scalars: dict[str, float] = {}

    def __call__(self, step: int, state: TrainState, *, log: bool = True) -> None:
        ref = self.ref if state.ref is None else state.ref
        self.results = evaluate.evaluate_pairs(
            self.job, self.program, state.params, ref, state.reward_mean, self.pack, self.groups
        )
        self.scalars = evaluate.eval_scalars(self.results, self.loss)
        kl = ""
        if self.sampler is not None and ref is not None:
            value, error = self.sampler.kl(state.params, ref)
            self.scalars |= {"eval_on_policy_kl": value, "eval_on_policy_kl_standard_error": error}
            kl = f"  KL {value:.2f} ± {error:.2f}"
        if log:
            self.job.log.write(step, self.scalars)
        self.job.say(
            f"eval {step}  loss {self.scalars['eval_loss']:.4f}  accuracy {self.scalars['eval_rewards/accuracies']:.3f}  "
            f"margin {self.scalars['eval_rewards/margins']:+.3f}{kl}  on {len(self.results.loss)} held-out "
            f"{'responses' if self.loss.unpaired else 'pairs'}"
        )


def _dpo_stage(job: Job, data: Data, policy: Policy, weights, batches, groups: int) -> tuple[Stage, Any]:
    """The preference stage and its optimizer."""
    c = job.config
    loss = c.loss.make()
    schedule = make_schedule(
        c.optim.schedule, learning_rate=c.optim.learning_rate, warmup_steps=c.optim.warmup_steps, num_steps=c.num_steps
    )
    optimizer = make_optimizer(c.optim, schedule, policy.model.axes)
    gradients = preference_gradients(policy.model, loss, chunk=c.model.logps_chunk_tokens)
    prints = fingerprints(
        job,
        data.train,
        policy,
        reference={"weights": checkpoint.digest(weights), "dtype": c.reference.dtype or c.model.param_dtype},
        loss={**dataclasses.asdict(c.loss), "source": loss.source},
        batch={"batch_size": c.batch_size, "batch_groups": c.batch_groups},
    )
    stage = Stage(
        name="DPO",
        prefix="",
        num_steps=c.num_steps,
        step_program=train_program(job, "dpo_step", policy, optimizer, gradients, moving=loss.moving),
        batches=batches,
        schedule=schedule,
        checkpoints=Checkpoints(job.workdir / "checkpoints", keep=c.checkpoint.keep),
        meta={"config": to_dict(c), "fingerprints": prints, "model": dataclasses.asdict(policy.config)},
        data=data.train,
        groups=groups,
        epoch_groups=len(data.train_index.rows),
        evaluate=lambda step, state: None,
        flops=token_flops(policy.config, passes=4 if resolved_mode(c) == "live" else 3),
    )
    return stage, optimizer


def _write_settings(job: Job, data: Data) -> None:
    """run.json and the tokenizer, so that the workdir can be used as a config and as model.init."""
    job.write_file("run.json", json.dumps(to_dict(job.config), indent=2) + "\n")
    if job.main_process and data.tokenizer is not None:
        (job.workdir / "tokenizer").mkdir(exist_ok=True)
        data.tokenizer.save(job.workdir / "tokenizer")


def _finished(job: Job) -> dict[str, Any] | None:
    """The summary of a run that is complete already, or None."""
    path = job.workdir / "summary.json"
    if not path.is_file() or not (job.workdir / "report.html").is_file():
        return None
    try:
        summary = json.loads(path.read_text())
        same = json.loads((job.workdir / "run.json").read_text()) == to_dict(job.config)
    except (ValueError, OSError):
        return None
    if same and summary.get("num_steps", 0) >= job.config.num_steps:
        job.say(
            f"{job.workdir}: finished, {summary['num_steps']} steps; a larger --config.num_steps goes on; {job.workdir / 'report.html'}"
        )
        return summary
    return None


def _self_check(job: Job, data: Data, policy: Policy, params, ref, shape: PackShape) -> selfcheck.CheckResult | None:
    """Runs the self-check where the config and the model's size ask for it, and says what it found."""
    c = job.config
    size = num_params(policy.config)
    if c.self_check == "off" or (c.self_check == "auto" and size > 1e9):
        job.say(f"self-check: skipped ({'off' if c.self_check == 'off' else 'over 1B parameters; self_check=full runs it'})")
        return None
    start = time.monotonic()
    bf16 = "bfloat16" in (c.model.dtype, c.reference.dtype or c.model.param_dtype)
    found = selfcheck.self_check(
        policy.model,
        params,
        ref,
        packer(job, data.train, data.train_index, shape),
        c.loss.make(),
        dtype="bfloat16" if bf16 else "float32",
        num_shards=sharding.num_shards(job.mesh),
        put=job.put,
        program=job.program,
    )
    closed = "no closed form" if found.expected is None else f"= {found.expected:.6f}"
    job.say(
        f"self-check: loss {found.loss:.6f} {closed} at policy == reference; noise floor of the log-ratios {found.noise_nats:.0e} nats, "
        f"{found.worst_ratio:.0e} of the log-probs; order, padding, micro-batches and layout move a token by {found.worst_layout:.0e} "
        f"nats ({duration(time.monotonic() - start)})"
    )
    return found


def _export(job: Job, data: Data, policy: Policy, params) -> None:
    whole = jax.jit(lambda tree: tree, out_shardings=job.replicated)(params)
    if job.main_process:
        tokenizer = data.tokenizer
        hf.export_params(
            whole,
            policy.config,
            job.workdir / "export",
            bos_id=tokenizer.bos_id if tokenizer else None,
            eos_id=tokenizer.eos_id if tokenizer else None,
            tokenizer=tokenizer,
        )
        say(f"exported to {job.workdir / 'export'}")


def _write_summary(job: Job, summary: dict[str, Any]) -> None:
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
    job.write_file("summary.json", json.dumps(plain, indent=2) + "\n")


def _say_results(summary: dict[str, Any], path: pathlib.Path, job: Job) -> None:
    for p in job.programs.values():
        if p.compiled:
            say(f"program {p.name}: compiled {p.compiled} time(s)")
    if "win_rate" in summary:
        say(
            f"win rate over the reference {summary['win_rate']:.1%} [{summary['win_rate_low']:.1%}, {summary['win_rate_high']:.1%}], "
            f"length-controlled {summary['win_rate_length_controlled']:.1%}"
        )
    if "kl" in summary:
        say(
            f"KL(policy || reference) {summary['kl']:.2f} ± {summary['kl_standard_error']:.2f} nats; "
            f"mean length {summary['mean_length']:.1f} vs {summary['reference_mean_length']:.1f} tokens"
        )
    say(f"done in {duration(summary['seconds'])}: {path}")
