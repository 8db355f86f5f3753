"""Preferences -> what a model, or a policy against its reference, makes of them: python -m
dpojax.score.

A DPO policy is a reward model: r(x, y) = beta (log pi(y | x) - log pi_ref(y | x)), up to a constant
of the prompt (Rafailov et al. 2023, Eq. 5). Its rewards rank candidates, filter data and pick the
best of n. A Bradley-Terry reward model (--reward_model) says r(x, y) itself.
"""

import argparse
import collections
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from dpojax.command_line import (
    Output,
    Parser,
    leave,
    note,
    run_tool,
)
from dpojax.data.dataset import Dataset
from dpojax.data.groups import DROPPED, Dropped
from dpojax.data.index import Index, build_index
from dpojax.data.sources import open_sources
from dpojax.data.written import Writing
from dpojax.errors import ConfigError, DataError
from dpojax.evaluation.score_passes import response_logps, response_rewards
from dpojax.evaluation.scored_rows import Scores, best_of_sizes, describe, summarise
from dpojax.generation.loaded import (
    add_model_arguments,
    add_text_arguments,
    load_model,
    open_text,
)
from dpojax.runtime.log import Progress, finite_json
from dpojax.untrusted.plain_data import check_output
from dpojax.weights.open import ignored_fields, open_weights
from dpojax.weights.tokenizer import check_shared_tokenizer

# of a model that no run of dpojax wrote
DEFAULTS = Writing(max_prompt_tokens=2048, max_response_tokens=2048)


def parser() -> Parser:
    """The command line."""
    flags = Parser(
        prog="python -m dpojax.score",
        description=(
            "Scores responses: log-probs, and with --ref the implicit rewards beta (log pi - log"
            " pi_ref). Rows are preferences as for training, or a prompt with 'completions' or"
            " 'responses' to be ranked."
        ),
    )
    flags.add_argument(
        "--model",
        default="",
        help="Hugging Face directory, PEFT adapter, dpojax workdir or llama2.c .bin",
    )
    flags.add_argument(
        "--reward_model",
        default="",
        help=(
            "in place of --model: a run with the stage reward_model, or a classifier of"
            " transformers with one label"
        ),
    )
    flags.add_argument("--ref", default="", help="the reference model, for rewards")
    flags.add_argument("--data", required=True, help="file of rows, or hf:NAME[:SPLIT]")
    flags.add_argument(
        "--out", default="-", help="JSONL, one line for each row; '-': standard output"
    )
    flags.add_argument(
        "--best_of",
        default="",
        help=(
            "comma-separated numbers: the summary says what the best of so many candidates earns,"
            " and how far it is from the policy"
        ),
    )
    flags.add_argument("--beta", type=float, default=0.1, help="of the rewards")
    flags.add_argument("--batch_size", type=int, default=16, help="prompts at a time")
    flags.add_argument(
        "--micro_batch_tokens",
        type=int,
        default=4096,
        help="tokens of a forward pass on each device",
    )
    flags.add_argument(
        "--limit", type=int, default=0, help="only the first so many usable rows; 0: all"
    )
    add_text_arguments(flags)
    add_model_arguments(flags)
    return flags


def read_rows(args) -> tuple[Dataset, Index]:
    """The rows, indexed. Raises ConfigError or DataError as training does."""
    sizes = {"batch_size": args.batch_size, "micro_batch_tokens": args.micro_batch_tokens}
    for flag, value in sizes.items():
        if value < 1:
            raise ConfigError(f"--{flag}={value}: it must be at least 1")
    if not args.beta > 0:
        raise ConfigError(f"--beta={args.beta}: it must be > 0")
    if bool(args.model) == bool(args.reward_model):
        raise ConfigError("name one of --model and --reward_model: what scores the responses")
    if args.reward_model and args.ref:
        raise ConfigError(f"--ref={args.ref}: a reward model has no reference; drop it")
    if args.best_of:
        best_of_sizes(args.best_of)
        if not (args.reward_model or args.ref):
            raise ConfigError(
                f"--best_of={args.best_of}: the best is told by rewards; add --reward_model or"
                " --ref"
            )
    # A model that does not exist is the first thing to be said.
    models = {"--model": args.model, "--ref": args.ref, "--reward_model": args.reward_model}
    for flag, name in models.items():
        if name:
            ignore = ignored_fields(args.ignore_fields)
            is_reward = flag == "--reward_model"
            open_weights(name, ignore=ignore, setting=flag, scalar_head=is_reward)
    records = open_sources(args.data, "--data")
    # Rows of ids need no tokenizer.
    of_ids = bool({"prompt_ids", "chosen_ids"} & set(records.get(0)))
    data = open_text(args.model or args.reward_model, args, DEFAULTS, needed=not of_ids).dataset(
        records, "score"
    )
    progress = Progress(f"reading {records.name}", records.size, "rows", enabled=args.out != "-")
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=progress)
    progress.close(f"{len(index.rows):,} of {records.size:,} rows usable")
    return data, index.first(min(args.limit or len(index.rows), len(index.rows)))


