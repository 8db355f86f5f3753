"""Every objective with settings, where it must end, and how it is measured: shared by the tests and
by the printed table.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import tiny

from dpojax.algorithms.preference import preference_gradients
from dpojax.data.packing import PackedBatch
from dpojax.data.token_groups import TokenGroup, TokenPair
from dpojax.objectives import exact
from dpojax.objectives.loss import Loss, make_loss
from dpojax.objectives.table import OBJECTIVES
from dpojax.runtime import sharding
from dpojax.runtime.mesh import MESH_AXES
from dpojax.training.logps import TokenScores
from dpojax.training.pairs import pairs_of
from dpojax.training.scores import StepScores

FROZEN = json.loads(
    (pathlib.Path(__file__).parents[1] / "oracles/frozen/trl_objectives.json").read_text()
)
PAIRS = 8
P = 0.75  # the chosen side wins with this probability
LENGTHS = (7, 3)  # of the two responses of the optima
MARGIN = 2.0  # of their scores


class Case(NamedTuple):
    """An objective with its settings, and its exact optimum: a function of the two log-ratios that
    must be 0, or why none.
    """

    name: str
    settings: dict[str, Any]
    optimum: Callable[[Any, np.ndarray], Any] | str
    how: str = "free"  # which minimiser: free, simplex or stationary
    p: float = P  # share that the chosen side wins
    soft: bool = False
    lengths: tuple[int, int] = LENGTHS


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def _difference(
    target: float | Callable[[dict], float],
    *,
    scaled: Callable[[dict, np.ndarray], float] | None = None,
):
    """The optimum beta h = target."""

    def off(settings: dict, r: np.ndarray) -> float:
        h = settings["beta"] * (r[0] - r[1]) if scaled is None else scaled(settings, r)
        return h - (target(settings) if callable(target) else target)

    return off


def _per_token(s, r):
    return s["beta"] * (r[0] / LENGTHS[0] - r[1] / LENGTHS[1])


def _ld(s, r):
    """Log-probs lie evenly on the tokens: the tail of the longer response counts alpha times."""
    head = min(LENGTHS) / LENGTHS[0]
    return s["beta"] * (r[0] * (head + s["alpha"] * (1 - head)) - r[1])


def _f_prime(settings: dict, r: np.ndarray) -> np.ndarray:
    c = settings.get("f_alpha", 0.5)
    return {
        "forward_kl": lambda: 1 - np.exp(-r),
        "js": lambda: np.log(2 / (1 + np.exp(-r))),
        "alpha": lambda: (np.exp((c - 1) * r) - 1) / (c - 1),
    }[settings["f_divergence"]]()


def _under_f(base: Callable[[dict, np.ndarray], float]):
    """The optimum of a difference loss holds for f'(u) in place of the log-ratios."""
    return lambda s, r: base(s, _f_prime(s, r))


def _simpo_gap(s: dict) -> float:
    q, g = P / (1 - P), math.exp(-2 * s["gamma"])
    return math.log(((q - 1) + math.sqrt((q - 1) ** 2 + 4 * q * g)) / (2 * math.exp(-s["gamma"])))


def _odpo_gap(s: dict) -> float:
    return _simpo_gap({"gamma": s["alpha"] * math.log(MARGIN)})


