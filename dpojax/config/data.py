"""Settings of the data: where preferences come from, and how they become rows."""

import dataclasses
import os
import string
from typing import Annotated, Any

from dpojax.config.limits import (
    Count,
    CountOrUnset,
    CountOrZero,
    OneOf,
    Share,
    ShareBelowOne,
    require,
)
from dpojax.errors import ConfigError

# What data.train=world:NAME stands for: data that dpojax makes itself.
WORLDS = ("summaries", "sorting")
WORLD_PREFIX = "world:"

LAYOUTS = ("auto", "shared", "slots", "separate")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where preferences come from, and how they become rows."""

    train: str  # files, folders and globs of them, hub datasets, comma-separated; "" = the embedded
    # world of summaries, world:sorting = the one with answers that can be verified
    eval: str  # held-out pairs, the same way, or several by name (NAME=FILE,NAME=FILE); "" =
    # eval_share of data.train
    eval_share: ShareBelowOne
    # of data.train's prompts that are held out where data.eval is ""; 0 = none
    seed: CountOrUnset  # of its order, flipped labels and the embedded world; -1 = the run's seed
    shuffle: bool  # False keeps the file's order
    flip_labels: Share  # of training pairs whose labels are swapped, for noise ablations
    prompt_template: str  # with {prompt}; "" leaves prompts as they are
    text_as_chat: bool  # where there is a chat template, a prompt that is text is a user's message
    # for it
    max_prompt_tokens: CountOrZero
    # BOS included; prompts are cut from the left; 0 = half of the model's positions, 512 at most
    max_response_tokens: CountOrZero
    # EOS included; responses are cut from the right; 0 = half of the model's positions, 512 at most
    layout: Annotated[str, OneOf(LAYOUTS)]
    # of rows: prompts once and packed (shared), by parts of a row (slots; TPU), one response a row
    # (separate, the oracle)
    row_tokens: CountOrZero
    # length of a packed row; 0 = the multiple of 128 that wastes least on this data
    micro_batch_tokens: Count
    # of a micro-batch on each data shard; a step takes as many as it needs
    eval_max_pairs: CountOrZero  # held-out pairs that are evaluated; 0 = all
    on_bad_line: Annotated[str, OneOf(("error", "skip"))]
    # what a line that cannot be read does: end the run, or be left out, up to max_bad_share
    max_bad_share: Share  # with skip: more than this share of bad lines is an error after all
    chat_template: str  # .jinja file for message lists; "" = the tokenizer's own, where there is no
    # prompt_template
    mask_template: bool  # what a chat template puts around an answer counts in no log-prob of the
    # preference stage
    mask_tokens: str  # comma-separated formatting tokens that count in no log-prob of the
    # preference stage
    workers: CountOrZero  # processes that tokenise and pack; 0 = threads of this process

    def check(self) -> None:
        """Rules that look at this section alone."""
        tokens = self.max_prompt_tokens
        must = "at least 2, or 0 for the model's own"
        require(tokens != 1, "data.max_prompt_tokens", tokens, must)
        most = 4 * (os.cpu_count() or 1)
        must = f"at most {most}, 4 for each core here"
        require(self.workers <= most, "data.workers", self.workers, must)
        check_template(self.prompt_template)
        if self.train.startswith(WORLD_PREFIX):
            choices = tuple(WORLD_PREFIX + name for name in WORLDS)
            OneOf(choices).check("data.train", self.train)
            must = "0: a world brings its own held-out prompts"
            require(not self.eval_share, "data.eval_share", self.eval_share, must)
        if self.eval_share and not self.train:
            raise ConfigError(
                f"data.train is '' while data.eval_share is {self.eval_share:g}; name a file of"
                " preferences in data.train"
            )
        if self.eval_share and self.eval:
            raise ConfigError(
                f"data.eval_share is {self.eval_share:g} while data.eval is {self.eval!r}; set one"
                " of the two"
            )


def unescape(template: Any) -> Any:
    """A template from a command line: `\\n` and `\\t`, which shells pass on as they are, become
    what they mean.
    """
    return template.replace("\\n", "\n").replace("\\t", "\t")


def check_template(template: str) -> None:
    """Raises ConfigError for a prompt template without {prompt}, or with another field."""
    try:
        fields = [
            (name, spec, conversion)
            for _, name, spec, conversion in string.Formatter().parse(template)
            if name is not None
        ]
    except ValueError:  # a brace alone
        fields = [(None, None, None)]
    usable = not template or (fields and all(field == ("prompt", "", None) for field in fields))
    must = "a template with {prompt} and no other field (double other braces)"
    require(bool(usable), "data.prompt_template", template, must)
