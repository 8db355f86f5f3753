"""Policy gradients, best-of-n and online DPO on an enumerated response space, in float64: what
sampling must agree with on average.

The last axis of every array runs over the responses y of a prompt; the axes before it are prompts.
Log-probs in nats. h(y) = log pi(y) / ref(y), and J = E_pi[r] - beta KL(pi || ref) is what RLHF
maximises (Rafailov et al. 2023, arXiv:2305.18290, Eq. 3). A policy is tabular: its log-probs are
the log-softmax of one logit for each response.
"""

from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats
from scipy.special import expit, gammaln, log_softmax

from dpojax.errors import ConfigError, did_you_mean
from dpojax.objectives.exact import bradley_terry, kl, optimal_logps

Values = np.ndarray

LABELS = ("square", "soft", "argmax")


def _array(values) -> Values:
    return np.asarray(values, np.float64)


def policy_gradient(
    policy_logps: Values, ref_logps: Values, rewards: Values, beta: float
) -> Values:
    """The gradient of J in the logits of a tabular policy: pi(y) (u(y) - E_pi[u]), u = r - beta h.

    It is zero where u is constant, which is at pi* alone.

    Args:
      policy_logps: log pi(y|x), or logits. [..., Y], nats.
      ref_logps: log ref(y|x). [..., Y], nats.
      rewards: r(x, y). [..., Y].
      beta: strength of the pull to the reference, >= 0.
    Returns: dJ / d logits. [..., Y].
    """
    logps = log_softmax(_array(policy_logps), axis=-1)
    probabilities = np.exp(logps)
    utility = _array(rewards) - beta * (logps - _array(ref_logps))
    mean = np.sum(probabilities * utility, axis=-1, keepdims=True)
    return probabilities * (utility - mean)


def k3_fixed_point(ref_logps: Values, rewards: Values, beta: float) -> Values:
    """log pi(y|x) that GRPO converges to with its k3 term in the loss: pi = beta ref / (lambda -
    r).

    lambda = beta + E_pi[r] is the number above every reward for which pi adds up to 1. It is not
    pi* (Eq. 4 of the DPO paper): k3's gradient is that of KL(ref || pi). Source: Shao et al. 2024
    (arXiv:2402.03300), Eq. 4; Vojnovic and Yun 2025 (arXiv:2502.18548).

    Args:
      ref_logps: log ref(y|x), all finite. [..., Y], nats.
      rewards: r(x, y). [..., Y].
      beta: strength of the k3 term, > 0.
    Returns: log-probs. [..., Y], nats.
    """
    ref = np.exp(_array(ref_logps))
    r = np.broadcast_to(_array(rewards), ref.shape)
    flat = np.empty((ref[..., 0].size, ref.shape[-1]))
    for row, (probabilities, values) in enumerate(
        zip(ref.reshape(flat.shape), r.reshape(flat.shape), strict=True)
    ):
        flat[row] = _k3_fixed_point_of_prompt(probabilities, values, beta)
    return flat.reshape(ref.shape)


def _k3_fixed_point_of_prompt(ref: Values, rewards: Values, beta: float) -> Values:
    below = rewards.max() - rewards

    def excess(gap: float) -> float:
        return float(np.sum(beta * ref / (gap + below))) - 1

    # At gap = beta ref(y_best) the best response alone has probability 1; at beta all sums are <=
    # 1.
    least = beta * float(ref[below == 0].sum())
    gap = beta
    if excess(beta) < 0:
        root: Any = scipy.optimize.brentq  # its stubs ask for numpy's own floats
        gap = float(root(excess, least, beta, xtol=1e-300, rtol=1e-15))
    return np.log(beta * ref) - np.log(gap + below)


def grpo_factor(group_size: int, p: float | Values, *, ddof: int = 0) -> Values:
    """f(G, p), where GRPO's expected gradient is f grad p for binary rewards of success probability
    p.

    f = sum_K Bin(K; G, p) sqrt(K/G (1 - K/G)) / (p (1 - p)), times sqrt((G - 1) / G) for standard
    deviations with ddof 1. Its limit for many samples is 1 / sqrt(p (1 - p)): prompts that are very
    hard or very easy count more. The standard deviation has no epsilon here, and responses are not
    divided by their lengths.

    Args:
      group_size: G, samples of a prompt, >= 2.
      p: probability of a reward of 1 under the policy, in (0, 1). Any shape.
      ddof: 0 for the population's standard deviation, 1 for the sample's, which the presets use.
    Returns: the factor, in p's shape.
    """
    if group_size < 2:
        raise ConfigError(f"group_size is {group_size}; a group without variance takes 2 or more")
    if ddof not in (0, 1):
        raise ConfigError(f"ddof is {ddof}; it must be 0 or 1")
    probability = _array(p)[..., None]
    successes = np.arange(group_size + 1)
    share = successes / group_size
    weights = scipy.stats.binom.pmf(successes, group_size, probability)
    mean = np.sum(weights * np.sqrt(share * (1 - share)), axis=-1)
    factor = mean / (probability * (1 - probability))[..., 0]
    if ddof == 1:
        return factor * np.sqrt((group_size - 1) / group_size)
    return factor


