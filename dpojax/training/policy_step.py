"""A step of policy gradients: the samples of a rollout, scored once, and one or more updates.

The whole step is one program. Log-probs of the old policy are those of the training forward, never
the sampler's, so that the ratio of the first update is exactly 1. Statistics (baselines, scales,
whitening, denominators) are of the whole step, whatever its devices and micro-batches.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from dpojax.data.packing import PackedBatch
from dpojax.models.decoder import Model
from dpojax.models.logits import read_scalar
from dpojax.objectives.advantages import (
    gae_advantages,
    informative_groups,
    overlong_penalty,
    scored,
    token_rewards,
    whiten,
)
from dpojax.objectives.policy_gradient import (
    Denominators,
    aggregate_terms,
    count_denominators,
    value_terms,
)
from dpojax.objectives.policy_loss import PolicyLoss
from dpojax.training.gradients import Gradients, full_params
from dpojax.training.micro_batches import accumulate, stacked
from dpojax.training.response_tokens import response_tokens, step_responses
from dpojax.training.scores import batch_scores, hidden_by_shard
from dpojax.training.state import POLICY, TrainState
from dpojax.training.update import Spikes, StepMetrics, make_update

VALUE = "value"  # the role of the value net
BETA = "beta"  # what the state remembers of an adaptive KL


class Critic(NamedTuple):
    """PPO's value net, a decoder with a scalar head, and what its advantages take."""

    model: Model
    clip: float  # of a value around its old self
    gamma: float
    lam: float
    target_kl: float  # nats; 0: beta is fixed
    horizon: float


class Rollout(NamedTuple):
    """What is known of a step's samples before the first update, without gradient. N = M A S."""

    rewards: Float[Array, " N"]  # of the task; NaN: none
    mask: Bool[Array, "N W"]  # tokens of responses with a reward
    old_logps: Float[Array, "N W"]
    ref_logps: Float[Array, "N W"] | None
    kl: Float[Array, "N W"] | None  # KL(pi || ref) over the vocabulary at each token, nats
    advantages: Float[Array, "N W"]
    values: Float[Array, "N W"] | None  # of the old value net
    returns: Float[Array, "N W"] | None  # its targets
    beta: Float[Array, ""]
    informative: Float[Array, ""]  # share of responses whose prompt has two different rewards


