"""A whole run: data -> SFT -> DPO -> evaluation -> report. `main.py` calls `run`; the step is in train.py."""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dpojax import checkpoint, evaluate, reference, report, sampling, selfcheck, sharding
from dpojax.checkpoint import Checkpoints
from dpojax.config import SIZES, Config, to_dict
from dpojax.data import world
from dpojax.data.index import Dataset, Index, load_or_build_index
from dpojax.data.packing import PackedBatch, PackShape
from dpojax.data.pipeline import PackGroups, eval_batches, groups_per_step, make_shape, train_batches
from dpojax.data.records import Records, open_records
from dpojax.data.tokens import Limits, Tokenizer, load_tokenizer
from dpojax.data.triples import RowReader
from dpojax.errors import CheckpointError, ConfigError, NumericsError
from dpojax.losses import make_loss
from dpojax.metrics import MetricsLog, Progress, duration, say
from dpojax.models import Model, ModelConfig, hf, make_decoder
from dpojax.models.attention import make_attention
from dpojax.models.table import num_params
from dpojax.optim import make_optimizer, make_schedule
from dpojax.programs import Program
from dpojax.train import (
    PairResults,
    StepMetrics,
    TrainState,
    make_eval_step,
    make_token_logps_step,
    make_train_step,
    new_state,
    preference_sums,
    sft_sums,
)

NON_FINITE_LIMIT = 3  # non-finite steps in a row that end the run


class Interrupted(Exception):  # noqa: N818  # not an error: the run stopped where it was told to
    """A signal asked the run to stop; everything is saved. `exit_code` is the process's."""

    def __init__(self, exit_code: int):
        super().__init__(exit_code)
        self.exit_code = exit_code


class Data(NamedTuple):
    """The datasets of a run, indexed."""

    tokenizer: Tokenizer | None
    train: Dataset
    train_index: Index
    eval: Dataset
    eval_index: Index
    sft: Dataset | None
    sft_index: Index | None


class Policy(NamedTuple):
    """The model of a run and where its parameters lie."""

    model: Model
    config: ModelConfig
    abstract: Any  # ShapeDtypeStructs of the parameters
    shardings: Any
    source: pathlib.Path | None  # Hugging Face directory or checkpoint step to start from


@dataclasses.dataclass
class Job:
    """What every part of a run shares."""

    config: Config
    workdir: pathlib.Path
    mesh: Mesh
    log: MetricsLog
    stop: Callable[[int], int]  # step -> exit code if the run should stop there, else 0
    programs: dict[str, Program] = dataclasses.field(default_factory=dict)

    @property
    def main_process(self) -> bool:
        """Whether this process talks and writes."""
        return jax.process_index() == 0

    @property
    def replicated(self) -> NamedSharding:
        """The whole array on every device."""
        return NamedSharding(self.mesh, P())

    def say(self, message: str) -> None:
        """One line from process 0."""
        if self.main_process:
            say(message)

    def program(self, name: str, function, **options) -> Program:
        """A program of the run; its compilations are counted under `name`."""
        self.programs[name] = Program(name, function, enabled=self.main_process, **options)
        return self.programs[name]

    def progress(self, name: str, total: int, unit: str) -> Progress:
        """A progress line from process 0."""
        return Progress(name, total, unit, enabled=self.main_process)


# --- data -------------------------------------------------------------------------------------------------------------


def _open_dataset(job: Job, records: Records, tokenizer, *, responses_only=False, flip=0.0) -> tuple[Dataset, Index]:
    config = job.config.data
    reader = RowReader(config.prompt_template, responses_only)
    limits = Limits(config.max_prompt_tokens, config.max_response_tokens)
    data = Dataset(records, reader, tokenizer, limits, flip, job.config.seed)
    progress = job.progress(f"reading {records.name}", records.size, "rows")
    index = load_or_build_index(
        data,
        job.workdir / "cache",
        on_bad_line=config.on_bad_line,
        max_bad_share=config.max_bad_share,
        write=job.main_process,
        progress=progress,
    )
    counts = index.counts
    notes = [f"{v} {k.removeprefix('dropped/')}" for k, v in counts.items() if k.startswith("dropped/") and v]
    dropped = f"dropped {', '.join(notes)}; " if notes else ""
    bad = f"{counts['bad_line']} bad lines skipped; " if counts["bad_line"] else ""
    cut = f"cut {counts.get('cut/prompt', 0)} prompts and {counts.get('cut/response', 0)} pairs' responses"
    progress.close(f"{len(index.rows):,} of {records.size:,} rows usable; {dropped}{bad}{cut}")
    return data, index


