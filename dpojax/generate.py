"""Prompts -> sampled responses, as JSONL: python -m dpojax.generate --model=DIR --prompts=FILE
--out=FILE.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpojax.algorithms.model_rewards import RewardOfModel
from dpojax.command_line import (
    Output,
    Parser,
    leave,
    note,
    run_tool,
)
from dpojax.config.data import unescape
from dpojax.data.open_tokenizer import stop_ids
from dpojax.data.prompts import Prompt, PromptReader
from dpojax.data.sources import open_sources
from dpojax.data.tokenizers import Tokenizer
from dpojax.data.written import Writing
from dpojax.errors import ConfigError, NumericsError
from dpojax.evaluation.best_of import best_places, describe_choice, sft_row
from dpojax.generation.decoding import SampleSettings, compile_sampler
from dpojax.generation.loaded import (
    LOGPS_CHUNK_TOKENS,
    Loaded,
    Text,
    add_model_arguments,
    add_text_arguments,
    load_model,
    open_text,
)
from dpojax.generation.open_model import OpenModel
from dpojax.generation.sampler import (
    Response,
    draw,
    fetch_whole,
    prompt_width,
    rows_put,
    whole_batch,
)
from dpojax.generation.scorer import make_scorer, score_batches
from dpojax.models.placed import check_positions
from dpojax.runtime.log import Progress
from dpojax.runtime.mesh import num_shards
from dpojax.training.rewards import make_rewards_step
from dpojax.weights.open import ignored_fields, open_weights

# The largest difference of a token's log-prob between sampling and the training forward, nats.
BOUND = {"float32": 1e-4, "bfloat16": 0.25}


def parser() -> Parser:
    """The command line."""
    flags = Parser(
        prog="python -m dpojax.generate",
        description="Samples responses to prompts, reproducibly by --seed, as JSONL.",
    )
    flags.add_argument(
        "--model",
        required=True,
        help="Hugging Face directory, PEFT adapter, dpojax workdir or llama2.c .bin",
    )
    flags.add_argument(
        "--prompts",
        default="",
        help="file of rows with 'prompt' (text or messages), 'messages' or 'prompt_ids'",
    )
    flags.add_argument("--prompt", default="", help="one prompt, instead of a file")
    flags.add_argument(
        "--out",
        default="-",
        help="JSONL: each row with its 'responses' added; '-': standard output",
    )
    flags.add_argument("--num_samples", type=int, default=1, help="responses to each prompt")
    flags.add_argument(
        "--best_of",
        type=int,
        default=0,
        help="draws so many responses and keeps the num_samples best by --reward_model; 0: off",
    )
    flags.add_argument(
        "--reward_model",
        default="",
        help=(
            "of --best_of: a run with the stage reward_model, or a classifier of transformers with"
            " one label"
        ),
    )
    flags.add_argument(
        "--demonstrations",
        action="store_true",
        help="writes a row for each response, as SFT takes it (rejection sampling)",
    )
    flags.add_argument("--max_new_tokens", type=int, default=128)
    flags.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    flags.add_argument("--top_k", type=int, default=0, help="0: off")
    flags.add_argument("--top_p", type=float, default=1.0, help="1: off")
    flags.add_argument(
        "--stop",
        action="append",
        default=[],
        help="text that ends a response and is cut off; may be repeated",
    )
    flags.add_argument(
        "--seed",
        type=int,
        default=0,
        help="a draw depends on it and on the row's place in the file",
    )
    flags.add_argument("--batch_size", type=int, default=16, help="prompts at a time")
    flags.add_argument(
        "--token_logps", action="store_true", help="with the ids and log-probs of all tokens"
    )
    flags.add_argument("--limit", type=int, default=0, help="only the first so many rows; 0: all")
    add_text_arguments(flags)
    add_model_arguments(flags)
    return flags


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
    at_least = {
        "num_samples": (args.num_samples, 1),
        "best_of": (args.best_of, 0),
        "max_new_tokens": (args.max_new_tokens, 1),
        "top_k": (args.top_k, 0),
        "seed": (args.seed, 0),
        "batch_size": (args.batch_size, 1),
        "limit": (args.limit, 0),
    }
    for flag, (value, least) in at_least.items():
        if value < least:
            raise ConfigError(f"--{flag}={value}: it must be at least {least}")
    if not math.isfinite(args.temperature) or args.temperature < 0:
        raise ConfigError(f"--temperature={args.temperature}: it must be finite and >= 0")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top_p={args.top_p}: it must be in (0, 1]")
    if bool(args.best_of) != bool(args.reward_model):
        raise ConfigError("name both --best_of=N and --reward_model=DIR, or none of them")
    if args.best_of and args.best_of < args.num_samples:
        raise ConfigError(
            f"--best_of={args.best_of}: it must be at least --num_samples={args.num_samples}"
        )
    args.stop = [unescape(s) for s in args.stop]
    if any(not s for s in args.stop):
        raise ConfigError("--stop='': it must not be empty")


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of the stop strings starts in `text`, or None."""
    places = [p for p in map(text.find, stops) if p >= 0]
    return min(places, default=None)


