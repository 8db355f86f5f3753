"""Config, data and weights -> what of the settings does not suit the weights at hand, said at the
start.

The embedded world's defaults train a small model from random weights; pretrained weights want other
rates and their own template. Nothing is refused here: a setting may be meant.
"""

from typing import NamedTuple

from dpojax.config.schema import Config
from dpojax.data.dataset import Dataset
from dpojax.data.index import Index
from dpojax.data.open_tokenizer import chat_template
from dpojax.data.written import read_writing
from dpojax.weights.open import Weights

FULL_RATE = 2e-5  # published recipes of full fine-tuning lie between 2e-7 and 1e-5

ADAPTER_RATE = 5e-6  # adapters are trained at 1e-5 to 2e-4

MAX_EPOCHS = 5.0  # published recipes take 1 to 3

LOOKED_AT = 50  # rows


class _Text(NamedTuple):
    """What the first rows look like as text."""

    rows: int
    glued: int  # with no white space between prompt and response
    posts: int  # whose prompt is a post of the TL;DR data


def _look(data: Dataset, index: Index) -> _Text:
    rows = glued = posts = 0
    for row in index.rows[:LOOKED_AT].tolist():
        group = data.text_group(row)
        if not isinstance(group.prompt, str) or group.contents is not None:
            continue  # ids, and what a chat template wrote
        if not group.responses:
            continue  # a prompt that waits for its answer
        rows += 1
        glued += bool(group.prompt[-1:].strip()) and all(
            str(response)[:1].strip() for response in group.responses
        )
        posts += "POST:" in group.prompt or "SUBREDDIT:" in group.prompt
    return _Text(rows, glued, posts)


def unfit_settings(
    config: Config, data: Dataset, index: Index, weights: Weights | None, epochs: float
) -> list[str]:
    """What is to be said of the settings, a sentence each; nothing of random weights and the
    embedded world.

    Args:
      data, index: the training data.
      epochs: that the run takes.
    """
    if weights is None or config.embedded:
        return []
    found = []
    rate = config.optim.learning_rate
    template = config.data.prompt_template
    if config.num_steps and not config.lora.rank and rate > FULL_RATE:
        found.append(
            f"warning: optim.learning_rate={rate:g} is a rate for random weights or adapters; full"
            " fine-tuning of pretrained weights takes 5e-7 to 1e-5 (configs/dpo.py: 1e-6)"
        )
    if config.num_steps and config.lora.rank and rate < ADAPTER_RATE:
        found.append(
            f"warning: optim.learning_rate={rate:g} is a rate for all parameters; adapters take"
            " 1e-5 to 2e-4"
        )
    if epochs > MAX_EPOCHS:
        found.append(
            f"warning: num_steps={config.num_steps} are {epochs:.1f} epochs of this data;"
            " pretrained weights take 1 to 3 (num_epochs=1)"
        )
    if template and data.tokenizer is not None and chat_template(data.tokenizer) is not None:
        found.append(
            f"warning: data.prompt_template={template!r} stands in for the tokenizer's own chat"
            " template, which the weights know; data.prompt_template='' takes that"
        )
    text = _look(data, index)
    if "TL;DR" in template and text.rows and text.posts < text.rows / 2:
        found.append(
            f"warning: data.prompt_template={template!r} asks for summaries, and"
            f" {text.rows - text.posts} of the first {text.rows} prompts are no posts"
        )
    if text.glued > text.rows / 2:
        found.append(
            f"note: {text.glued} of the first {text.rows} responses follow their prompt without"
            " white space; --config.data.prompt_template='{prompt}\\n\\n' sets a blank line"
            " between"
        )
    before = read_writing(weights.companions) if weights.companions is not None else None
    if before is not None and before.prompt_template != template:
        found.append(
            f"warning: model.init was trained with data.prompt_template={before.prompt_template!r},"
            f" and this run sets {template!r}"
        )
    return found
