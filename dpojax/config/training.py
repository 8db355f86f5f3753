"""Settings of training: stages, objective, optimizer, checkpoints and samples."""

import dataclasses
import functools
import math
from typing import Annotated

from dpojax.config.limits import (
    Above,
    Count,
    CountOrUnset,
    CountOrZero,
    NotNegative,
    OneOf,
    Positive,
    ShareBelowOne,
    Within,
    require,
)
from dpojax.errors import ConfigError, did_you_mean
from dpojax.objectives.f_divergences import F_DIVERGENCES
from dpojax.objectives.loss import Loss, make_loss

SMALLEST_NORMAL = 1.1754944e-38  # of float32

LEAST_TEMPERATURE = 1e-6  # logits divided by less leave float32

# The moments and eps that each optimizer has, as published or as the common implementations set
# them: what optim.* means unset.
OPTIMIZERS: dict[str, dict[str, float]] = {
    "adamw": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},  # Loshchilov & Hutter 2019
    # torch.optim.RMSprop, which the DPO authors used; b2 is its alpha
    "rmsprop": {"b2": 0.99, "eps": 1e-8},
    "adafactor": {},  # Shazeer & Stern 2018
    "lion": {"b1": 0.9, "b2": 0.99},  # Chen et al. 2023
}

SCHEDULES = ("constant", "linear", "cosine")

Schedule = Annotated[str, OneOf(SCHEDULES)]

CHANGEABLE = (
    "data",
    "tokenizer",
    "model",
    "dtype",
    "reference",
    "layout",
    "loss",
    "seed",
    "batch",
    "sft",
    "init",
    "lora",
)