def stopper(tokenizer: Tokenizer, stops: Sequence[str]) -> Callable[[list[int]], int | None] | None:
    """The function ids -> how many of them a stop string ends: the fewest whose text holds one, or
    None. Without stop strings there is no such function.
    """
    if not stops:
        return None

    def stopped(ids: list[int]) -> int | None:
        if first_stop(tokenizer.decode(ids), stops) is None:
            return None
        # A search by halves: the text of more ids holds what the text of fewer holds.
        low = 1
        high = len(ids)
        while low < high:
            middle = (low + high) // 2
            if first_stop(tokenizer.decode(ids[:middle]), stops) is None:
                low = middle + 1
            else:
                high = middle
        return low

    return stopped


def check_logps(
    loaded: Loaded, prompts, responses, *, width: int, each: int, settings, batch_size: int
) -> float:
    """The largest difference per token between sampled log-probs and those of the training forward,
    over one batch, nats.

    Args:
      each: responses to a prompt, which follow one another in `responses`.

    Raises: NumericsError past BOUND.
    """
    shards = num_shards(loaded.mesh)
    scorer = make_scorer(
        loaded.model, prompt_width=width, num_shards=shards, chunk=LOGPS_CHUNK_TOKENS
    )
    totals = score_batches(
        jax.jit(scorer),
        loaded.params,
        [prompts[i // each] for i in range(len(responses))],
        [r.ids for r in responses],
        width=width,
        batch_size=batch_size,
        max_new_tokens=settings.max_new_tokens,
        pad_id=settings.pad_id,
        put=rows_put(loaded.mesh),
        fetch=fetch_whole,
    )
    sampled = np.asarray([r.logps.sum() for r in responses])
    lengths = np.asarray([max(1, len(r.ids)) for r in responses])
    worst = float(np.max(np.abs(totals - sampled) / lengths))
    if not worst <= BOUND[loaded.dtype]:
        raise NumericsError(
            f"the sampled log-probs differ from the training forward's by {worst:.1e} nats per"
            f" token, over {BOUND[loaded.dtype]:g}"
        )
    return worst


def describe(response: Response, tokenizer: Tokenizer, ends: Sequence[int], args) -> dict[str, Any]:
    """A response as it is written."""
    text = tokenizer.decode(response.without_end(ends))
    finish = "length"
    if response.ended:
        finish = "stop"
    written: dict[str, Any] = {
        "text": text[: first_stop(text, args.stop)],
        "num_tokens": len(response.ids),
        "logp": float(response.logps.sum()),
        "finish": finish,
    }
    if args.token_logps:
        written |= {"ids": response.ids, "token_logps": [float(x) for x in response.logps]}
    return written


def generate(args: argparse.Namespace) -> None:
    """Samples, checks the log-probs of the first batch, and writes."""
    check_settings(args)
    # A model that does not exist is the first thing to be said.
    ignore = ignored_fields(args.ignore_fields)
    open_weights(args.model, ignore=ignore, setting="--model")
    if args.reward_model:
        open_weights(args.reward_model, ignore=ignore, setting="--reward_model", scalar_head=True)
    text = open_text(args.model, args, Writing())
    prompts = read_prompts(args, text)
    with Output(args.out) as out:
        _draw_responses(args, text, prompts, out)


def _draw_responses(
    args: argparse.Namespace, text: Text, prompts: list[Prompt], out: Output
) -> None:
    tokenizer = text.tokenizer
    assert tokenizer is not None
    loaded = load_model(args.model, args, quiet=out.path is None)
    ids = [p.ids for p in prompts]
    check_positions(
        loaded.config,
        max(map(len, ids)) + args.max_new_tokens,
        "--max_prompt_tokens or --max_new_tokens",
    )
    if max(map(max, ids)) >= loaded.config.vocab_size:
        raise ConfigError(
            f"a prompt holds the token id {max(map(max, ids))}, the model has"
            f" {loaded.config.vocab_size}"
        )
    ends = stop_ids(tokenizer, text.chat)
    settings = SampleSettings(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        eos_ids=ends,
        pad_id=tokenizer.pad_id,
        num_samples=args.best_of or args.num_samples,
    )

    def jit(name, function, **options):
        return jax.jit(function, **options)

    sampler = compile_sampler(loaded.model, settings, loaded.mesh, jit)
    size = whole_batch(args.batch_size, len(ids), loaded.mesh)
    width = prompt_width(ids)
    progress = Progress("sampling", len(ids), "prompts", enabled=out.path is not None)
    responses = draw(
        sampler,
        loaded.params,
        ids,
        settings=settings,
        seed=args.seed,
        width=width,
        batch_size=size,
        put=rows_put(loaded.mesh),
        fetch=fetch_whole,
        shards=num_shards(loaded.mesh),
        progress=progress,
        stopped=stopper(tokenizer, args.stop),
    )
    for i, response in enumerate(responses):
        if not np.isfinite(response.logps).all():
            raise NumericsError(
                f"prompt {i // settings.num_samples}: the log-prob of a sampled token is not"
                " finite; compute with --dtype=float32, or look at the weights"
            )
    each = settings.num_samples
    first = responses[: size * each]
    worst = check_logps(
        loaded, ids, first, width=width, each=each, settings=settings, batch_size=size
    )
    del loaded  # before a reward model is read: the memory holds one of them
    described = [describe(r, tokenizer, ends, args) for r in responses]
    groups = [described[i : i + each] for i in range(0, len(described), each)]
    if args.best_of:
        groups = _keep_best(args, prompts, groups, out)
    for prompt, kept in zip(prompts, groups, strict=True):
        if args.demonstrations:
            for response in kept:
                out.write(sft_row(prompt.row, response["text"]))
        else:
            out.write({**prompt.row, "responses": kept})
    out.close()
    tokens = sum(len(r.ids) for r in responses)
    progress.close(f"{len(responses):,} responses, {tokens:,} tokens, written to {args.out}")
    note(
        f"log-probs: sampled and training forward differ by at most {worst:.1e} nats per token"
        f" ({len(first)} responses)",
        out,
    )


def _keep_best(
    args: argparse.Namespace,
    prompts: list[Prompt],
    groups: list[list[dict[str, Any]]],
    out: Output,
) -> list[list[dict[str, Any]]]:
    """The num_samples best responses of every prompt, with their rewards, the best first."""
    loaded = load_model(args.reward_model, args, quiet=out.path is None, scalar_head=True)
    texts = OpenModel(loaded, open_text(args.reward_model, args, Writing()))
    everywhere = jax.sharding.NamedSharding(loaded.mesh, jax.sharding.PartitionSpec())
    step = jax.jit(make_rewards_step(loaded.model), out_shardings=everywhere)
    reward_of = RewardOfModel(texts, args.reward_model, step)
    progress = Progress("rewards", len(prompts), "prompts", enabled=out.path is not None)
    rewards = []
    for number, (prompt, drawn) in enumerate(zip(prompts, groups, strict=True)):
        row = prompt.row
        given = row.get("prompt_ids", row.get("messages", row.get("prompt")))
        rewards.append(reward_of.of_prompts([given] * len(drawn), [r["text"] for r in drawn]))
        progress(number + 1)
    kept = []
    for drawn, values in zip(groups, rewards, strict=True):
        places = best_places(values, args.num_samples)
        kept.append([{**drawn[k], "reward": values[k]} for k in places])
    found = describe_choice(rewards)
    progress.close(
        f"best of {args.best_of}: reward {found.of_all:+.3f}, of one sample {found.of_one:+.3f},"
        f" on {found.prompts:,} prompts; KL at most {found.kl_bound:.2f} nats"
    )
    return kept


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return run_tool(generate, parser(), argv)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
