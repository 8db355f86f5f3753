"""Gradients of a preference objective: of one run, or of several runs that share a batch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpojax.data.packing import PackedBatch
from dpojax.models.decoder import Model
from dpojax.objectives.loss import Loss
from dpojax.objectives.pairs import PairInfo, PairLogps
from dpojax.training.gradients import (
    Gradients,
    full_params,
    pair_gradients,
    preference_sums,
    reference_of,
    scored_sums,
    step_results,
    step_scores,
)
from dpojax.training.metrics import mean_where
from dpojax.training.micro_batches import accumulate, accumulate_gradient
from dpojax.training.pairs import step_pairs
from dpojax.training.router_loss import Balance
from dpojax.training.scores import StepScores, batch_scores, routed_scores
from dpojax.training.state import TrainState


def dropout_key(seed: int | Array | None, step, i):
    """The key of the adapters' dropout in a micro-batch of a step; None: no dropout."""
    if seed is None:
        return None
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), i)


@dataclasses.dataclass(frozen=True)
class PreferenceGradients:
    """The gradients of a preference objective, as pure functions (state, frozen, batch, details,
    constrain_params) -> Gradients.

    frozen: {"reference": parameters, "base": parameters under adapters}, each a tree or None. The
    state's memory holds "reward_mean", and "reference" where that moves.
    """

    model: Model
    loss: Loss
    chunk: int  # logits exist for this many tokens at a time
    balance: Balance | None = None  # the routers' loss
    dropout_seed: int | None = None  # of the adapters' dropout; None: no dropout

    def one_pass(
        self,
        state: TrainState,
        frozen: Mapping[str, Any],
        batch: PackedBatch,
        details,
        constrain_params,
    ) -> Gradients:
        """Each micro-batch's loss and gradient at once: for objectives that take pairs alone."""
        count = batch.num_pairs.astype(jnp.float32)
        policy = full_params(frozen)
        ref_params = reference_of(state, frozen)
        keys = self._keys(state)
        part = self._routers_part(policy(state.policy), batch, keys)

        def sums(params, mb, i):
            return preference_sums(
                self.model,
                self.loss,
                self.chunk,
                policy(params["policy"]),
                ref_params,
                mb,
                details,
                key=keys(i),
                balance=part,
            )

        total, grads, (results, parts) = accumulate(
            sums, state.params, batch, count, constrain_params
        )
        memory = {"reward_mean": state.memory["reward_mean"]}
        gradients = pair_gradients(self.loss, total / count, grads, results, batch, memory)
        return self._with_routers(gradients, batch, parts)

    def two_passes(
        self,
        state: TrainState,
        frozen: Mapping[str, Any],
        batch: PackedBatch,
        details,
        constrain_params,
    ) -> Gradients:
        """A first pass scores the whole step, a second one pulls each token: for objectives that
        couple pairs.
        """
        count = batch.num_pairs.astype(jnp.float32)
        policy = full_params(frozen)
        ref_params = reference_of(state, frozen)
        keys = self._keys(state)
        part = self._routers_part(policy(state.policy), batch, keys)
        scores = step_scores(
            self.model,
            self.loss,
            policy(state.policy),
            ref_params,
            batch,
            chunk=self.chunk,
            details=details,
            keys=keys,
        )
        reward_mean = state.memory["reward_mean"]
        if self.loss.needs("shift"):
            pairs = step_pairs(self.loss, batch, scores)
            reward_mean = _running_mean(state, pairs, self.loss.reward_scale)
        total, pulls = self._pulls(batch, scores, reward_mean)
        full = ref_params if self.loss.needs("kl") else None

        def pulled(params, mb, i):
            tokens, routing = routed_scores(
                self.model,
                policy(params["policy"]),
                mb,
                chunk=self.chunk,
                ref_params=full,
                key=keys(i),
            )
            values = zip(pulls, (tokens.logps, tokens.kl), strict=True)
            total = sum(jnp.sum(pull[i] * x) for pull, x in values if x is not None)
            if part is None:
                return total, None
            routers = part(routing)
            return total + routers, jax.lax.stop_gradient(routers)

        _, grads, parts = accumulate(pulled, state.params, batch, count, constrain_params)
        if parts is not None:
            total = total + parts.sum()
        results = step_results(self.loss, batch, scores, reward_mean)
        memory = {"reward_mean": reward_mean}
        gradients = pair_gradients(self.loss, total / count, grads, results, batch, memory)
        return self._with_routers(gradients, batch, parts)

    def _pulls(self, batch: PackedBatch, scores: StepScores, reward_mean):
        """(summed loss of the step, its gradient by every token's log-prob and KL)."""

        def step_loss(logps, kl):
            moved = scores._replace(policy=scores.policy._replace(logps=logps, kl=kl))
            pairs, ref, info = step_pairs(self.loss, batch, moved)
            values = self.loss(pairs, ref, info._replace(shift=reward_mean)).loss
            return jnp.sum(jnp.where(info.valid, values, 0.0))

        gradient = jax.value_and_grad(step_loss, argnums=(0, 1))
        return gradient(scores.policy.logps, scores.policy.kl)

    def _keys(self, state: TrainState) -> Callable[[Any], Any]:
        """Micro-batch -> the key of its dropout."""

        def keys(i):
            return dropout_key(self.dropout_seed, state.step, i)

        return keys

    def _routers_part(self, params, batch: PackedBatch, keys) -> Callable[[Any], Any] | None:
        """Routing -> its part of the routers' loss; None where there is no such loss."""
        if self.balance is None:
            return None
        balance = self.balance
        counts = balance.counts(self.model, params, batch, keys)
        pairs = batch.num_pairs.astype(jnp.float32)

        def part(routing):
            return pairs * balance.part(routing, counts, batch)

        return part

    def _with_routers(self, gradients: Gradients, batch: PackedBatch, parts) -> Gradients:
        """With the routers' loss among the metrics, where there is one."""
        if parts is None or self.balance is None:
            return gradients
        # TRL's name, without the weight
        loss = parts.sum() / batch.num_pairs / self.balance.weight
        return gradients._replace(scalars={**gradients.scalars, "aux_loss": loss})