def open_data(job: Job) -> Data:
    """The run's datasets, from files or from the embedded world."""
    config = job.config
    want_sft = config.sft.num_steps > 0
    sft_records, only = None, False
    if config.data.train:
        place = config.tokenizer or _tokenizer_of(config.model.init)
        tokenizer = load_tokenizer(place) if place else None
        train, evaluation = open_records(config.data.train), open_records(config.data.eval)
        if want_sft:
            sft_records, only = (open_records(config.sft.data), True) if config.sft.data else (train, True)
    else:
        made = world.make_world(config.seed)
        tokenizer, train, evaluation = made.tokenizer, made.train, made.eval
        sft_records = made.demonstrations if want_sft else None
        job.say(f"embedded world: {train.size:,} pairs, {evaluation.size} held out, {tokenizer.vocab_size} pieces")
    sft = _open_dataset(job, sft_records, tokenizer, responses_only=only) if sft_records else (None, None)
    train_data, train_index = _open_dataset(job, train, tokenizer, flip=config.data.flip_labels)
    eval_data, eval_index = _open_dataset(job, evaluation, tokenizer)
    for data, index in ((train_data, train_index), (eval_data, eval_index)):
        if not len(index.chosen):
            raise ConfigError(f"{data.records.name}: its rows hold responses but no preferences; it can serve as sft.data")
    return Data(tokenizer, train_data, train_index, eval_data, eval_index, *sft)


def _tokenizer_of(init: str) -> str:
    """The tokenizer beside model.init's weights, or "" if there is none."""
    if not init:
        return ""
    folder = pathlib.Path(init)
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer", folder.parent.parent / "tokenizer"):
        if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "spiece.model")):
            return str(place)
    return ""


# --- model ------------------------------------------------------------------------------------------------------------


def _checkpoint_step(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest committed step in a step folder, a checkpoints folder or a workdir."""
    if (folder / checkpoint.COMMITTED).is_file():
        return folder
    for place in (folder, folder / "checkpoints"):
        if place.is_dir():
            steps = [p for p in place.iterdir() if p.name.isdigit() and (p / checkpoint.COMMITTED).is_file()]
            if steps:
                return max(steps, key=lambda p: int(p.name))
    return None


def open_model(job: Job, data: Data) -> Policy:
    """The policy's model, before any of its parameters is read."""
    section, source = job.config.model, None
    if section.init:
        folder = pathlib.Path(section.init)
        if "\0" in section.init or not folder.is_dir():
            raise ConfigError(f"model.init={section.init!r}: there is no such folder")
        if (folder / "config.json").is_file():
            source, config = folder, hf.read_config(folder)
        elif (source := _checkpoint_step(folder)) is not None:
            config = ModelConfig(**Checkpoints(source.parent, keep=10**6).meta(int(source.name))["model"])
        else:
            raise ConfigError(f"model.init={section.init!r}: neither a Hugging Face directory nor a dpojax checkpoint")
    else:
        assert data.tokenizer is not None
        try:
            config = ModelConfig(vocab_size=data.tokenizer.vocab_size, **{s: getattr(section, s) for s in SIZES})
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if data.tokenizer is not None and data.tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {data.tokenizer.vocab_size} pieces, the model's embedding {config.vocab_size} rows; "
            "they do not belong together"
        )
    longest = max(int(i.totals().max()) for i in (data.train_index, data.eval_index))
    if longest > config.max_positions:
        job.say(f"warning: groups reach {longest} tokens, the model was made for {config.max_positions} positions")
    model = make_decoder(
        config,
        attention=make_attention(section.attention),
        dtype=jnp.dtype(section.dtype),
        param_dtype=jnp.dtype(section.param_dtype),
        remat=section.remat,
        constrain=sharding.constrain_rows(job.mesh),
    )
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    shardings = sharding.param_shardings(abstract, model.axes, job.mesh, job.config.mesh.rules)
    job.say(f"model: {num_params(config) / 1e6:,.2f}M parameters, {section.dtype} compute, {section.param_dtype} stored")
    return Policy(model, config, abstract, shardings, source)


