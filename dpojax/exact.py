"""The paper's mathematics on response spaces small enough to enumerate, in float64: what training must reach.

The last axis of every array runs over the responses y of a prompt; the axes before it are prompts. Log-probs in nats.
Source: Rafailov et al. 2023 (arXiv:2305.18290), sections 3 and 4.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from scipy.special import expit, log_softmax, logsumexp

from dpojax.losses import PairInfo, PairLogps
from dpojax.objectives import Loss

Values = np.ndarray


def optimal_logps(ref_logps: Values, rewards: Values, beta: float) -> Values:
    """log pi*(y|x) = log ref(y|x) + r(x, y) / beta - log Z(x), Eq. 4. [..., Y]."""
    return log_softmax(np.asarray(ref_logps, np.float64) + np.asarray(rewards, np.float64) / beta, axis=-1)


def log_partition(ref_logps: Values, rewards: Values, beta: float) -> Values:
    """log Z(x) = log sum_y ref(y|x) exp(r(x, y) / beta); beta log Z is the value of the optimum. [...]."""
    return np.asarray(logsumexp(np.asarray(ref_logps, np.float64) + np.asarray(rewards, np.float64) / beta, axis=-1))


def implicit_rewards(policy_logps: Values, ref_logps: Values, beta: float) -> Values:
    """beta log pi(y|x) / ref(y|x): the reward, up to a function of x, that the policy is the optimum of (Eq. 5). [..., Y]."""
    return beta * (np.asarray(policy_logps, np.float64) - np.asarray(ref_logps, np.float64))


def bradley_terry(rewards: Values) -> Values:
    """p(y_i beats y_j) = s(r_i - r_j), Eq. 1. [..., Y] -> [..., Y, Y]."""
    r = np.asarray(rewards, np.float64)
    return expit(r[..., :, None] - r[..., None, :])


def kl(policy_logps: Values, ref_logps: Values) -> Values:
    """KL(pi || ref), nats. [...]."""
    p, q = np.asarray(policy_logps, np.float64), np.asarray(ref_logps, np.float64)
    return np.sum(np.exp(p) * (p - q), axis=-1)


def regularised_value(policy_logps: Values, ref_logps: Values, rewards: Values, beta: float) -> Values:
    """E_pi[r] - beta KL(pi || ref), what RLHF maximises (Eq. 3). [...]."""
    p = np.exp(np.asarray(policy_logps, np.float64))
    return np.sum(p * rewards, axis=-1) - beta * kl(policy_logps, ref_logps)


# --- population losses ------------------------------------------------------------------------------------------------


def _pair_terms(loss: Loss, logps, ref_logps, preferences, lengths, margins, soft: bool, shift):
    """The pairs of all prompts as a loss takes them: (policy, ref, info)."""
    y = logps.shape[-1]
    i, j = np.triu_indices(y, 1) if soft else np.nonzero(~np.eye(y, dtype=bool))
    take = lambda v, k: v[..., k].reshape(-1)
    shares = preferences[..., i, j].reshape(-1)

    def both(v, policy: bool) -> PairLogps:
        pairs = PairLogps(take(v, i), take(v, j), take(lengths, i), take(lengths, j))
        if loss.needs("head"):
            share = jnp.minimum(pairs.chosen_lengths, pairs.rejected_lengths)
            heads = pairs.chosen * share / pairs.chosen_lengths, pairs.rejected * share / pairs.rejected_lengths
            pairs = pairs._replace(chosen_head=heads[0], rejected_head=heads[1])
        if policy and loss.needs("kl"):  # of one token: every response of a prompt has the same
            own = jnp.sum(jnp.exp(ref_logps) * (ref_logps - v), axis=-1, keepdims=True) + jnp.zeros_like(v)
            pairs = pairs._replace(chosen_kl=take(own, i), rejected_kl=take(own, j))
        if policy and loss.needs("wpo"):
            weight = jnp.exp(v - jax.nn.logsumexp(2 * v, axis=-1, keepdims=True))
            pairs = pairs._replace(chosen_weight=take(weight, i), rejected_weight=take(weight, j))
        return pairs

    policy = both(logps, True)
    info = PairInfo(
        weight=None if soft else shares,
        soft_label=shares if soft else jnp.ones_like(shares),
        # an offset is that of the pair, in both orders
        margin=None
        if margins is None
        else jnp.abs(jnp.broadcast_to(margins, (*logps.shape[:-1], y, y))[..., i, j].reshape(-1)),
        # Every response is the chosen one with the probability that it wins.
        mean_chosen_length=jnp.sum(shares * policy.chosen_lengths) / jnp.sum(shares),
        valid=shares > 0 if loss.coupled else jnp.ones(shares.shape, bool),
        shift=shift,
    )
    return policy, both(ref_logps, False), info


def _unpaired_terms(logps, ref_logps, desirable, lengths):
    """Every response once as desirable and once as undesirable; the mismatched one is any response alike."""
    flat = lambda v: jnp.concatenate([jnp.broadcast_to(v, logps.shape).reshape(-1)] * 2)
    share = jnp.broadcast_to(desirable, logps.shape).reshape(-1)

    def both(v) -> PairLogps:
        return PairLogps(flat(v), flat(v), flat(lengths), flat(lengths))

    info = PairInfo(
        weight=jnp.concatenate([share, 1 - share]),
        soft_label=jnp.concatenate([jnp.ones_like(share), jnp.zeros_like(share)]),
        valid=jnp.ones(2 * share.size, bool),
    )
    return both(logps), both(ref_logps), info


@functools.lru_cache(maxsize=64)
def _value_and_gradient(loss: Loss, soft: bool):
    """(logps, ref, preferences, lengths, margins, shift) -> (population loss, its gradient in logps), compiled once."""

    def total(logps, ref, shares, sizes, margins, shift):
        if loss.unpaired:
            policy, fixed, info = _unpaired_terms(logps, ref, shares, sizes)
            count = ref.size
        else:
            policy, fixed, info = _pair_terms(loss, logps, ref, shares, sizes, margins, soft, shift)
            count = policy.chosen.size / (1 if soft else 2)
        return jnp.sum(jnp.where(info.valid, loss(policy, fixed, info).loss, 0.0)) / count

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

    Every two responses of a prompt are compared alike often, and y_i wins with probability p_ij: the mean over the
    pairs of p_ij loss(i, j) + p_ji loss(j, i). Objectives that look inside a response take it as one token (tdpo, wpo), or
    its log-prob as spread evenly over its tokens (ld_dpo).

    Args:
      loss: any objective.
      ref_logps: log ref(y|x). [..., Y].
      preferences: p(y_i beats y_j), [..., Y, Y]; of an unpaired objective p(y is desirable), [..., Y].
      lengths: |y| in tokens, [Y]; None: 1 each.
      margins: score of y_i minus score of y_j, [..., Y, Y], for odpo.
      soft: one row for a pair, with p_ij as its soft label, instead of both orders.
      shift: d of bco_pair_shift.
    Raises: ValueError for AOT with labels that are not certain: its batch is then no list of these pairs.
    """
    uncertain = (
        not np.isin(np.asarray(preferences)[..., ~np.eye(np.shape(ref_logps)[-1], dtype=bool)], (0, 1)).all()
        if not loss.unpaired
        else False
    )
    if uncertain and any(t.objective.coupled and "shift" not in t.objective.needs for t in loss.terms):
        raise ValueError(
            f"{loss.name} compares whole batches: its population loss is defined here for preferences of 0 and 1 only"
        )
    shape = np.shape(ref_logps)
    with jax.enable_x64(True):
        fixed = (
            jnp.asarray(ref_logps, jnp.float64),
            jnp.broadcast_to(jnp.asarray(preferences, jnp.float64), shape if loss.unpaired else (*shape, shape[-1])),
            jnp.broadcast_to(jnp.ones(shape[-1], jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32), shape),
            None if margins is None else jnp.asarray(margins, jnp.float64),
            jnp.asarray(shift, jnp.float64),
        )
    compiled = _value_and_gradient(loss, soft)

    def population_loss(logps: Values) -> tuple[float, Values]:
        with jax.enable_x64(True):
            value, gradient = compiled(jnp.asarray(logps, jnp.float64), *fixed)
        return float(value), np.asarray(gradient)

    return population_loss


