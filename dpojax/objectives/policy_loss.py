"""A preset with settings -> the loss of a policy-gradient step, as a pure function of arrays.

All presets are one algorithm: rows of `policy_presets.PRESETS`, which differ in the advantage, its
scale, the ratio, the clip, the aggregate, the KL and the number of epochs.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dpojax.errors import ConfigError
from dpojax.objectives import policy_gradient
from dpojax.objectives.advantages import (
    ADVANTAGES,
    scale_advantages,
    scored,
    sequence_returns,
    token_advantages,
    whiten,
)
from dpojax.objectives.policy_gradient import Denominators
from dpojax.objectives.policy_presets import PRESETS as PRESETS
from dpojax.objectives.policy_presets import PolicySettings, policy_settings


class PolicyMetrics(NamedTuple):
    """Of the step, or of a micro-batch's part of it; without gradient."""

    approx_kl: Float[Array, ""]  # mean over tokens of (log pi/old)^2 / 2, nats
    ratio: Float[Array, ""]  # mean over tokens; 1 at the first minibatch
    clipped_low: Float[Array, ""]  # share of tokens
    clipped_high: Float[Array, ""]
    kl: Float[Array, ""] | None  # mean over responses of log pi/ref, nats; None without reference


class PolicyLossOutput(NamedTuple):
    """What a policy-gradient step minimises, and the rest for logging."""

    loss: Float[Array, ""]  # over all N responses, as one step
    advantages: Float[Array, "N T"]  # 0 where the mask is False; without gradient
    metrics: PolicyMetrics


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """(logps, old_logps, ref_logps, rewards, mask, group) -> PolicyLossOutput. Made by
    `make_policy_loss`.

    A trainer with micro-batches takes the three parts: `live_mask` and `step_advantages` once a
    rollout, over the whole step, then `partial` of each micro-batch. The parts add up to the call.
    """

    preset: str
    settings: PolicySettings

    def __call__(
        self,
        logps: ArrayLike,
        old_logps: ArrayLike,
        ref_logps: ArrayLike | None,
        rewards: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        group: ArrayLike | None = None,
        *,
        advantages: ArrayLike | None = None,
    ) -> PolicyLossOutput:
        """The loss of a whole step.

        Args:
          logps: log pi(y_t | x, y_<t) of the policy that is trained. [N, T], nats.
          old_logps: of the policy that drew the responses, by the training forward; may be `logps`
            itself, and has no gradient. [N, T].
          ref_logps: of the reference; None where no KL reads it. [N, T].
          rewards: of each response; NaN: it has none, and counts in nothing. `ppo` takes
            `advantages` instead. [N].
          mask: True: a token of the response; None: everywhere. A row without tokens counts in
            nothing. [N, T].
          group: the prompt of each response, any whole numbers in any order. [N].
          advantages: of each token, for `ppo` alone. [N, T].
        Raises: ConfigError for shapes that do not fit and for what a preset lacks.
        """
        logps = _floats(logps)
        old_logps = _floats(old_logps)
        if mask is None:
            mask = jnp.ones(logps.shape, bool)
        mask = jnp.asarray(mask).astype(bool)
        if ref_logps is not None:
            ref_logps = _floats(ref_logps)
        self._check(logps, old_logps, ref_logps, rewards, mask, group, advantages)
        known = jnp.zeros(logps.shape[0], logps.dtype)
        if rewards is not None:
            known = jnp.asarray(rewards, logps.dtype)
        mask = self.live_mask(known, mask)
        if self.settings.advantage == "given":
            of_tokens = self._given(jnp.asarray(advantages, logps.dtype), mask)
        else:
            prompts = jnp.zeros(logps.shape[0], jnp.int32)
            if group is not None:
                prompts = jnp.asarray(group)
            of_tokens = self.step_advantages(known, old_logps, ref_logps, mask, prompts)
        denominators = policy_gradient.count_denominators(mask, logps.dtype)
        return self.partial(logps, old_logps, ref_logps, of_tokens, mask, denominators)

    def live_mask(
        self, rewards: Float[Array, " N"], mask: Bool[Array, "N T"]
    ) -> Bool[Array, "N T"]:
        """The mask without the responses that have no reward: they are as though not drawn."""
        return mask & scored(rewards, mask)[:, None]

    def step_advantages(
        self,
        rewards: Float[Array, " N"],
        old_logps: Float[Array, "N T"],
        ref_logps: Float[Array, "N T"] | None,
        mask: Bool[Array, "N T"],
        group: Int[Array, " N"],
    ) -> Float[Array, "N T"]:
        """The advantages of a whole step's tokens, by rewards. Arguments as the call's."""
        settings = self.settings
        beta = settings.beta if settings.kl == "reward" else 0.0
        rewards = jax.lax.stop_gradient(rewards)
        valid = scored(rewards, mask)
        old_logps = jax.lax.stop_gradient(old_logps)
        returns = sequence_returns(rewards, old_logps, ref_logps, mask, beta=beta)
        returns = jax.lax.stop_gradient(returns)
        advantages = scale_advantages(
            ADVANTAGES[settings.advantage](returns, group, valid),
            returns,
            rewards,
            group,
            valid,
            scale=settings.scale,
            epsilon=settings.epsilon,
        )
        return token_advantages(advantages, mask)

    def partial(
        self,
        logps: Float[Array, "N T"],
        old_logps: Float[Array, "N T"],
        ref_logps: Float[Array, "N T"] | None,
        advantages: Float[Array, "N T"],
        mask: Bool[Array, "N T"],
        denominators: Denominators,
    ) -> PolicyLossOutput:
        """The part of these responses in a step's loss and metrics.

        Args:
          advantages: these responses' part of `step_advantages`. [N, T].
          mask: these responses' part of `live_mask`. [N, T].
          denominators: those of the whole step, `count_denominators(live_mask)`.
        """
        settings = self.settings
        surrogate = policy_gradient.policy_surrogate(
            logps,
            old_logps,
            advantages,
            mask,
            ratio=settings.ratio,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
        )
        terms = -surrogate.objective
        if settings.beta > 0 and settings.kl.startswith("loss_"):
            if ref_logps is None:
                raise _missing_reference(self.preset, settings)
            terms = terms + settings.beta * policy_gradient.kl_terms(
                logps, old_logps, ref_logps, mask, kl=settings.kl, ratio=settings.ratio
            )
        loss = policy_gradient.aggregate_terms(
            terms,
            mask,
            denominators,
            aggregate=settings.aggregate,
            max_tokens=settings.max_tokens,
        )
        advantages = jax.lax.stop_gradient(jnp.where(mask, advantages, 0.0))
        metrics = _metrics(logps, old_logps, ref_logps, mask, denominators, surrogate)
        return PolicyLossOutput(loss=loss, advantages=advantages, metrics=metrics)

    def _given(
        self, advantages: Float[Array, "N T"], mask: Bool[Array, "N T"]
    ) -> Float[Array, "N T"]:
        if self.settings.scale == "step":
            return whiten(advantages, mask)
        return jnp.where(mask, advantages, 0.0)

    def _check(self, logps, old_logps, ref_logps, rewards, mask, group, advantages) -> None:
        """The shapes, and what the preset needs."""
        if logps.ndim != 2:
            raise ConfigError(f"logps has the shape {logps.shape}; it must be [N, T]")
        responses = logps.shape[:1]
        _check_shape("old_logps", old_logps, logps.shape)
        _check_shape("ref_logps", ref_logps, logps.shape)
        _check_shape("rewards", rewards, responses)
        _check_shape("mask", mask, logps.shape)
        _check_shape("group", group, responses)
        _check_shape("advantages", advantages, logps.shape)
        settings = self.settings
        needs_reference = settings.beta > 0 and settings.kl != "none"
        if settings.advantage == "given":
            needs_reference = needs_reference and settings.kl != "reward"
            if advantages is None:
                raise ConfigError(
                    f"advantages is None; {self.preset} takes advantages= of each token, from"
                    " gae_advantages, instead of rewards"
                )
        else:
            if advantages is not None:
                raise ConfigError(
                    f"advantages is given; {self.preset} computes them from rewards, and ppo takes"
                    " them"
                )
            if rewards is None:
                raise ConfigError(f"rewards is None; {self.preset} takes a reward of each response")
            if group is None and (settings.advantage != "return" or settings.scale == "group"):
                raise ConfigError(
                    f"group is None; {self.preset} compares the responses of a prompt: group is"
                    " the prompt of each response, [N]"
                )
        if needs_reference and ref_logps is None:
            raise _missing_reference(self.preset, settings)