def initial_params(job: Job, policy: Policy) -> Any:
    """The policy's parameters before any training of this run, in their shardings."""
    dtype = jnp.dtype(job.config.model.param_dtype)
    if policy.source is None:
        return jax.jit(policy.model.init, out_shardings=policy.shardings)(jax.random.key(job.config.seed))
    if (policy.source / "config.json").is_file():
        return hf.load_params(policy.source, policy.config, policy.shardings, dtype)
    found = Checkpoints(policy.source.parent, keep=10**6)
    step = int(policy.source.name)
    return found.restore_params(step, policy.abstract, policy.shardings, found.meta(step))


# --- training ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Stage:
    """One of the two stages of training: what differs between SFT and DPO."""

    name: str
    prefix: str  # of its keys in metrics.jsonl
    num_steps: int
    step_program: Program
    batches: Callable[[int], Iterator[tuple[PackedBatch, tuple[float, float]]]]
    schedule: Callable[[Any], Any]
    checkpoints: Checkpoints
    meta: dict[str, Any]
    groups: int  # per step
    epoch_groups: int
    evaluate: Callable[[int, TrainState], None]
    pairs: int = 0  # trained on in this process, after the first step
    seconds: float = 0.0  # that they took
    bad_in_a_row: int = 0

    def log(self, job: Job, step: int, metrics: StepMetrics, batch: PackedBatch, waste, seconds: float) -> None:
        """Reads a finished step's metrics: quarantines what is not finite, writes and shows the rest."""
        if not bool(metrics.finite):
            self._quarantine(job, step, metrics, batch)
        else:
            self.bad_in_a_row = 0
        if step % job.config.log_every_steps and step != self.num_steps:
            return
        scalars = {k: float(v) for k, v in metrics.scalars.items()}
        count = int(batch.num_pairs) or self.groups
        tokens = int(batch.num_tokens)
        scalars |= {
            "learning_rate": float(self.schedule(step - 1)),
            "epoch": step * self.groups / self.epoch_groups,
            "num_tokens": tokens,
            "pairs_per_second": count / seconds,
            "tokens_per_second": tokens / seconds,
            "step_time_s": seconds,
            "padding/packing": waste[0],
            "padding/rounding": waste[1],
        }
        job.log.write(step, {self.prefix + k: v for k, v in scalars.items()})
        shown = f"{self.name} {step}/{self.num_steps}  loss {scalars['loss']:.4f}"
        if "rewards/accuracies" in scalars:
            shown += f"  accuracy {scalars['rewards/accuracies']:.3f}  margin {scalars['rewards/margins']:+.3f}"
        unit = "pairs" if int(batch.num_pairs) else "prompts"
        left = duration((self.num_steps - step) * seconds)
        job.say(f"{shown}  grad {scalars['grad_norm']:.2f}  {count / seconds:.1f} {unit}/s  ETA {left}")

    def _quarantine(self, job: Job, step: int, metrics: StepMetrics, batch: PackedBatch) -> None:
        """A non-finite step changed nothing: name its pairs, and give up after NON_FINITE_LIMIT in a row."""
        self.bad_in_a_row += 1
        losses = np.asarray(multihost_utils.process_allgather(metrics.pair_loss, tiled=True))
        rows = np.asarray(batch.row_id)
        bad = sorted(set(rows[~np.isfinite(losses)].tolist())) if losses.shape == rows.shape else []
        everyone = sorted(set(rows[rows >= 0].tolist()))
        note = {"stage": self.name, "step": step, "rows": bad or everyone, "named_by_loss": bool(bad)}
        if job.main_process:
            with (job.workdir / "quarantine.jsonl").open("a") as file:
                file.write(json.dumps(note) + "\n")
        job.say(f"{self.name} {step}: not finite; parameters unchanged; rows {note['rows'][:8]} in quarantine.jsonl")
        if self.bad_in_a_row >= NON_FINITE_LIMIT:
            raise NumericsError(
                f"{self.name}: {NON_FINITE_LIMIT} steps in a row up to step {step} were not finite; lower the learning rate, or "
                f"look at the rows in {job.workdir / 'quarantine.jsonl'}; the last good state is in {self.checkpoints.folder}"
            )

    def save(self, job: Job, step: int, state: TrainState, *, wait: bool) -> None:
        """Starts a checkpoint of `state`; with `wait`, until it is committed."""
        trouble = self.checkpoints.save(step, state, self.meta)
        if wait:
            trouble = self.checkpoints.wait() or trouble
        if trouble:
            job.say(f"warning: {trouble}; training goes on")