def population_loss(loss: Loss, policy_logps: Values, ref_logps: Values, preferences: Values, **more) -> float:
    """The value of `make_population_loss`, whose arguments it takes, at `policy_logps`."""
    return make_population_loss(loss, ref_logps, preferences, **more)(policy_logps)[0]


# --- its minimisers ---------------------------------------------------------------------------------------------------


def _descend(function: Callable[[Values], tuple[float, Values]], size: int) -> Values:
    """The minimiser of a function of `size` numbers, from 0: L-BFGS, then Nelder-Mead where a kink may have stopped it.

    Some losses have plateaus that a long first step lands on: a second descent starts with steps a hundred times as small.
    """
    best = None
    for unit in (1.0, 0.01):

        def scaled(x, unit=unit):
            value, gradient = function(unit * x)
            return value, unit * gradient

        options = dict(ftol=1e-16, gtol=1e-13 * unit, maxiter=10_000, maxfun=10**5)
        found = scipy.optimize.minimize(scaled, np.zeros(size), jac=True, method="L-BFGS-B", options=options)
        if best is None or found.fun < best[0] - 1e-12:
            best = float(found.fun), unit * found.x, float(np.abs(found.jac).max()) / unit
    assert best is not None
    value, x, slope = best
    if size > 6 or slope < 1e-9:
        return x
    options = dict(xatol=1e-9, fatol=1e-15, maxiter=20_000, maxfev=10**5)
    again = scipy.optimize.minimize(lambda x: function(x)[0], x, method="Nelder-Mead", options=options)
    return again.x if again.fun <= value else x