@dataclasses.dataclass(frozen=True)
class SftConfig:
    """The supervised stage before DPO; num_steps 0 skips it.

    In a validated Config num_steps is at least 0.
    """

    num_steps: CountOrZero
    # -1: steps_from_random where model.init is "", none where it brings weights
    steps_from_random: CountOrZero  # what sft.num_steps=-1 means for random weights, in steps
    data: str  # "" = the chosen responses of data.train (the embedded world has demonstrations of
    # its own)
    batch_size: Count  # prompts
    learning_rate: Positive  # at its peak, after warmup
    schedule: Schedule  # of the rate after warmup; linear and cosine end at 0
    warmup_steps: CountOrZero  # over which the rate rises to its peak
    b2: Annotated[float | None, Within(0, 1, "[)")]
    # in place of optim.b2, where the optimizer has one


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """The Bradley-Terry reward model: a scalar head on the policy's decoder."""

    num_steps: CountOrUnset  # of batch_size pairs; -1 = one epoch of data.train; 0 = none
    learning_rate: Positive  # at its peak, after warmup
    schedule: Schedule  # of the rate after warmup; linear and cosine end at 0
    warmup_steps: CountOrZero  # over which the rate rises to its peak
    centring: NotNegative
    # weight of (r_w + r_l)^2, which holds a prompt's rewards around 0; 0 = none
    norm_prompts: CountOrZero  # samples of the reference that rewards are normalised on; 0 = none


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The objective and its settings; None = unset.

    One that the objective does not take is an error.
    """

    name: str  # an objective, a sum like 0.8*sigmoid+0.2*bco_pair, or your own module:function
    beta: float | None  # strength of the pull to the reference; IPO's tau, RSO's gamma
    label_smoothing: float | None  # share of labels that are taken to be wrong
    average: bool | None  # ipo: log-ratios per token
    tau: float | None  # discopop: temperature of its mixture; tr_*: steps between two moves of the
    # reference
    gamma: float | None  # simpo: the margin that it asks for
    alpha: float | None  # weight of what r_dpo, odpo, tdpo2, ld_dpo or cpo adds; tr_*: share of the
    # policy in a moved reference
    dpop_lambda: float | None  # dpop: weight of the penalty on a chosen response that falls
    orpo_lambda: float | None  # orpo: weight of the odds ratio
    desirable_weight: float | None  # kto: of responses labelled true
    undesirable_weight: float | None  # kto: of responses labelled false
    f_divergence: Annotated[str | None, OneOf(tuple(F_DIVERGENCES))]
    # in place of the reverse KL to the reference
    f_alpha: float | None  # of the alpha divergence
    sft_weight: float | None  # of the chosen response's negative log-likelihood, added
    sft_normalize: Annotated[str | None, OneOf(("token", "pair"))]
    # whether the SFT term is a mean over tokens or over pairs
    extra: dict[str, float]  # settings of a user's own function that are not above

    @functools.cached_property
    def objective(self) -> Loss:
        """The loss, built when the config is checked and carried with it.

        Raises: ValueError naming the setting that is wrong.
        """
        return make_loss(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer; b1, b2 and eps None = as published (OPTIMIZERS)."""

    name: Annotated[str, OneOf(tuple(OPTIMIZERS))]  # the optimizer
    learning_rate: Positive  # at its peak, after warmup
    schedule: Schedule  # of the rate after warmup; linear and cosine end at 0
    warmup_steps: CountOrZero  # over which the rate rises to its peak
    warmup_ratio: ShareBelowOne
    # of the run's steps, in place of warmup_steps; 0 = warmup_steps counts
    weight_decay: NotNegative  # decoupled, times the rate; not on norms and biases
    clip_norm: Annotated[float, Above(0, "inf for no clipping")]
    # longest gradient, over all parameters; inf = no clipping
    b1: float | None  # first moment's decay
    b2: float | None  # second moment's decay
    eps: float | None  # added to the second moment's root
    spike_factor: Annotated[float, Above(1, "inf: no loss is a spike")]
    # a loss over this many times its running average is a spike: named and warned of
    skip_spikes: bool  # True: a spike is also skipped, like a step that is not finite

    def check(self) -> None:
        """Moments and eps in their ranges, and none that the optimizer does not have."""
        for name in ("b1", "b2", "eps"):
            value = getattr(self, name)
            if value is None:
                continue
            takes = OPTIMIZERS[self.name]
            has = f"left unset: {self.name} has {', '.join(takes) or 'no such settings'}"
            require(name in takes, f"optim.{name}", value, has)
            if name != "eps":
                Within(0, 1, "[)").check(f"optim.{name}", value)
                continue
            # below it is 0 on most devices, and a moment of 0 divided by it no number
            fits = math.isfinite(value) and value >= SMALLEST_NORMAL
            require(fits, "optim.eps", value, f">= {SMALLEST_NORMAL:g}")
        if self.warmup_ratio and self.warmup_steps:
            raise ConfigError(
                f"optim.warmup_steps is {self.warmup_steps} while optim.warmup_ratio is"
                f" {self.warmup_ratio:g}; set one of them to 0"
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept, and what a resumed run may change."""

    keep: Count  # how many of the newest stay
    restore_step: CountOrUnset  # -1 = the newest
    allow_changed: str  # comma-separated: data, tokenizer, model, dtype, reference, layout, loss,
    # seed, batch, sft, init, lora

    def allowed(self) -> frozenset[str]:
        """The names in `allow_changed`."""
        return frozenset(name.strip() for name in self.allow_changed.split(",") if name.strip())

    def check(self) -> None:
        """Names of what may change are known ones."""
        for name in self.allowed():
            near = did_you_mean(name, CHANGEABLE)
            must = f"names out of {', '.join(CHANGEABLE)}{near}"
            require(name in CHANGEABLE, "checkpoint.allow_changed", name, must)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Generations of policy and reference for the report."""

    num_prompts: CountOrZero  # held-out prompts that policy and reference answer; 0 = none
    kl_prompts: CountOrZero
    # of these, that every evaluation samples for the on-policy KL and reward; 0 = none
    max_new_tokens: Count  # of a response, EOS included
    batch_size: Count  # responses drawn at a time
    temperature: float  # 0 = greedy
    top_k: CountOrZero  # draw from the k likeliest tokens; 0 = off
    top_p: Annotated[float, Within(0, 1, "(]")]
    # draw from the likeliest tokens whose probability sums to p; 1 = off
    reward: str  # module:function (prompts, responses) -> scores, for the win rate; "" = the
    # embedded world's, or none

    def check(self) -> None:
        """A temperature that float32 can divide by."""
        value = self.temperature
        warm = value == 0 or value >= LEAST_TEMPERATURE
        must = f"0 (the likeliest token) or finite and at least {LEAST_TEMPERATURE:g}"
        require(math.isfinite(value) and warm, "sample.temperature", value, must)