def _orpo(s: dict, r: np.ndarray) -> float:
    """One token, two responses, q = pi(y_1) = s(g): (q - p) + 2 lambda (s(2 g) - p) = 0."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def slope(g):
        return sigmoid(g) - P + 2 * s["orpo_lambda"] * (sigmoid(2 * g) - P)

    return float(r[0] - r[1]) - scipy.optimize.brentq(slope, -20, 20)


HALF = math.log(0.5)  # log ref of both responses
SIGMOID = _difference(logit(P))
IPO_MEAN = _difference(lambda s: (2 * P - 1) / 2, scaled=_per_token)
NONE_FINITE = "none is finite"
CASES: dict[str, Case] = {
    "sigmoid": Case("sigmoid", {"beta": 0.1}, SIGMOID),
    "sigmoid beta .5": Case("sigmoid", {"beta": 0.5}, SIGMOID),
    "sigmoid, e .1 (cDPO)": Case(
        "sigmoid",
        {"beta": 0.1, "label_smoothing": 0.1},
        _difference(logit(0.9 * P + 0.1 * (1 - P))),
    ),
    "sigmoid, e .1, p 1": Case(
        "sigmoid", {"beta": 0.1, "label_smoothing": 0.1}, _difference(logit(0.9)), p=1.0
    ),
    "robust": Case(
        "robust", {"beta": 0.1, "label_smoothing": 0.1}, SIGMOID, p=0.9 * P + 0.1 * (1 - P)
    ),
    "hinge": Case("hinge", {"beta": 0.05}, _difference(1.0)),
    "ipo": Case("ipo", {"beta": 0.1}, IPO_MEAN),
    "ipo, summed": Case("ipo", {"beta": 0.1, "average": False}, _difference((2 * P - 1) / 2)),
    "sigmoid_norm": Case("sigmoid_norm", {"beta": 5.0}, _difference(logit(P), scaled=_per_token)),
    "exo_pair": Case(
        "exo_pair",
        {"beta": 0.1, "label_smoothing": 1e-3},
        _difference((2 * P - 1) * logit(1 - 1e-3)),
    ),
    "nca_pair": Case(
        "nca_pair", {"beta": 0.01}, lambda s, r: s["beta"] * r - np.log([2 * P, 2 - 2 * P])
    ),
    "bco_pair": Case(
        "bco_pair", {"beta": 0.01}, lambda s, r: s["beta"] * r - np.array([1, -1]) * logit(P)
    ),
    "bco_pair_shift": Case(
        "bco_pair_shift",
        {"beta": 0.01},
        lambda s, r: s["beta"] * r - 0.3 - np.array([1, -1]) * logit(P),
    ),
    "sppo_hard": Case(
        "sppo_hard", {"beta": 0.001}, lambda s, r: s["beta"] * r - np.array([P - 0.5, 0.5 - P])
    ),
    "aot": Case("aot", {"beta": 0.01}, NONE_FINITE),
    "aot smoothed": Case(
        "aot", {"beta": 0.1, "label_smoothing": 0.2}, _difference(logit(0.8)), p=1.0
    ),
    "aot_unpaired": Case(
        "aot_unpaired", {"beta": 0.1, "label_smoothing": 0.1}, _difference(logit(0.9)), p=1.0
    ),
    "apo_zero": Case("apo_zero", {"beta": 0.1}, NONE_FINITE),
    "apo_down": Case("apo_down", {"beta": 0.1}, NONE_FINITE),
    "discopop": Case("discopop", {"beta": 0.05, "tau": 0.05}, "local minima"),
    "dpop": Case("dpop", {"beta": 0.3, "dpop_lambda": 50.0}, SIGMOID),
    "r_dpo": Case(
        "r_dpo",
        {"beta": 0.1, "alpha": 0.1},
        _difference(lambda s: logit(P) - s["alpha"] * (LENGTHS[0] - LENGTHS[1])),
    ),
    "odpo": Case("odpo", {"beta": 0.1, "alpha": 1.0}, _difference(_odpo_gap)),
    "ld_dpo": Case("ld_dpo", {"beta": 0.1, "alpha": 0.5}, _difference(logit(P), scaled=_ld)),
    "tdpo1": Case("tdpo1", {"beta": 0.5}, SIGMOID, "simplex"),
    "tdpo2": Case("tdpo2", {"beta": 0.5, "alpha": 0.5}, "no closed form"),
    "wpo": Case("wpo", {"beta": 0.5}, SIGMOID, "stationary"),
    "wpo*ipo": Case(
        "wpo*ipo", {"beta": 0.5}, _difference((2 * P - 1) / 2), "stationary", lengths=(1, 1)
    ),
    "soft labels": Case("sigmoid", {"beta": 0.1}, SIGMOID, soft=True),
    "simpo": Case(
        "simpo",
        {"beta": 2.5, "gamma": 1.25},
        _difference(_simpo_gap, scaled=lambda s, r: _per_token(s, r + HALF)),
    ),
    "orpo": Case("orpo", {"orpo_lambda": 0.1}, _orpo, "simplex", lengths=(1, 1)),
    "cpo": Case("cpo", {"beta": 1.0, "alpha": 1.0}, SIGMOID, "simplex", lengths=(1, 1)),
    "sft": Case("sft", {}, lambda s, r: r[0] - r[1] - logit(P), "simplex", lengths=(1, 1)),
    "sigmoid + .2 sft": Case(
        "sigmoid", {"beta": 1.0, "sft_weight": 0.2}, SIGMOID, "simplex", lengths=(1, 1)
    ),
    "sigmoid + .2 sft (RPO)": Case(
        "sigmoid",
        {"beta": 1.0, "sft_weight": 0.2, "sft_normalize": "pair"},
        SIGMOID,
        "simplex",
        lengths=(1, 1),
    ),
    "mpo": Case("mpo", {"beta": 0.1}, "no closed form"),
    "kto": Case("kto", {"beta": 0.1}, NONE_FINITE),
    "kto weighted": Case(
        "kto", {"beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.5}, NONE_FINITE
    ),
    "apo_zero_unpaired": Case("apo_zero_unpaired", {"beta": 0.1}, NONE_FINITE),
    # between two moves
    "tr_dpo": Case("tr_dpo", {"beta": 0.1, "alpha": 0.6, "tau": 512.0}, SIGMOID),
    "tr_ipo": Case("tr_ipo", {"beta": 0.1, "alpha": 0.6, "tau": 512.0}, IPO_MEAN),
    "tr_kto": Case("tr_kto", {"beta": 0.1, "alpha": 0.6, "tau": 512.0}, NONE_FINITE),
}
for _f, _more in {"forward_kl": {}, "js": {}, "alpha": {"f_alpha": 0.5}}.items():
    for _base in (
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "robust",
        "discopop",
        "sigmoid_norm",
        "r_dpo",
        "odpo",
    ):
        _case = CASES[_base]
        CASES[f"{_base}, {_f}"] = _case._replace(
            settings=_case.settings | {"f_divergence": _f, **_more},
            optimum=_under_f(_case.optimum) if callable(_case.optimum) else _case.optimum,
        )

for _label, _frozen in FROZEN["losses"].items():
    assert (CASES[_label].name, CASES[_label].settings) == (
        _frozen["name"],
        _frozen["settings"],
    ), _label
assert {c.name for c in CASES.values()} >= set(OBJECTIVES), "an objective has no case"


# --- against TRL ----------------------------------------------------------------------------------


def _batch_of(
    lengths: list[int], pairs: Callable[[int], tuple[TokenPair, ...]], per_group: int
) -> PackedBatch:
    """A packed step whose responses have these lengths, in this
    order; one group's after another's.
    """
    groups = []
    for g in range(len(lengths) // per_group):
        own = lengths[g::PAIRS][:per_group]  # response g of the first half, then of the second
        groups.append(
            TokenGroup(
                np.array([1], np.int32), tuple(np.full(n, 2, np.int32) for n in own), pairs(g), g
            )
        )
    return tiny.pack(groups, row_tokens=64, shard_rows=2)[0]


def _fill(batch: PackedBatch, rows: list[list[float]]) -> np.ndarray:
    """Token values [M, A, T] of a batch from `_batch_of`, given for every response."""
    out = np.zeros(batch.weight.shape)
    for m, s, t in _places(batch):
        out[m, 0, t] = rows[s]
    return out


def _places(batch: PackedBatch):
    """(micro-batch, response of the list, tokens) of every response."""
    for m in range(batch.tokens.shape[0]):
        for number in np.unique(batch.response[m, 0][batch.weight[m, 0] > 0]):
            here = np.flatnonzero((batch.response[m, 0] == number) & (batch.weight[m, 0] > 0))
            group = int(batch.response_row[m, 0, number])
            first = min(
                s
                for s in range(batch.response_row.shape[2])
                if batch.response_row[m, 0, s] == group
            )
            yield m, group + PAIRS * int(number - first), here


def trl_error(label: str) -> tuple[float, float] | None:
    """(error of the value, of the gradient) against TRL's frozen numbers, relative; None where TRL
    has no such loss.

    The way is the trainer's own, from token log-probs on, in float64.
    """
    frozen, inputs = FROZEN["losses"].get(label), FROZEN["inputs"]
    if frozen is None:
        return None
    with jax.enable_x64(True):
        loss = make_loss(frozen["name"], **frozen["settings"])
        labels = inputs["labels"]

        def pair(g):
            return (TokenPair(0, 1, 1.0, float(labels[g]) if loss.unpaired else 1.0, 0.0),)

        batch = _batch_of([len(r) for r in inputs["policy"]], pair, 2)

        def fill(key):
            return jnp.asarray(_fill(batch, inputs[key]))

        squares = fill("log_sum_sq") if loss.needs("wpo") else None
        ref = fill("ref") if loss.uses_reference else None
        axes = jax.tree.map(lambda x: 0 if np.ndim(x) else None, batch)

        def mean(tokens):
            zero = jnp.zeros_like(tokens)
            scores = StepScores(
                TokenScores(tokens, None, None, squares, zero, zero.astype(bool), zero), ref, None
            )
            policy, fixed, info = jax.vmap(functools.partial(pairs_of, loss), in_axes=(axes, 0))(
                batch, scores
            )
            length = info.mean_chosen_length[0]
            policy, fixed, info = jax.tree.map(lambda x: x.reshape(-1), (policy, fixed, info))
            out = loss(policy, fixed, info._replace(mean_chosen_length=length))
            return jnp.sum(jnp.where(info.valid, out.loss, 0.0)) / batch.num_pairs

        value, gradient = jax.value_and_grad(mean)(fill("policy"))
        worst = 0.0
        largest = max(abs(v) for row in frozen["gradient"] for v in row)
        for m, s, t in _places(batch):
            theirs = (
                np.array(frozen["gradient"][s]) if s < len(frozen["gradient"]) else np.zeros(len(t))
            )
            worst = max(worst, float(np.abs(np.asarray(gradient)[m, 0, t] - theirs).max()))
        return abs(float(value) - frozen["loss"]) / abs(frozen["loss"]), worst / largest


# --- to the optimum -------------------------------------------------------------------------------


def optimum_distance(case: Case) -> float | None:
    """How far the minimiser of the population loss of one pair is from the exact optimum, in units
    of the reward.

    None where there is none that could be stated.
    """
    if not callable(case.optimum):
        return None
    loss = make_loss(case.name, **case.settings)
    ref = np.array([HALF, HALF])
    preferences = np.array([[0.5, case.p], [1 - case.p, 0.5]])
    margins = np.array([[0.0, MARGIN], [-MARGIN, 0.0]])
    more = dict(lengths=np.array(case.lengths), soft=case.soft, shift=0.3)
    if loss.needs("scores"):
        more["margins"] = margins
    minimise = {
        "free": exact.minimise_free,
        "simplex": exact.minimise_simplex,
        "stationary": exact.stationary_simplex,
    }
    found = minimise[case.how](loss, ref, preferences, **more)
    ratios = found if case.how == "free" else found - ref
    return float(np.abs(case.optimum(case.settings, ratios)).max())


# --- one device and eight -------------------------------------------------------------------------

SMALL = dataclasses.replace(tiny.CONFIG, num_layers=1)
MODEL = tiny.model(SMALL, full=True)


@functools.cache
def _params(seed: int):
    return tiny.params(MODEL, seed)


def _groups(loss: Loss, rng: np.random.Generator) -> list[TokenGroup]:
    """Twelve random groups as the objective takes them; unpaired ones hold one labelled and one
    mismatched response.
    """
    made = []
    for g in tiny.groups(rng, 12, longest=16):
        margin, label = (
            float(rng.uniform(0.5, 3)),
            float(rng.integers(0, 2)) if loss.unpaired else 1.0,
        )
        made.append(
            g._replace(pairs=(TokenPair(0, 1, float(rng.uniform(0.5, 1.5)), label, margin),))
        )
    return made


def step_gradients(
    loss: Loss, *, devices: int, shard_rows: int, two_passes: bool | None = None, groups=None
):
    """(mean loss, its gradient as one vector) of a step on so many devices, cut into micro-batches
    of so many rows.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1, 1, 1), MESH_AXES)
    made = _groups(loss, np.random.default_rng(5)) if groups is None else groups
    batch, _ = tiny.pack(made, row_tokens=64, shard_rows=shard_rows, num_shards=devices)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params, ref = (jax.device_put(_params(seed), whole) for seed in (0, 1))
    state = tiny.policy_state(_no_optimizer(), params)
    state = state._replace(memory={"reward_mean": jnp.asarray(0.2)})
    run = preference_gradients(MODEL, loss, chunk=32, two_passes=two_passes)
    step = jax.jit(
        lambda s, r, b: run(s, tiny.frozen(r), b, jnp.asarray(True), lambda x: x),
        out_shardings=whole,
    )
    fixed = ref if loss.uses_reference else None
    found = step(jax.device_put(state, whole), fixed, sharding.put_batch(batch, mesh))
    return (
        float(found.loss),
        np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(found.grads)]),
        found,
    )


def _no_optimizer():
    import optax

    return optax.identity()


def split_differences(loss: Loss) -> tuple[float, float]:
    """(1 device against 8, one micro-batch against many): the larger of the errors of loss and
    gradient, relative.
    """
    value, gradient, _ = step_gradients(loss, devices=1, shard_rows=12)
    found = []
    for devices, rows in ((8, 1), (1, 1)):
        other, g, _ = step_gradients(loss, devices=devices, shard_rows=rows)
        found.append(
            max(
                abs(other - value) / abs(value),
                float(np.linalg.norm(g - gradient) / np.linalg.norm(gradient)),
            )
        )
    return found[0], found[1]
