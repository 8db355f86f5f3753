"""What training must reach: the paper's mathematics on response spaces that can be enumerated.

Everything is float64. The last axis of every array runs over the responses y of a prompt; the axes
before it are prompts.
Log-probs in nats.
Source: Rafailov et al. 2023 (arXiv:2305.18290), sections 3 and 4.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array
from scipy.special import expit, log_softmax, logsumexp

from dpojax.objectives.loss import Loss
from dpojax.objectives.pairs import PairInfo, PairLogps, ResponseLogps

Values = np.ndarray


def optimal_logps(ref_logps: Values, rewards: Values, beta: float) -> Values:
    """log pi*(y|x) = log ref(y|x) + r(x, y) / beta - log Z(x), Eq. 4. [..., Y]."""
    return log_softmax(
        np.asarray(ref_logps, np.float64) + np.asarray(rewards, np.float64) / beta, axis=-1
    )


def log_partition(ref_logps: Values, rewards: Values, beta: float) -> Values:
    """log Z(x) = log sum_y ref(y|x) exp(r(x, y) / beta). [...].

    beta log Z is the value of the optimum.
    """
    return np.asarray(
        logsumexp(
            np.asarray(ref_logps, np.float64) + np.asarray(rewards, np.float64) / beta, axis=-1
        )
    )


def implicit_rewards(policy_logps: Values, ref_logps: Values, beta: float) -> Values:
    """beta log pi(y|x) / ref(y|x), Eq. 5. [..., Y].

    Up to a function of x it is the reward that the policy is the optimum of.
    """
    return beta * (np.asarray(policy_logps, np.float64) - np.asarray(ref_logps, np.float64))


def bradley_terry(rewards: Values) -> Values:
    """p(y_i beats y_j) = s(r_i - r_j), Eq. 1. [..., Y] -> [..., Y, Y]."""
    r = np.asarray(rewards, np.float64)
    return expit(r[..., :, None] - r[..., None, :])


def kl(policy_logps: Values, ref_logps: Values) -> Values:
    """KL(pi || ref), nats. [...]."""
    p = np.asarray(policy_logps, np.float64)
    q = np.asarray(ref_logps, np.float64)
    return np.sum(np.exp(p) * (p - q), axis=-1)


def regularised_value(
    policy_logps: Values, ref_logps: Values, rewards: Values, beta: float
) -> Values:
    """E_pi[r] - beta KL(pi || ref), what RLHF maximises (Eq. 3). [...]."""
    p = np.exp(np.asarray(policy_logps, np.float64))
    return np.sum(p * rewards, axis=-1) - beta * kl(policy_logps, ref_logps)


# --- population losses ----------------------------------------------------------------------------


class _Population(NamedTuple):
    """What is compared, and how often; the arguments of `make_population_loss` as arrays."""

    ref_logps: Array  # [..., Y]
    preferences: Array  # [..., Y, Y], or [..., Y] of unpaired objectives
    lengths: Array  # [..., Y]
    margins: Array | None  # [..., Y, Y]
    shift: Array


def _pair_terms(
    loss: Loss, logps: Array, population: _Population, *, soft: bool
) -> tuple[PairLogps, PairLogps, PairInfo]:
    """The pairs of all prompts as a loss takes them: (policy, ref, info)."""
    ref_logps = population.ref_logps
    y = logps.shape[-1]
    if soft:
        i, j = np.triu_indices(y, 1)
    else:
        i, j = np.nonzero(~np.eye(y, dtype=bool))

    def take(v, k):
        if v is None:
            return None
        return v[..., k].reshape(-1)

    shares = population.preferences[..., i, j].reshape(-1)
    shorter = jnp.minimum(take(population.lengths, i), take(population.lengths, j))

    def pairs(v, *, kl=None, weight=None) -> PairLogps:
        def response(k) -> ResponseLogps:
            values = ResponseLogps(
                logps=take(v, k),
                lengths=take(population.lengths, k),
                kl=take(kl, k),
                weight=take(weight, k),
            )
            if not loss.needs("head"):
                return values
            return values._replace(head=values.logps * shorter / values.lengths)

        return PairLogps(chosen=response(i), rejected=response(j))

    kl_of_prompt = None
    if loss.needs("kl"):  # of one token: every response of a prompt has the same
        kl_of_prompt = jnp.sum(
            jnp.exp(ref_logps) * (ref_logps - logps), axis=-1, keepdims=True
        ) + jnp.zeros_like(logps)
    weight = None
    if loss.needs("wpo"):
        weight = jnp.exp(logps - jax.nn.logsumexp(2 * logps, axis=-1, keepdims=True))
    policy = pairs(logps, kl=kl_of_prompt, weight=weight)
    margin = None
    if population.margins is not None:
        # an offset is that of the pair, in both orders
        margins = jnp.broadcast_to(population.margins, (*logps.shape[:-1], y, y))
        margin = jnp.abs(margins[..., i, j].reshape(-1))
    valid = jnp.ones(shares.shape, bool)
    if loss.coupled:
        valid = shares > 0
    info = PairInfo(
        weight=shares,
        soft_label=jnp.ones_like(shares),
        margin=margin,
        # Every response is the chosen one with the probability that it wins.
        mean_chosen_length=jnp.sum(shares * policy.chosen.lengths) / jnp.sum(shares),
        valid=valid,
        shift=population.shift,
    )
    if soft:
        info = info._replace(weight=None, soft_label=shares)
    return policy, pairs(ref_logps), info


def _unpaired_terms(logps: Array, population: _Population) -> tuple[PairLogps, PairLogps, PairInfo]:
    """Every response once as desirable and once as undesirable.

    Mismatched responses are those of the same list.
    """

    def twice(v):
        return jnp.concatenate([jnp.broadcast_to(v, logps.shape).reshape(-1)] * 2)

    share = jnp.broadcast_to(population.preferences, logps.shape).reshape(-1)

    def pairs(v) -> PairLogps:
        response = ResponseLogps(twice(v), twice(population.lengths))
        return PairLogps(chosen=response, rejected=response)

    info = PairInfo(
        weight=jnp.concatenate([share, 1 - share]),
        soft_label=jnp.concatenate([jnp.ones_like(share), jnp.zeros_like(share)]),
        valid=jnp.ones(2 * share.size, bool),
    )
    return pairs(logps), pairs(population.ref_logps), info


@functools.lru_cache(maxsize=64)
def _value_and_gradient(loss: Loss, soft: bool):
    """(logps, population) -> (population loss, its gradient in logps), compiled once."""

    def total(logps, population: _Population):
        if loss.unpaired:
            policy, ref, info = _unpaired_terms(logps, population)
            count = logps.size
        else:
            policy, ref, info = _pair_terms(loss, logps, population, soft=soft)
            count = policy.chosen.logps.size
            if not soft:  # every pair stands there in both orders
                count = count / 2
        return jnp.sum(jnp.where(info.valid, loss(policy, ref, info).loss, 0.0)) / count

    return jax.jit(jax.value_and_grad(total))


def make_population_loss(
    loss: Loss,
    ref_logps: Values,
    preferences: Values,
    *,
    lengths: Values | None = None,
    margins: Values | None = None,
    soft: bool = False,
    shift: float = 0.0,
) -> Callable[[Values], tuple[float, Values]]:
    """The function logps [..., Y] -> (population loss, its gradient), in float64.

    Every two responses of a prompt are compared alike often, and y_i wins with probability p_ij:
    the mean over the pairs of p_ij loss(i, j) + p_ji loss(j, i). Objectives that look inside a
    response take it as one token (tdpo, wpo), or its log-prob as spread evenly over its tokens
    (ld_dpo).

    Args:
      loss: any objective.
      ref_logps: log ref(y|x). [..., Y].
      preferences: p(y_i beats y_j), [..., Y, Y]; of an unpaired objective p(y is desirable), [...,
        Y].
      lengths: |y| in tokens, [Y]; None: 1 each.
      margins: score of y_i minus score of y_j, [..., Y, Y], for odpo.
      soft: one row for a pair, with p_ij as its soft label, instead of both orders.
      shift: d of bco_pair_shift.
    Raises: ValueError for AOT with labels that are not certain: its batch is then no list of these
      pairs.
    """
    _check_certain(loss, preferences)
    shape = np.shape(ref_logps)
    preferences_shape = shape
    if not loss.unpaired:
        preferences_shape = (*shape, shape[-1])
    with jax.enable_x64(True):
        if lengths is None:
            lengths = np.ones(shape[-1], np.int32)
        population = _Population(
            ref_logps=jnp.asarray(ref_logps, jnp.float64),
            preferences=jnp.broadcast_to(jnp.asarray(preferences, jnp.float64), preferences_shape),
            lengths=jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), shape),
            margins=None,
            shift=jnp.asarray(shift, jnp.float64),
        )
        if margins is not None:
            population = population._replace(margins=jnp.asarray(margins, jnp.float64))
    compiled = _value_and_gradient(loss, soft)

    def population_loss(logps: Values) -> tuple[float, Values]:
        with jax.enable_x64(True):
            value, gradient = compiled(jnp.asarray(logps, jnp.float64), population)
        return float(value), np.asarray(gradient)

    return population_loss


def _check_certain(loss: Loss, preferences: Values) -> None:
    """Raises ValueError for an objective of whole batches, and preferences that are not certain."""
    whole_batches = any(
        t.objective.coupled and "shift" not in t.objective.needs for t in loss.terms
    )
    if loss.unpaired or not whole_batches:
        return
    different = ~np.eye(np.shape(preferences)[-1], dtype=bool)
    if not np.isin(np.asarray(preferences)[..., different], (0, 1)).all():
        raise ValueError(
            f"{loss.name} compares whole batches: its population loss is defined here for"
            " preferences of 0 and 1 only"
        )


def population_loss(
    loss: Loss, policy_logps: Values, ref_logps: Values, preferences: Values, **more
) -> float:
    """The value of `make_population_loss`, whose arguments it takes, at `policy_logps`."""
    return make_population_loss(loss, ref_logps, preferences, **more)(policy_logps)[0]


# --- its minimisers -------------------------------------------------------------------------------


def _descend(function: Callable[[Values], tuple[float, Values]], size: int) -> Values:
    """The minimiser of a function of `size` numbers, from 0.

    L-BFGS, then Nelder-Mead where a kink may have stopped it.

    Some losses have plateaus that a long first step lands on: a second descent starts with steps a
    hundred times as small.
    """
    descents = []
    for unit in (1.0, 0.01):

        def scaled(x, unit=unit):
            value, gradient = function(unit * x)
            return value, unit * gradient

        options = dict(ftol=1e-16, gtol=1e-13 * unit, maxiter=10_000, maxfun=10**5)
        end = scipy.optimize.minimize(
            scaled, np.zeros(size), jac=True, method="L-BFGS-B", options=options
        )
        descents.append((float(end.fun), unit * end.x, float(np.abs(end.jac).max()) / unit))
    first, second = descents
    value, x, slope = first
    if second[0] < value - 1e-12:
        value, x, slope = second
    if size > 6 or slope < 1e-9:
        return x
    options = dict(xatol=1e-9, fatol=1e-15, maxiter=20_000, maxfev=10**5)
    again = scipy.optimize.minimize(
        lambda x: function(x)[0], x, method="Nelder-Mead", options=options
    )
    if again.fun <= value:
        return again.x
    return x


def _scale(loss: Loss) -> float:
    """The optimisers' unit over a nat.

    It is that of the reward, so that beta does not matter; f-divergences are curved in nats.
    """
    if loss.f_divergence == "reverse_kl":
        return loss.reward_scale
    return 1.0


def minimise_free(loss: Loss, ref_logps: Values, preferences: Values, **more) -> Values:
    """The log-ratios [..., Y] that minimise the population loss when they are free.

    The responses' probabilities need not add up to 1: objectives' optima are stated so. Arguments
    as in `make_population_loss`.
    """
    value = make_population_loss(loss, ref_logps, preferences, **more)
    ref = np.asarray(ref_logps, np.float64)
    scale = _scale(loss)

    def function(x):
        mean, gradient = value(ref + x.reshape(ref.shape) / scale)
        return mean, gradient.reshape(-1) / scale

    return _descend(function, ref.size).reshape(ref.shape) / scale


def _on_simplex(loss: Loss, ref_logps: Values, preferences: Values, **more):
    """(x -> log pi, x -> (population loss, its gradient in x)).

    x are logits, minus the reference's.
    """
    value = make_population_loss(loss, ref_logps, preferences, **more)
    ref = np.asarray(ref_logps, np.float64)
    scale = _scale(loss)

    def policy(x):
        return log_softmax(ref + x.reshape(ref.shape) / scale, axis=-1)

    def function(x):
        logps = policy(x)
        mean, gradient = value(logps)
        gradient = gradient - np.exp(logps) * gradient.sum(axis=-1, keepdims=True)
        return mean, gradient.reshape(-1) / scale

    return policy, function


def minimise_simplex(loss: Loss, ref_logps: Values, preferences: Values, **more) -> Values:
    """log pi(y|x) [..., Y] that minimises the population loss over normalised policies.

    The logits are optimised directly. Arguments as in `make_population_loss`.
    """
    policy, function = _on_simplex(loss, ref_logps, preferences, **more)
    return policy(_descend(function, np.size(ref_logps)))


def stationary_simplex(loss: Loss, ref_logps: Values, preferences: Values, **more) -> Values:
    """As `minimise_simplex`, where the gradient that training follows is zero.

    For objectives with a weight or reference point through which no gradient flows (wpo, tdpo2):
    training does not descend their value.
    """
    policy, function = _on_simplex(loss, ref_logps, preferences, **more)

    def slope(x):
        return function(x)[1] + 1e-9 * x  # the logits are known up to a constant

    return policy(
        scipy.optimize.root(
            slope, np.zeros(np.size(ref_logps)), method="lm", options=dict(xtol=1e-14, ftol=1e-14)
        ).x
    )
