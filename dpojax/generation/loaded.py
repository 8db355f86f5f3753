"""A model from disk, ready to sample and to score, and how its text is written."""

import argparse
import pathlib
import sys
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from dpojax.config.data import check_template, unescape
from dpojax.config.model import SHARDING_RULES
from dpojax.data.chat import ChatTemplate
from dpojax.data.dataset import Dataset
from dpojax.data.open_tokenizer import chat_template, load_tokenizer
from dpojax.data.records import Records
from dpojax.data.rows import RowReader
from dpojax.data.tokenizers import Tokenizer
from dpojax.data.tokens import Limits, mask_ids
from dpojax.data.written import Writing, read_writing
from dpojax.errors import ConfigError
from dpojax.models.config import ModelConfig
from dpojax.models.decoder import Model
from dpojax.models.params import num_params, param_shapes
from dpojax.models.placed import check_memory, place_decoder
from dpojax.runtime import sharding
from dpojax.runtime.log import Progress
from dpojax.runtime.mesh import make_mesh
from dpojax.weights import huggingface
from dpojax.weights.open import ignored_fields, open_weights
from dpojax.weights.tokenizer import tokenizer_of

# Tokens whose logits exist at a time: the float32 logits of 128k pieces take 128 MB then.
LOGPS_CHUNK_TOKENS = 256


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how a model is loaded and computed."""
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the computation and the weights",
    )
    parser.add_argument(
        "--tensor",
        type=int,
        default=1,
        help="devices that share each layer; the rest share the rows",
    )
    parser.add_argument(
        "--ignore_fields", default="", help="fields of config.json that are known not to matter"
    )


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how rows become tokens.

    Where they are unset, the run that wrote the model decides.
    """
    run = "default: as the run that wrote the model"
    parser.add_argument(
        "--tokenizer", default="", help="its folder or file (default: the model's own)"
    )
    parser.add_argument(
        "--chat_template", default="", help=".jinja file (default: the tokenizer's own)"
    )
    parser.add_argument(
        "--prompt_template", default=None, help=f"with {{prompt}}; as data.prompt_template ({run})"
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=(
            "a prompt that is text is a user's message for the chat template; as data.text_as_chat"
            f" ({run})"
        ),
    )
    parser.add_argument(
        "--max_prompt_tokens",
        type=int,
        default=None,
        help=f"BOS included; longer prompts lose their start; 0: none ({run})",
    )
    parser.add_argument(
        "--max_response_tokens",
        type=int,
        default=None,
        help=f"EOS included; longer ones lose their end; 0: none ({run})",
    )
    parser.add_argument(
        "--mask_tokens",
        default=None,
        help=f"formatting tokens that do not count; as data.mask_tokens ({run})",
    )
    parser.add_argument(
        "--mask_template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"what a chat template adds does not count; as data.mask_template ({run})",
    )


class Loaded(NamedTuple):
    """A model with its parameters on the devices."""

    model: Model
    config: ModelConfig
    params: Any
    mesh: Mesh
    dtype: str  # of the computation and the parameters


class Text(NamedTuple):
    """How a command line's rows become tokens."""

    tokenizer: Tokenizer | None
    chat: ChatTemplate | None  # None as well where a prompt template stands in its place
    writing: Writing

    def dataset(self, records: Records, kind: str) -> Dataset:
        """Rows as groups of one kind of `RowReader`."""
        writing = self.writing
        reader = RowReader(writing.prompt_template, kind, self.chat, writing.text_as_chat)
        limits = Limits(
            writing.max_prompt_tokens or sys.maxsize, writing.max_response_tokens or sys.maxsize
        )
        masked: frozenset[int] = frozenset()
        if self.tokenizer is not None:
            masked = frozenset(mask_ids(writing.mask_tokens, self.tokenizer))
        return Dataset(
            records,
            reader,
            self.tokenizer,
            limits,
            mask_ids=masked,
            mask_template=writing.mask_template,
        )


def tokenizer_place(name: str) -> str:
    """The tokenizer that a command line names: a file, its folder, or a workdir or model that holds
    one.
    """
    if pathlib.Path(name).is_dir():
        return tokenizer_of(name) or name
    return name