def _floats(values) -> Array:
    """float32 at least: sums of bfloat16 log-probs lose whole nats."""
    array = jnp.asarray(values)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _check_shape(name: str, values: Any, shape: tuple[int, ...]) -> None:
    if values is not None and jnp.shape(values) != shape:
        raise ConfigError(
            f"{name} has the shape {jnp.shape(values)}; beside these logps it must be {shape}"
        )


def _missing_reference(preset: str, settings: PolicySettings) -> ConfigError:
    return ConfigError(
        f"ref_logps is None; {preset} with kl={settings.kl} and beta={settings.beta} needs the"
        " reference's log-probs; beta=0 does without"
    )


def _metrics(
    logps: Float[Array, "N T"],
    old_logps: Float[Array, "N T"],
    ref_logps: Float[Array, "N T"] | None,
    mask: Bool[Array, "N T"],
    denominators: Denominators,
    surrogate: policy_gradient.Surrogate,
) -> PolicyMetrics:
    logps = jax.lax.stop_gradient(logps)

    def share(values: Array) -> Array:
        terms = values.astype(logps.dtype)
        return policy_gradient.aggregate_terms(terms, mask, denominators, aggregate="token")

    kl = None
    if ref_logps is not None:
        to_ref = policy_gradient.log_ratios(logps, ref_logps, mask)
        kl = policy_gradient.aggregate_terms(to_ref, mask, denominators, aggregate="constant")
    moved = policy_gradient.log_ratios(logps, old_logps, mask)
    return PolicyMetrics(
        approx_kl=share(policy_gradient.k2(moved)),
        ratio=share(surrogate.ratio),
        clipped_low=share(surrogate.clipped_low),
        clipped_high=share(surrogate.clipped_high),
        kl=kl,
    )