def train_stage(job: Job, stage: Stage, state: TrainState, ref_params: Any) -> TrainState:
    """The loop: dispatches a step, then reads the one before it."""
    start = int(state.step)
    batches = stage.batches(start)
    pending: tuple | None = None
    clock = time.monotonic()
    for step in range(start + 1, stage.num_steps + 1):
        batch, waste = next(batches)
        state, metrics = stage.step_program(state, ref_params, sharding.put_batch(batch, job.mesh))
        if pending:
            stage.log(job, *pending)
        jax.block_until_ready(metrics)
        now = time.monotonic()
        pending = (step, metrics, batch, waste, now - clock)
        if step > start + 1:  # the first step of a process compiles
            stage.pairs, stage.seconds = stage.pairs + int(batch.num_pairs), stage.seconds + now - clock
        exit_code = job.stop(step)
        evaluation_due = step % job.config.eval_every_steps == 0 or step == stage.num_steps
        checkpoint_due = step % job.config.checkpoint_every_steps == 0 or step == stage.num_steps
        if exit_code or evaluation_due or checkpoint_due:
            stage.log(job, *pending)
            pending = None
        if evaluation_due and not exit_code:
            stage.evaluate(step, state)
        if checkpoint_due or exit_code:
            stage.save(job, step, state, wait=bool(exit_code) or step == stage.num_steps)
        if exit_code:
            job.say(f"{stage.name}: stopped at step {step}, saved; the same command goes on from there")
            raise Interrupted(exit_code)
        clock = time.monotonic()
    return state


def start_state(job: Job, stage: Stage, params: Any, optimizer, policy: Policy) -> TrainState:
    """The stage's newest checkpoint, or step 0 from `params`."""
    init = functools.partial(new_state, optimizer)
    abstract = jax.eval_shape(init, policy.abstract)
    shardings = sharding.state_shardings(abstract, policy.abstract, policy.shardings, job.mesh)
    if stage.checkpoints.strays:
        job.say(f"{stage.checkpoints.folder}: not checkpoints, left alone: {', '.join(stage.checkpoints.strays)}")
    steps = stage.checkpoints.steps()
    wanted = job.config.checkpoint.restore_step
    if not steps:
        return jax.jit(init, out_shardings=shardings)(params)
    if wanted >= 0 and wanted not in steps and stage.name == "DPO":
        raise CheckpointError(f"checkpoint.restore_step={wanted}: there are the steps {', '.join(map(str, steps))}")
    step = wanted if wanted in steps else steps[-1]
    if step < steps[-1]:
        stage.checkpoints.drop_after(step)
    meta = stage.checkpoints.meta(step)
    allow = [name.strip() for name in job.config.checkpoint.allow_changed.split(",") if name.strip()]
    changed = checkpoint.compare_fingerprints(meta["fingerprints"], stage.meta["fingerprints"], allow)
    if changed:
        job.say(f"resuming with another {', '.join(changed)}, as allowed")
        stage.meta["changed"] = [*meta.get("changed", []), {"step": step, "names": changed}]
    targets = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    state = stage.checkpoints.restore(step, targets, meta)
    job.say(f"{stage.name}: resumed at step {step} of {stage.num_steps}, every checksum equal")
    return state


def fingerprints(job: Job, data: Dataset, policy: Policy, **more: Any) -> dict[str, str]:
    """What a resumed run must share with the one that saved; readable where it is short."""
    c = job.config
    return {
        "data": data.records.fingerprint + (f" flipped {data.flip_labels}" if data.flip_labels else ""),
        "tokenizer": data.tokenizer.fingerprint if data.tokenizer else "none",
        "model": checkpoint.describe({**dataclasses.asdict(policy.config), "dtype": c.model.dtype}),
        "layout": checkpoint.describe(
            {
                "layout": "shared" if c.data.layout == "auto" else c.data.layout,
                "max_prompt_tokens": c.data.max_prompt_tokens,
                "max_response_tokens": c.data.max_response_tokens,
                "prompt_template": c.data.prompt_template,
            }
        ),
        "seed": f"{c.seed}, shuffle {c.data.shuffle}",
        **{k: v if isinstance(v, str) else checkpoint.describe(v) for k, v in more.items()},
    }


def _digest(sums: dict[str, str]) -> str:
    return reference.cache_key(weights=sums, model="", data="", dtype="")


def _pack(job: Job, data: Dataset, index: Index, shape: PackShape, lookup=None) -> PackGroups:
    pad = data.tokenizer.pad_id if data.tokenizer else 0
    return PackGroups(data, index, shape, tuple(sharding.local_shards(job.mesh)), pad, lookup)


