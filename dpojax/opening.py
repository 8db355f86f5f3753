"""Config -> everything that the preference stage starts from: data, policy, reference, rows, self-check, samplers."""

import dataclasses
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax import checkpoint, evaluate, reference, selfcheck, winrate
from dpojax.config import Config, doubts, frozen_dtype, resolved_mode, to_dict, with_limits, with_steps
from dpojax.data.packing import PackShape
from dpojax.data.pipeline import PackGroups, groups_per_step
from dpojax.data.tokens import copy_companions, stop_ids
from dpojax.data.written import Writing
from dpojax.datasets import Data, open_data
from dpojax.fitness import unfit_settings
from dpojax.job import Job
from dpojax.metrics import duration
from dpojax.models import ModelConfig, lora
from dpojax.models.table import num_params
from dpojax.plain_data import read_json
from dpojax.policy import (
    Policy,
    adapted,
    build_model,
    fitted,
    initial_adapters,
    kernel_name,
    open_policy,
    random_model,
    reference_params,
    starting_weights,
)
from dpojax.stages import batch_shape, check_workdir, describe_rows, known_fingerprints, packer, params_before_dpo
from dpojax.train import make_token_logps_step


@dataclasses.dataclass
class Opened:
    """What the preference stage starts from."""

    data: Data
    policy: Policy  # fitted to the rows
    trained: Policy  # the same, or its adapters
    params: Any  # trained ones before the first step; the stage's state takes their memory
    base: Any  # frozen parameters under adapters, or None
    ref: Any  # the reference's parameters; None where there is none, or a cache in their place
    full: Callable[[Any], Any]  # trained parameters -> the policy's
    groups: int  # per step
    train_pack: PackGroups
    eval_pack: PackGroups | None  # None: there are no held-out preferences
    weights: dict[str, str]  # checksums of the reference's parameters
    own_weights: dict[str, str]  # and of the policy's before the stage
    sampler: evaluate.Sampling | None
    check: selfcheck.CheckResult | None


class Inputs(NamedTuple):
    """What is known of a run before any parameter is read."""

    data: Data
    policy: Policy
    groups: int  # per step


def open_run(job: Job, inputs: Inputs, objective: Any) -> Opened:
    """Opens everything, after the SFT stage where there is one.

    Nothing of the workdir is changed before it is known that the run may go on in it.

    Args:
      inputs: from `open_inputs`; they hold preferences.
      objective: what tells the objective, for the checkpoint's fingerprints.
    Raises: DpojaxError for what a user can mend.
    """
    data, policy, groups = inputs
    config = job.config
    resumed = check_workdir(job, known_fingerprints(job, data.train, policy, objective))
    params = params_before_dpo(job, data, policy)
    mode = resolved_mode(config)
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
    shape = batch_shape(job, policy, [i for i in (data.train_index, data.eval_index) if i is not None], groups)
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
    sampler = None
    if config.sample.num_prompts and data.tokenizer is not None:
        if data.eval is None:
            job.say("no held-out prompts: nothing is sampled for the report (data.eval or data.eval_share gives some)")
        else:
            sampler = evaluate.Sampling(job, data, anywhere)
    if resumed is None:  # a checkpoint that is there is still to be read and compared, weights included
        job.commit()
    caches: tuple[Any, Any] = (None, None)
    if mode == "cached":
        caches, ref = reference.open_caches(job, data, policy, ref, weights, shape, groups), None
    eval_pack = None
    if data.eval is not None and data.eval_index is not None:
        eval_pack = packer(job, data.eval, data.eval_index, shape, caches[1])
    train_pack = packer(job, data.train, data.train_index, shape, caches[0])
    packs = dict(train_pack=train_pack, eval_pack=eval_pack)
    rest = dict(weights=weights, own_weights=own_weights, sampler=sampler, check=check)
    return Opened(data, policy, trained, params, base, ref, full, groups, **packs, **rest)


def open_inputs(job: Job) -> Inputs:
    """Data, policy and groups per step, before any parameter is read; completes job.config by what they tell.

    Nothing of the workdir is changed: settings and caches wait for job.commit.
    Raises: DpojaxError for what a user can mend.
    """
    config = job.config
    weights = starting_weights(config)  # first of all: a model that is not there is said before anything else
    if config.sample.num_prompts and evaluate.reward_name(config):
        winrate.load_reward(evaluate.reward_name(config))  # a misspelt one fails now, not after training
    positions = random_model(config, 1).max_positions if weights is None else weights.config.max_positions
    job.config = with_limits(config, positions)
    data = open_data(job)
    if data.eval_parts:  # each of them was cut to its first pairs already
        job.config = dataclasses.replace(job.config, data=dataclasses.replace(job.config.data, eval_max_pairs=0))
    _try_reward(job, data)
    policy = open_policy(job, data, weights)
    groups, epoch_steps = 1, 1.0
    if data.has_preferences:
        groups = groups_per_step(data.train_index, batch_size=config.batch_size, batch_groups=config.batch_groups)
        epoch_steps = len(data.train_index.rows) / groups
    job.config = with_steps(job.config, epoch_steps)
    if data.has_preferences and job.config.num_steps:
        job.say(
            f"training: {job.config.num_steps:,} steps of {groups} prompts with {len(data.train_index.chosen) / epoch_steps:.3g} "
            f"{'responses' if config.loss.make().unpaired else 'pairs'}, {job.config.num_steps / epoch_steps:.3g} epochs"
        )
    for line in unfit_settings(job.config, data.train, data.train_index, weights, job.config.num_steps / epoch_steps):
        job.say(line)
    for doubt in doubts(job.config):
        job.say(f"warning: {doubt}")
    job.write(functools.partial(write_settings, job, data, policy))
    return Inputs(data, policy, groups)


