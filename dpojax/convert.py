"""Any model that dpojax reads -> a Hugging Face directory: python -m dpojax.convert --model=DIR
--out=DIR.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp

from dpojax.command_line import Parser, leave, run_tool
from dpojax.config.model import SHARDING_RULES
from dpojax.errors import ConfigError
from dpojax.models.params import logical_axes, param_shapes
from dpojax.runtime import sharding
from dpojax.runtime.log import Progress
from dpojax.runtime.mesh import make_mesh
from dpojax.weights import export, huggingface
from dpojax.weights.open import ignored_fields, open_weights


def parser() -> Parser:
    """The command line."""
    flags = Parser(
        prog="python -m dpojax.convert",
        description=(
            "Writes a model as a Hugging Face directory: a dpojax workdir or checkpoint (adapters"
            " are merged), a PEFT adapter with its base, a llama2.c .bin file, or another Hugging"
            " Face directory (e.g. in another dtype)."
        ),
    )
    flags.add_argument("--model", required=True, help="what to read")
    flags.add_argument("--out", required=True, help="folder to write")
    flags.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights on disk",
    )
    flags.add_argument(
        "--max_shard_gib",
        type=float,
        default=5.0,
        help="a larger model gets several files and an index",
    )
    flags.add_argument(
        "--ignore_fields", default="", help="fields of config.json that are known not to matter"
    )
    return flags


def convert(args: argparse.Namespace) -> None:
    """Reads and writes, tensor by tensor. Raises ConfigError for what cannot be read or written."""
    if not args.max_shard_gib > 0:
        raise ConfigError(f"--max_shard_gib={args.max_shard_gib}: it must be > 0")
    weights = open_weights(args.model, ignore=ignored_fields(args.ignore_fields))
    out = pathlib.Path(args.out)
    if out.exists() and pathlib.Path(args.model).resolve() == out.resolve():
        raise ConfigError(f"--out={args.out!r} is what is read; name another folder")
    mesh = make_mesh(data=1, fsdp=-1, tensor=1)
    dtype = jnp.dtype("float32")  # float16 is rounded from it when it is written
    if args.dtype == "bfloat16":
        dtype = jnp.dtype("bfloat16")
    shardings = sharding.param_shardings(
        param_shapes(weights.config), logical_axes(weights.config), mesh, SHARDING_RULES
    )
    total = huggingface.num_tensors(weights.config)
    progress = Progress(f"reading {args.model}", total, "tensors", enabled=True)
    params = weights.load(shardings, dtype, progress)
    progress.close(f"{total} tensors")
    progress = Progress(f"writing {args.out}", total, "tensors", enabled=True)
    fields = weights.fields
    if not fields:
        bos_id, eos_id = export.special_ids(weights.companions)
        fields = export.llama_fields(weights.config, bos_id=bos_id, eos_id=eos_id)
    export.export_params(
        params,
        weights.config,
        out,
        fields=fields,
        dtype=args.dtype,
        companions=weights.companions,
        max_shard_bytes=int(args.max_shard_gib * 2**30),
        progress=progress,
    )
    progress.close(f"{weights.config.family}, {args.dtype}")


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return run_tool(convert, parser(), argv)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
