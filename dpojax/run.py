"""A whole run: data -> SFT -> DPO -> evaluation -> report. `main.py` calls `run`; the loop is in stages.py."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

from dpojax import checkpoint, evaluate, reference, report, selfcheck, sharding, winrate
from dpojax.checkpoint import Checkpoints
from dpojax.config import Config, bound_dtype, frozen_dtype, resolved_mode, to_dict
from dpojax.data.packing import PackShape
from dpojax.data.pipeline import groups_per_step
from dpojax.data.tokens import copy_companions
from dpojax.datasets import Data, open_data
from dpojax.job import Job, Stop
from dpojax.metrics import MetricsLog, duration, peak_memory, say
from dpojax.models import hf, lora, peft
from dpojax.models.table import num_params
from dpojax.policy import Policy, adapted, build_model, fitted, initial_adapters, kernel_name, open_policy, reference_params
from dpojax.stages import (
    Stage,
    Trace,
    batch_shape,
    batch_stream,
    describe_rows,
    fingerprints,
    origin,
    packer,
    params_before_dpo,
    preference_passes,
    preference_program,
    preference_schedule,
    start_state,
    step_flops,
    train_stage,
)
from dpojax.train import TrainState, make_eval_step, make_token_logps_step, new_state


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
    if config.sample.num_prompts and evaluate.reward_name(config):
        winrate.load_reward(evaluate.reward_name(config))  # a misspelt one fails now, not after training
    data = open_data(job)
    policy = open_policy(job, data)
    _write_settings(job, data, policy)

    params = params_before_dpo(job, data, policy)
    mode, moving = resolved_mode(config), config.loss.make().moving
    other = reference_params(job, policy) if config.reference.init else None
    own_weights = checkpoint.checksums(params)
    weights = own_weights if other is None else checkpoint.checksums(other)
    base = reference.open_frozen(job, policy, params, config.lora.base_dtype, {}) if config.lora.rank else None
    if mode == "none":
        ref = None
    elif base is not None and mode != "live" and other is None:
        ref = base
    else:
        ref = reference.open_live(job, policy, params if other is None else other)
    groups = groups_per_step(data.train_index, batch_size=config.batch_size, batch_groups=config.batch_groups)
    shape = batch_shape(job, policy, [data.train_index, data.eval_index], groups)
    kernel, reason = kernel_name(job, policy.config, shape.layout)
    job.say(f"{describe_rows(shape)}, attention {kernel}{f' ({reason})' if reason else ''}")
    anywhere, policy = policy, fitted(job, policy, shape)
    trained, own_dtype = policy, config.model.param_dtype
    if ref is not None and ref is not base:
        _say_rounding(job, data, policy, params if other is None else other, ref, config.reference.dtype, shape, groups)
    jax.tree.map(lambda x: x.delete(), other)
    if config.lora.rank:
        own_dtype = config.lora.base_dtype or own_dtype
        trained = adapted(job, policy)
        _say_rounding(job, data, policy, params, base, config.lora.base_dtype, shape, groups)
        jax.tree.map(lambda x: x.delete(), params)  # the base has its own
        params = initial_adapters(job, trained)
        job.say(
            f"adapters: {sum(x.size for x in jax.tree.leaves(params)):,} parameters trained, rank {config.lora.rank} on {config.lora.targets!r}"
        )
    full = (lambda params: params) if base is None else functools.partial(lora.join, base)
    # What must hold is known where policy == reference: one that is rounded otherwise, or another one, is left out of it.
    differs = ref is not None and (frozen_dtype(config) != own_dtype or bool(config.reference.init))
    own_ref = full(params) if differs else ref
    check = _self_check(job, data, policy, full(params), own_ref, shape)
    caches: tuple[Any, Any] = (None, None)
    if mode == "cached":
        caches, ref = reference.open_caches(job, data, policy, ref, weights, shape, groups), None
    sampler = evaluate.Sampling(job, data, anywhere) if config.sample.num_prompts and data.tokenizer is not None else None
    eval_pack = packer(job, data.eval, data.eval_index, shape, caches[1])
    evaluation = _Evaluation(job, policy, full, None if moving else ref, eval_pack, groups, sampler)
    train_pack = packer(job, data.train, data.train_index, shape, caches[0])
    stage, optimizer = _dpo_stage(
        job, data, trained, weights, own_weights, batch_stream(job, train_pack, groups, config.num_steps), groups
    )
    stage.evaluate = evaluation
    state = start_state(job, stage, params, functools.partial(new_state, optimizer), trained, moving_ref=ref if moving else None)
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
        _export(job, data, policy, full(state.params))
    summary = {
        "num_steps": int(state.step),
        "pairs_per_second": stage.pairs / stage.seconds if stage.seconds else None,
        **stage.speed(),
        **peak_memory(),
        "seconds_compiling": sum(p.seconds for p in job.programs.values()),
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

    def __init__(self, job: Job, policy: Policy, full, ref: Any, pack, groups: int, sampler: evaluate.Sampling | None):
        self.job, self.full, self.ref, self.pack, self.groups = job, full, ref, pack, groups
        self.sampler = sampler if job.config.sample.kl_prompts else None
        self.loss = job.config.loss.make()
        step = make_eval_step(policy.model, self.loss, chunk=job.config.model.logps_chunk_tokens)
        self.program = job.program("eval_step", step, out_shardings=job.replicated)
        self.results: Any = None
        self.scalars: dict[str, float] = {}

    def __call__(self, step: int, state: TrainState, *, log: bool = True) -> None:
        ref = self.ref if state.ref is None else state.ref
        params = self.full(state.params)
        self.results = evaluate.evaluate_pairs(self.job, self.program, params, ref, state.reward_mean, self.pack, self.groups)
        self.scalars = evaluate.eval_scalars(self.results, self.loss)
        kl = ""
        if self.sampler is not None and ref is not None:
            value, error = self.sampler.kl(params, ref)
            self.scalars |= {"eval_on_policy_kl": value, "eval_on_policy_kl_standard_error": error}
            kl = f"  KL {value:.2f} ± {error:.2f}"
        if log:
            self.job.log.write(step, self.scalars)
        self.job.say(
            f"eval {step}  loss {self.scalars['eval_loss']:.4f}  accuracy {self.scalars['eval_rewards/accuracies']:.3f}  "
            f"margin {self.scalars['eval_rewards/margins']:+.3f}{kl}  on {len(self.results.loss)} held-out "
            f"{'responses' if self.loss.unpaired else 'pairs'}"
        )


def _dpo_stage(
    job: Job, data: Data, policy: Policy, weights, own_weights: dict[str, str], batches, groups: int
) -> tuple[Stage, Any]:
    """The preference stage and its optimizer."""
    c = job.config
    loss = c.loss.make()
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
    prints = fingerprints(
        job,
        data.train,
        policy,
        reference={"weights": checkpoint.digest(weights), "dtype": frozen_dtype(c)},
        **({"lora": {**dataclasses.asdict(c.lora), "base": checkpoint.digest(own_weights)}} if c.lora.rank else {}),
        loss={**dataclasses.asdict(c.loss), "source": loss.source},
        batch={"batch_size": c.batch_size, "batch_groups": c.batch_groups},
    )
    stage = Stage(
        name="DPO",
        prefix="",
        num_steps=c.num_steps,
        step_program=program,
        batches=batches,
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


def _write_settings(job: Job, data: Data, policy: Policy) -> None:
    """run.json and the tokenizer, so that the workdir can be used as a config and as model.init."""
    job.write_file("run.json", json.dumps(to_dict(job.config), indent=2) + "\n")
    if not job.main_process:
        return
    folder = job.workdir / "tokenizer"
    folder.mkdir(exist_ok=True)
    beside = None if policy.weights is None else policy.weights.companions
    generation = None if beside is None else beside / "generation_config.json"
    if generation is not None and generation.is_file() and generation.resolve() != (folder / generation.name).resolve():
        shutil.copyfile(generation, folder / generation.name)
    if data.tokenizer is not None:  # its own files, whatever lies beside the weights
        data.tokenizer.save(folder)
    elif beside is not None:
        copy_companions(beside, folder)


def _say_rounding(job: Job, data: Data, policy: Policy, params, frozen, dtype: str, shape: PackShape, groups: int) -> None:
    """What storing a frozen tree in fewer bits does to its log-probs, on the first groups of the training data."""
    if not dtype or dtype == job.config.model.param_dtype:
        return
    step = make_token_logps_step(policy.model, chunk=job.config.model.logps_chunk_tokens)
    pack, values = packer(job, data.train, data.train_index, shape), []
    for tree in (params, frozen):
        program = job.program("rounding_pass", step, out_shardings=job.replicated)
        token_logps = lambda batch, program=program, tree=tree: np.asarray(program(tree, job.put(batch)))
        count = min(groups, len(data.train_index.rows))
        values.append(reference.compute(pack, token_logps, num_groups=groups, count=count, progress=lambda n: None))
    moved = np.abs(values[0] - values[1])
    job.say(
        f"{dtype} instead of {job.config.model.param_dtype}: a token's log-prob moves by {moved.mean():.1e} nats, at most {moved.max():.1e} ({moved.size:,} tokens)"
    )


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
    kernel, _ = kernel_name(job, policy.config, shape.layout)
    # Every arrangement on the run's kernel, but for the oracle's, which is on plain XLA.
    model_for = lambda own: build_model(job, policy.config, own, "xla" if own.layout == "separate" else kernel)
    found = selfcheck.self_check(
        model_for,
        params,
        ref,
        packer(job, data.train, data.train_index, shape),
        c.loss.make(),
        dtype=bound_dtype(c),
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
    """WORKDIR/export, a Hugging Face directory with adapters merged; and the adapters as PEFT's, in WORKDIR/adapter."""
    c, tokenizer = job.config, job.workdir / "tokenizer"
    weights = policy.weights
    fields = None if weights is None else weights.fields
    if fields is None:
        own = data.tokenizer
        ids = dict(bos_id=own.bos_id, eos_id=own.eos_id) if own else dict(bos_id=None, eos_id=None)
        fields = hf.llama_fields(policy.config, **ids)
    if c.lora.rank:
        adapters = {"layers": {k: v for k, v in params["layers"].items() if k.endswith((lora.LORA_A, lora.LORA_B))}}
        whole = jax.jit(lambda tree: tree, out_shardings=job.replicated)(adapters)
        scale = c.lora.alpha / c.lora.rank
        # After an SFT stage the base is its result, which dpojax alone reads; PEFT takes the merged export.
        base = c.model.init if data.sft is None else str((job.workdir / "sft").resolve())
        if job.main_process:
            peft.export_adapters(whole, policy.config, job.workdir / "adapter", scale=scale, base=base)
        params = jax.jit(lambda tree: lora.merge(tree, policy.config, scale))(params)
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
    if "step_time_p50_s" in summary:
        mfu = f", {summary['useful_mfu']:.1%} of the peak" if "useful_mfu" in summary else ""
        rate = f"{summary['pairs_per_second']:.1f} pairs/s, " if summary["pairs_per_second"] else ""
        say(
            f"step {summary['step_time_p50_s']:.3f} s (median), {summary['step_time_p99_s']:.3f} s (99th percentile); {rate}"
            f"{summary['useful_tflops']:.3g} useful TFLOP/s{mfu}; compiled for {duration(summary['seconds_compiling'])}; "
            + ", ".join(f"{k.removeprefix('peak_').removesuffix('_gib').replace('_', ' ')} {v:.2f} GiB" for k, v in summary.items() if k.startswith("peak_"))
        )
    say(f"done in {duration(summary['seconds'])}: {path}")
