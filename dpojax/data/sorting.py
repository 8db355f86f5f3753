"""A world whose rewards can be verified: digits to be sorted, with exact answers.

Demonstrations come from a careless writer, who slips in some of them, so that a policy after SFT
sorts right about as often as the writer did, and has something to gain. Everything is a pure
function of a seed: no file, no network.
"""

import functools
import io
from collections.abc import Sequence

import numpy as np
import sentencepiece

from dpojax.data.records import in_memory
from dpojax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from dpojax.data.world import World

START = "sort "
END = " ="
FEWEST_DIGITS = 5
MOST_DIGITS = 8
SLIPS = 0.6  # share of demonstrations with a mistake


def make_prompt(rng: np.random.Generator) -> str:
    """A prompt with 5 to 8 digits: "sort 73916 ="."""
    count = int(rng.integers(FEWEST_DIGITS, MOST_DIGITS + 1))
    digits = "".join(map(str, rng.integers(0, 10, count)))
    return f"{START}{digits}{END}"


def sorted_digits(prompt: str) -> str:
    """The answer of a prompt: its digits in order."""
    return "".join(sorted(filter(str.isdecimal, prompt)))


def slip(rng: np.random.Generator, digits: str) -> str:
    """The digits with one mistake: two neighbours swapped, one left out, or one changed."""
    place = int(rng.integers(len(digits) - 1))
    kind = int(rng.integers(3))
    before, first, second, after = (
        digits[:place],
        digits[place],
        digits[place + 1],
        digits[place + 2 :],
    )
    if kind == 0 and first != second:
        return before + second + first + after
    if kind == 1:
        return before + second + after
    changed = str((int(first) + int(rng.integers(1, 10))) % 10)
    return before + changed + second + after


def true_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """1 for the digits of the prompt in order, white space at the ends apart; else 0."""
    return [
        float(response.strip() == sorted_digits(prompt))
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def train_tokenizer(texts: Sequence[str]) -> SentencePieceTokenizer:
    """A sentencepiece model of single characters; deterministic."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=64,  # at most: there are fewer characters
        hard_vocab_limit=False,
        model_type="char",
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceTokenizer(model.getvalue(), "world of sorting")


def _distinct_prompts(rng: np.random.Generator, count: int) -> list[str]:
    """Prompts of which no two are equal."""
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[make_prompt(rng)] = None
    return list(prompts)


def _demonstration(rng: np.random.Generator, prompt: str) -> dict[str, str]:
    digits = sorted_digits(prompt)
    if rng.random() < SLIPS:
        digits = slip(rng, digits)
    return {"prompt": prompt, "completion": f" {digits}"}


@functools.lru_cache(maxsize=2)
def make_sorting(
    seed: int, *, num_demonstrations: int = 8192, num_prompts: int = 8192, num_eval: int = 512
) -> World:
    """The world of a seed: demonstrations, prompts with answers, and held-out ones.

    No prompt stands in two of them.
    """
    # any fixed number keeps the world apart from other uses of the seed
    rng = np.random.default_rng([seed, 20240205])
    prompts = _distinct_prompts(rng, num_demonstrations + num_prompts + num_eval)
    demonstrated = prompts[:num_demonstrations]
    trained = prompts[num_demonstrations : num_demonstrations + num_prompts]
    held_out = prompts[num_demonstrations + num_prompts :]
    rows = [_demonstration(rng, prompt) for prompt in demonstrated]
    return World(
        in_memory("world:sorting/demonstrations", rows),
        in_memory("world:sorting/train", [_question(prompt) for prompt in trained]),
        in_memory("world:sorting/eval", [_question(prompt) for prompt in held_out]),
        train_tokenizer([row["prompt"] + row["completion"] for row in rows[:2000]]),
    )


def _question(prompt: str) -> dict[str, str]:
    return {"prompt": prompt, "answer": sorted_digits(prompt)}
