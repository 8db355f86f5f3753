"""A model from disk, ready to sample and to score: what the command lines of generate and score share."""

import argparse
import pathlib
import sys
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from dpojax import sharding
from dpojax.data.chat import ChatTemplate
from dpojax.data.tokens import Tokenizer, chat_template, load_tokenizer
from dpojax.datasets import tokenizer_of
from dpojax.errors import ConfigError, DpojaxError
from dpojax.metrics import Progress, finite_json, say
from dpojax.models import Model, ModelConfig, hf
from dpojax.models.table import num_params, param_shapes
from dpojax.policy import place_decoder
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
    parser.add_argument("--tokenizer", default="", help="its folder or file (default: the model's own)")
    parser.add_argument("--chat_template", default="", help=".jinja file (default: the tokenizer's own)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation and the weights"
    )
    parser.add_argument("--tensor", type=int, default=1, help="devices that share each layer; the rest share the rows")
    parser.add_argument("--ignore_fields", default="", help="fields of config.json that are known not to matter")


def load_model(path: str, args: argparse.Namespace, *, quiet: bool = False) -> Loaded:
    """The model at `path` (see weights.open_weights), spread over all devices; `quiet`: without progress."""
    weights = open_weights(path, ignore=ignored_fields(args.ignore_fields))
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=args.tensor)
    kinds = dict(dtype=args.dtype, param_dtype=args.dtype, remat="none")
    model = place_decoder(weights.config, mesh, sharding.RULES, **kinds)
    shardings = sharding.param_shardings(param_shapes(weights.config), model.axes, mesh, sharding.RULES)
    progress = Progress(f"reading {path}", hf.num_tensors(weights.config), "tensors", enabled=not quiet)
    params = weights.load(shardings, jnp.dtype(args.dtype), progress)
    progress.close(f"{num_params(weights.config) / 1e6:,.2f}M parameters, {weights.config.family}, {args.dtype}")
    return Loaded(model, weights.config, params, mesh, args.dtype)


def open_tokenizer(path: str, args: argparse.Namespace) -> tuple[Tokenizer, ChatTemplate | None]:
    """The tokenizer of the model at `path`, or the one that --tokenizer names, with its chat template."""
    place = args.tokenizer or tokenizer_of(path)
    if not place:
        raise ConfigError(f"{path}: there is no tokenizer beside the weights; name one with --tokenizer")
    tokenizer = load_tokenizer(place)
    return tokenizer, chat_template(tokenizer, args.chat_template)


class Output:
    """A JSONL file that is whole or not there; "-" is the standard output."""

    def __init__(self, name: str):
        self.name = name
        self.path = None if name == "-" else pathlib.Path(name)
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.temporary = self.path.with_name(self.path.name + ".tmp")
                self.file = self.temporary.open("w", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"--out={name!r}: cannot be written: {error.strerror or error}") from error

    def write(self, row: dict[str, Any]) -> None:
        text = finite_json(row)
        print(text, file=None if self.path is None else self.file)

    def close(self) -> None:
        """Puts the file in its place."""
        if self.path is not None:
            self.file.close()
            self.temporary.replace(self.path)


def run_tool(main, parser: argparse.ArgumentParser, argv) -> int:
    """Runs main(args); errors that a user can mend become one line and an exit code."""
    args = parser.parse_args(argv)
    open_cache()
    try:
        main(args)
    except BrokenPipeError:
        sys.stdout = None
        return 1
    except DpojaxError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def note(message: str, out: Output) -> None:
    """Says something, unless the rows themselves go to the standard output."""
    if out.path is None:
        print(message, file=sys.stderr, flush=True)
    else:
        say(message)