def _shape(job: Job, indexes, groups: int) -> PackShape:
    c = job.config.data
    return make_shape(
        indexes,
        layout=c.layout,
        num_groups=groups,
        num_shards=sharding.num_shards(job.mesh),
        micro_batch_tokens=c.micro_batch_tokens,
        row_tokens=c.row_tokens,
    )


def _stream(job: Job, pack: PackGroups, groups: int, num_steps: int):
    c = job.config
    return lambda start: train_batches(
        pack, num_groups=groups, seed=c.seed, shuffle=c.data.shuffle, start=start, stop=num_steps, workers=c.data.workers
    )


def _train_program(job: Job, name: str, policy: Policy, optimizer, sums, denominator) -> Program:
    constrain = lambda tree: jax.lax.with_sharding_constraint(tree, policy.shardings)
    step = make_train_step(sums, denominator, optimizer, constrain)
    init = functools.partial(new_state, optimizer)
    abstract = jax.eval_shape(init, policy.abstract)
    state = sharding.state_shardings(abstract, policy.abstract, policy.shardings, job.mesh)
    return job.program(name, step, donate_argnums=0, out_shardings=(state, job.replicated))


def run_sft(job: Job, data: Data, policy: Policy) -> Any:
    """The supervised stage: returns the parameters after it."""
    c = job.config
    assert data.sft is not None and data.sft_index is not None
    groups = min(c.sft.batch_size, len(data.sft_index.rows))
    shape = _shape(job, [data.sft_index], groups)
    schedule = make_schedule(
        c.sft.schedule, learning_rate=c.sft.learning_rate, warmup_steps=c.sft.warmup_steps, num_steps=c.sft.num_steps
    )
    optim = c.optim if c.sft.b2 is None else dataclasses.replace(c.optim, b2=c.sft.b2)
    optimizer = make_optimizer(optim, schedule, policy.model.axes)
    sums = functools.partial(sft_sums, policy.model, c.model.logps_chunk_tokens)
    params = initial_params(job, policy)
    prints = fingerprints(job, data.sft, policy, sft=dataclasses.asdict(c.sft), init=_digest(checkpoint.checksums(params)))
    stage = Stage(
        name="SFT",
        prefix="sft_",
        num_steps=c.sft.num_steps,
        step_program=_train_program(job, "sft_step", policy, optimizer, sums, lambda b: b.num_response_tokens),
        batches=_stream(job, _pack(job, data.sft, data.sft_index, shape), groups, c.sft.num_steps),
        schedule=schedule,
        checkpoints=Checkpoints(job.workdir / "sft", keep=1),
        meta={"config": to_dict(c), "fingerprints": prints, "model": dataclasses.asdict(policy.config)},
        groups=groups,
        epoch_groups=len(data.sft_index.rows),
        evaluate=lambda step, state: None,
    )
    state = start_state(job, stage, params, optimizer, policy)
    job.log.rewind(sft_step=int(state.step), step=0 if int(state.step) < c.sft.num_steps else 10**12)
    state = train_stage(job, stage, state, None)
    stage.checkpoints.close()
    return state.params


# --- the reference ----------------------------------------------------------------------------------------------------


def open_reference(job: Job, policy: Policy, params: Any) -> tuple[Any, Any]:
    """The live reference tree and its shardings, from the policy's parameters before DPO."""
    c = job.config
    rules = c.reference.rules or c.mesh.rules
    shardings = sharding.param_shardings(policy.abstract, policy.model.axes, job.mesh, rules)
    return reference.make_live(params, shardings, jnp.dtype(c.reference.dtype or c.model.param_dtype)), shardings