def _try_reward(job: Job, data: Data) -> None:
    """Calls the user's own reward function on two held-out rows: its mistakes show now, not after the training."""
    c = job.config.sample
    if not (c.num_prompts and c.reward) or data.tokenizer is None or data.eval is None or data.eval_index is None:
        return
    rows = data.eval_index.rows[:2].tolist()
    groups = [data.eval.text_group(row) for row in (rows * 2)[:2]]
    texts = [(group.prompt, group.responses[0]) for group in groups]
    plain = [[text if isinstance(text, str) else data.tokenizer.decode(text) for text in pair] for pair in texts]
    winrate.try_reward(c.reward, [prompt for prompt, _ in plain], [response for _, response in plain])


def write_settings(job: Job, data: Data, policy: Policy) -> None:
    """run.json and the tokenizer, so that the workdir can be used as a config and as model.init."""
    job.write_file("run.json", json.dumps(to_dict(job.asked), indent=2) + "\n")
    if not job.main_process:
        return
    folder = job.workdir / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    beside = None if policy.weights is None else policy.weights.companions
    generation = None if beside is None else beside / "generation_config.json"
    if generation is not None and generation.is_file() and generation.resolve() != (folder / generation.name).resolve():
        shutil.copyfile(generation, folder / generation.name)
    if data.tokenizer is not None:  # its own files, whatever lies beside the weights
        data.tokenizer.save(folder)
        _write_text_files(job.config, data, folder)
    elif beside is not None:
        copy_companions(beside, folder)


def _write_text_files(config: Config, data: Data, folder: pathlib.Path) -> None:
    """What made the training text, beside the tokenizer: its template, what ends a response, templates, limits and masks."""
    assert data.tokenizer is not None
    c, chat = config.data, data.train.reader.chat
    if chat is not None and c.chat_template:
        (folder / "chat_template.jinja").write_text(chat.source, encoding="utf-8")
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)  # of the template that it stands in for
    ends = sorted(stop_ids(data.tokenizer, chat))
    path = folder / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    named = generation.get("eos_token_id")
    if ends != sorted(named if isinstance(named, list) else [named] if isinstance(named, int) else []):
        values = {**generation, "eos_token_id": ends if len(ends) > 1 else ends[0]}
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    writing = Writing(**{key: getattr(c, key) for key in Writing._fields})
    writing._replace(text_as_chat=data.train.reader.text_as_chat).save(folder)


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


def _plain_models(job: Job, config: ModelConfig, shape: PackShape) -> selfcheck.PlainModels:
    """What the start-up check compares the run's model with."""
    exact = build_model(job, config, kernel="causal", dtype="float32")
    if job.config.model.dtype == "float32":
        return selfcheck.PlainModels(exact, None, None)
    rounded = build_model(job, config, kernel="causal")
    packed = build_model(job, config, shape, dtype="float32")  # on plain XLA: some kernels take bfloat16 alone
    return selfcheck.PlainModels(exact, rounded, packed)


def _self_check(job: Job, data: Data, policy: Policy, params, ref, shape: PackShape) -> selfcheck.CheckResult | None:
    """Runs the self-check where the config and the model's size ask for it, and says what it found."""
    c = job.config
    size = num_params(policy.config)
    if c.self_check == "off" or (c.self_check == "auto" and size > 1e9):
        job.say(f"self-check: skipped ({'off' if c.self_check == 'off' else 'over 1B parameters; self_check=full runs it'})")
        return None
    start = time.monotonic()
    found = selfcheck.self_check(
        policy.model,
        _plain_models(job, policy.config, shape),
        params,
        ref,
        packer(job, data.train, data.train_index, shape),
        c.loss.make(),
        depth=policy.config.num_layers,
        chunk=c.model.logps_chunk_tokens,
        put=job.put,
        program=job.program,
    )
    closed = "no closed form" if found.expected is None else f"= {found.expected:.6f}"
    rounding = f"; {c.model.dtype} moves a token by {found.rounding_nats:.0e}" if found.rounding_nats else ""
    job.say(
        f"self-check: loss {found.loss:.6f} {closed} at policy == reference; noise floor of the log-ratios {found.noise_nats:.0e} "
        f"nats; {found.num_tokens} tokens of packed rows are within {found.layout_nats:.0e} nats of plain sequences (rounding "
        f"explains {found.allowed_nats:.0e}{rounding}); no mask leaks ({duration(time.monotonic() - start)})"
    )
    for warning in found.warnings:
        job.say(f"warning: self-check: {warning}")
    return found
