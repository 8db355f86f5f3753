"""The settings of algorithms that sample between two steps: policy gradients and online DPO."""

import dataclasses
from typing import Annotated

from dpojax.config.limits import (
    Above,
    AtLeast,
    Count,
    CountOrZero,
    NotNegative,
    OneOf,
    Positive,
    Within,
)
from dpojax.errors import ConfigError
from dpojax.objectives.policy_loss import PolicyLoss, make_policy_loss
from dpojax.objectives.policy_presets import PRESETS

LABELS = ("soft", "sampled", "argmax")
PAIRS = ("all", "extremes")


@dataclasses.dataclass(frozen=True)
class PolicyGradientConfig:
    """A stage of policy gradients; num_steps, batch_size (in prompts) and optim are the run's."""

    preset: Annotated[str, OneOf(tuple(PRESETS))]  # a row of the table of losses
    num_samples: Count  # responses drawn to each prompt; of sample.max_new_tokens at most
    beta: float | None  # strength of the pull to the reference; unset: the preset's
    kl: str | None
    # where the KL goes: reward, loss_k2_sequence, loss_k3, loss_k3_ratio, none; unset: the preset's
    clip_low: float | None  # the ratio is held above 1 - clip_low; unset: the preset's
    clip_high: float | None  # and below 1 + clip_high; unset: the preset's
    scale: str | None  # of the advantages: none, group, step; unset: the preset's
    aggregate: str | None  # mean over token, sequence, constant; unset: the preset's
    epochs: int | None  # updates from the samples of a step; unset: the preset's
    redraws: CountOrZero  # times that a prompt whose rewards are equal is drawn again (DAPO)
    overlong_tokens: CountOrZero  # the last tokens over which a long response loses up to 1 (DAPO)
    value_model: str  # ppo: a reward model's folder that the value net starts from; "": the policy
    value_learning_rate: Positive  # ppo: of the value net, by optim's schedule
    value_clip: Annotated[float, Above(0, "inf for no bound")]  # ppo: of V around its old self
    gamma: Annotated[float, Within(0, 1)]  # ppo: discount
    lam: Annotated[float, Within(0, 1)]  # ppo: GAE's lambda
    target_kl: NotNegative  # ppo: nats that beta is adapted to hold; 0: beta is fixed
    horizon: Positive  # ppo: responses over which beta follows an error of 20 %

    def loss(self, max_new_tokens: int) -> PolicyLoss:
        """The loss of a step, from the preset and what is set beside it.

        Args:
          max_new_tokens: of a response: what dr_grpo divides a response's sum by.
        Raises: ConfigError for what the preset does not take.
        """
        names = ("beta", "kl", "clip_low", "clip_high", "scale", "aggregate", "epochs")
        values = dataclasses.asdict(self)
        settings = {name: values[name] for name in names if values[name] is not None}
        if self.preset == "dr_grpo":
            settings["max_tokens"] = float(max_new_tokens)
        try:
            return make_policy_loss(self.preset, **settings)
        except ConfigError as error:
            raise ConfigError(f"policy_gradient: {error}") from error

    def check(self) -> None:
        """Settings that belong together."""
        loss = self.loss(1)
        grouped = loss.settings.advantage in ("group_mean", "leave_one_out")
        if grouped and self.num_samples < 2:
            raise ConfigError(
                f"policy_gradient.num_samples is {self.num_samples}; {self.preset} compares the"
                " responses of a prompt: it must be at least 2"
            )
        if self.preset == "ppo" and loss.settings.kl != "reward":
            raise ConfigError(
                f"policy_gradient.kl is {loss.settings.kl!r}; ppo's KL stands in the reward of each"
                " token: leave it unset"
            )
        if self.preset != "ppo" and self.target_kl:
            raise ConfigError(
                f"policy_gradient.target_kl is {self.target_kl:g}; ppo alone adapts beta: set it to"
                " 0"
            )
        if self.preset != "ppo" and self.value_model:
            raise ConfigError(
                f"policy_gradient.value_model is {self.value_model!r}; ppo alone has a value net:"
                " leave it empty"
            )


@dataclasses.dataclass(frozen=True)
class OnlineDPOConfig:
    """DPO on pairs that the policy draws itself: the objective is `loss`, batch_size in prompts."""

    num_samples: Annotated[int, AtLeast(2)]  # responses drawn to each prompt, scored and paired
    labels: Annotated[str, OneOf(LABELS)]
    # soft: sigmoid(r_i - r_j) as the label; sampled: drawn from it; argmax: the larger reward is
    # chosen, and ties are left out
    pairs: Annotated[str, OneOf(PAIRS)]  # all of a prompt's, or its best and its worst response
    temperature: Positive  # that responses are drawn at
