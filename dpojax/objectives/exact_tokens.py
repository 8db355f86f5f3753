"""Responses as sequences of tokens, all of them enumerated, in float64: advantages, values and the
placements of the KL, exactly.

A space holds every response of at most T tokens over V tokens, of which the last is EOS. Y
responses, S prefixes (states), T tokens. The policy is a table of logits, one row for each prefix:
[S, V].
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.special import log_softmax

from dpojax.errors import ConfigError

Values = np.ndarray


def gae(
    rewards: Values,
    values: Values,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Values | None = None,
) -> Values:
    """Generalised advantages by their definition, a sum over later tokens (Schulman et al. 2015,
    arXiv:1506.02438, Eq. 16): A_t = sum_l (gamma lam)^l delta_(t+l).

    delta_t = r_t + gamma V_(t+1) - V_t. The state after the last token has the value 0, and t + 1
    is the next token of the response: what the mask leaves out (padding, the output of a tool) is
    as though it was not there, whatever numbers stand there.

    Args:
      rewards: of each token. [..., T].
      values: V of the state in which each token was drawn. [..., T].
      gamma: discount, in [0, 1].
      lam: lambda, in [0, 1]; at 1 the advantage is the return minus V, whatever V is.
      mask: True at a token of the response; None: everywhere. [..., T].
    Returns: advantages, 0 where the mask is False. [..., T].
    """
    r = np.asarray(rewards, np.float64)
    v = np.asarray(values, np.float64)
    inside = np.ones(r.shape, bool) if mask is None else np.asarray(mask, bool)
    advantages = np.zeros(r.shape)
    for row in np.ndindex(r.shape[:-1]):
        places = np.flatnonzero(inside[row])
        deltas = r[row][places] - v[row][places]
        deltas[:-1] += gamma * v[row][places][1:]
        for start in range(places.size):
            later = deltas[start:]
            discounts = (gamma * lam) ** np.arange(later.size)
            advantages[row][places[start]] = np.sum(discounts * later)
    return advantages


# --- the space ------------------------------------------------------------------------------------


class TokenSpace(NamedTuple):
    """Every response, and the prefix that each of its tokens was drawn after."""

    tokens: Int[np.ndarray, "Y T"]  # 0 at padding
    mask: Bool[np.ndarray, "Y T"]  # True: a token of the response
    states: Int[np.ndarray, "Y T"]  # which prefix precedes the token; 0 at padding
    num_states: int
    vocab_size: int

    @property
    def lengths(self) -> Int[np.ndarray, " Y"]:
        """Tokens of each response, EOS included."""
        return self.mask.sum(axis=-1)


def token_space(vocab_size: int, max_tokens: int) -> TokenSpace:
    """All responses of 1 to `max_tokens` tokens; the token vocab_size - 1 is EOS and ends one.

    A response of `max_tokens` tokens may lack it. A vocabulary of 3 and 3 tokens give 15 responses
    after 7 prefixes.
    """
    if vocab_size < 2 or max_tokens < 1:
        raise ConfigError(
            f"vocab_size is {vocab_size} and max_tokens is {max_tokens}; a space takes at least 2"
            " and 1"
        )
    eos = vocab_size - 1
    responses: list[tuple[int, ...]] = []
    for length in range(max_tokens):
        for prefix in itertools.product(range(eos), repeat=length):
            responses.append((*prefix, eos))
    responses.extend(itertools.product(range(eos), repeat=max_tokens))
    tokens = np.zeros((len(responses), max_tokens), np.int32)
    mask = np.zeros(tokens.shape, bool)
    states = np.zeros(tokens.shape, np.int32)
    numbers: dict[tuple[int, ...], int] = {}
    for row, response in enumerate(responses):
        for place, token in enumerate(response):
            prefix = response[:place]
            states[row, place] = numbers.setdefault(prefix, len(numbers))
            tokens[row, place] = token
            mask[row, place] = True
    return TokenSpace(tokens, mask, states, len(numbers), vocab_size)


def token_logps(space: TokenSpace, logits: Float[Array, "S V"]) -> Float[Array, "Y T"]:
    """log pi(y_t | y_<t), 0 at padding; differentiable in the logits. Nats."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return jnp.where(space.mask, log_probs[space.states, space.tokens], 0.0)