def _writing_of_run(place: str, model: str) -> Writing | None:
    """How the run that wrote the tokenizer at `place`, or else the model, wrote its rows."""
    writing = None
    if place:
        writing = read_writing(place)
    if writing is None and model:
        beside_model = tokenizer_of(model)
        if beside_model:
            writing = read_writing(beside_model)
    return writing


def settle_writing(place: str, model: str, args: argparse.Namespace, defaults: Writing) -> Writing:
    """Templates, limits and masks: as the command line says, else as the run that wrote tokenizer
    or model, else `defaults`.

    Raises: ConfigError for one that is out of its range.
    """
    asked: dict[str, Any] = {
        "prompt_template": args.prompt_template,
        "text_as_chat": args.chat,
        "max_prompt_tokens": args.max_prompt_tokens,
        "max_response_tokens": args.max_response_tokens,
        "mask_tokens": args.mask_tokens,
        "mask_template": args.mask_template,
    }
    changes = {field: value for field, value in asked.items() if value is not None}
    if "prompt_template" in changes:
        template = unescape(changes["prompt_template"])
        check_template(template)
        changes["prompt_template"] = template
        if template:
            # The template stands in the place of a chat template, unless --chat asks for both.
            changes.setdefault("text_as_chat", False)
    elif args.chat_template or args.chat:
        changes["prompt_template"] = ""
    for field in ("max_prompt_tokens", "max_response_tokens"):
        if changes.get(field, 0) < 0:
            raise ConfigError(f"--{field}={changes[field]}: it must be at least 0")
    return (_writing_of_run(place, model) or defaults)._replace(**changes)


def open_text(
    model: str, args: argparse.Namespace, defaults: Writing, *, needed: bool = True
) -> Text:
    """The tokenizer of the model at `model`, or the one that --tokenizer names, with its template,
    limits and masks.

    Args:
      needed: whether rows without a tokenizer are of no use.
    Raises: ConfigError where there is none, or a setting is wrong.
    """
    if args.tokenizer:
        place = tokenizer_place(args.tokenizer)
    else:
        place = tokenizer_of(model)
    writing = settle_writing(place, model, args, defaults)
    if not place:
        if needed:
            raise ConfigError(
                f"{model}: there is no tokenizer beside the weights; name one with --tokenizer"
            )
        return Text(None, None, writing)
    tokenizer = load_tokenizer(place)
    for line in tokenizer.notes:
        print(line, file=sys.stderr, flush=True)
    chat = None
    if not writing.prompt_template:
        chat = chat_template(tokenizer, args.chat_template)
    return Text(tokenizer, chat, writing)


def load_model(
    path: str, args: argparse.Namespace, *, quiet: bool = False, scalar_head: bool = False
) -> Loaded:
    """The model at `path` (see weights.open_weights), spread over all devices.

    Args:
      quiet: whether no progress is shown: the rows themselves go to the terminal.
      scalar_head: whether it is a reward model.
    """
    ignore = ignored_fields(args.ignore_fields)
    weights = open_weights(path, ignore=ignore, setting="--model", scalar_head=scalar_head)
    check_memory(weights.config, args.dtype)
    mesh = make_mesh(data=-1, fsdp=1, tensor=args.tensor)
    model = place_decoder(
        weights.config,
        mesh,
        SHARDING_RULES,
        dtype=args.dtype,
        param_dtype=args.dtype,
        remat="none",
    )
    shapes = param_shapes(weights.config)
    shardings = sharding.param_shardings(shapes, model.axes, mesh, SHARDING_RULES)
    progress = Progress(
        f"reading {path}", huggingface.num_tensors(weights.config), "tensors", enabled=not quiet
    )
    params = weights.load(shardings, jnp.dtype(args.dtype), progress)
    progress.close(
        f"{num_params(weights.config) / 1e6:,.2f}M parameters, {weights.config.family},"
        f" {args.dtype}"
    )
    return Loaded(model, weights.config, params, mesh, args.dtype)
