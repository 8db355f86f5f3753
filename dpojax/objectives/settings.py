"""Which objectives a loss's name sums, and which settings they take."""

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpojax.errors import ConfigError, did_you_mean
from dpojax.objectives.f_divergences import F_DIVERGENCES
from dpojax.objectives.preference import sft_loss
from dpojax.objectives.table import OBJECTIVES, Objective
from dpojax.untrusted.user_function import load_function

ALIASES = {"dpo": "sigmoid"}  # second names of objectives, for people

SHORTHANDS = {
    "mpo": "0.8*sigmoid+0.2*bco_pair+1*sft",  # Wang et al. 2024, arXiv:2411.10442
    "wpo": "wpo*sigmoid",
}

RECIPES = {  # said where a setting is missing
    "alpha": "r_dpo .01 to .5, odpo 1, tdpo2 .5, ld_dpo .5, cpo 1, tr_dpo .6",
    "beta": "mostly .01 to .5",
    "dpop_lambda": "50",
    "f_alpha": ".5",
    "gamma": "simpo: .1 to .8 of beta",
    "label_smoothing": "exo_pair 1e-3, robust .1",
    "orpo_lambda": ".1",
    "tau": "discopop .05, tr_dpo 512 steps",
}

MOVING_SETTINGS = ("alpha", "tau")  # what a moving reference takes besides its function's settings

Test = tuple[Callable[[Any], bool], str]

FINITE: Test = (math.isfinite, "a finite number")

_AT_LEAST_0: Test = (lambda v: math.isfinite(v) and v >= 0, "a finite number >= 0")

_OVER_0: Test = (lambda v: math.isfinite(v) and v > 0, "a finite number > 0")

# Valid ranges: name -> (test, what it must be). Rows of OBJECTIVES may ask for more.
RANGES: dict[str, Test] = {
    "beta": _OVER_0,
    "label_smoothing": (lambda v: 0 <= v < 0.5, "in [0, 0.5)"),
    "average": (lambda v: isinstance(v, bool), "True or False"),
    "tau": _OVER_0,
    "gamma": _AT_LEAST_0,
    "alpha": _AT_LEAST_0,
    "dpop_lambda": _AT_LEAST_0,
    "orpo_lambda": _AT_LEAST_0,
    "desirable_weight": _AT_LEAST_0,
    "undesirable_weight": _AT_LEAST_0,
    "f_divergence": (lambda v: v in F_DIVERGENCES, f"one of {', '.join(F_DIVERGENCES)}"),
    "f_alpha": FINITE,
    "sft_weight": _AT_LEAST_0,
    "sft_normalize": (lambda v: v in ("token", "pair"), "'token' or 'pair'"),
}


def keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only arguments of a loss function with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


_ALIAS = re.compile(rf"(?<![\w:./-])({'|'.join(ALIASES)})(?![\w:./-])")


def canonical_name(name: str) -> str:
    """The name of a loss without aliases: `0.8*dpo+1*sft` is `0.8*sigmoid+1*sft`.

    Two runs whose names differ by an alias alone are the same run, so that one resumes the other.
    """
    return _ALIAS.sub(lambda alias: ALIASES[alias[0]], name)


class Summand(NamedTuple):
    """One part of a loss's name."""

    weight: float
    wpo: bool
    objective: str


def parse_name(name: str) -> list[Summand]:
    """A canonical name as summands."""
    summands = []
    for text in re.split(r"(?<![0-9]e)\+", name):  # the plus of 1e+2 is no sum's
        *factors, objective = (part.strip() for part in text.split("*"))
        weight = 1.0
        wpo = False
        for factor in factors:
            if factor == "wpo":
                wpo = True
                continue
            try:
                weight *= float(factor)
            except ValueError as error:
                raise ValueError(
                    f"loss.name is {name!r}: {factor!r} is neither a number nor wpo"
                ) from error
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"loss.name is {name!r}: the weight of {objective} is {weight}; it must be > 0"
            )
        if objective not in SHORTHANDS:
            summands.append(Summand(weight, wpo, objective))
            continue
        for inner in parse_name(SHORTHANDS[objective]):
            summands.append(Summand(weight * inner.weight, wpo or inner.wpo, inner.objective))
    return summands


def find_objective(name: str) -> Objective:
    """The row of OBJECTIVES, or a row for the user's own function."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if ":" in name:
        loaded = load_function(name, "loss.name", kind=Objective)
        if isinstance(loaded, Objective):
            return loaded
        return Objective(loaded)
    names = [*OBJECTIVES, *SHORTHANDS, *ALIASES]
    raise ValueError(
        f"loss.name holds {name!r}, which is none of {', '.join(names)}; nor a sum like"
        f" 0.8*sigmoid+0.2*bco_pair, nor your own module:function{did_you_mean(name, names)}"
    )


def check_range(key: str, value: Any, test: Test) -> None:
    try:
        valid = test[0](value)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"loss.{key} is {value!r}; it must be {test[1]}")


def _settings_of(rows: list[Objective], *, sft_beside: bool) -> list[str]:
    """The settings that a sum of these objectives takes, by name.

    Args:
      sft_beside: whether loss.sft_weight adds an SFT term.
    """
    takes = {k for row in rows for k in keywords(row.function)}
    if any(row.reference == "moving" for row in rows):
        takes |= set(MOVING_SETTINGS)
    # the SFT term is that of a pair's chosen response
    if all(row.data != "unpaired" for row in rows):
        takes |= {"sft_weight"}
        if sft_beside:
            takes |= set(keywords(sft_loss))
    alone = len(rows) == 1 and not sft_beside
    if all(_takes_divergence(row, alone=alone) for row in rows):
        takes |= {"f_divergence"}
    return sorted(takes)


def _takes_divergence(row: Objective, *, alone: bool) -> bool:
    """Whether an f-divergence can stand in the objective.

    It is of the difference that an f-divergence changes, or a term beside such an objective.
    """
    return row.f_divergence or (row.function is sft_loss and not alone)


def only_takes(takes: list[str]) -> str:
    """What an objective takes, as the end of a sentence."""
    if not takes:
        return "takes no settings; leave it unset (None)"
    return f"takes only {', '.join(takes)}; leave it unset (None)"


def instead(key: str, takes: list[str]) -> str:
    """What may have been meant by a setting that an objective does not take."""
    if key == "f_divergence":
        return (
            "; objectives with an f-divergence are"
            f" {', '.join(k for k, v in OBJECTIVES.items() if v.f_divergence)}"
        )
    return did_you_mean(key, takes)


def taken(rows: list[Objective], given: Mapping[str, Any]) -> list[str]:
    """The settings that a sum of these objectives takes, where these are given."""
    takes = _settings_of(rows, sft_beside=bool(given.get("sft_weight")))
    if "f_divergence" in takes and given.get("f_divergence") == "alpha":
        takes.append("f_alpha")
    return takes


def settings_not_taken(name: str, settings: Mapping[str, Any]) -> set[str]:
    """The settings (fields of config.loss) that are set and that the objective does not take.

    None for a name that `make_loss` refuses.
    """
    given = {key: value for key, value in settings.items() if value is not None and key in RANGES}
    try:
        rows = [find_objective(summand.objective) for summand in parse_name(canonical_name(name))]
    except (ValueError, ConfigError):
        return set()
    return set(given) - set(taken(rows, given))
