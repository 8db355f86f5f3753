"""Rules that look at several settings; and what is doubtful about them.

A rule of one setting stands in its type, and a rule of one section in its class.
"""

import functools
import math

from dpojax.config.data import WORLD_PREFIX
from dpojax.config.limits import require
from dpojax.config.model import QUANTISED
from dpojax.config.schema import STAGES, Config, resolved_mode, setting_rules
from dpojax.config.training import OPTIMIZERS
from dpojax.errors import ConfigError, did_you_mean
from dpojax.untrusted.user_function import names_code


def _validate_stages(config: Config) -> None:
    """Known stages, or functions of one's own, each once."""
    names = config.stage_names
    require(bool(names), "stages", config.stages, f"one or more of {', '.join(STAGES)}")
    for name in names:
        near = did_you_mean(name, STAGES)
        must = f"made of {', '.join(STAGES)}, or an algorithm of your own as file.py:name{near}"
        require(name in STAGES or names_code(name), "stages", name, must)
    require(len(set(names)) == len(names), "stages", config.stages, "a list without repetition")


def validate(config: Config) -> None:
    """Everything that can be known before a device is touched: the rules in each setting's type,
    those of each section, and those that look at several.
    """
    _validate_stages(config)
    for field, rules in setting_rules().items():
        value = functools.reduce(getattr, field.split("."), config)
        for rule in rules:
            if value is not None:
                rule.check(field, value)
    for section in vars(config).values():
        if hasattr(section, "check"):
            section.check()
    _validate_steps(config)
    _validate_files(config)
    _validate_loss(config)


def _validate_steps(config: Config) -> None:
    """Steps or epochs, and not both."""
    if config.num_steps < 0:
        require(config.num_epochs > 0, "num_epochs", config.num_epochs, "> 0, as num_steps is -1")
    elif config.num_epochs:
        raise ConfigError(
            f"num_steps is {config.num_steps} while num_epochs is {config.num_epochs:g}; set one of"
            " them: num_steps=-1, or num_epochs=0"
        )


def _validate_files(config: Config) -> None:
    """What stands beside files of one's own, and what the embedded world brings itself."""
    own = {
        "tokenizer": config.tokenizer,
        "model.init": config.model.init,
        "data.eval": config.data.eval,
        "sft.data": config.sft.data,
    }
    is_world = config.data.train.startswith(WORLD_PREFIX)
    only_evaluates = bool(config.data.eval) and config.num_steps == 0 and not is_world
    for name, value in own.items():
        if value and (is_world or not config.data.train) and not only_evaluates:
            raise ConfigError(
                f"{name} is {value!r} but data.train is {config.data.train!r}; the embedded world"
                " brings its own; set data.train"
            )
    if config.sft.num_steps and not config.data.train and not config.embedded:
        raise ConfigError(
            f"data.train is '' while sft.num_steps is {config.sft.num_steps}; name a file to"
            " train on"
        )


def _validate_loss(config: Config) -> None:
    """The objective with its settings, and the reference that it asks for."""
    try:
        loss = config.loss.objective
    except ValueError as error:
        raise ConfigError(str(error)) from error
    flips = config.data.flip_labels
    if loss.needs("scores"):
        require(
            flips == 0,
            "data.flip_labels",
            flips,
            f"0: a flipped pair has no score margin for {loss.name}",
        )
    _validate_lora(config, moving=loss.moving is not None)
    if loss.moving is not None:
        own = config.reference
        require(
            own.dtype not in QUANTISED,
            "reference.dtype",
            own.dtype,
            f"float32 or bfloat16: {loss.name} moves its reference",
        )
        require(
            own.memory == "device",
            "reference.memory",
            own.memory,
            f"'device': {loss.name} moves its reference",
        )
    mode = config.reference.mode
    if loss.needs_live_reference:
        require(
            mode in ("auto", "live", "adapter"),
            "reference.mode",
            mode,
            f"'live' or 'auto': {loss.name} needs the reference's parameters",
        )
    if loss.uses_reference:
        require(
            mode != "none",
            "reference.mode",
            mode,
            f"'live', 'cached' or 'auto': {loss.name} needs a reference",
        )