def preference_gradients(
    model: Model,
    loss: Loss,
    *,
    chunk: int,
    two_passes: bool | None = None,
    balance: Balance | None = None,
    dropout_seed: int | None = None,
) -> Callable[..., Gradients]:
    """The function (state, frozen, batch, details, constrain_params) -> Gradients of a preference
    objective: see `PreferenceGradients`.

    Args:
      two_passes: None: where the objective couples the pairs of a step.
      balance: the routers' loss, or None.
      dropout_seed: of the adapters' dropout, or None: no dropout. The draw depends on step and
        micro-batch.
    """
    gradients = PreferenceGradients(model, loss, chunk, balance, dropout_seed)
    if two_passes is None:
        two_passes = loss.coupled
    return gradients.two_passes if two_passes else gradients.one_pass


def sweep_gradients(
    model: Model,
    losses: Sequence[Loss],
    *,
    chunk: int,
    each: Callable[..., Any],
    dropout_seeds=None,
):
    """Like `preference_gradients`, of N runs that share batch, base and reference: the leaves of
    the state's parameters and memory are [N, ...].

    The reference scores a micro-batch once for all runs. Neither coupled objectives nor those that
    need the reference's full distributions are taken.

    Args:
      losses: of every run.
      each: maps a function of one run over the leading axes of its arguments: `jax.vmap`, or a
        loop.
      dropout_seeds: of every run's adapters' dropout, [N], or None.
    """
    squares = any(loss.needs("wpo") for loss in losses)
    count = len(losses)
    seeds = np.zeros(count, np.int32) if dropout_seeds is None else np.asarray(dropout_seeds)

    def gradients(
        state: TrainState, frozen: Mapping[str, Any], batch: PackedBatch, details, constrain_params
    ) -> Gradients:
        policy = full_params(frozen)
        ref_params = frozen.get("reference")

        def run_sums(params, n, seed, mb: PackedBatch, ref_logps, i):
            key = None if dropout_seeds is None else dropout_key(seed, state.step, i)
            options = dict(chunk=chunk, details=details, squares=squares, key=key)
            tokens = batch_scores(model, policy(params["policy"]), mb, **options)
            scores = StepScores(tokens, ref_logps, None)
            # The branches are a few operations on [B] arrays each.
            branches = [lambda scores, loss=loss: scored_sums(loss, mb, scores) for loss in losses]
            if count == 1:
                return branches[0](scores)
            return jax.lax.switch(n, branches, scores)

        def gradient(params, mb: PackedBatch, i):
            ref_logps = mb.ref_logps
            if ref_logps is None and ref_params is not None:
                tokens = batch_scores(model, ref_params, mb, chunk=chunk)
                ref_logps = jax.lax.stop_gradient(tokens.logps)

            def run_gradient(params, n, seed):
                sums = jax.value_and_grad(run_sums, has_aux=True)
                return sums(params, n, seed, mb, ref_logps, i)

            return each(run_gradient)(params, jnp.arange(count), seeds)

        pairs = batch.num_pairs.astype(jnp.float32)
        total, grads, (results, _) = accumulate_gradient(
            gradient, state.params, batch, pairs, constrain_params
        )
        results = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), results)  # [N, M, A, P]

        def run_report(mean, grads, results, memory):
            return pair_gradients(losses[0], mean, grads, results, batch, memory)

        return jax.vmap(run_report)(total / pairs, grads, results, state.memory)

    return gradients


def _running_mean(
    state: TrainState, pairs: tuple[PairLogps, PairLogps | None, PairInfo], scale: float
) -> Float[Array, ""]:
    """The mean implicit reward of all responses so far, this step's included; steps count alike."""
    policy, ref, info = pairs
    assert ref is not None
    log_ratios = policy.chosen.logps - ref.chosen.logps + policy.rejected.logps - ref.rejected.logps
    rewards = 0.5 * scale * log_ratios
    before = state.memory["reward_mean"]
    taken = state.step - state.skipped + 1
    return before + (mean_where(rewards, info.valid) - before) / taken