# --- best of n ------------------------------------------------------------------------------------


class _Ranks(NamedTuple):
    """What the reward's distribution is at each response."""

    tie: Values  # P(r = r(y)). [..., Y]
    below: Values  # P(r < r(y)). [..., Y]
    above: Values  # P(r > r(y)). [..., Y]


def _ranks(logps: Values, rewards: Values) -> _Ranks:
    probabilities = np.exp(logps)
    r = np.broadcast_to(_array(rewards), probabilities.shape)
    shape = (probabilities[..., 0].size, probabilities.shape[-1])
    tie = np.empty(shape)
    below = np.empty(shape)
    above = np.empty(shape)
    for row, (weights, values) in enumerate(
        zip(probabilities.reshape(shape), r.reshape(shape), strict=True)
    ):
        _, level = np.unique(values, return_inverse=True)
        mass = np.bincount(level, weights=weights)
        tie[row] = mass[level]
        below[row] = np.concatenate([[0.0], np.cumsum(mass)[:-1]])[level]
        above[row] = np.concatenate([np.cumsum(mass[::-1])[-2::-1], [0.0]])[level]
    return _Ranks(
        tie=tie.reshape(r.shape), below=below.reshape(r.shape), above=above.reshape(r.shape)
    )


def _best_of_n_ratios(logps: Values, rewards: Values, n: int) -> Values:
    """P_n(y) / pi(y) = [F(<=)^n - F(<)^n] / P(r = r(y)). [..., Y].

    The difference of powers is written so that nothing cancels for rare responses, and a rounding
    of F is not raised to the power n for the best one.
    """
    if n < 1:
        raise ConfigError(f"n is {n}; the best of n samples takes 1 or more")
    ranks = _ranks(logps, rewards)
    possible = ranks.tie > 0
    tie = np.where(possible, ranks.tie, 1.0)
    up_to = np.where(possible, ranks.tie + ranks.below, 1.0)
    rarely_passed = ranks.above < 0.5
    log_up_to = np.where(
        rarely_passed, np.log1p(-np.where(rarely_passed, ranks.above, 0.0)), np.log(up_to)
    )
    share = np.clip(tie / up_to, 0.0, 1.0)
    with np.errstate(divide="ignore"):  # log1p(-1) is -inf at the lowest reward, which is right
        difference = -np.expm1(n * np.log1p(-share))
    return np.where(possible, np.exp(n * log_up_to) * difference / tie, 0.0)


def best_of_n(logps: Values, rewards: Values, n: int) -> Values:
    """P_n(y|x): the distribution of the best of n samples by reward; ties are shared in pi's ratio.

    P_n(y) = pi(y) [F(r <= r(y))^n - F(r < r(y))^n] / P(r = r(y)).

    Args:
      logps: log pi(y|x), normalised. [..., Y], nats.
      rewards: r(x, y). [..., Y].
      n: number of samples, >= 1.
    Returns: probabilities, which add up to 1. [..., Y].
    """
    log_probs = _array(logps)
    return np.exp(log_probs) * _best_of_n_ratios(log_probs, rewards, n)


def best_of_n_kl(logps: Values, rewards: Values, n: int) -> Values:
    """KL(P_n || pi), exactly; arguments as `best_of_n`'s. [...], nats.

    log n - (n - 1) / n is an upper bound (Beirami et al. 2024, arXiv:2401.01879), near it only for
    many responses with different rewards; -log P(r is the largest) is another.
    """
    log_probs = _array(logps)
    ratios = _best_of_n_ratios(log_probs, rewards, n)
    log_ratios = np.log(np.where(ratios > 0, ratios, 1.0))
    return np.sum(np.exp(log_probs) * ratios * log_ratios, axis=-1)


def best_of_n_kl_bound(n: int) -> float:
    """log n - (n - 1) / n, nats: no best-of-n policy is farther from the policy it samples."""
    return float(np.log(n) - (n - 1) / n)


def best_of_n_win_rate(logps: Values, rewards: Values, n: int) -> Values:
    """P(the best of n samples beats another sample), ties counted half. [...].

    It is n / (n + 1) where no two samples tie.
    """
    log_probs = _array(logps)
    ranks = _ranks(log_probs, rewards)
    return np.sum(best_of_n(log_probs, rewards, n) * (ranks.below + ranks.tie / 2), axis=-1)


