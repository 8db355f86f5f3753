"""How far rounding alone may move log-probs: the bounds of the start-up check and of the cache.

What rounding explains is measured and not set. Plain sequences in the run's precision are compared
with the same in float32; in float32 the unit roundoff counts times the size of the logits and the
square root of the depth.
"""

from typing import NamedTuple

import numpy as np

# of float32, in which every sum is taken whatever the precision of its operands
UNIT_ROUNDOFF = 2.0**-24

# How often the unit roundoff of a logit, times sqrt(depth), may be counted: SmolLM2-135M needs
# 0.44, random weights 0.36.
FLOAT32_SLACK = 16.0

# Packed rows differ from plain sequences by about as much as plain sequences in the run's precision
# from float32: 1.28 times in bfloat16 on SmolLM2-135M.
ROUNDING_SLACK = 3.0


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def typical_size(x, *, experts: bool) -> float:
    """Root mean square over tokens; with experts, of all but the 2 % that differ most.

    Where two experts are nearly equally likely, rounding decides between them, and that token
    differs by any amount.
    """
    sizes = np.sort(np.abs(np.asarray(x, np.float64)))
    if experts:
        sizes = sizes[: max(1, int(0.98 * len(sizes)))]
    return rms(sizes)


class Tokens(NamedTuple):
    """Log-probs of every scored token, response by response, [Q] each, nats."""

    policy: np.ndarray
    ref: np.ndarray | None
    plain: list  # (log-probs, log-sum-exp) of the same hidden states
    exact: np.ndarray  # plain sequences in float32
    rounded: np.ndarray | None  # and in the run's precision
    packed_exact: np.ndarray | None  # packed rows in float32, where the run's are not


class Allowed(NamedTuple):
    """What rounding explains, nats of a token's log-prob, root mean square."""

    float32: float
    rounding: float  # measured
    layout: float


def cache_bound(values: np.ndarray, *, dtype: str, depth: int) -> float:
    """How far stored log-probs may lie from those of another program that computes the same.

    The logits are not stored: they are taken for ten times as large as the log-probs.

    Returns: nats, root mean square.
    """
    unit = UNIT_ROUNDOFF
    slack = FLOAT32_SLACK
    if dtype != "float32":
        unit *= 2**16
        slack = 1.0
    return slack * unit * max(1.0, 10 * rms(values)) * float(np.sqrt(2 * depth + 1))


def allowed_by_rounding(tokens: Tokens, *, depth: int, experts: bool) -> Allowed:
    """How far the log-probs of the checked tokens may lie apart in a model of `depth` layers."""
    logps, totals = tokens.plain[0]
    unit = UNIT_ROUNDOFF * (rms(totals) + rms(logps))  # of a logit
    # each layer adds to the hidden states twice
    float32 = FLOAT32_SLACK * unit * float(np.sqrt(2 * depth + 1))
    rounding = 0.0
    if tokens.rounded is not None:
        rounding = typical_size(tokens.rounded - tokens.exact, experts=experts)
    return Allowed(float32, rounding, float32 + ROUNDING_SLACK * rounding)