def open_caches(job: Job, data: Data, policy: Policy, ref: Any, weights, shape: PackShape, groups: int):
    """The cached reference of training and evaluation data: loaded and checked on a sample, or computed."""
    c = job.config
    step = make_token_logps_step(policy.model, chunk=c.model.logps_chunk_tokens)
    program = job.program("reference_pass", step, out_shardings=job.replicated)
    token_logps = lambda batch: np.asarray(program(ref, sharding.put_batch(batch, job.mesh)))
    caches = []
    for name, dataset, index in (("train", data.train, data.train_index), ("eval", data.eval, data.eval_index)):
        key = reference.cache_key(
            weights=weights,
            model=checkpoint.describe(dataclasses.asdict(policy.config)),
            data=dataset.fingerprint(),
            dtype=f"{c.model.dtype} {c.reference.dtype}",
        )
        path = job.workdir / "cache" / f"reference-{name}-{key}.npy"
        pack = _pack(job, dataset, index, shape)
        values = reference.load(path, index)
        if values is not None:
            sample = min(8, len(index.rows))
            again = reference.compute(pack, token_logps, num_groups=groups, count=sample, progress=lambda n: None)
            worst = float(np.abs(again - values[: len(again)]).max())
            bound = 2e-5 if c.model.dtype == "float32" else 0.25
            if worst <= bound:
                job.say(f"reference cache of {name}: loaded; {len(again)} sampled tokens agree within {worst:.1e} nats")
            else:
                job.say(f"reference cache of {name}: {worst:.1e} nats off on a sample; computed anew")
                values = None
        if values is None:
            progress = job.progress(f"reference pass over {name}", len(index.rows), "prompts")
            values = reference.compute(pack, token_logps, num_groups=groups, count=len(index.rows), progress=progress)
            if not np.isfinite(values).all():
                raise NumericsError(f"the reference's log-probs of {dataset.records.name} are not finite")
            if job.main_process:
                reference.store(path, values)
            progress.close(f"{len(values):,} tokens")
        caches.append(reference.ReferenceCache(index, values))
    return caches


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluate_pairs(job: Job, program: Program, params, ref, pack: PackGroups, groups: int) -> PairResults:
    """Per-pair results of the held-out pairs, flat, padding removed."""
    parts = []
    for batch, _ in eval_batches(pack, num_groups=groups, max_pairs=job.config.data.eval_max_pairs):
        found = jax.device_get(program(params, ref, sharding.put_batch(batch, job.mesh)))
        used = found.row_id >= 0
        parts.append(jax.tree.map(lambda x, used=used: np.asarray(x)[used], found))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def eval_scalars(r: PairResults) -> dict[str, float]:
    """TRL's evaluation metrics (prefix eval_), means over the held-out pairs."""
    margin = r.chosen_rewards - r.rejected_rewards
    means = {
        "loss": r.loss,
        "rewards/chosen": r.chosen_rewards,
        "rewards/rejected": r.rejected_rewards,
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0) + 0.5 * (margin == 0),
        "logps/chosen": r.policy_chosen,
        "logps/rejected": r.policy_rejected,
        "logits/chosen": r.chosen_logits,
        "logits/rejected": r.rejected_logits,
        "entropy": r.entropy,
        "mean_token_accuracy": r.token_accuracy,
        "displacement": r.policy_chosen < r.ref_chosen,  # chosen responses that became less likely
    }
    return {f"eval_{k}": float(np.mean(v)) for k, v in means.items()}


