"""A name with settings -> Loss: what training minimises, as a pure function of two models' log-probs.

A name is a row of `losses.OBJECTIVES`, a user's own function (module:function or file.py:function), or a weighted
sum of both, `0.8*sigmoid+0.2*bco_pair+1*sft`; a factor `wpo` weights a term's pairs by their probability under the
policy (Zhou et al. 2024, arXiv:2406.11827). `mpo` and `wpo` alone are the sums that their papers use.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpojax.errors import ConfigError
from dpojax.flags import did_you_mean
from dpojax.functions import file_digest, load_function
from dpojax.losses import F_DIVERGENCES, OBJECTIVES, Objective, PairInfo, PairLogps, Pairs, known, sft_loss

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

_MOVING = ("alpha", "tau")  # what a moving reference takes besides its function's settings
Test = tuple[Callable[[Any], bool], str]
_FINITE: Test = (math.isfinite, "a finite number")
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
    "f_alpha": _FINITE,
    "sft_weight": _AT_LEAST_0,
    "sft_normalize": (lambda v: v in ("token", "pair"), "'token' or 'pair'"),
}


class LossOutput(NamedTuple):
    """Per-pair results. All but the loss are for logging and carry no gradient."""

    loss: Float[Array, "B"]
    chosen_rewards: Float[Array, "B"]  # beta log pi(y_w|x)/ref(y_w|x); beta log pi(y_w|x) without reference, of simpo a token's
    rejected_rewards: Float[Array, "B"]
    margin: Float[Array, "B"]  # what the objective trains upwards


class Term(NamedTuple):
    """One summand of a loss."""

    name: str
    weight: float
    wpo: bool
    objective: Objective
    settings: dict[str, Any]  # the function's keyword arguments
    moving: tuple[float, int] | None  # (alpha, tau)


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """(policy, ref, info=None) -> LossOutput, and what it needs. Made by `make_loss`."""

    name: str
    terms: tuple[Term, ...]
    reward_scale: float  # beta
    f_divergence: str
    f_alpha: float
    source: str  # changes with the file of a user's own function; "" where there is none

    def needs(self, what: str) -> bool:
        """Whether some term needs `what`: a key of `Objective.needs`, or "wpo"."""
        return any(what in t.objective.needs or (what == "wpo" and t.wpo) for t in self.terms)

    @property
    def main(self) -> Term:
        """The term whose margin and rewards are logged: the first that compares responses."""
        return next((t for t in self.terms if t.objective.function is not sft_loss), self.terms[0])

    @property
    def coupled(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the step."""
        return any(t.objective.coupled for t in self.terms)

    @property
    def unpaired(self) -> bool:
        """Whether it takes labelled responses instead of pairs."""
        return self.terms[0].objective.data == "unpaired"

    @property
    def uses_reference(self) -> bool:
        """Whether the loss itself depends on a reference."""
        return any(t.objective.reference != "none" for t in self.terms)

    @property
    def needs_live_reference(self) -> bool:
        """Whether the reference's parameters must be at hand in every step."""
        return any(t.objective.reference in ("live", "moving") for t in self.terms)

    @property
    def moving(self) -> tuple[float, int] | None:
        """(alpha, tau) of a moving reference: every tau steps ref <- alpha pi + (1 - alpha) ref."""
        return next((t.moving for t in self.terms if t.moving), None)

    def __call__(self, policy: PairLogps, ref: PairLogps | None, info: PairInfo | None = None) -> LossOutput:
        """The loss of B pairs, weighted by their weights, and what is logged of them.

        Args:
          policy: log-probs of both responses under the policy. [B] each, nats.
          ref: under the reference, or None where there is none.
          info: what else is known of the pairs; None: nothing, and no padding.
        """
        info = PairInfo() if info is None else info
        ref = jax.lax.stop_gradient(ref)  # the one place where the reference is cut off
        pairs = self._pairs(policy, ref, info)
        value = sum(t.weight * self._term(t, pairs) for t in self.terms)
        assert isinstance(value, jax.Array | np.ndarray)
        if info.weight is not None:
            value = value * info.weight
        main = self.main
        margin = main.objective.margin(jax.lax.stop_gradient(pairs), main.settings)
        plain = jax.lax.stop_gradient(self._pairs(policy, ref, info, plain=True))
        len_w, len_l = plain.lengths if main.objective.per_token else (1, 1)
        return LossOutput(value, self.reward_scale * plain.a / len_w, self.reward_scale * plain.b / len_l, margin)

    def _pairs(self, policy: PairLogps, ref: PairLogps | None, info: PairInfo, *, plain: bool = False) -> Pairs:
        a, b = (policy.chosen, policy.rejected) if ref is None else (policy.chosen - ref.chosen, policy.rejected - ref.rejected)
        if not plain:
            a, b = (F_DIVERGENCES[self.f_divergence](v, self.f_alpha) for v in (a, b))
        return Pairs(a, b, policy, ref, info)

    def _term(self, term: Term, x: Pairs) -> Array:
        objective, p = term.objective, x.info.soft_label
        value = objective.function(x, **term.settings)
        # A soft label is the share of the pair that was labelled in this order. Where the step's pairs are coupled, or the
        # label means something else, there is no such share.
        if p is not None and objective.data == "pairs" and not objective.coupled:
            value = p * value + (1 - p) * objective.function(_other_order(x, p < 1), **term.settings)
        if term.wpo:
            w_w, w_l = known(x.policy.chosen_weight, x.policy.rejected_weight)
            value = value * jax.lax.stop_gradient(w_w * w_l)
        return value

    def at_reference(self, policy: PairLogps, info: PairInfo) -> np.ndarray | None:
        """The per-pair loss in closed form where policy == reference, in float64; None if a term has none.

        Args:
          policy, info: numpy arrays, flat, without padding. Weights and soft labels are left out.
        """
        zero = np.zeros(np.shape(policy.chosen))
        pairs: Any = Pairs(zero, zero, policy, policy, info)  # numpy arrays throughout
        total = zero
        for t in self.terms:
            if t.objective.at_reference is None:
                return None
            value = t.objective.at_reference(pairs, t.settings)
            if t.wpo:
                value = value * np.asarray(policy.chosen_weight) * np.asarray(policy.rejected_weight)
            total = total + t.weight * value
        return total