def _validate_lora(config: Config, *, moving: bool) -> None:
    """Adapters and what they leave to the reference."""
    lora = config.lora
    reference = config.reference
    if reference.init:
        mode = resolved_mode(config)
        require(
            mode in ("live", "cached"),
            "reference.init",
            reference.init,
            f"'': reference.mode is {mode!r}",
        )
    if not lora.rank:
        require(
            reference.mode != "adapter",
            "reference.mode",
            "adapter",
            "another one: lora.rank is 0, there is no base",
        )
        require(
            not lora.base_dtype,
            "lora.base_dtype",
            lora.base_dtype,
            "'': lora.rank is 0, there is no frozen base",
        )
        return
    require(
        math.isfinite(lora.alpha) and lora.alpha > 0,
        "lora.alpha",
        lora.alpha,
        "a finite number > 0",
    )
    require(0 <= lora.dropout < 1, "lora.dropout", lora.dropout, "in [0, 1)")
    require(
        not moving,
        "lora.rank",
        lora.rank,
        f"0: {config.loss.name} moves its reference, and the base is frozen",
    )
    if resolved_mode(config) != "live" and not reference.init:
        require(
            not reference.dtype,
            "reference.dtype",
            reference.dtype,
            "'': the reference is the base, in lora.base_dtype",
        )
        require(
            reference.memory == "device",
            "reference.memory",
            reference.memory,
            "'device': the reference is the base",
        )
        require(
            not reference.rules,
            "reference.rules",
            reference.rules,
            "empty: the reference is the base",
        )


def doubts(config: Config) -> list[str]:
    """Settings that are legal and cannot do what they say, one sentence each."""
    c = config
    found = []
    stages = [
        ("optim", c.num_steps, c.optim.warmup_steps),
        ("sft", c.sft.num_steps, c.sft.warmup_steps),
    ]
    for section, steps, warmup in stages:
        if steps and warmup >= steps and warmup > 1:
            field = "num_steps" if section == "optim" else "sft.num_steps"
            found.append(
                f"{section}.warmup_steps={warmup} of {field}={steps}: the rate is still rising at"
                " the last step"
            )
    if c.sample.kl_prompts > c.sample.num_prompts > 0:
        found.append(
            f"sample.kl_prompts={c.sample.kl_prompts}: it takes"
            f" sample.num_prompts={c.sample.num_prompts} at most"
        )
    if (
        c.sample.num_prompts
        and c.sample.temperature == 0
        and (c.sample.top_k or c.sample.top_p < 1)
    ):
        found.append(
            "sample.top_k and sample.top_p do nothing: sample.temperature=0 takes the likeliest"
            " token"
        )
    if not c.sft.num_steps:
        if c.sft.data:
            found.append(f"sft.data={c.sft.data!r} is not read: sft.num_steps=0")
    elif c.sft.b2 is not None and "b2" not in OPTIMIZERS[c.optim.name]:
        found.append(f"sft.b2={c.sft.b2} does nothing: {c.optim.name} has no b2")
    if c.lora.dropout and not c.lora.rank:
        found.append(f"lora.dropout={c.lora.dropout} does nothing: lora.rank=0")
    if c.optim.skip_spikes and math.isinf(c.optim.spike_factor):
        found.append(
            "optim.skip_spikes=True does nothing: optim.spike_factor=inf calls no loss a spike"
        )
    if resolved_mode(c) in ("none", "adapter") and c.reference.rules:
        found.append("reference.rules do nothing: there is no reference tree of its own")
    if resolved_mode(c) == "none" and (c.reference.dtype or c.reference.memory != "device"):
        found.append("reference.dtype and reference.memory do nothing: there is no reference")
    return found
