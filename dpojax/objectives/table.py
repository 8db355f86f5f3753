"""Every objective by name: its function and what it needs.

And its value where policy and reference are the same, in closed form.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpojax.objectives.pairs import Pairs, known
from dpojax.objectives.preference import (
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    apo_zero_unpaired_loss,
    bco_pair_loss,
    bco_pair_shift_loss,
    cpo_loss,
    desirable,
    discopop_loss,
    dpop_loss,
    exo_pair_loss,
    gap_per_token,
    head_ratios,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_point,
    ld_dpo_loss,
    log_odds,
    nca_pair_loss,
    odpo_loss,
    orpo_loss,
    r_dpo_loss,
    robust_loss,
    sft_loss,
    sigmoid_loss,
    sigmoid_norm_loss,
    simpo_loss,
    sppo_hard_loss,
    tdpo1_loss,
    tdpo2_loss,
)

# --- the table ------------------------------------------------------------------------------------

Settings = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A row of the table below: a loss function and what it needs.

    The function's keyword arguments are the objective's settings.
    """

    function: Callable[..., Float[Array, " B"]]
    # (pairs in numpy, settings) -> its value where policy == reference, [B] or a number; None: not
    # known in closed form
    at_reference: Callable[[Any, Settings], Any] | None = None
    # what it trains upwards; its sign is its accuracy
    margin: Callable[[Pairs, Settings], Array] = lambda x, s: x.h
    per_token: bool = False  # its implicit rewards are those of a token, as TRL logs them
    data: str = "pairs"  # or "unpaired"
    # "none": not used; "live": its full distributions; "moving": ref <- alpha pi + (1 - alpha) ref
    reference: str = "any"
    needs: tuple[str, ...] = ()  # of "head", "kl", "mismatched", "shift", "scores"
    coupled: bool = False  # over the pairs of the whole step
    f_divergence: bool = False  # a function of a and b alone, in which f'(u) may stand for log u
    # name of a setting -> (test, what it must be), where that is more than settings.RANGES asks
    ranges: Mapping[str, tuple[Callable[[Any], bool], str]] = dataclasses.field(
        default_factory=dict
    )


LOG2 = math.log(2)


def _softplus(x):
    return np.logaddexp(0.0, x)


def _gap(x):
    """log pi_w - log pi_l of pairs in numpy, nats."""
    return x.policy.chosen.logps - x.policy.rejected.logps


def _mean_logp(response):
    """A response's log-prob per token in numpy, nats."""
    return response.logps / np.maximum(response.lengths, 1)


def _gap_per_token(x):
    return _mean_logp(x.policy.chosen) - _mean_logp(x.policy.rejected)


def _nll(x, normalize: str):
    if normalize == "token":
        return -x.policy.chosen.logps / x.info.mean_chosen_length
    return -_mean_logp(x.policy.chosen)


def _odds(response):
    p = np.exp(_mean_logp(response))
    return p / (1 - p)


def _orpo_at(x, s: Settings):
    ratio = _odds(x.policy.rejected) / _odds(x.policy.chosen)
    return _nll(x, "pair") + s["orpo_lambda"] * np.log1p(ratio)


def _longer(x):
    """|y_w| - |y_l|, tokens."""
    return x.policy.chosen.lengths - x.policy.rejected.lengths


def _unpaired_at(x, s: Settings):
    return 0.5 * np.where(x.info.soft_label > 0.5, s["desirable_weight"], s["undesirable_weight"])


def _normalised(x: Pairs, s: Settings) -> Array:
    if not s.get("average", True):
        return x.h
    len_w, len_l = x.lengths
    return x.a / len_w - x.b / len_l


def _ld_margin(x: Pairs, s: Settings) -> Array:
    a_head, b_head = head_ratios(x)
    head = a_head - b_head
    return head + s["alpha"] * (x.h - head)


def _tdpo_margin(x: Pairs, s: Settings) -> Array:
    kl_gap = known(x.policy.rejected.kl) - known(x.policy.chosen.kl)
    return x.h - s.get("alpha", 1.0) * kl_gap


def _r_dpo_margin(x: Pairs, s: Settings) -> Array:
    return s["beta"] * x.h + s["alpha"] * _longer(x)


def _sides(point: Callable[[Pairs], Any]) -> Callable[[Pairs, Settings], Array]:
    return lambda x, s: jnp.where(desirable(x), x.a - point(x), point(x) - x.a)


_HALF_OPEN = (lambda v: 0 < v < 0.5, "in (0, 0.5)")

_SHARE = (lambda v: 0 < v <= 1, "in (0, 1]")

_MOVING = {
    "alpha": _SHARE,
    "tau": (lambda v: v >= 1 and float(v).is_integer(), "a whole number of steps, at least 1"),
}