@dataclasses.dataclass(frozen=True)
class PolicyGradients:
    """Samples -> advantages -> gradients; every part takes the arrays of a whole step."""

    model: Model
    loss: PolicyLoss
    critic: Critic | None  # of ppo
    width: int  # W, tokens of the longest response
    chunk: int  # tokens whose logits exist at a time
    overlong_tokens: int  # 0: no penalty

    def rollout(self, state: TrainState, frozen: Mapping[str, Any], batch: PackedBatch) -> Rollout:
        """Scores the samples by policy, reference and value net, and gives them advantages."""
        scores = self._score(state, frozen, batch)
        step = step_responses(batch, self.width)
        valid = scored(step.rewards, step.mask)
        mask = self.loss.live_mask(step.rewards, step.mask)
        rewards = step.rewards
        if self.overlong_tokens:
            rewards = rewards + overlong_penalty(
                jnp.sum(step.mask, axis=-1),
                max_tokens=self.width,
                cache_tokens=self.overlong_tokens,
            )
        beta = state.memory.get(BETA, jnp.float32(self.loss.settings.beta))
        if self.critic is None:
            advantages = self.loss.step_advantages(
                rewards, scores["old"], scores.get("ref"), mask, step.group
            )
            values = None
            returns = None
        else:
            ref = scores.get("ref", scores["old"])  # without a reference beta is 0
            of_tokens = token_rewards(rewards, scores["old"], ref, mask, beta=beta)
            values = scores["values"]
            estimates = gae_advantages(
                of_tokens, values, mask, gamma=self.critic.gamma, lam=self.critic.lam
            )
            returns = estimates.returns
            advantages = whiten(estimates.advantages, mask)
        informative = informative_groups(step.rewards, step.group, valid)
        return Rollout(
            rewards=step.rewards,
            mask=mask,
            old_logps=scores["old"],
            ref_logps=scores.get("ref"),
            kl=scores.get("kl"),
            advantages=advantages,
            values=values,
            returns=returns,
            beta=beta,
            informative=jnp.sum(informative) / jnp.maximum(jnp.sum(valid), 1),
        )

    def _score(
        self, state: TrainState, frozen: Mapping[str, Any], batch: PackedBatch
    ) -> dict[str, Float[Array, "N W"]]:
        """Of every token: old, ref and kl where there is a reference, values where there is a
        critic.
        """
        params = full_params(frozen)(state.policy)
        ref_params = frozen.get("reference")

        def of(mb: PackedBatch, i) -> dict[str, Any]:
            tokens = {}
            if ref_params is None:
                tokens["old"] = batch_scores(self.model, params, mb, chunk=self.chunk).logps
            else:
                # KL(pi || ref): of the scored model to the one that it is compared with
                scores = batch_scores(
                    self.model, ref_params, mb, chunk=self.chunk, ref_params=params
                )
                tokens = {"old": scores.ref_logps, "ref": scores.logps, "kl": scores.kl}
            if self.critic is not None:
                tokens["values"] = token_values(self.critic.model, state.params[VALUE], mb)
            return {name: response_tokens(mb, x, self.width) for name, x in tokens.items()}

        rows = stacked(of, batch)  # [M, A S, W]
        return jax.lax.stop_gradient({k: x.reshape(-1, self.width) for k, x in rows.items()})

    def gradients(  # the arguments of every algorithm's gradients, and two more
        self,
        state: TrainState,
        frozen: Mapping[str, Any],
        batch: PackedBatch,
        details,
        constrain_params,
        rollout: Rollout,
        is_first,
    ) -> Gradients:
        """Of the loss over the whole step.

        Args:
          is_first: whether nothing was updated since the samples were drawn: the old policy is then
            the one that is trained, to the bit.
        """
        policy = full_params(frozen)
        denominators = count_denominators(rollout.mask)

        def sums(params, mb, i):
            part = _micro_batch_part(rollout, batch, i)
            scores = batch_scores(
                self.model, policy(params[POLICY]), mb, chunk=self.chunk, details=details
            )
            logps = response_tokens(mb, scores.logps, self.width)
            here = jax.lax.stop_gradient(logps)
            old = jnp.where(is_first, here, part.old_logps)
            out = self.loss.partial(
                logps, old, part.ref_logps, part.advantages, part.mask, denominators
            )
            total = out.loss
            metrics = _policy_metrics(out.metrics)
            entropy = response_tokens(mb, scores.entropy, self.width)
            metrics["policy/entropy"] = _mean(entropy, part.mask, denominators)
            if self.critic is not None:
                values = token_values(self.critic.model, params[VALUE], mb)
                values = response_tokens(mb, values, self.width)
                assert part.values is not None and part.returns is not None
                terms = value_terms(
                    values, part.values, part.returns, part.mask, clip=self.critic.clip
                )
                value_loss = aggregate_terms(terms, part.mask, denominators, aggregate="token")
                total = total + value_loss
                metrics["value/loss"] = value_loss
            of_responses = -jnp.sum(jnp.where(part.mask, part.advantages * here, 0.0), axis=-1)
            of_responses = of_responses.reshape(mb.lengths.shape)
            return total, jax.lax.stop_gradient((of_responses, metrics))

        one = jnp.float32(1)  # the parts are of the step's mean already
        loss, grads, (losses, metrics) = accumulate(
            sums, state.params, batch, one, constrain_params
        )
        scalars = {name: jnp.sum(parts) for name, parts in metrics.items()}
        scalars |= self.rollout_scalars(rollout)
        memory = {}
        if BETA in state.memory:
            memory[BETA] = self._next_beta(rollout, scalars["objective/kl"])
        return Gradients(loss, grads, scalars, losses, batch.response_row, memory)

    def rollout_scalars(self, rollout: Rollout) -> dict[str, Float[Array, ""]]:
        """Means over the step's responses, under the field's names; lengths in tokens."""
        valid = jnp.any(rollout.mask, axis=-1)
        count = jnp.maximum(jnp.sum(valid), 1)
        lengths = jnp.sum(rollout.mask, axis=-1)

        def mean(x):
            return jnp.sum(jnp.where(valid, x, 0.0)) / count

        score = mean(rollout.rewards)
        scalars = {
            "objective/scores": score,
            "objective/scores_std": jnp.sqrt(mean(jnp.square(rollout.rewards - score))),
            "completions/mean_length": mean(lengths),
            "completions/at_limit": mean(lengths == self.width),
            "groups/informative": rollout.informative,
        }
        if rollout.kl is not None:
            # the sum of the per-step KLs at the visited states: never negative
            kl = mean(jnp.sum(jnp.where(rollout.mask, rollout.kl, 0.0), axis=-1))
            scalars["objective/kl"] = kl
            scalars["objective/rlhf_reward"] = score - rollout.beta * kl
            scalars["objective/beta"] = rollout.beta
        if rollout.values is not None and rollout.returns is not None:
            scalars["value/mean"] = _token_mean(rollout.values, rollout.mask)
            scalars["value/explained_variance"] = _explained(rollout)
        return scalars

    def _next_beta(self, rollout: Rollout, kl) -> Float[Array, ""]:
        """Ziegler et al. 2019 (arXiv:1909.08593), section 2.2; see `objectives.adaptive_beta`."""
        assert self.critic is not None
        error = jnp.clip(kl / self.critic.target_kl - 1, -0.2, 0.2)
        count = jnp.sum(jnp.any(rollout.mask, axis=-1))
        return rollout.beta * (1 + error * count / self.critic.horizon)