def score(args: argparse.Namespace) -> None:
    """Scores with the model, then with the reference, and writes; or with a reward model."""
    data, index = read_rows(args)
    if args.ref:
        check_shared_tokenizer(data.tokenizer, args.ref, [(data, index)], setting="--ref")
    with Output(args.out) as out:
        _score_rows(args, data, index, out)


def score_groups(
    args: argparse.Namespace, data: Dataset, index: Index, *, quiet: bool
) -> list[Scores]:
    """What the models say of every group of the index."""
    counted = [index.counted(i) for i in range(len(index.rows))]
    if args.reward_model:
        loaded = load_model(args.reward_model, args, quiet=quiet, scalar_head=True)
        rewards = response_rewards(loaded, data, index, args)
        return [Scores(lengths, own) for lengths, own in zip(counted, rewards, strict=True)]
    logps = []
    for name in filter(None, (args.model, args.ref)):
        loaded = load_model(name, args, quiet=quiet)
        logps.append(response_logps(loaded, data, index, args, name))
        del loaded  # before the next model is read: the memory holds one of them
    if not args.ref:
        return [Scores(n, logps=own) for n, own in zip(counted, logps[0], strict=True)]
    return [
        Scores(lengths, args.beta * (own - ref), own, ref)
        for lengths, own, ref in zip(counted, *logps, strict=True)
    ]


def _score_rows(args: argparse.Namespace, data: Dataset, index: Index, out: Output) -> None:
    scored = score_groups(args, data, index, quiet=out.path is None)
    place = {int(row): i for i, row in enumerate(index.rows)}
    written = []
    left_out = collections.Counter()
    last = data.records.size - 1
    if args.limit:
        last = int(index.rows[-1])
    for number in range(last + 1):
        # A null column is an absent column.
        row = {k: v for k, v in data.records.get(number).items() if v is not None}
        try:
            group = data.text_group(number)
            if number not in place:
                data.token_group(number)
                raise DataError(f"{data.records.where(number)}: was left out")
        except Dropped as verdict:
            left_out[verdict.reason] += 1
            out.write({"row": number, "left_out": DROPPED[verdict.reason]})
            continue
        i = place[number]
        # A response of formatting tokens alone counts as empty, and has no score.
        if len(index.responses(i)) != len(group.responses):
            left_out["empty_response"] += 1
            out.write({"row": number, "left_out": DROPPED["empty_response"]})
            continue
        written.append(describe(row, group, scored[i]))
        out.write({"row": number, **written[-1]})
    out.close()
    _report(summarise(written, dict(left_out), args), args, out)


def _report(summary: dict[str, Any], args: argparse.Namespace, out: Output) -> None:
    """Writes the summary beside the rows, and prints it."""
    if out.path is not None and not out.in_place:
        path = pathlib.Path(f"{out.path}.summary.json")
        check_output(path)
        path.write_text(finite_json(summary, indent=2) + "\n", encoding="utf-8")
    if summary["pairs"]:
        kind = "log-probs alone, without --ref"
        if args.reward_model:
            kind = "a reward model"
        elif args.ref:
            kind = f"implicit rewards, beta {args.beta:g}"
        note(
            f"accuracy {summary['accuracy']:.1%} [{summary['accuracy_low']:.1%},"
            f" {summary['accuracy_high']:.1%}] on {summary['pairs']:,} pairs ({kind}), mean margin"
            f" {summary['mean_margin']:+.3f}",
            out,
        )
    for point in summary.get("best_of", []):
        if point["prompts"]:
            note(
                f"best of {point['k']}: reward {point['mean_reward']:+.3f} ±"
                f" {point['standard_error']:.3f} on {point['prompts']:,} prompts, KL at most"
                f" {point['kl_bound']:.2f} nats",
                out,
            )
    left_out = sum(summary["left_out"].values())
    note(f"{summary['rows']:,} rows scored, {left_out} left out: {args.out}", out)


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return run_tool(score, parser(), argv)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
