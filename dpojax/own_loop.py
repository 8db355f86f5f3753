"""A loop of your own: batches of a file, and one optimizer step, as a whole run makes them.

`open_batches` reads, packs and orders rows as a run does; `make_step` puts a loss, its gradients
and an optimizer together as a run does. On the same batch both steps are the same.
"""

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpojax.algorithms.preference import preference_gradients
from dpojax.config.model import SHARDING_RULES
from dpojax.data.batches import PackGroups, train_batches
from dpojax.data.index import Index, build_index
from dpojax.data.open import check_pairs
from dpojax.data.packing import PackedBatch
from dpojax.data.records import Records, in_memory
from dpojax.data.shapes import groups_per_step, make_shape
from dpojax.data.sources import open_sources
from dpojax.data.tokens import Limits
from dpojax.errors import ConfigError
from dpojax.generation.loaded import LOGPS_CHUNK_TOKENS
from dpojax.generation.open_model import OpenModel
from dpojax.models.placed import check_positions, place_decoder
from dpojax.objectives.loss import Loss, own_loss
from dpojax.objectives.pairs import PairInfo, PairLogps
from dpojax.runtime import sharding
from dpojax.runtime.mesh import local_shards, num_shards
from dpojax.training.flops import layer_work
from dpojax.training.state import POLICY, TrainState, new_state
from dpojax.training.update import Spikes, StepMetrics, make_train_step, moving_reference

# (policy, ref, info) -> the loss of each pair
LossFunction = Callable[[PairLogps, PairLogps | None, PairInfo], Any]
NO_SPIKES = Spikes(factor=float("inf"), skip=False)