def _other_order(x: Pairs, where: Array) -> Pairs:
    """The pairs with their responses exchanged where `where` holds; elsewhere as they are, so that nothing overflows unseen."""
    info = x.info
    if info.margin is not None:
        info = info._replace(margin=abs(info.margin))  # an offset is that of the pair, in both orders
    ref = None if x.ref is None else x.ref.swapped()
    other = Pairs(x.b, x.a, x.policy.swapped(), ref, info)
    picked = jax.tree.map(lambda new, old: jnp.where(where, new, old), other[:4], x[:4])
    return Pairs._make([*picked, info])


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only arguments of a loss function with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _parse(name: str) -> list[tuple[float, bool, str]]:
    """A name as summands: (weight, whether wpo, objective)."""
    found = []
    for text in re.split(r"(?<![0-9]e)\+", name):  # the plus of 1e+2 is no sum's
        *factors, objective = (part.strip() for part in text.split("*"))
        weight, wpo = 1.0, False
        for factor in factors:
            if factor == "wpo":
                wpo = True
                continue
            try:
                weight *= float(factor)
            except ValueError as error:
                raise ValueError(f"loss.name is {name!r}: {factor!r} is neither a number nor wpo") from error
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"loss.name is {name!r}: the weight of {objective} is {weight}; it must be > 0")
        inner = _parse(SHORTHANDS[objective]) if objective in SHORTHANDS else [(1.0, False, objective)]
        found += [(weight * w, wpo or own, what) for w, own, what in inner]
    return found


