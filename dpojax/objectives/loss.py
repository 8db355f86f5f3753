"""A name with settings -> Loss: what training minimises, a pure function of two models' log-probs.

A name is a row of `table.OBJECTIVES`, a user's own function (module:function or file.py:function),
or a weighted sum of both, `0.8*sigmoid+0.2*bco_pair+1*sft`; a factor `wpo` weights a term's pairs
by their probability under the policy (Zhou et al. 2024, arXiv:2406.11827). `mpo` and `wpo` alone
are the sums that their papers use. `dpo` is another name of `sigmoid`, which is TRL's.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpojax.errors import ConfigError
from dpojax.objectives.f_divergences import F_DIVERGENCES
from dpojax.objectives.pairs import PairInfo, PairLogps, Pairs, ResponseLogps, known
from dpojax.objectives.preference import sft_loss
from dpojax.objectives.settings import (
    FINITE,
    MOVING_SETTINGS,
    RANGES,
    RECIPES,
    Summand,
    canonical_name,
    check_range,
    find_objective,
    instead,
    keywords,
    only_takes,
    parse_name,
    taken,
)
from dpojax.objectives.table import OBJECTIVES, Objective
from dpojax.untrusted.user_function import file_digest


class LossOutput(NamedTuple):
    """Per-pair results. All but the loss are for logging and carry no gradient."""

    loss: Float[Array, " B"]
    # beta log pi(y_w|x)/ref(y_w|x); beta log pi(y_w|x) without reference, of simpo a token's
    chosen_rewards: Float[Array, " B"]
    rejected_rewards: Float[Array, " B"]
    margin: Float[Array, " B"]  # what the objective trains upwards


class Moving(NamedTuple):
    """A moving reference: every tau steps ref <- alpha pi + (1 - alpha) ref."""

    alpha: float
    tau: int


class Term(NamedTuple):
    """One summand of a loss."""

    name: str
    weight: float
    wpo: bool
    objective: Objective
    settings: dict[str, Any]  # the function's keyword arguments
    moving: Moving | None  # None: the reference is fixed


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """(policy, ref, info=None) -> LossOutput, and what it needs. Made by `make_loss`.

    >>> loss = dpojax.make_loss("simpo", beta=2.0, gamma=1.0)
    >>> loss.uses_reference, loss.coupled
    (False, False)
    >>> policy = dpojax.pair_logps([-3.0], [-5.0], [6], [10])
    >>> round(float(loss(policy, None).loss[0]), 4)  # -log s(2 (-3/6 + 5/10) - 1)
    1.3133
    """

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
    def moving(self) -> Moving | None:
        """How the reference moves; None: it is fixed."""
        return next((t.moving for t in self.terms if t.moving), None)

    def __call__(
        self, policy: PairLogps, ref: PairLogps | None, info: PairInfo | None = None
    ) -> LossOutput:
        """The loss of B pairs, weighted by their weights, and what is logged of them.

        Args:
          policy: log-probs of both responses under the policy. [B] each, nats.
          ref: under the reference, or None where there is none.
          info: what else is known of the pairs; None: nothing, and no padding.
        """
        if info is None:
            info = PairInfo()
        ref = jax.lax.stop_gradient(ref)  # no gradient flows into the reference
        pairs = self._pairs(policy, ref, info)
        first, *more = [t.weight * self._term(t, pairs) for t in self.terms]
        value = sum(more, first)
        if info.weight is not None:
            value = value * info.weight
        main = self.main
        margin = main.objective.margin(jax.lax.stop_gradient(pairs), main.settings)
        a, b = jax.lax.stop_gradient(_log_ratios(policy, ref))
        if main.objective.per_token:
            len_w, len_l = pairs.lengths
            a = a / len_w
            b = b / len_l
        return LossOutput(
            loss=value,
            chosen_rewards=self.reward_scale * a,
            rejected_rewards=self.reward_scale * b,
            margin=margin,
        )

    def _pairs(self, policy: PairLogps, ref: PairLogps | None, info: PairInfo) -> Pairs:
        a, b = _log_ratios(policy, ref)
        transform = F_DIVERGENCES[self.f_divergence]
        a = transform(a, self.f_alpha)
        b = transform(b, self.f_alpha)
        return Pairs(a=a, b=b, policy=policy, ref=ref, info=info)

    def _term(self, term: Term, x: Pairs) -> Array:
        objective = term.objective
        p = x.info.soft_label
        value = objective.function(x, **term.settings)
        # A soft label is the share of the pair that was labelled in this order. Where the step's
        # pairs are coupled, or the label means something else, there is no such share.
        if p is not None and objective.data == "pairs" and not objective.coupled:
            value = p * value + (1 - p) * objective.function(
                _other_order(x, p < 1), **term.settings
            )
        if term.wpo:
            weight = known(x.policy.chosen.weight) * known(x.policy.rejected.weight)
            value = value * jax.lax.stop_gradient(weight)
        return value

    def at_reference(self, policy: PairLogps, info: PairInfo) -> np.ndarray | None:
        """The per-pair loss in closed form where policy == reference, in float64.

        None if a term has no closed form.

        Args:
          policy, info: numpy arrays, flat, without padding. Weights and soft labels are left out.
        """
        zero = np.zeros(np.shape(policy.chosen.logps))
        # numpy arrays throughout
        pairs: Any = Pairs(a=zero, b=zero, policy=policy, ref=policy, info=info)
        total = zero
        for t in self.terms:
            if t.objective.at_reference is None:
                return None
            value = t.objective.at_reference(pairs, t.settings)
            if t.wpo:
                chosen = np.asarray(policy.chosen.weight)
                rejected = np.asarray(policy.rejected.weight)
                value = value * chosen * rejected
            total = total + t.weight * value
        return total


def _log_ratios(policy: PairLogps, ref: PairLogps | None) -> tuple[Array, Array]:
    """a and b of `Pairs`, before an f-divergence: log pi / ref, or log pi without reference."""
    if ref is None:
        return policy.chosen.logps, policy.rejected.logps
    return policy.chosen.logps - ref.chosen.logps, policy.rejected.logps - ref.rejected.logps


def _other_order(x: Pairs, where: Array) -> Pairs:
    """The pairs with their responses exchanged where `where` holds.

    Elsewhere they stay as they are: an exponential of the order that has no share might overflow,
    and its gradient would be nan.
    """

    def exchanged(new, old):
        return jax.tree.map(functools.partial(jnp.where, where), new, old)

    info = x.info
    if info.margin is not None:
        # an offset is that of the pair, in both orders
        info = info._replace(margin=abs(info.margin))
    ref = None
    if x.ref is not None:
        ref = exchanged(x.ref.swapped(), x.ref)
    return Pairs(
        a=exchanged(x.b, x.a),
        b=exchanged(x.a, x.b),
        policy=exchanged(x.policy.swapped(), x.policy),
        ref=ref,
        info=info,
    )


def _check_together(name: str, terms: list[Term]) -> None:
    """Raises ValueError for terms that cannot be summed."""
    if len({t.objective.data for t in terms}) > 1 or (
        terms[0].objective.data == "unpaired" and any(t.wpo for t in terms)
    ):
        raise ValueError(
            f"loss.name is {name!r}: unpaired objectives stand alone, without wpo and without an"
            " SFT term"
        )
    moving = {t.moving for t in terms if t.moving}
    others = [t.name for t in terms if t.objective.reference == "live"]
    if moving and others:
        raise ValueError(
            f"loss.name is {name!r}: {others[0]} needs a fixed reference; a tr_ objective moves it"
        )
    for key in ("alpha", "tau"):  # every paper means something else by these
        takers = {
            t.name for t in terms if key in t.settings or (t.moving and key in MOVING_SETTINGS)
        }
        if len(takers) > 1:
            raise ValueError(
                f"loss.name is {name!r}: {' and '.join(sorted(takers))} mean different things by"
                f" loss.{key}"
            )


def make_loss(name: str, *, extra: Mapping[str, float] | None = None, **settings: Any) -> Loss:
    """The loss that a config names.

    Args:
      name: see the module's docstring.
      extra: settings of a user's own function that no objective of ours has.
      **settings: fields of config.loss; None means unset. `sft_weight` adds that much of the SFT
      loss.
    Raises: ValueError for an unknown name, a setting that no term takes, one out of range, or one
      that is missing.

    >>> loss = dpojax.make_loss("dpo", beta=0.1)
    >>> policy = dpojax.pair_logps([-3.0, -4.0], [-5.0, -2.0], [7, 9], [8, 4])
    >>> ref = dpojax.pair_logps([-3.5, -4.0], [-5.0, -2.0], [7, 9], [8, 4])
    >>> [round(value, 4) for value in loss(policy, ref).loss.tolist()]
    [0.6685, 0.6931]
    """
    name = canonical_name(name)
    given = {k: v for k, v in settings.items() if v is not None}
    extra = dict(extra or {})
    for key in extra:
        if key in RANGES:
            raise ValueError(f"loss.extra.{key} is a setting of loss itself: set loss.{key}")
    given |= extra
    summands = parse_name(name)
    rows = {summand.objective: find_objective(summand.objective) for summand in summands}
    _check_given(name, given, taken([rows[s.objective] for s in summands], given), extra)
    files = [file_digest(s.objective) for s in summands if s.objective not in OBJECTIVES]
    if given.get("sft_weight"):
        summands.append(Summand(given["sft_weight"], False, "sft"))
        rows["sft"] = OBJECTIVES["sft"]
    terms = [_term(summand, rows[summand.objective], given) for summand in summands]
    _check_together(name, terms)
    with_beta = [term for term in terms if "beta" in term.settings]
    reward_scale = given.get("orpo_lambda", 1.0)
    if with_beta:
        reward_scale = with_beta[0].settings["beta"]
    return Loss(
        name=name,
        terms=tuple(terms),
        reward_scale=float(reward_scale),
        f_divergence=given.get("f_divergence", "reverse_kl"),
        f_alpha=float(given.get("f_alpha", 1.0)),
        source=",".join(files),
    )


# Settings that only go with another one: name -> (the other one, an example of it).
_BESIDE = {"f_alpha": ("f_divergence", "alpha"), "sft_normalize": ("sft_weight", "0.2")}


def _check_given(
    name: str, given: Mapping[str, Any], takes: list[str], extra: Mapping[str, float]
) -> None:
    """Raises ValueError for a setting that no term takes, or that is out of range."""
    for key, value in given.items():
        if key in _BESIDE and key not in takes and _BESIDE[key][0] in takes:
            needed, example = _BESIDE[key]
            only = f"which only goes with loss.{needed}, e.g. {example}"
            raise ValueError(
                f"loss.{key} is {value!r}, {only}; set that, or leave loss.{key} unset (None)"
            )
        if key not in takes and (key, value) != ("f_divergence", "reverse_kl"):
            field = f"loss.{key}"
            if key in extra:
                field = f"loss.extra.{key}"
            raise ValueError(
                f"{field} is {value!r}, but {name} {only_takes(takes)}{instead(key, takes)}"
            )
        check_range(key, value, RANGES.get(key, FINITE))
    if given.get("f_divergence") == "alpha" and "f_alpha" not in given:
        raise ValueError(
            f"loss.f_alpha is not set; the alpha divergence needs it (recipe: {RECIPES['f_alpha']})"
        )


def _term(summand: Summand, row: Objective, given: Mapping[str, Any]) -> Term:
    """The summand with its settings, from those that are given and the function's defaults.

    Raises: ValueError for a setting that is missing, or out of the objective's range.
    """
    defaults = keywords(row.function)
    if row.reference == "moving":
        defaults |= dict.fromkeys(MOVING_SETTINGS, inspect.Parameter.empty)
    settings = {key: given.get(key, default) for key, default in defaults.items()}
    for key, value in settings.items():
        if value is inspect.Parameter.empty:
            recipe = ""
            if key in RECIPES:
                recipe = f" (recipe: {RECIPES[key]})"
            raise ValueError(f"loss.{key} is not set; {summand.objective} needs it{recipe}")
        if key in row.ranges:
            check_range(key, value, row.ranges[key])
    moving = None
    if row.reference == "moving":
        moving = Moving(alpha=float(settings.pop("alpha")), tau=int(settings.pop("tau")))
    return Term(summand.objective, summand.weight, summand.wpo, row, settings, moving)


def own_loss(function: Callable[[PairLogps, PairLogps | None, PairInfo], Array]) -> Loss:
    """A function of Python as a loss, without a name: for `dpojax.make_step`.

    It is given all pairs of a step at once and may couple them. What it returns is multiplied by
    the pairs' weights, so that `info` has none; `info.valid` is False at padding, whose loss does
    not count. Rewards are logged without beta: log pi(y|x) / ref(y|x), nats.

    Args:
      function: (policy, ref, info) -> the loss of each pair [B].
    Raises: ConfigError, when it is called, for a result of another shape.
    """

    def objective(x: Pairs) -> Array:
        # padding has no tokens, and a mean over them would be nan, in the gradient too
        policy = _with_tokens(x.policy)
        ref = None if x.ref is None else _with_tokens(x.ref)
        losses = function(policy, ref, x.info._replace(weight=None))
        wanted = policy.chosen.logps.shape
        shape = getattr(losses, "shape", None)
        if shape != wanted:
            raise ConfigError(
                f"the loss returned {type(losses).__name__} of shape {shape}; it must return a loss"
                f" for each pair, {wanted}, e.g. make_loss(...)(policy, ref, info).loss"
            )
        return losses

    name = getattr(function, "__name__", "own")
    term = Term(name, 1.0, False, Objective(objective, coupled=True), {}, None)
    return Loss(name, (term,), reward_scale=1.0, f_divergence="reverse_kl", f_alpha=1.0, source="")


def _with_tokens(pairs: PairLogps) -> PairLogps:
    """The pairs, every response having a token at least."""

    def at_least_one(response: ResponseLogps) -> ResponseLogps:
        return response._replace(lengths=jnp.maximum(response.lengths, 1))

    return PairLogps(at_least_one(pairs.chosen), at_least_one(pairs.rejected))
