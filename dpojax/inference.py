"""A model from disk, ready to sample and to score: what the command lines of generate and score share."""

import argparse
import pathlib
import sys
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from dpojax import sharding
from dpojax.command import run_command
from dpojax.config import check_template, unescape
from dpojax.data.chat import ChatTemplate
from dpojax.data.index import Dataset
from dpojax.data.records import Records
from dpojax.data.tokens import Limits, Tokenizer, chat_template, load_tokenizer, mask_ids
from dpojax.data.triples import RowReader
from dpojax.data.written import Writing, read_writing
from dpojax.datasets import tokenizer_of
from dpojax.errors import ConfigError
from dpojax.metrics import Progress, finite_json, say
from dpojax.models import Model, ModelConfig, hf
from dpojax.models.table import num_params, param_shapes
from dpojax.policy import check_memory, place_decoder
from dpojax.programs import open_cache
from dpojax.weights import ignored_fields, open_weights


class Loaded(NamedTuple):
    """A model with its parameters on the devices."""

    model: Model
    config: ModelConfig
    params: Any
    mesh: Mesh
    dtype: str


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how a model is loaded and computed."""
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation and the weights"
    )
    parser.add_argument("--tensor", type=int, default=1, help="devices that share each layer; the rest share the rows")
    parser.add_argument("--ignore_fields", default="", help="fields of config.json that are known not to matter")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that say how rows become tokens; unset, they are those of the run that wrote the model."""
    run = "default: as the run that wrote the model"
    parser.add_argument("--tokenizer", default="", help="its folder or file (default: the model's own)")
    parser.add_argument("--chat_template", default="", help=".jinja file (default: the tokenizer's own)")
    parser.add_argument("--prompt_template", default=None, help=f"with {{prompt}}; as data.prompt_template ({run})")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"a prompt that is text is a user's message for the chat template; as data.text_as_chat ({run})",
    )
    parser.add_argument(
        "--max_prompt_tokens", type=int, default=None, help=f"BOS included; longer prompts lose their start; 0: none ({run})"
    )
    parser.add_argument(
        "--max_response_tokens", type=int, default=None, help=f"EOS included; longer ones lose their end; 0: none ({run})"
    )
    parser.add_argument("--mask_tokens", default=None, help=f"formatting tokens that do not count; as data.mask_tokens ({run})")
    parser.add_argument(
        "--mask_template",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"what a chat template adds does not count; as data.mask_template ({run})",
    )


class Text(NamedTuple):
    """How a command line's rows become tokens."""

    tokenizer: Tokenizer | None
    chat: ChatTemplate | None  # None as well where a prompt template stands in its place
    writing: Writing

    def dataset(self, records: Records, kind: str) -> Dataset:
        """Rows as groups of one kind of `RowReader`."""
        own = self.writing
        limits = Limits(own.max_prompt_tokens or sys.maxsize, own.max_response_tokens or sys.maxsize)
        reader = RowReader(own.prompt_template, kind, self.chat, own.text_as_chat)
        masked = mask_ids(own.mask_tokens, self.tokenizer) if self.tokenizer is not None else frozenset()
        return Dataset(records, reader, self.tokenizer, limits, mask_ids=masked, mask_template=own.mask_template)


def tokenizer_place(name: str) -> str:
    """The tokenizer that a command line names: a file, its folder, or a workdir or model that holds one."""
    return (tokenizer_of(name) if pathlib.Path(name).is_dir() else "") or name


def settle_writing(place: str, model: str, args: argparse.Namespace, defaults: Writing) -> Writing:
    """Templates, limits and masks: as the command line says, else as the run that wrote tokenizer or model, else `defaults`.

    Raises: ConfigError for one that is out of its range.
    """
    of_run = read_writing(place) if place else None
    if of_run is None and model and (beside := tokenizer_of(model)):
        of_run = read_writing(beside)
    own = of_run or defaults
    given = {key: getattr(args, key) for key in Writing._fields if getattr(args, key, None) is not None}
    if args.chat is not None:
        given["text_as_chat"] = args.chat
    if "prompt_template" in given:
        given["prompt_template"] = unescape(given["prompt_template"])
        check_template(given["prompt_template"])
        if given["prompt_template"]:
            given.setdefault("text_as_chat", False)
    elif args.chat_template or args.chat:
        given["prompt_template"] = ""
    for name in ("max_prompt_tokens", "max_response_tokens"):
        if given.get(name, 0) < 0:
            raise ConfigError(f"--{name}={given[name]}: it must be at least 0")
    return own._replace(**given)