def _scale(loss: Loss) -> float:
    """The optimisers' unit over a nat: that of the reward, so that beta is no matter; f-divergences are curved in nats."""
    return loss.reward_scale if loss.f_divergence == "reverse_kl" else 1.0


def minimise_free(loss: Loss, ref_logps: Values, preferences: Values, **more) -> Values:
    """The log-ratios [..., Y] that minimise the population loss when they are free: the responses' probabilities need not
    add up to 1. It is what objectives' optima are stated for; arguments as `make_population_loss`'s.
    """
    value = make_population_loss(loss, ref_logps, preferences, **more)
    ref, scale = np.asarray(ref_logps, np.float64), _scale(loss)

    def function(x):
        found, gradient = value(ref + x.reshape(ref.shape) / scale)
        return found, gradient.reshape(-1) / scale

    return _descend(function, ref.size).reshape(ref.shape) / scale


def _on_simplex(loss: Loss, ref_logps: Values, preferences: Values, **more):
    """(x -> log pi, x -> (population loss, its gradient in x)), x being logits beside the reference's."""
    value = make_population_loss(loss, ref_logps, preferences, **more)
    ref, scale = np.asarray(ref_logps, np.float64), _scale(loss)

    def policy(x):
        return log_softmax(ref + x.reshape(ref.shape) / scale, axis=-1)

    def function(x):
        logps = policy(x)
        found, gradient = value(logps)
        gradient = gradient - np.exp(logps) * gradient.sum(axis=-1, keepdims=True)
        return found, gradient.reshape(-1) / scale

    return policy, function


def minimise_simplex(loss: Loss, ref_logps: Values, preferences: Values, **more) -> Values:
    """log pi(y|x) [..., Y] that minimises the population loss over normalised policies, by direct optimisation of logits."""
    policy, function = _on_simplex(loss, ref_logps, preferences, **more)
    return policy(_descend(function, np.size(ref_logps)))


def stationary_simplex(loss: Loss, ref_logps: Values, preferences: Values, **more) -> Values:
    """As `minimise_simplex`, where the gradient that training follows is zero.

    For objectives with a weight or reference point that has no gradient of its own (wpo, tdpo2), whose value is not what
    training descends.
    """
    policy, function = _on_simplex(loss, ref_logps, preferences, **more)
    slope = lambda x: function(x)[1] + 1e-9 * x  # the logits are known up to a constant
    return policy(scipy.optimize.root(slope, np.zeros(np.size(ref_logps)), method="lm", options=dict(xtol=1e-14, ftol=1e-14)).x)