def _find(name: str) -> Objective:
    """The row of OBJECTIVES, or a row for the user's own function."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if ":" in name:
        found = load_function(name, "loss.name", kind=Objective)
        return found if isinstance(found, Objective) else Objective(found)
    names = [*OBJECTIVES, *SHORTHANDS]
    raise ValueError(
        f"loss.name holds {name!r}, which is none of {', '.join(names)}; nor a sum like 0.8*sigmoid+0.2*bco_pair, "
        f"nor your own module:function{did_you_mean(name, names)}"
    )


def _check_range(key: str, value: Any, test: Test) -> None:
    try:
        valid = test[0](value)
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"loss.{key} is {value!r}; it must be {test[1]}")


def _check_together(name: str, terms: list[Term]) -> None:
    """Raises ValueError for terms that cannot be summed."""
    if len({t.objective.data for t in terms}) > 1 or (terms[0].objective.data == "unpaired" and any(t.wpo for t in terms)):
        raise ValueError(f"loss.name is {name!r}: unpaired objectives stand alone, without wpo and without an SFT term")
    moving = {t.moving for t in terms if t.moving}
    others = [t.name for t in terms if t.objective.reference == "live"]
    if moving and others:
        raise ValueError(f"loss.name is {name!r}: {others[0]} needs a fixed reference; a tr_ objective moves it")
    for key in ("alpha", "tau"):  # every paper means something else by these
        takers = {t.name for t in terms if key in t.settings or (t.moving and key in _MOVING)}
        if len(takers) > 1:
            raise ValueError(f"loss.name is {name!r}: {' and '.join(sorted(takers))} mean different things by loss.{key}")


def _settings_of(rows: list[Objective], *, sft_beside: bool) -> list[str]:
    """The settings that a sum of these objectives takes, by name.

    Args:
      sft_beside: whether loss.sft_weight adds an SFT term.
    """
    takes = {k for row in rows for k in _keywords(row.function)}
    if any(row.reference == "moving" for row in rows):
        takes |= set(_MOVING)
    if all(row.data != "unpaired" for row in rows):  # the SFT term is that of a pair's chosen response
        takes |= {"sft_weight"}
        takes |= set(_keywords(sft_loss)) if sft_beside else set()
    alone = len(rows) == 1 and not sft_beside
    if all(_takes_divergence(row, alone=alone) for row in rows):
        takes |= {"f_divergence"}
    return sorted(takes)


def _takes_divergence(row: Objective, *, alone: bool) -> bool:
    """Whether the objective is of the difference that an f-divergence changes, or a term beside it."""
    return row.f_divergence or (row.function is sft_loss and not alone)


def _only(takes: list[str]) -> str:
    """What an objective takes, as the end of a sentence."""
    if not takes:
        return "takes no settings; leave it unset (None)"
    return f"takes only {', '.join(takes)}; leave it unset (None)"


def _instead(key: str, takes: list[str]) -> str:
    """What may have been meant by a setting that an objective does not take."""
    if key == "f_divergence":
        return f"; objectives with an f-divergence are {', '.join(k for k, v in OBJECTIVES.items() if v.f_divergence)}"
    return did_you_mean(key, takes)


def _taken(rows: list[Objective], given: Mapping[str, Any]) -> list[str]:
    """The settings that a sum of these objectives takes, where these are given."""
    takes = _settings_of(rows, sft_beside=bool(given.get("sft_weight")))
    if "f_divergence" in takes and given.get("f_divergence") == "alpha":
        takes.append("f_alpha")
    return takes


def settings_not_taken(name: str, settings: Mapping[str, Any]) -> set[str]:
    """The names of the settings (fields of config.loss) that are set and that the objective does not take.

    None for a name that `make_loss` refuses.
    """
    given = {key: value for key, value in settings.items() if value is not None and key in RANGES}
    try:
        rows = [_find(term) for _, _, term in _parse(name)]
    except (ValueError, ConfigError):
        return set()
    return set(given) - set(_taken(rows, given))


def make_loss(name: str, *, extra: Mapping[str, float] | None = None, **settings: Any) -> Loss:
    """The loss that a config names.

    Args:
      name: see the module's docstring.
      extra: settings of a user's own function that no objective of ours has.
      **settings: fields of config.loss; None means unset. `sft_weight` adds that much of the SFT loss.
    Raises: ValueError for an unknown name, a setting that no term takes, one out of range, or one that is missing.
    """
    given = {k: v for k, v in settings.items() if v is not None}
    for key in extra or {}:
        if key in RANGES:
            raise ValueError(f"loss.extra.{key} is a setting of loss itself: set loss.{key}")
    given |= dict(extra or {})
    rows = [(weight, wpo, own, _find(own)) for weight, wpo, own in _parse(name)]
    takes = _taken([row for *_, row in rows], given)
    for key, value in given.items():
        for beside, needed in {"f_alpha": ("f_divergence", "alpha"), "sft_normalize": ("sft_weight", "0.2")}.items():
            if key == beside and key not in takes and needed[0] in takes:
                only = f"which only goes with loss.{needed[0]}, e.g. {needed[1]}"
                raise ValueError(f"loss.{key} is {value!r}, {only}; set that, or leave loss.{key} unset (None)")
        if key not in takes and (key, value) != ("f_divergence", "reverse_kl"):
            shown = f"loss.extra.{key}" if key in (extra or {}) else f"loss.{key}"
            raise ValueError(f"{shown} is {value!r}, but {name} {_only(takes)}{_instead(key, takes)}")
        _check_range(key, value, RANGES.get(key, _FINITE))
    if given.get("sft_weight"):
        rows.append((given["sft_weight"], False, "sft", OBJECTIVES["sft"]))
    if given.get("f_divergence") == "alpha" and "f_alpha" not in given:
        raise ValueError(f"loss.f_alpha is not set; the alpha divergence needs it (recipe: {RECIPES['f_alpha']})")

    terms = []
    for weight, wpo, own, row in rows:
        keys = _keywords(row.function)
        if row.reference == "moving":
            keys |= dict.fromkeys(_MOVING, inspect.Parameter.empty)
        full = {k: given.get(k, default) for k, default in keys.items()}
        for key, value in full.items():
            if value is inspect.Parameter.empty:
                recipe = f" (recipe: {RECIPES[key]})" if key in RECIPES else ""
                raise ValueError(f"loss.{key} is not set; {own} needs it{recipe}")
            if key in row.ranges:
                _check_range(key, value, row.ranges[key])
        moving = (float(full.pop("alpha")), int(full.pop("tau"))) if row.reference == "moving" else None
        terms.append(Term(own, weight, wpo, row, full, moving))
    f_divergence = given.get("f_divergence", "reverse_kl")
    _check_together(name, terms)
    scale = next((t.settings["beta"] for t in terms if "beta" in t.settings), given.get("orpo_lambda", 1.0))
    files = [file_digest(own) for _, _, own, _ in rows if own not in OBJECTIVES]
    return Loss(name, tuple(terms), float(scale), f_divergence, float(given.get("f_alpha", 1.0)), ",".join(files))