def token_values(model: Model, params: Any, mb: PackedBatch) -> Float[Array, "A T"]:
    """V of the state in which each scored token is drawn: read at the token before it."""
    hidden, _ = hidden_by_shard(model, params, mb)
    before = jnp.take_along_axis(hidden, mb.predictor[..., None], axis=1)
    return read_scalar(model.head(params), before)


def _micro_batch_part(rollout: Rollout, batch: PackedBatch, i) -> Rollout:
    """The responses of micro-batch i: [A S, ...] in place of [N, ...]."""
    count = batch.tokens.shape[0]

    def part(x):
        if x.ndim == 0:
            return x
        return jax.lax.dynamic_index_in_dim(x.reshape(count, -1, *x.shape[1:]), i, 0, False)

    return jax.tree.map(part, rollout)


def _policy_metrics(metrics) -> dict[str, Float[Array, ""]]:
    return {
        "policy/approx_kl": metrics.approx_kl,
        "policy/clipfrac": metrics.clipped_low + metrics.clipped_high,
        "policy/clipfrac_low": metrics.clipped_low,
        "policy/clipfrac_high": metrics.clipped_high,
        "val/ratio": metrics.ratio,
    }


def _mean(x, mask, denominators: Denominators) -> Float[Array, ""]:
    """A micro-batch's part of the mean over the step's tokens."""
    return aggregate_terms(x, mask, denominators, aggregate="token")


def _token_mean(x, mask) -> Float[Array, ""]:
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def _explained(rollout: Rollout) -> Float[Array, ""]:
    """1 - Var(R - V) / Var(R) over the step's tokens; 0 where the returns do not vary."""
    assert rollout.values is not None and rollout.returns is not None

    def variance(x):
        mean = _token_mean(x, rollout.mask)
        return _token_mean(jnp.square(x - mean), rollout.mask)

    whole = variance(rollout.returns)
    left = variance(rollout.returns - rollout.values)
    return jnp.where(whole > 0, 1 - left / jnp.where(whole > 0, whole, 1.0), 0.0)


def make_policy_step(
    gradients: PolicyGradients,
    optimizers: Mapping[str, optax.GradientTransformation],
    constrain_params: Callable[[Any], Any],
    *,
    spikes: Spikes,
):
    """The step (state, frozen, batch, details) -> (state, StepMetrics): all epochs of a rollout.

    An update whose numbers are not finite changes nothing, to the bit; the step is counted as
    skipped where all of its updates were. The metrics are those of the first update; those of the
    last one, where there are several, have `_last` behind their names.
    """
    epochs = gradients.loss.settings.epochs
    update = make_update(optimizers, spikes=spikes)

    def step(state: TrainState, frozen, batch: PackedBatch, details):
        rollout = gradients.rollout(state, frozen, batch)

        def epoch(current: TrainState, number):
            grads = gradients.gradients(
                current, frozen, batch, details, constrain_params, rollout, number == 0
            )
            return update(current, grads)

        if epochs == 1:
            return epoch(state, 0)
        after, metrics = jax.lax.scan(epoch, state, jnp.arange(epochs))
        all_skipped = after.skipped - state.skipped == epochs
        after = after._replace(
            step=state.step + 1, skipped=state.skipped + all_skipped.astype(jnp.int32)
        )
        first: StepMetrics = jax.tree.map(lambda x: x[0], metrics)
        last = {
            f"{name}_last": metrics.scalars[name][-1]
            for name in metrics.scalars
            if name.startswith(("policy/", "val/", "value/loss"))
        }
        scalars = first.scalars | last
        finite = jnp.all(metrics.finite)
        return after, first._replace(scalars=scalars, finite=finite, skipped=state.skipped)

    return step
