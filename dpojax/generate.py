"""Prompts -> sampled responses, as JSONL: python -m dpojax.generate --model=DIR --prompts=FILE --out=FILE."""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dpojax import sampling, sharding
from dpojax.command import leave
from dpojax.config import unescape
from dpojax.data.prompts import Prompt, PromptReader
from dpojax.data.sources import open_sources
from dpojax.data.tokens import Tokenizer, stop_ids
from dpojax.data.written import Writing
from dpojax.errors import ConfigError, NumericsError
from dpojax.flags import Parser
from dpojax.inference import (
    Loaded,
    Output,
    Text,
    add_model_arguments,
    add_text_arguments,
    load_model,
    note,
    open_text,
    run_tool,
)
from dpojax.metrics import Progress
from dpojax.policy import check_positions
from dpojax.weights import ignored_fields, open_weights

# Largest difference of a token's log-prob between sampling and the training forward, nats.
BOUND = {"float32": 1e-4, "bfloat16": 0.25}


def parser() -> Parser:
    """The command line."""
    made = Parser(
        prog="python -m dpojax.generate", description="Samples responses to prompts, reproducibly by --seed, as JSONL."
    )
    made.add_argument("--model", required=True, help="Hugging Face directory, PEFT adapter, dpojax workdir or llama2.c .bin")
    made.add_argument("--prompts", default="", help="file of rows with 'prompt' (text or messages), 'messages' or 'prompt_ids'")
    made.add_argument("--prompt", default="", help="one prompt, instead of a file")
    made.add_argument("--out", default="-", help="JSONL: each row with its 'responses' added; '-': standard output")
    made.add_argument("--num_samples", type=int, default=1, help="responses to each prompt")
    made.add_argument("--max_new_tokens", type=int, default=128)
    made.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    made.add_argument("--top_k", type=int, default=0, help="0: off")
    made.add_argument("--top_p", type=float, default=1.0, help="1: off")
    made.add_argument("--stop", action="append", default=[], help="text that ends a response and is cut off; may be repeated")
    made.add_argument("--seed", type=int, default=0, help="a draw depends on it and on the row's place in the file")
    made.add_argument("--batch_size", type=int, default=16, help="prompts at a time")
    made.add_argument("--token_logps", action="store_true", help="with the ids and log-probs of all tokens")
    made.add_argument("--limit", type=int, default=0, help="only the first so many rows; 0: all")
    add_text_arguments(made)
    add_model_arguments(made)
    return made


def read_prompts(args, text: Text) -> list[Prompt]:
    """All prompts. Raises ConfigError or DataError for the first that cannot be read."""
    if bool(args.prompts) == bool(args.prompt):
        raise ConfigError("name one of --prompts=FILE and --prompt=TEXT")
    assert text.tokenizer is not None
    reader = PromptReader(text.tokenizer, text.chat, text.writing)
    if args.prompt:
        return reader.read_all([({"prompt": unescape(args.prompt)}, "--prompt")])
    records = open_sources(args.prompts, "--prompts")
    count = min(records.size, args.limit or records.size)
    return reader.read_all((records.get(i), records.where(i)) for i in range(count))


