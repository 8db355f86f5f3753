"""config.model -> the policy's model, and its parameters before training, in their shardings."""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpojax import sharding
from dpojax.checkpoint import Checkpoints, newest_step
from dpojax.config import SIZES
from dpojax.datasets import Data
from dpojax.errors import ConfigError
from dpojax.job import Job
from dpojax.models import Model, ModelConfig, hf, make_decoder
from dpojax.models.attention import make_attention
from dpojax.models.table import num_params


class Policy(NamedTuple):
    """The model of a run and where its parameters lie."""

    model: Model
    config: ModelConfig
    abstract: Any  # ShapeDtypeStructs of the parameters
    shardings: Any
    source: pathlib.Path | None  # Hugging Face directory or checkpoint step to start from


def _find_source(job: Job, data: Data) -> tuple[pathlib.Path | None, ModelConfig]:
    """Where the parameters come from, and what decoder they belong to."""
    section = job.config.model
    if not section.init:
        assert data.tokenizer is not None
        try:
            return None, ModelConfig(vocab_size=data.tokenizer.vocab_size, **{s: getattr(section, s) for s in SIZES})
        except ValueError as error:
            raise ConfigError(str(error)) from error
    folder = pathlib.Path(section.init)
    if "\0" in section.init or not folder.is_dir():
        raise ConfigError(f"model.init={section.init!r}: there is no such folder")
    if (folder / "config.json").is_file():
        return folder, hf.read_config(folder)
    if (step := newest_step(folder)) is not None:
        return step, ModelConfig(**Checkpoints(step.parent, keep=10**6).meta(int(step.name))["model"])
    raise ConfigError(f"model.init={section.init!r}: neither a Hugging Face directory nor a dpojax checkpoint")


def open_policy(job: Job, data: Data) -> Policy:
    """The policy's model, before any of its parameters is read.

    Raises: ConfigError if there is no such model, or it does not belong to the tokenizer or the token ids.
    """
    section = job.config.model
    source, config = _find_source(job, data)
    if data.tokenizer is not None and data.tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {data.tokenizer.vocab_size} pieces, the model's embedding {config.vocab_size} rows; "
            "they do not belong together"
        )
    indexes = [i for i in (data.train_index, data.eval_index, data.sft_index) if i is not None]
    largest = max(i.largest_id for i in indexes)
    if largest >= config.vocab_size:
        raise ConfigError(f"the data holds the token id {largest}, the model's embedding has {config.vocab_size} rows")
    longest = max(int(i.sequence_lengths().max()) for i in indexes)
    if longest > config.max_positions:
        job.say(f"warning: prompt and response reach {longest} tokens, the model was made for {config.max_positions} positions")
    model = make_decoder(
        config,
        attention=make_attention(section.attention, num_shards=sharding.num_shards(job.mesh)),
        dtype=jnp.dtype(section.dtype),
        param_dtype=jnp.dtype(section.param_dtype),
        remat=section.remat,
        constrain=sharding.constrain_rows(job.mesh),
    )
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    shardings = sharding.param_shardings(abstract, model.axes, job.mesh, job.config.mesh.rules)
    job.say(f"model: {num_params(config) / 1e6:,.2f}M parameters, {section.dtype} compute, {section.param_dtype} stored")
    return Policy(model, config, abstract, shardings, source)


def reference_layout(job: Job, policy: Policy) -> tuple[Any, Any]:
    """(ShapeDtypeStructs, shardings) of a reference's own tree: reference.dtype and reference.rules."""
    c = job.config
    dtype = jnp.dtype(c.reference.dtype or c.model.param_dtype)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), policy.abstract)
    rules = c.reference.rules or c.mesh.rules
    return abstract, sharding.param_shardings(policy.abstract, policy.model.axes, job.mesh, rules)


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