def open_text(model: str, args: argparse.Namespace, defaults: Writing, *, needed: bool = True) -> Text:
    """The tokenizer of the model at `model`, or the one that --tokenizer names, with its template, limits and masks.

    Args:
      needed: whether rows without a tokenizer are of no use.
    Raises: ConfigError where there is none, or a setting is wrong.
    """
    place = tokenizer_place(args.tokenizer) if args.tokenizer else tokenizer_of(model)
    writing = settle_writing(place, model, args, defaults)
    if not place:
        if needed:
            raise ConfigError(f"{model}: there is no tokenizer beside the weights; name one with --tokenizer")
        return Text(None, None, writing)
    tokenizer = load_tokenizer(place)
    for line in tokenizer.notes:
        print(line, file=sys.stderr, flush=True)
    chat = None if writing.prompt_template else chat_template(tokenizer, args.chat_template)
    return Text(tokenizer, chat, writing)


def load_model(path: str, args: argparse.Namespace, *, quiet: bool = False) -> Loaded:
    """The model at `path` (see weights.open_weights), spread over all devices; `quiet`: without progress."""
    weights = open_weights(path, ignore=ignored_fields(args.ignore_fields))
    check_memory(weights.config, args.dtype)
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=args.tensor)
    kinds = dict(dtype=args.dtype, param_dtype=args.dtype, remat="none")
    model = place_decoder(weights.config, mesh, sharding.RULES, **kinds)
    shardings = sharding.param_shardings(param_shapes(weights.config), model.axes, mesh, sharding.RULES)
    progress = Progress(f"reading {path}", hf.num_tensors(weights.config), "tensors", enabled=not quiet)
    params = weights.load(shardings, jnp.dtype(args.dtype), progress)
    progress.close(f"{num_params(weights.config) / 1e6:,.2f}M parameters, {weights.config.family}, {args.dtype}")
    return Loaded(model, weights.config, params, mesh, args.dtype)


class Output:
    """A JSONL file that is whole or not there; "-" is the standard output. A context, which removes what an error cut off."""

    def __init__(self, name: str):
        self.name = name
        self.path = None if name == "-" else pathlib.Path(name)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A device or a pipe is written to, and stays what it is.
            self.in_place = self.path.exists() and not self.path.is_file()
            self.temporary = self.path if self.in_place else self.path.with_name(self.path.name + ".tmp")
            if not self.in_place and self.temporary.exists() and not self.temporary.is_file():
                raise ConfigError(f"--out={name!r}: {self.temporary} is no plain file")
            self.file = self.temporary.open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out={name!r}: cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind, *exception) -> None:
        if self.path is None or self.file.closed:
            return
        if kind is None:
            self.close()
            return
        self.file.close()
        if not self.in_place:
            self.temporary.unlink(missing_ok=True)

    def write(self, row: dict[str, Any]) -> None:
        text = finite_json(row)
        print(text, file=None if self.path is None else self.file)

    def close(self) -> None:
        """Puts the file in its place."""
        if self.path is not None:
            self.file.close()
            if not self.in_place:
                self.temporary.replace(self.path)


def run_tool(main, parser: argparse.ArgumentParser, argv) -> int:
    """Runs main(args); errors that a user can mend become one line and an exit code."""
    args = parser.parse_args(argv)

    def tool(stop) -> None:
        open_cache()
        main(args)

    return run_command(tool)


def note(message: str, out: Output) -> None:
    """Says something, unless the rows themselves go to the standard output."""
    if out.path is None:
        print(message, file=sys.stderr, flush=True)
    else:
        say(message)
