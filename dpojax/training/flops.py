"""Useful work of a step over what the devices could have done: MFU.

The FLOPs that its tokens need (Chowdhery et al. 2022).

Counted are the matrix products of every distinct token once (a shared prompt once), the scores and
sums of attention between tokens that see each other (causal: about half), and the vocabulary at
response tokens. Padding, work that is done again in the backward pass, a second pass of coupled
objectives, norms, softmax and the optimizer do not count.
"""

import math
from collections.abc import Sequence

from dpojax.data.shapes import Work
from dpojax.models.config import ModelConfig
from dpojax.models.params import layer_rows, num_params

# FLOPs that a device does while it moves a byte, about: what a micro-batch's gradient costs beside
# its tokens.
_FLOPS_PER_BYTE = {"cpu": 16, "tpu": 300}


def layer_work(config: ModelConfig, platform: str = "cpu", *, num_shards: int = 1) -> Work:
    """FLOPs of one layer's forward pass.

    Of a token through its matrices, and of a query and a key that see each other.

    Args:
      num_shards: over which a micro-batch's gradients are added up.
    """
    matrices = 0.0
    for row in layer_rows(config):
        if row.experts:  # a token meets some of them
            share = config.experts_per_token / config.num_experts
            matrices += math.prod(row.shape) * share
        elif row.in_dims:
            matrices += math.prod(row.shape)
    # A micro-batch moves 12 bytes of every parameter, and as many again between shards; a token
    # takes 6 FLOPs of a layer's.
    moved = 2.0 * _FLOPS_PER_BYTE.get(platform, 150) * (1 + (num_shards > 1))
    micro_batch = moved * num_params(config) / (config.num_layers * matrices)
    return Work(
        token=2.0 * matrices, pair=4.0 * config.num_heads * config.head_dim, micro_batch=micro_batch
    )


def visible_pairs(prompt: int, responses: Sequence[int], window: int) -> int:
    """Pairs of a query and a key of a group that see each other.

    window: of the attention rule; 0: none.
    """
    seen = 0
    for first, count in [(0, prompt), *((prompt, y) for y in responses)]:
        if not window:
            seen += first * count + count * (count + 1) // 2
            continue
        rising = min(max(window - first, 0), count)  # tokens that see everything before them
        seen += first * rising + rising * (rising + 1) // 2 + (count - rising) * window
    return seen


def forward_flops(
    config: ModelConfig, prompts: Sequence[int], responses: Sequence[Sequence[int]]
) -> float:
    """FLOPs of one forward pass over groups of these lengths."""
    scored = sum(map(sum, responses))
    work = layer_work(config)
    windows = config.windows or (0,) * config.num_layers
    pairs = {
        w: sum(visible_pairs(x, ys, w) for x, ys in zip(prompts, responses, strict=True))
        for w in set(windows)
    }
    layers = config.num_layers * work.token * (sum(prompts) + scored) + work.pair * sum(
        pairs[w] for w in windows
    )
    return layers + 2.0 * config.hidden_size * config.vocab_size * scored
