"""How long real preferences are: quantiles of three public data sets, for plans without data."""

from collections.abc import Sequence

import numpy as np

from dpojax.data.shapes import Lengths

# Tokens of prompt, chosen and rejected at 21 even quantiles; Llama 2's tokenizer, BOS and EOS
# included.
QUANTILES: dict[str, Sequence[Sequence[int]]] = {
    # OpenAI TL;DR comparisons (Stiennon et al. 2020), 3,491 pairs, prompts end in "TL;DR:"
    "tldr": (
        (
            13,
            165,
            189,
            216,
            234,
            256,
            271,
            289,
            309,
            326,
            342,
            362,
            379,
            391,
            408,
            424,
            442,
            459,
            477,
            498,
            563,
        ),
        (5, 18, 21, 23, 24, 26, 28, 29, 31, 32, 34, 36, 38, 39, 41, 44, 46, 50, 54, 64, 140),
        (2, 15, 18, 20, 22, 23, 25, 27, 28, 30, 31, 33, 35, 36, 38, 41, 43, 46, 50, 59, 147),
    ),
    # Anthropic HH, helpful-base, its test file (Bai et al. 2022), 2,339 usable pairs
    "hh": (
        (
            13,
            21,
            23,
            25,
            27,
            35,
            54,
            70,
            83,
            100,
            116,
            131,
            153,
            171,
            196,
            221,
            251,
            289,
            341,
            417,
            1051,
        ),
        (3, 8, 12, 17, 20, 24, 28, 33, 36, 41, 47, 53, 59, 65, 73, 84, 95, 109, 135, 173, 878),
        (3, 7, 10, 13, 15, 18, 21, 24, 27, 31, 34, 38, 44, 49, 56, 63, 72, 83, 101, 138, 522),
    ),
    # a subset of UltraFeedback (Cui et al. 2023), 994 pairs
    "ultrafeedback": (
        (
            6,
            11,
            14,
            17,
            21,
            26,
            32,
            43,
            59,
            76,
            88,
            104,
            126,
            148,
            178,
            234,
            308,
            396,
            504,
            714,
            1625,
        ),
        (
            2,
            11,
            22,
            31,
            47,
            66,
            88,
            119,
            160,
            201,
            243,
            289,
            351,
            404,
            471,
            519,
            580,
            661,
            743,
            885,
            1420,
        ),
        (
            2,
            12,
            23,
            36,
            55,
            72,
            96,
            117,
            150,
            183,
            213,
            257,
            307,
            340,
            384,
            440,
            506,
            552,
            632,
            759,
            1047,
        ),
    ),
}


def draw_lengths(name: str, *, max_prompt: int, max_response: int, count: int = 4096) -> Lengths:
    """Groups with the lengths of a data set of QUANTILES, cut as training cuts.

    Args:
      name: of the data set; "full": every prompt and response is as long as it may be.

    Prompt and responses are drawn apart: in these sets they are nearly uncorrelated (|r| < 0.2). A
    row of any shape must hold the longest group that the limits allow, which is therefore among
    them.
    """
    if name == "full":
        return Lengths(np.full(count, max_prompt), [[max_response, max_response]] * count)
    rng = np.random.default_rng(0)

    def draw(quantiles):
        return np.interp(rng.random(count), np.linspace(0, 1, len(quantiles)), quantiles).astype(
            int
        )

    prompts, chosen, rejected = map(draw, QUANTILES[name])
    prompts[0] = max_prompt
    chosen[0] = max_response
    rejected[0] = max_response
    responses = np.stack([chosen, rejected], axis=1).clip(1, max_response)
    return Lengths(prompts.clip(1, max_prompt), responses.tolist())