def best_of_k_mean(rewards: Values, k: int) -> Values:
    """E[reward of the best of k samples], estimated without bias from N >= k samples of a prompt.

    The U-statistic sum_i C(i - 1, k - 1) / C(N, k) r_(i) over the sorted rewards: the mean of the
    largest reward over all subsets of k samples. For rewards of 0 and 1 it is pass@k (Chen et al.
    2021, arXiv:2107.03374, Eq. 1).

    Args:
      rewards: of N samples. [..., N].
      k: number of samples to choose from, 1 to N.
    Returns: the estimate. [...].
    """
    r = np.sort(_array(rewards), axis=-1)
    samples = r.shape[-1]
    if not 1 <= k <= samples:
        raise ConfigError(f"k is {k}; with {samples} samples of a prompt it must be 1 to {samples}")
    place = np.arange(k, samples + 1)  # below place k a sample is the largest of no subset
    log_subsets = gammaln(place) - gammaln(k) - gammaln(place - k + 1)
    log_all = gammaln(samples + 1) - gammaln(k + 1) - gammaln(samples - k + 1)
    return np.sum(np.exp(log_subsets - log_all) * r[..., k - 1 :], axis=-1)


# --- what no policy passes ------------------------------------------------------------------------


class Frontier(NamedTuple):
    """The most reward at each KL from the reference, one point for each beta."""

    kl: Values  # KL(pi* || ref). [betas, ...], nats
    reward: Values  # E_pi*[r]. [betas, ...]


def tilted_frontier(ref_logps: Values, rewards: Values, betas: Values) -> Frontier:
    """KL and mean reward of the tilted references pi* = ref exp(r / beta) / Z (Eq. 4 of DPO).

    No policy has more reward at the same KL: E_pi[r] <= E_pi*[r] + beta (KL(pi) - KL(pi*)) for
    every beta.

    Args:
      ref_logps: log ref(y|x). [..., Y], nats.
      rewards: r(x, y). [..., Y].
      betas: each > 0. [betas].
    """
    tilted = [optimal_logps(ref_logps, rewards, float(beta)) for beta in np.atleast_1d(betas)]
    return Frontier(
        kl=np.stack([kl(logps, ref_logps) for logps in tilted]),
        reward=np.stack([np.sum(np.exp(logps) * _array(rewards), axis=-1) for logps in tilted]),
    )


# --- online DPO -----------------------------------------------------------------------------------


def online_gradient(
    policy_logps: Values, ref_logps: Values, rewards: Values, beta: float, *, labels: str
) -> Values:
    """The expected gradient of online DPO: two samples of the policy are compared, and the sampling
    itself has no gradient.

    `square` is (beta (h_i - h_j) - (r_i - r_j))^2, whose gradient is -4 beta grad J at every policy
    (REBEL, Gao et al. 2024, arXiv:2404.16767). `soft` is DPO's loss with the label s(r_i - r_j);
    its gradient tends to -(beta / 2) grad J as differences get small, and is zero at pi*. `argmax`
    takes the larger reward as the preferred response (OAIF, Guo et al. 2024, arXiv:2402.04792; a
    tie counts half), and has no optimum: beta only sets the speed.

    Args:
      policy_logps: log pi(y|x), or logits. [..., Y], nats.
      ref_logps: log ref(y|x). [..., Y], nats.
      rewards: r(x, y). [..., Y].
      beta: strength of the pull to the reference, > 0.
      labels: "square", "soft" or "argmax".
    Returns: d E[loss] / d logits of the tabular policy. [..., Y].
    """
    if labels not in LABELS:
        raise ConfigError(
            f"labels is {labels!r}; it must be one of {', '.join(LABELS)}"
            f"{did_you_mean(labels, LABELS)}"
        )
    logps = log_softmax(_array(policy_logps), axis=-1)
    r = _array(rewards)
    h = logps - _array(ref_logps)
    gaps = beta * (h[..., :, None] - h[..., None, :])
    reward_gaps = r[..., :, None] - r[..., None, :]
    if labels == "square":
        slopes = 2 * beta * (gaps - reward_gaps)
    elif labels == "soft":
        slopes = beta * (expit(gaps) - bradley_terry(r))
    else:
        slopes = beta * (expit(gaps) - np.heaviside(reward_gaps, 0.5))
    pairs = np.exp(logps[..., :, None] + logps[..., None, :])
    weighted = pairs * slopes
    # The normaliser of the softmax cancels in h_i - h_j.
    return weighted.sum(axis=-1) - weighted.sum(axis=-2)