def moving(function: Callable[..., Any], at_reference, **row: Any) -> Objective:
    """The row of TR-DPO's variant of `function` (Gorbatovski et al. 2024, arXiv:2404.09656).

    Every tau steps ref <- alpha pi + (1 - alpha) ref; alpha = 1 replaces it ("hard"). The step does
    that, not the loss.
    """
    return Objective(function, at_reference, reference="moving", ranges=_MOVING, **row)


OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(sigmoid_loss, lambda x, s: LOG2, f_divergence=True),
    "robust": Objective(robust_loss, lambda x, s: LOG2, f_divergence=True),
    "hinge": Objective(hinge_loss, lambda x, s: 1.0, f_divergence=True),
    "ipo": Objective(
        ipo_loss, lambda x, s: 1 / (4 * s["beta"] ** 2), _normalised, f_divergence=True
    ),
    "sigmoid_norm": Objective(sigmoid_norm_loss, lambda x, s: LOG2, _normalised, f_divergence=True),
    "exo_pair": Objective(
        exo_pair_loss,
        lambda x, s: -LOG2 - 0.5 * math.log(s["label_smoothing"] * (1 - s["label_smoothing"])),
        f_divergence=True,
        ranges={"label_smoothing": _HALF_OPEN},
    ),
    "nca_pair": Objective(nca_pair_loss, lambda x, s: 2 * LOG2),
    "bco_pair": Objective(bco_pair_loss, lambda x, s: 2 * LOG2),
    "bco_pair_shift": Objective(
        bco_pair_shift_loss, lambda x, s: 2 * LOG2, needs=("shift",), coupled=True
    ),
    "sppo_hard": Objective(sppo_hard_loss, lambda x, s: 1 / (2 * s["beta"] ** 2)),
    "aot": Objective(aot_loss, lambda x, s: LOG2, coupled=True),
    "aot_unpaired": Objective(aot_unpaired_loss, lambda x, s: LOG2, coupled=True),
    "apo_zero": Objective(apo_zero_loss, lambda x, s: 1.0),
    "apo_down": Objective(apo_down_loss, lambda x, s: 1.0),
    "discopop": Objective(
        discopop_loss, lambda x, s: 0.5 * LOG2 + 0.5, f_divergence=True, ranges={"tau": _SHARE}
    ),
    "dpop": Objective(
        dpop_loss,
        lambda x, s: LOG2,
        lambda x, s: x.h - s["dpop_lambda"] * jax.nn.relu(-x.a),
        f_divergence=True,
    ),
    "r_dpo": Objective(
        r_dpo_loss,
        lambda x, s: _softplus(-s["alpha"] * _longer(x)),
        _r_dpo_margin,
        f_divergence=True,
    ),
    "odpo": Objective(
        odpo_loss,
        lambda x, s: _softplus(s["alpha"] * np.log(x.info.margin)),
        needs=("scores",),
        f_divergence=True,
    ),
    "ld_dpo": Objective(
        ld_dpo_loss, lambda x, s: LOG2, _ld_margin, needs=("head",), ranges={"alpha": _SHARE}
    ),
    "tdpo1": Objective(
        tdpo1_loss, lambda x, s: LOG2, _tdpo_margin, reference="live", needs=("kl",)
    ),
    "tdpo2": Objective(
        tdpo2_loss, lambda x, s: LOG2, _tdpo_margin, reference="live", needs=("kl",)
    ),
    "simpo": Objective(
        simpo_loss,
        lambda x, s: _softplus(s["gamma"] - s["beta"] * _gap_per_token(x)),
        lambda x, s: gap_per_token(x),
        reference="none",
        per_token=True,
    ),
    "orpo": Objective(
        orpo_loss, _orpo_at, lambda x, s: log_odds(x), reference="none", per_token=True
    ),
    "cpo": Objective(
        cpo_loss,
        lambda x, s: _softplus(-s["beta"] * _gap(x)) + s["alpha"] * _nll(x, s["sft_normalize"]),
        lambda x, s: _gap(x),
        reference="none",
    ),
    "sft": Objective(
        sft_loss,
        lambda x, s: _nll(x, s["sft_normalize"]),
        lambda x, s: _gap(x),
        reference="none",
    ),
    "kto": Objective(
        kto_loss,
        _unpaired_at,
        _sides(kto_point),
        data="unpaired",
        needs=("mismatched",),
        coupled=True,
    ),
    "apo_zero_unpaired": Objective(
        apo_zero_unpaired_loss, _unpaired_at, _sides(lambda x: 0.0), data="unpaired"
    ),
    "tr_dpo": moving(sigmoid_loss, lambda x, s: LOG2, f_divergence=True),
    "tr_ipo": moving(
        ipo_loss, lambda x, s: 1 / (4 * s["beta"] ** 2), margin=_normalised, f_divergence=True
    ),
    "tr_kto": moving(
        kto_loss,
        _unpaired_at,
        margin=_sides(kto_point),
        data="unpaired",
        needs=("mismatched",),
        coupled=True,
    ),
}