def open_batches(
    data: str | os.PathLike[str] | Sequence[dict[str, Any]],
    model: OpenModel,
    *,
    batch_size: int,
    loss: Loss | None = None,
    seed: int | None = 0,
    limits: tuple[int, int] | None = None,
    micro_batch_tokens: int = 4096,
) -> "OpenBatches":
    """The batches of a file of preferences, or of a list of rows: see dpojax/data/README.md.

    They are those of a run with the same data, model, seed and batch size.

    Args:
      data: what `data.train` takes (files, folders, globs), or rows, e.g. {"prompt": ...,
        "chosen": ..., "rejected": ...}.
      model: whose tokenizer, templates and devices the batches are for.
      batch_size: pairs of a step.
      loss: the batches carry what it takes: labelled responses for "kto"; None: pairs.
      seed: of the order, a fresh shuffle in every epoch; None: the order of the file.
      limits: most tokens of a prompt, BOS included, and of a response, EOS included; None: those of
        the run that wrote the model, or none.
      micro_batch_tokens: what a data shard computes at a time; a step takes as many as it needs.
    Raises: ConfigError or DataError with what to mend, and the row.

    >>> rows = [{"prompt": "a b", "chosen": " c", "rejected": " d"}] * 4
    >>> policy = dpojax.open_model(folder)
    >>> batches = dpojax.open_batches(rows, policy, batch_size=2)
    >>> [int(batch.num_pairs) for batch in batches.take(3)]
    [2, 2, 2]
    """
    kind = "pairs"
    if loss is not None and loss.unpaired:
        kind = "unpaired"
    dataset = model.text.dataset(_records(data), kind)
    if limits is not None:
        dataset = dataclasses.replace(dataset, limits=Limits(*limits))
    index = build_index(dataset, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
    if loss is not None:
        check_pairs(dataset, index, loss)
        if loss.needs("mismatched"):
            index = index.with_mismatched(seed or 0)
    _check_fits(index, model)
    mesh = model.loaded.mesh
    groups = groups_per_step(index, batch_size=batch_size, batch_groups=0)
    shards = num_shards(mesh)
    platform = mesh.devices.flat[0].platform
    shape = make_shape(
        [index],
        layout="shared",
        num_groups=groups,
        num_shards=shards,
        micro_batch_tokens=micro_batch_tokens,
        row_tokens=0,
        work=layer_work(model.loaded.config, platform, num_shards=shards),
    )
    pad_id = 0
    if model.tokenizer is not None:
        pad_id = model.tokenizer.pad_id
    pack = PackGroups(dataset, index, shape, tuple(local_shards(mesh)), pad_id)
    return OpenBatches(pack, mesh, groups, seed)


def _records(data: str | os.PathLike[str] | Sequence[dict[str, Any]]) -> Records:
    """A file's rows, or those that are given."""
    if isinstance(data, str | os.PathLike):
        return open_sources(os.fspath(data), "data")
    return in_memory("rows", list(data))


def _check_fits(index: Index, model: OpenModel) -> None:
    """Raises ConfigError where the model cannot take a token or a position of the data."""
    config = model.loaded.config
    check_positions(config, int(index.sequence_lengths().max()), "limits")
    if int(index.largest_id) >= config.vocab_size:
        raise ConfigError(
            f"a token id of the data is {int(index.largest_id)}, and the model has"
            f" {config.vocab_size} tokens: the rows are another tokenizer's"
        )


class OpenBatches:
    """The batches of a dataset, all of one static shape, on the model's devices."""

    def __init__(self, pack: PackGroups, mesh: jax.sharding.Mesh, groups: int, seed: int | None):
        """Takes what `open_batches` opened."""
        self.pack = pack
        self.mesh = mesh
        self.groups = groups  # prompts of a step
        self.seed = seed

    @property
    def index(self) -> Index:
        """The usable rows: their lengths, and in `dropped` which were left out and why."""
        return self.pack.index

    @property
    def epoch_steps(self) -> float:
        """How many steps see every prompt once."""
        return len(self.index.rows) / self.groups

    def take(self, count: int, *, after: int = 0) -> Iterator[PackedBatch]:
        """The batches of `count` steps, made ahead by threads.

        A step's batch depends on the seed and the step's number alone.

        Args:
          after: steps that were taken before, as when a loop goes on.
        """
        stream = train_batches(
            self.pack,
            num_groups=self.groups,
            seed=self.seed or 0,
            shuffle=self.seed is not None,
            start=after,
            stop=after + count,
            workers=0,
        )
        for batch, _ in stream:
            yield sharding.put_batch(batch, self.mesh)


def make_step(
    policy: OpenModel,
    loss: Loss | LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    ref: OpenModel | None = None,
    remat: str = "dots",
) -> "TrainStep":
    """One optimizer step on a batch of `open_batches`, compiled at its first call.

    The gradient is that of the mean over the step's pairs, exact for losses that couple them too. A
    step whose loss or gradient is not finite changes nothing but the counters.

    Args:
      policy: whose weights training starts from; it keeps them.
      loss: from `make_loss`, or a function (policy, ref, info) -> losses [B], nats, of the whole
        step's pairs: see `own_loss`.
      optimizer: of optax.
      ref: the frozen reference; None: the policy as it was opened.
      remat: what the backward pass computes anew: none, dots (all but matrix products), full.

    >>> policy = dpojax.open_model(folder)
    >>> loss = dpojax.make_loss("dpo", beta=0.1)
    >>> step = dpojax.make_step(policy, loss, optax.adam(1e-3))
    >>> rows = [{"prompt": "a b", "chosen": " c", "rejected": " d"}] * 4
    >>> state = step.start()
    >>> for batch in dpojax.open_batches(rows, policy, batch_size=2).take(3):
    ...     state, metrics = step(state, batch)
    >>> int(state.step), float(metrics.scalars["loss"]) < 0.6931
    (3, True)
    """
    if not isinstance(loss, Loss):
        loss = own_loss(loss)
    if ref is None:
        ref = policy
    return TrainStep(policy, loss, optimizer, ref, remat)


class TrainStep:
    """(state, batch) -> (state, metrics). Made by `make_step`."""

    def __init__(
        self,
        policy: OpenModel,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        ref: OpenModel,
        remat: str,
    ):
        """Takes what `make_step` was given."""
        self.policy = policy
        self.loss = loss
        self.optimizers = {POLICY: optimizer}
        reference = None
        if loss.uses_reference:
            reference = ref.params
        self.frozen: dict[str, Any] = {"reference": reference, "base": None}
        loaded = policy.loaded
        model = place_decoder(
            loaded.config,
            loaded.mesh,
            SHARDING_RULES,
            dtype=loaded.dtype,
            param_dtype=loaded.dtype,
            remat=remat,
        )
        remember = None
        if loss.moving is not None:  # then the state remembers the reference
            remember = moving_reference(loss.moving.alpha, loss.moving.tau)
            self.frozen["reference"] = None
        self._first_reference = reference
        step = make_train_step(
            preference_gradients(model, loss, chunk=LOGPS_CHUNK_TOKENS),
            self.optimizers,
            functools.partial(_constrain, {POLICY: _shardings(loaded.params)}),
            spikes=NO_SPIKES,
            remember=remember,
        )
        out_shardings = (self._state_shardings(), self._everywhere)
        self._step = jax.jit(step, donate_argnums=0, out_shardings=out_shardings)

    @property
    def _everywhere(self) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(self.policy.loaded.mesh, jax.sharding.PartitionSpec())

    def _make_state(self, params: Any, reference: Any) -> TrainState:
        """The state at step 0."""
        memory = {"reward_mean": jnp.zeros((), jnp.float32)}
        if self.loss.moving is not None:
            memory["reference"] = reference
        return new_state(self.optimizers, {POLICY: params}, memory)

    def _state_shardings(self) -> TrainState:
        """Optimizer states and a moving reference lie as the parameters do."""
        params = self.policy.params
        state = jax.eval_shape(self._make_state, params, self._first_reference)
        shardings = _shardings(params)
        return sharding.state_shardings(state, params, shardings, self.policy.loaded.mesh)

    def start(self) -> TrainState:
        """The state before the first step: copies of the policy's weights, and of the optimizer."""
        params = jax.tree.map(jnp.copy, self.policy.params)
        reference = None
        if self.loss.moving is not None:
            reference = jax.tree.map(jnp.copy, self._first_reference)
        state = self._make_state(params, reference)
        return jax.device_put(state, self._state_shardings())

    def __call__(
        self, state: TrainState, batch: PackedBatch, *, details: bool = True
    ) -> tuple[TrainState, StepMetrics]:
        """The next state, and what the step reports: `metrics.scalars` has TRL's names.

        Args:
          state: it is used up, as its memory becomes the next state's.
          details: whether entropies and logits are among the scalars; they cost a little.
        """
        return self._step(state, self.frozen, batch, np.bool_(details))

    def model(self, state: TrainState) -> OpenModel:
        """The policy with a copy of the state's weights, to sample, to score, or to go on from."""
        model = copy.copy(self.policy)  # it keeps what was compiled
        model.loaded = model.loaded._replace(params=jax.tree.map(jnp.copy, state.policy))
        return model


def _shardings(params: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, params)


def _constrain(shardings: Mapping[str, Any], tree: Any) -> Any:
    """Keeps a tree shaped like the parameters by role in the parameters' shardings."""
    return jax.lax.with_sharding_constraint(tree, dict(shardings))