def check_settings(args) -> None:
    """Raises ConfigError for a setting out of its range."""
    least = {"num_samples": 1, "max_new_tokens": 1, "top_k": 0, "seed": 0, "batch_size": 1, "limit": 0}
    for name, value in least.items():
        if getattr(args, name) < value:
            raise ConfigError(f"--{name}={getattr(args, name)}: it must be at least {value}")
    if not math.isfinite(args.temperature) or args.temperature < 0:
        raise ConfigError(f"--temperature={args.temperature}: it must be finite and >= 0")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top_p={args.top_p}: it must be in (0, 1]")
    args.stop = [unescape(s) for s in args.stop]
    if any(not s for s in args.stop):
        raise ConfigError("--stop='': it must not be empty")


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings starts in `text`, or None."""
    places = [p for p in map(text.find, stops) if p >= 0]
    return min(places, default=None)


def stopper(tokenizer: Tokenizer, stops: Sequence[str]):
    """ids -> how many of them a stop string ends, or None: the fewest whose text holds one."""

    def stopped(ids: list[int]) -> int | None:
        if first_stop(tokenizer.decode(ids), stops) is None:
            return None
        low, high = 1, len(ids)  # the text of more ids holds what the text of fewer holds
        while low < high:
            middle = (low + high) // 2
            if first_stop(tokenizer.decode(ids[:middle]), stops) is None:
                low = middle + 1
            else:
                high = middle
        return low

    return stopped if stops else None


def check_logps(loaded: Loaded, prompts, responses, *, width: int, each: int, settings, batch_size: int) -> float:
    """The largest difference per token between sampled log-probs and the training forward's, over one batch, nats.

    Raises: NumericsError past BOUND.
    """
    shards = sharding.num_shards(loaded.mesh)
    scorer = sampling.make_scorer(loaded.model, prompt_width=width, num_shards=shards, chunk=256)
    totals = sampling.score_batches(
        jax.jit(scorer),
        loaded.params,
        [prompts[i // each] for i in range(len(responses))],
        [r.ids for r in responses],
        width=width,
        batch_size=batch_size,
        max_new_tokens=settings.max_new_tokens,
        pad_id=settings.pad_id,
        put=sampling.rows_put(loaded.mesh),
        fetch=sampling.fetch_whole,
    )
    sampled = np.asarray([r.logps.sum() for r in responses])
    lengths = np.asarray([max(1, len(r.ids)) for r in responses])
    worst = float(np.max(np.abs(totals - sampled) / lengths))
    if not worst <= BOUND[loaded.dtype]:
        raise NumericsError(
            f"the sampled log-probs differ from the training forward's by {worst:.1e} nats per token, over {BOUND[loaded.dtype]:g}"
        )
    return worst


def describe(response: sampling.Response, tokenizer: Tokenizer, ends: Sequence[int], args) -> dict[str, Any]:
    """A response as it is written."""
    ids = response.ids[:-1] if response.ids and response.ids[-1] in ends else response.ids
    text = tokenizer.decode(ids)
    cut = first_stop(text, args.stop)
    found: dict[str, Any] = {
        "text": text if cut is None else text[:cut],
        "num_tokens": len(response.ids),
        "logp": float(response.logps.sum()),
        "finish": "stop" if response.ended else "length",
    }
    if args.token_logps:
        found |= {"ids": response.ids, "token_logps": [float(x) for x in response.logps]}
    return found


def generate(args: argparse.Namespace) -> None:
    """Samples, checks the log-probs of the first batch, and writes."""
    check_settings(args)
    open_weights(
        args.model, ignore=ignored_fields(args.ignore_fields), setting="--model"
    )  # one that is not there is said first
    text = open_text(args.model, args, Writing())
    prompts = read_prompts(args, text)
    with Output(args.out) as out:
        _draw_responses(args, text, prompts, out)


def _draw_responses(args: argparse.Namespace, text: Text, prompts: list[Prompt], out: Output) -> None:
    tokenizer = text.tokenizer
    assert tokenizer is not None
    loaded = load_model(args.model, args, quiet=out.path is None)
    ids = [p.ids for p in prompts]
    check_positions(loaded.config, max(map(len, ids)) + args.max_new_tokens, "--max_prompt_tokens or --max_new_tokens")
    if max(map(max, ids)) >= loaded.config.vocab_size:
        raise ConfigError(f"a prompt holds the token id {max(map(max, ids))}, the model has {loaded.config.vocab_size}")
    ends = stop_ids(tokenizer, text.chat)
    settings = sampling.SampleSettings(
        args.max_new_tokens, args.temperature, args.top_k, args.top_p, ends, tokenizer.pad_id, args.num_samples
    )
    jit = lambda name, function, **options: jax.jit(function, **options)
    sampler = sampling.compile_sampler(loaded.model, settings, loaded.mesh, jit)
    size, width = sampling.whole_batch(args.batch_size, len(ids), loaded.mesh), sampling.prompt_width(ids)
    progress = Progress("sampling", len(ids), "prompts", enabled=out.path is not None)
    draw = functools.partial(
        sampling.generate, sampler, loaded.params, settings=settings, width=width, batch_size=size,
        put=sampling.rows_put(loaded.mesh), fetch=sampling.fetch_whole, stopped=stopper(tokenizer, args.stop),
    )  # fmt: skip
    responses = draw(ids, seed=args.seed, progress=progress)
    for i, response in enumerate(responses):
        if not np.isfinite(response.logps).all():
            raise NumericsError(
                f"prompt {i // args.num_samples}: the log-prob of a sampled token is not finite; compute with --dtype=float32, or "
                "look at the weights"
            )
    first = responses[: size * args.num_samples]
    worst = check_logps(loaded, ids, first, width=width, each=args.num_samples, settings=settings, batch_size=size)
    for i, prompt in enumerate(prompts):
        own = responses[i * args.num_samples : (i + 1) * args.num_samples]
        out.write({**prompt.row, "responses": [describe(r, tokenizer, ends, args) for r in own]})
    out.close()
    tokens = sum(len(r.ids) for r in responses)
    progress.close(f"{len(responses):,} responses, {tokens:,} tokens, written to {args.out}")
    note(f"log-probs: sampled and training forward differ by at most {worst:.1e} nats per token ({len(first)} responses)", out)


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return run_tool(generate, parser(), argv)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