def response_logps(space: TokenSpace, logits: Float[Array, "S V"]) -> Float[Array, " Y"]:
    """log pi(y), nats."""
    return jnp.sum(token_logps(space, logits), axis=-1)


# --- exact values ---------------------------------------------------------------------------------


def regularised_gradient(
    space: TokenSpace, logits: Values, ref_logits: Values, rewards: Values, beta: float
) -> Values:
    """The gradient of J = E[r] - beta KL(pi || ref) of whole responses in the table of logits.

    Sum over y of pi(y) (u(y) - E[u]) d log pi(y), u = r - beta log pi / ref, written out by hand.

    Args:
      logits: the policy. [S, V].
      ref_logits: the reference. [S, V].
      rewards: r(y). [Y].
      beta: strength of the pull to the reference, >= 0.
    Returns: [S, V].
    """
    log_probs = log_softmax(np.asarray(logits, np.float64), axis=-1)
    ref_log_probs = log_softmax(np.asarray(ref_logits, np.float64), axis=-1)
    drawn = np.where(space.mask, log_probs[space.states, space.tokens], 0.0)
    ref = np.where(space.mask, ref_log_probs[space.states, space.tokens], 0.0)
    probabilities = np.exp(drawn.sum(axis=-1))
    utility = np.asarray(rewards, np.float64) - beta * (drawn - ref).sum(axis=-1)
    weights = probabilities * (utility - np.sum(probabilities * utility))
    gradient = np.zeros(log_probs.shape)
    for row, place in np.argwhere(space.mask):
        state = space.states[row, place]
        gradient[state] -= weights[row] * np.exp(log_probs[state])
        gradient[state, space.tokens[row, place]] += weights[row]
    return gradient


def state_values(space: TokenSpace, logits: Values, token_rewards: Values) -> Values:
    """V(y_<t): the expected sum of the rewards of this token and of all later ones.

    Args:
      logits: the policy. [S, V].
      token_rewards: of every token of every response. [Y, T].
    Returns: the value of the prefix that precedes each token, 0 at padding. [Y, T].
    """
    log_probs = log_softmax(np.asarray(logits, np.float64), axis=-1)
    drawn = np.where(space.mask, log_probs[space.states, space.tokens], 0.0)
    rewards = np.where(space.mask, token_rewards, 0.0)
    probabilities = np.exp(drawn.sum(axis=-1))
    to_go = np.cumsum(rewards[:, ::-1], axis=-1)[:, ::-1]
    shares = np.zeros(space.num_states)
    totals = np.zeros(space.num_states)
    weights = np.where(space.mask, probabilities[:, None], 0.0)
    np.add.at(shares, space.states, weights)
    np.add.at(totals, space.states, weights * to_go)
    return np.where(space.mask, (totals / shares)[space.states], 0.0)


def visited_kl(space: TokenSpace, logits: Values, ref_logits: Values) -> Values:
    """Sum over a response's tokens of KL(pi(.|y_<t) || ref(.|y_<t)) over the whole vocabulary.

    Its mean over responses is KL(pi || ref), and it is never negative. [Y], nats.
    """
    log_probs = log_softmax(np.asarray(logits, np.float64), axis=-1)
    ref_log_probs = log_softmax(np.asarray(ref_logits, np.float64), axis=-1)
    of_state = np.sum(np.exp(log_probs) * (log_probs - ref_log_probs), axis=-1)
    return np.where(space.mask, of_state[space.states], 0.0).sum(axis=-1)


def expected_gradient(
    space: TokenSpace,
    logits: Values,
    loss: Callable[[Float[Array, "Y T"]], Float[Array, " Y"]],
) -> Values:
    """E_y[d loss(y) / d logits]: what the mean of a sampled loss descends on average.

    The probability of the response itself has no gradient here, as in a trainer, where it is drawn.

    Args:
      logits: the policy. [S, V].
      loss: token log-probs of every response -> the loss of each, for itself.
    Returns: [S, V].
    """
    with jax.enable_x64(True):
        table = jnp.asarray(logits, jnp.float64)
        probabilities = jax.lax.stop_gradient(jnp.exp(response_logps(space, table)))

        def mean(x):
            return jnp.sum(probabilities * loss(token_logps(space, x)))

        return np.asarray(jax.grad(mean)(table))
