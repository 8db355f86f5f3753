"""Every setting: frozen dataclasses, whose types hold their rules and whose comments are what
--help says of them.
"""

import dataclasses
import math
import typing
from typing import Annotated, Any

from dpojax.config.data import WORLD_PREFIX, WORLDS, DataConfig
from dpojax.config.limits import Count, CountOrUnset, CountOrZero, OneOf, Rule, Within
from dpojax.config.model import LoraConfig, MeshConfig, ModelSection, ReferenceConfig
from dpojax.config.online import RewardConfig
from dpojax.config.policy_gradient import OnlineDPOConfig, PolicyGradientConfig
from dpojax.config.training import (
    CheckpointConfig,
    LossConfig,
    OptimConfig,
    RewardModelConfig,
    SampleConfig,
    SftConfig,
)

# Settings whose text may name a function of one's own.
CODE_SETTINGS = ("stages", "loss.name", "sample.reward", "reward.terms")
# What dpojax trains itself; algorithms/table.py says how.
STAGES = ("sft", "dpo", "reward_model", "policy_gradient", "online_dpo")

PREFERENCE_STAGES = ("dpo", "reward_model")  # those that cannot do without pairs or labels

MAY_BE_INFINITE = ("optim.clip_norm", "optim.spike_factor")  # none


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    stages: str  # what is trained, one after another: sft, dpo, or an algorithm of your own, as
    # file.py:name; a stage without data or steps is left out
    seed: CountOrZero  # of weights, order and samples
    batch_size: Count  # pairs per step
    batch_groups: CountOrZero  # groups per step, where the number of pairs per group varies; else 0
    num_steps: CountOrUnset
    # of the preference stage; -1 = num_epochs of the data; 0 = none: SFT or evaluation alone
    num_epochs: Annotated[float, Within(0, 10**6)]  # in place of num_steps; 0 = num_steps counts
    log_every_steps: Count  # between two lines of metrics.jsonl and of the terminal
    eval_every_steps: Count  # between two evaluations on the held-out pairs
    checkpoint_every_steps: Count  # between two checkpoints; the last step has one too
    tokenizer: str  # .model, tokenizer.json or its folder; "" = model.init's own, or the embedded
    # world's
    self_check: Annotated[str, OneOf(("auto", "full", "off"))]
    # of loss and log-probs before the first step; auto skips it above 1B parameters
    export: bool  # True writes WORKDIR/export, a Hugging Face directory
    data: DataConfig
    model: ModelSection
    sft: SftConfig
    reward_model: RewardModelConfig
    reward: RewardConfig
    policy_gradient: PolicyGradientConfig
    online_dpo: OnlineDPOConfig
    loss: LossConfig
    reference: ReferenceConfig
    lora: LoraConfig
    optim: OptimConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    sample: SampleConfig

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The names in `stages`."""
        return tuple(name.strip() for name in self.stages.split(",") if name.strip())

    @property
    def wants_preferences(self) -> bool:
        """Whether rows must hold preferences; else the rows themselves say what they hold."""
        return bool(set(self.stage_names) & set(PREFERENCE_STAGES))

    @property
    def embedded(self) -> bool:
        """Whether a world of dpojax's own is the data."""
        return bool(self.world)

    @property
    def world(self) -> str:
        """The world that is the data, one of config.data.WORLDS; "": files are.

        An evaluation alone needs no data.train.
        """
        if self.data.train.startswith(WORLD_PREFIX):
            return self.data.train.removeprefix(WORLD_PREFIX)
        if not self.data.train and not self.data.eval:
            return WORLDS[0]
        return ""

    @property
    def data_seed(self) -> int:
        """The seed of everything about the data."""
        return self.seed if self.data.seed < 0 else self.data.seed


def setting_rules(section: Any = None, prefix: str = "") -> dict[str, tuple[Rule, ...]]:
    """Every setting by its dotted name, with the rules that stand in its type."""
    holder = Config if section is None else section
    plain = typing.get_type_hints(holder)
    found: dict[str, tuple[Rule, ...]] = {}
    for name, kind in typing.get_type_hints(holder, include_extras=True).items():
        if dataclasses.is_dataclass(plain[name]):
            found |= setting_rules(plain[name], f"{prefix}{name}.")
        else:
            found[prefix + name] = getattr(kind, "__metadata__", ())
    return found


def setting_choices() -> dict[str, tuple[str, ...]]:
    """What a setting may be, where that is a list."""
    return {
        key: rule.choices
        for key, rules in setting_rules().items()
        for rule in rules
        if isinstance(rule, OneOf)
    }


# The longest prompt and the longest response where the limits are 0: 1,024 tokens together, as
# TRL's default is.
MAX_AUTO_TOKENS = 512


def with_limits(config: Config, max_positions: int) -> Config:
    """The config with data.max_prompt_tokens and data.max_response_tokens set, for a model of so
    many positions.
    """
    half = min(MAX_AUTO_TOKENS, max(2, max_positions // 2))
    limits = {
        "max_prompt_tokens": config.data.max_prompt_tokens or half,
        "max_response_tokens": config.data.max_response_tokens or half,
    }
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **limits))


def with_steps(config: Config, epoch_steps: float) -> Config:
    """The config with num_steps and optim.warmup_steps set, for training data that lasts
    `epoch_steps` steps.
    """
    num_steps = config.num_steps
    if num_steps < 0:
        num_steps = max(1, math.ceil(config.num_epochs * epoch_steps - 1e-6))
    optim = config.optim
    if optim.warmup_ratio:
        optim = dataclasses.replace(
            optim, warmup_steps=round(optim.warmup_ratio * num_steps), warmup_ratio=0.0
        )
    return dataclasses.replace(config, num_steps=num_steps, num_epochs=0.0, optim=optim)


def resolved_mode(config: Config) -> str:
    """reference.mode: live, cached, adapter or none; auto is none where the objective takes no
    reference.
    """
    if config.reference.mode != "auto":
        return config.reference.mode
    if not config.loss.objective.uses_reference:
        return "none"
    return "adapter" if config.lora.rank and not config.reference.init else "live"


def frozen_dtype(config: Config) -> str:
    """What the reference's parameters are stored in."""
    of_base = config.lora.rank and resolved_mode(config) != "live" and not config.reference.init
    return (
        config.lora.base_dtype if of_base else config.reference.dtype
    ) or config.model.param_dtype
