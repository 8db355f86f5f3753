"""config.model -> the policy's model, and its parameters before training, in their shardings."""

from typing import Any

import jax
import jax.numpy as jnp

from dpojax.config.model import SIZES
from dpojax.config.schema import Config
from dpojax.data.index import Index
from dpojax.data.open import Data
from dpojax.errors import ConfigError
from dpojax.models import lora
from dpojax.models.config import ModelConfig
from dpojax.models.params import num_params
from dpojax.models.placed import (
    Policy,
    check_memory,
    check_mesh,
    check_positions,
    checked_adapter_rows,
    describe,
)
from dpojax.runtime.context import Job
from dpojax.weights import huggingface
from dpojax.weights.open import Weights, ignored_fields, open_weights, read_shape
from dpojax.weights.tokenizer import check_shared_tokenizer

# The longest sample, in the positions that the model was made for: rotary angles mean nothing
# beyond, and its cache would take memory for all of them.
MOST_CONTEXTS = 8


def starting_weights(config: Config) -> Weights | None:
    """What the policy starts from, before any of it is read; None: random weights.

    Raises: ConfigError if it is not there.
    """
    section = config.model
    if not section.init:
        return None
    # A reward model may be trained further, as one.
    either = None if config.stage_names == ("reward_model",) else False
    ignore = ignored_fields(section.ignore_fields)
    return open_weights(section.init, ignore=ignore, scalar_head=either)


def random_model(config: Config, vocab_size: int) -> ModelConfig:
    """The decoder of random weights: model.shape, or the sizes of the config.

    Raises: ConfigError for sizes that do not fit.
    """
    section = config.model
    if section.shape:
        return read_shape(section.shape, ignore=ignored_fields(section.ignore_fields))
    try:
        sizes = {size: value for size, value in vars(section).items() if size in SIZES}
        return ModelConfig(vocab_size=vocab_size, **sizes)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _vocab_size(data: Data) -> int:
    """The tokenizer's pieces; 0 without one."""
    if data.tokenizer is None:
        return 0
    return data.tokenizer.vocab_size


def _indexes(data: Data) -> list[Index]:
    """The indexes of all rows that the policy sees."""
    indexes = (data.train_index, data.eval_index, data.sft_index)
    return [index for index in indexes if index is not None]


def _check_token_ids(config: ModelConfig, data: Data) -> None:
    """Raises ConfigError for a token id without a row in the embedding.

    A tokenizer may have more pieces than the embedding has rows, as long as the data holds none of
    them.
    """
    largest = max(index.largest_id for index in _indexes(data))
    if largest < config.vocab_size:
        return
    pieces = ""
    if data.tokenizer is not None:
        pieces = f"; the tokenizer has {data.tokenizer.vocab_size} pieces"
    raise ConfigError(
        f"the data holds the token id {largest}, the model's embedding has {config.vocab_size}"
        f" rows{pieces}: they do not belong together"
    )


def open_policy(job: Job, data: Data, weights: Weights | None) -> Policy:
    """The policy's model, before any of its parameters is read; `weights` are what it starts from.

    Raises: ConfigError if it does not belong to the tokenizer or the token ids.
    """
    section = job.config.model
    if weights is None and not section.shape and data.tokenizer is None:
        raise ConfigError(
            "model.init and tokenizer are ''; random weights take the size of their vocabulary from"
            " a tokenizer"
        )
    if weights is None:
        config = random_model(job.config, _vocab_size(data))
        kind = "random weights"
    else:
        config = weights.config
        kind = config.family
    _check_token_ids(config, data)
    if job.config.reference.init:
        sets = [(data.train, data.train_index)]
        if data.eval is not None and data.eval_index is not None:
            sets.append((data.eval, data.eval_index))
        check_shared_tokenizer(
            data.tokenizer, job.config.reference.init, sets, setting="reference.init"
        )
    longest = max(int(index.sequence_lengths().max()) for index in _indexes(data))
    check_positions(config, longest, "data.max_prompt_tokens or data.max_response_tokens")
    if longest > config.max_positions:
        job.say(
            f"warning: prompt and response reach {longest} tokens, the model was made for"
            f" {config.max_positions} positions"
        )
    job.say(
        f"model: {num_params(config) / 1e6:,.2f}M parameters ({kind}), {section.dtype} compute,"
        f" {section.param_dtype} stored"
    )
    check_memory(config, section.param_dtype)
    check_mesh(job, config)
    if job.config.lora.rank:
        # An adapter that fits no map is said now, and not after the SFT stage.
        checked_adapter_rows(job, config)
    new_tokens = job.config.sample.max_new_tokens
    most = MOST_CONTEXTS * config.max_positions
    if job.config.sample.num_prompts and new_tokens > most:
        raise ConfigError(
            f"sample.max_new_tokens={new_tokens}: over {most}, {MOST_CONTEXTS} times the positions"
            " that the model was made for"
        )
    if section.router_loss_weight and not config.num_experts:
        raise ConfigError(
            f"model.router_loss_weight is {section.router_loss_weight}; the model has no experts"
        )
    return describe(job, config)


def initial_adapters(job: Job, policy: Policy) -> Any:
    """Fresh adapters in their shardings; `policy` is an `adapted` one."""
    c = job.config
    rows = lora.adapter_rows(policy.config, c.lora.targets, c.lora.rank)

    def init(key):
        return lora.init_adapters(
            key, rows, policy.config.num_layers, jnp.dtype(c.model.param_dtype)
        )

    key = jax.random.fold_in(jax.random.key(c.seed), 1)  # not the key of random weights
    return jax.jit(init, out_shardings=policy.shardings)(key)


def initial_params(job: Job, policy: Policy, weights: Weights | None) -> Any:
    """The policy's parameters before any training of this run, in their shardings.

    Args:
      weights: that it starts from; None: random ones by the run's seed.
    """
    if weights is None:
        start = jax.jit(policy.model.init, out_shardings=policy.shardings)
        return start(jax.random.key(job.config.seed))
    return read_params(job, policy, weights)


def read_params(job: Job, policy: Policy, weights: Weights) -> Any:
    """Weights on disk as parameters, in the policy's shardings and in model.param_dtype."""
    progress = job.progress("reading weights", huggingface.num_tensors(policy.config), "tensors")
    params = weights.load(policy.shardings, jnp.dtype(job.config.model.param_dtype), progress)
    progress.clear()
    return params