def make_policy_loss(preset: str, **settings: Any) -> PolicyLoss:
    """The loss of a policy-gradient step: a row of `PRESETS`, with the settings that are given.

    Args:
      preset: reinforce, rloo, grpo, dr_grpo, dapo, gspo, or ppo (which takes advantages instead of
        rewards).
      settings: `beta`, strength of the pull to the reference, >= 0; `kl`, where it goes: reward
        (k1, exact), loss_k2_sequence (exact), loss_k3 (GRPO as published), loss_k3_ratio (TRL
        1.16) or none; `clip_low` and `clip_high`, > 0, None: no bound; `scale`: none, group or
        step; `aggregate`: token, sequence or constant; `max_tokens`, the constant of the last, 1
        unless given; and the further fields of `PolicySettings`.
    Returns: a pure function (logps, old_logps, ref_logps, rewards, mask, group) -> loss and
      advantages; see `PolicyLoss`.
    Raises: ConfigError for an unknown preset or setting, with the nearest known one, and for a
      placement of the KL that has no gradient towards the reference, with the reason.

    >>> loss = dpojax.make_policy_loss("grpo", beta=0.0)
    >>> logps = np.array([[-1.0, -2.0], [-1.5, -0.5]])  # of two responses' tokens
    >>> rewards = np.array([1.0, 0.0])
    >>> advantages = loss(logps, logps, logps, rewards, group=np.array([0, 0])).advantages
    >>> [round(value, 2) for value in advantages[:, 0].tolist()]
    [0.71, -0.71]
    """
    return PolicyLoss(preset=preset, settings=policy_settings(preset, **settings))
