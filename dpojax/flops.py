"""Useful work of a step: the FLOPs that its tokens need, over what the devices could have done (MFU, Chowdhery et al. 2022).

Useful are the matrix products of every distinct token once, and of the vocabulary at response tokens; padding, rematerialised
work and attention's own products do not count, so that the MFU is a lower bound.
"""

import math
from typing import NamedTuple

from dpojax.models import ModelConfig
from dpojax.models.table import layer_rows

# Dense bf16 matrix products, FLOP/s per device, from the makers' data sheets; found by the longest start of the device's name.
PEAK = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
}


class TokenFlops(NamedTuple):
    """FLOPs of one token of a step."""

    token: float  # through the layers
    response_token: float  # through the vocabulary, besides


def token_flops(config: ModelConfig, *, passes: int) -> TokenFlops:
    """FLOPs of a token of `config`.

    Args:
      passes: forward passes' worth of work: 3 for a forward and backward pass, 1 more for a live reference.
    """
    share = config.experts_per_token / config.num_experts if config.num_experts else 1.0  # of its experts that a token meets
    matrices = sum(math.prod(row.shape) * (share if row.experts else 1) for row in layer_rows(config) if row.in_dims)
    head = config.hidden_size * config.vocab_size
    return TokenFlops(2.0 * passes * config.num_layers * matrices, 2.0 * passes * head)


def peak_flops(device_kind: str) -> float | None:
    """What a device can do in a second, or None where it is not known (CPUs)."""
    known = [name for name in PEAK if device_kind.startswith(name)]
    return PEAK[max(known, key=len)] if known else None