def generate_samples(job: Job, data: Data, policy: Policy, params, ref) -> dict[str, Any] | None:
    """Policy and reference answer the same held-out prompts; None where there is nothing to sample."""
    c = job.config.sample
    if not c.num_prompts or data.tokenizer is None:
        return None
    tokenizer = data.tokenizer
    shards = sharding.num_shards(job.mesh)
    count = min(c.num_prompts, len(data.eval_index.rows))
    rows = [int(r) for r in data.eval_index.rows[:count]]
    prompts = [data.eval.token_group(r)[0].prompt.tolist() for r in rows]
    batch = -(-min(c.batch_size, count) // shards) * shards
    settings = sampling.SampleSettings(c.max_new_tokens, c.temperature, c.top_k, c.top_p, tokenizer.eos_id, tokenizer.pad_id)
    sampler = job.program("sampler", sampling.make_sampler(policy.model, settings), out_shardings=job.replicated)
    rows_sharding = sharding.rows_sharding(job.mesh, leading=0)
    put = lambda x: jax.make_array_from_callback(x.shape, rows_sharding, lambda index: x[index])
    common = dict(batch_size=batch, pad_id=tokenizer.pad_id, put=put, fetch=np.asarray)
    sampled = {}
    for name, tree, seed in (("policy", params, job.config.seed), ("reference", ref, job.config.seed + 1)):
        progress = job.progress(f"sampling from the {name}", count, "prompts")
        sampled[name], _ = sampling.generate(sampler, _as_policy(tree, params), prompts, seed=seed, progress=progress, **common)
        progress.close(f"{sum(map(len, sampled[name])):,} tokens")
    width = sampling.prompt_width(prompts)
    scorer = job.program(
        "scorer",
        sampling.make_scorer(policy.model, prompt_width=width, num_shards=shards, chunk=job.config.model.logps_chunk_tokens),
        out_shardings=job.replicated,
    )
    score = functools.partial(
        sampling.score_batches,
        scorer,
        prompts=prompts,
        responses=sampled["policy"],
        max_new_tokens=c.max_new_tokens,
        **common,
    )
    log_ratio = score(params) - score(_as_policy(ref, params))
    texts = {name: [tokenizer.decode(_without_eos(r, tokenizer)) for r in ids] for name, ids in sampled.items()}
    result = {"prompts": [tokenizer.decode(p) for p in prompts], "texts": texts, "ids": sampled}
    result["prompt_texts"] = [g if isinstance(g, str) else tokenizer.decode(g) for g in
                              (data.eval.text_group(r).prompt for r in rows)]  # fmt: skip
    result["kl"], result["kl_error"] = evaluate.mean_with_error(log_ratio)
    return result


def _as_policy(tree, params):
    """The reference in the policy's dtype and shardings, so that one program serves both."""
    same = jax.tree.map(lambda x, p: x.dtype == p.dtype and x.sharding == p.sharding, tree, params)
    if all(jax.tree.leaves(same)):
        return tree
    shardings = jax.tree.map(lambda p: p.sharding, params)
    return reference.make_live(tree, shardings, jax.tree.leaves(params)[0].dtype)


def _without_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids


def judge_samples(job: Job, samples: dict[str, Any]) -> dict[str, Any]:
    """Length, diversity and KL of the samples, and the win rate where there is a reward."""
    ids = samples["ids"]
    lengths = {name: np.array([len(r) for r in ids[name]]) for name in ids}
    found: dict[str, Any] = {
        "kl": samples["kl"],
        "kl_standard_error": samples["kl_error"],
        "num_samples": len(ids["policy"]),
        "mean_length": float(lengths["policy"].mean()),
        "reference_mean_length": float(lengths["reference"].mean()),
        "distinct_2": evaluate.distinct_n(ids["policy"], 2),
        "reference_distinct_2": evaluate.distinct_n(ids["reference"], 2),
    }
    if job.config.sample.reward:
        reward = evaluate.load_reward(job.config.sample.reward)
        scores = {name: list(reward(samples["prompt_texts"], samples["texts"][name])) for name in ids}
        rate = evaluate.win_rate(scores["policy"], scores["reference"])
        difference = lengths["policy"] - lengths["reference"]
        found |= {
            "win_rate": rate.value,
            "win_rate_low": rate.low,
            "win_rate_high": rate.high,
            "win_rate_length_controlled": evaluate.length_controlled_win_rate(
                scores["policy"], scores["reference"], difference.tolist()
            ),
            "mean_reward": float(np.mean(scores["policy"])),
            "reference_mean_reward": float(np.mean(scores["reference"])),
        }
        samples["scores"] = scores
    return found


# --- the run ----------------------------------------------------------------------------------------------------------


def run(config: Config, workdir: pathlib.Path, stop: Callable[[int], int]) -> dict[str, Any]:
    """Runs `config` in `workdir`, from where it stands there; returns the summary.

    Args:
      stop: step -> exit code if the run should save and stop there, else 0.
    Raises: DpojaxError for what a user can mend; Interrupted after saving.
    """
    began = time.monotonic()
    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
    job = Job(config, workdir, mesh, MetricsLog(workdir, enabled=jax.process_index() == 0), stop)
    shape = " x ".join(f"{k} {v}" for k, v in mesh.shape.items())
    job.say(f"devices: {jax.device_count()} {jax.devices()[0].device_kind}, mesh {shape}, {jax.process_count()} process(es)")
    finished = _finished(job)
    if finished is not None:
        return finished
    if job.main_process:
        (workdir / "run.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
    data = open_data(job)
    if job.main_process and data.tokenizer is not None:
        (workdir / "tokenizer").mkdir(exist_ok=True)
        data.tokenizer.save(workdir / "tokenizer")
    policy = open_model(job, data)
    params = run_sft(job, data, policy) if data.sft is not None else initial_params(job, policy)
    weights = checkpoint.checksums(params)
    ref, _ = open_reference(job, policy, params)

    groups = groups_per_step(data.train_index, batch_size=config.batch_size, batch_groups=config.batch_groups)
    shape = _shape(job, [data.train_index, data.eval_index], groups)
    job.say(
        f"rows: {shape.shard_rows} x {shape.row_tokens} tokens a micro-batch on each of {shape.num_shards} data shard(s), "
        f"layout {shape.layout}"
    )
    check = _self_check(job, data, policy, params, ref, shape)
    caches: list[Any] = [None, None]
    if config.reference.mode == "cached":
        caches = open_caches(job, data, policy, ref, weights, shape, groups)
    train_pack = _pack(job, data.train, data.train_index, shape, caches[0])
    eval_pack = _pack(job, data.eval, data.eval_index, shape, caches[1])
    step_ref = None if config.reference.mode == "cached" else ref

    loss = make_loss(config.loss.name, **config.loss.settings())
    schedule = make_schedule(
        config.optim.schedule,
        learning_rate=config.optim.learning_rate,
        warmup_steps=config.optim.warmup_steps,
        num_steps=config.num_steps,
    )
    optimizer = make_optimizer(config.optim, schedule, policy.model.axes)
    chunk = config.model.logps_chunk_tokens
    eval_program = job.program("eval_step", make_eval_step(policy.model, loss, chunk=chunk), out_shardings=job.replicated)
    last_eval: dict[str, Any] = {}

    def evaluate_step(step: int, state: TrainState) -> None:
        results = evaluate_pairs(job, eval_program, state.params, step_ref, eval_pack, groups)
        scalars = eval_scalars(results)
        last_eval.update(results=results, scalars=scalars)
        job.log.write(step, scalars)
        job.say(
            f"eval {step}  loss {scalars['eval_loss']:.4f}  accuracy {scalars['eval_rewards/accuracies']:.3f}  "
            f"margin {scalars['eval_rewards/margins']:+.3f}  on {len(results.loss)} held-out pairs"
        )

    prints = fingerprints(
        job,
        data.train,
        policy,
        reference=_digest(weights),
        loss=dataclasses.asdict(config.loss),
        batch={"batch_size": config.batch_size, "batch_groups": config.batch_groups},
    )
    stage = Stage(
        name="DPO",
        prefix="",
        num_steps=config.num_steps,
        step_program=_train_program(
            job,
            "dpo_step",
            policy,
            optimizer,
            functools.partial(preference_sums, policy.model, loss, chunk),
            lambda b: b.num_pairs,
        ),
        batches=_stream(job, train_pack, groups, config.num_steps),
        schedule=schedule,
        checkpoints=Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep),
        meta={"config": to_dict(config), "fingerprints": prints, "model": dataclasses.asdict(policy.config)},
        groups=groups,
        epoch_groups=len(data.train_index.rows),
        evaluate=evaluate_step,
    )
    state = start_state(job, stage, params, optimizer, policy)
    start = int(state.step)
    job.log.rewind(sft_step=10**12, step=start if start else -1)
    if start == 0:
        evaluate_step(0, state)
    state = train_stage(job, stage, state, step_ref)
    stage.checkpoints.close()
    if not last_eval:
        evaluate_step(int(state.step), state)

    samples = generate_samples(job, data, policy, state.params, ref)
    summary = {
        "num_steps": int(state.step),
        "pairs_per_second": stage.pairs / stage.seconds if stage.seconds else None,
        "skipped_steps": int(state.skipped),
        **last_eval["scalars"],
        **(judge_samples(job, samples) if samples else {}),
        "seconds": time.monotonic() - began,
        "programs": {p.name: {"compiled": p.compiled, "seconds": p.seconds} for p in job.programs.values()},
        "train_rows": data.train_index.counts,
        "eval_rows": data.eval_index.counts,
    }
    if check is not None:
        summary["self_check"] = check._asdict()
    if config.export:
        _export(job, data, policy, state.params)
    if job.main_process:
        path = report.write_report(workdir, config, summary, job.log.rows(), last_eval["results"], samples)
        _write_summary(workdir, summary)
        _say_results(summary, path, job)
    job.log.close()
    return summary


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
        _pack(job, data.train, data.train_index, shape),
        c.loss,
        dtype="bfloat16" if bf16 else "float32",
        num_shards=sharding.num_shards(job.mesh),
        put=lambda batch: sharding.put_batch(batch, job.mesh),
    )
    job.say(
        f"self-check: loss {found.loss:.6f} = {found.expected:.6f} at policy == reference; log-ratios within "
        f"{found.worst_ratio:.0e} of the log-probs; layouts within {found.worst_layout:.0e} nats ({duration(time.monotonic() - start)})"
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


def _write_summary(workdir: pathlib.Path, summary: dict[str, Any]) -> None:
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
    temporary = workdir / "summary.tmp"
    temporary.write_text(json.dumps(plain, indent=2) + "\n")
    temporary.replace(workdir / "summary.json")


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
