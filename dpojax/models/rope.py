"""Positions -> rotary angles, and the turning of queries and keys.

Su et al. 2021 (arXiv:2104.09864).

Legend: R rows, L row length, H heads, E head dim, Z pairs that are turned.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dpojax.models.config import RopeScaling


def _yarn(frequency: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """YaRN, section 3.2 of Peng et al. 2023 (arXiv:2309.00071).

    Low frequencies are divided, high ones kept.
    """
    pairs = len(frequency)

    def pair_of(rotations: float) -> float:  # which pair turns so often within the original context
        return (
            pairs
            * math.log(scaling.original_max_positions / (rotations * 2 * math.pi))
            / math.log(theta)
        )

    low = pair_of(scaling.beta_fast)
    high = pair_of(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0, 1)
    return frequency / scaling.factor * ramp + frequency * (1 - ramp)


def _llama3(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1's scaling.

    Wavelengths past the original context are stretched, short ones kept, those between
    interpolated.
    """
    # within the original context
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequency / scaling.factor * (1 - kept) + frequency * kept


def frequencies(pairs: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """(angle per position of each pair [Z], factor of cosine and sine)."""
    frequency = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    if scaling is None:
        return frequency, 1.0
    scaled = {
        "linear": lambda: frequency / scaling.factor,
        "llama3": lambda: _llama3(frequency, scaling),
        "yarn": lambda: _yarn(frequency, theta, scaling),
        "longrope": lambda: frequency / np.asarray(scaling.short_factors),
    }
    return scaled[scaling.kind](), scaling.attention_factor


def rope_angles(
    positions: Int[Array, "R L"], *, pairs: int, theta: float, scaling: RopeScaling | None
):
    """Cosine and sine of the angles, [R, L, Z] each, in float32."""
    frequency, factor = frequencies(pairs, theta, scaling)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "R L H E"],
    cos: Float[Array, "R L Z"],
    sin: Float[Array, "R L Z"],
    *,
    interleaved: bool,
):
    """Turns the first 2 Z dimensions of every head, in float32.

    Args:
      interleaved: the pairs are (x_2i, x_2i+1), as in GPT-J; else (x_i, x_{i + Z}), as in Llama and
        GPT-NeoX.
    """
    turned, unturned = jnp.split(x.astype(jnp.float32), [2 * cos.shape[-1]], axis=-1)
    first, second = (
        (turned[..., ::2], turned[..., 1::2]) if interleaved else jnp.split(turned, 2, axis=-1)
    )
    cos = cos[:, :, None]
    sin = sin[:, :, None]
    both = first * cos - second * sin, second * cos + first * sin
    turned = (
        jnp.stack(both, axis=-1).reshape(turned.shape)
        if interleaved
        else jnp.concatenate(both, axis=-1)
    )
    return jnp.concatenate([turned, unturned], axis=-1).astype(x.dtype)
