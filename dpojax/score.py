"""Preferences -> what a model, or a policy against its reference, makes of them: python -m dpojax.score.

A DPO policy is a reward model: r(x, y) = beta (log pi(y | x) - log pi_ref(y | x)), up to a constant of the prompt
(Rafailov et al. 2023, Eq. 5). Its rewards rank candidates, filter data and pick the best of n.
"""

import argparse
import collections
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dpojax import reference, sharding
from dpojax.command import leave
from dpojax.data.index import Dataset, Index, build_index
from dpojax.data.pipeline import PackGroups, make_shape
from dpojax.data.sources import open_sources
from dpojax.data.triples import DROPPED, Dropped
from dpojax.data.written import Writing
from dpojax.datasets import check_shared_tokenizer
from dpojax.errors import ConfigError, DataError
from dpojax.evaluation import statistics
from dpojax.flags import Parser
from dpojax.inference import Loaded, Output, add_model_arguments, add_text_arguments, load_model, note, open_text, run_tool
from dpojax.metrics import Progress, finite_json
from dpojax.plain_data import check_output
from dpojax.policy import check_positions
from dpojax.train import make_token_logps_step
from dpojax.weights import ignored_fields, open_weights

DEFAULTS = Writing(max_prompt_tokens=2048, max_response_tokens=2048)  # of a model that no run of dpojax wrote


def parser() -> Parser:
    """The command line."""
    made = Parser(
        prog="python -m dpojax.score",
        description="Scores responses: log-probs, and with --ref the implicit rewards beta (log pi - log pi_ref). Rows are "
        "preferences as for training, or a prompt with 'completions' or 'responses' to be ranked.",
    )
    made.add_argument("--model", required=True, help="Hugging Face directory, PEFT adapter, dpojax workdir or llama2.c .bin")
    made.add_argument("--ref", default="", help="the reference model, for rewards")
    made.add_argument("--data", required=True, help="file of rows, or hf:NAME[:SPLIT]")
    made.add_argument("--out", default="-", help="JSONL, one line for each row; '-': standard output")
    made.add_argument("--beta", type=float, default=0.1, help="of the rewards")
    made.add_argument("--batch_size", type=int, default=16, help="prompts at a time")
    made.add_argument("--micro_batch_tokens", type=int, default=4096, help="tokens of a forward pass on each device")
    made.add_argument("--limit", type=int, default=0, help="only the first so many usable rows; 0: all")
    add_text_arguments(made)
    add_model_arguments(made)
    return made


def read_rows(args) -> tuple[Dataset, Index]:
    """The rows, indexed. Raises ConfigError or DataError as training does."""
    for name in ("batch_size", "micro_batch_tokens"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}={getattr(args, name)}: it must be at least 1")
    if not args.beta > 0:
        raise ConfigError(f"--beta={args.beta}: it must be > 0")
    for name in filter(None, (args.model, args.ref)):  # a model that is not there is said before anything else
        open_weights(name, ignore=ignored_fields(args.ignore_fields), setting="--model" if name == args.model else "--ref")
    records = open_sources(args.data, "--data")
    of_ids = bool({"prompt_ids", "chosen_ids"} & set(records.get(0)))  # rows of ids need no tokenizer
    data = open_text(args.model, args, DEFAULTS, needed=not of_ids).dataset(records, "score")
    progress = Progress(f"reading {records.name}", records.size, "rows", enabled=args.out != "-")
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=progress)
    progress.close(f"{len(index.rows):,} of {records.size:,} rows usable")
    return data, index.first(min(args.limit or len(index.rows), len(index.rows)))


def response_logps(loaded: Loaded, data: Dataset, index: Index, args, name: str) -> list[np.ndarray]:
    """log pi(y_k | x) of every response of every group, nats."""
    check_positions(loaded.config, int(index.sequence_lengths().max()), "--max_prompt_tokens or --max_response_tokens")
    if int(index.largest_id) >= loaded.config.vocab_size:
        raise ConfigError(f"the data holds the token id {int(index.largest_id)}, the model has {loaded.config.vocab_size}")
    shards, groups = sharding.num_shards(loaded.mesh), min(args.batch_size, len(index.rows))
    shape = make_shape(
        [index], layout="shared", num_groups=groups, num_shards=shards,
        micro_batch_tokens=args.micro_batch_tokens, row_tokens=0,
    )  # fmt: skip
    pad = data.tokenizer.pad_id if data.tokenizer else 0
    pack = PackGroups(data, index, shape, tuple(sharding.local_shards(loaded.mesh)), pad)
    step = make_token_logps_step(loaded.model, chunk=256)
    whole = jax.sharding.NamedSharding(loaded.mesh, jax.sharding.PartitionSpec())
    program = jax.jit(step, out_shardings=whole)
    token_logps = lambda batch: np.asarray(program(loaded.params, sharding.put_batch(batch, loaded.mesh)))
    progress = Progress(f"scoring with {name}", len(index.rows), "prompts", enabled=args.out != "-")
    values = reference.compute(pack, token_logps, num_groups=groups, count=len(index.rows), progress=progress)
    progress.close(f"{len(values):,} tokens")
    if (index.counted_lengths != index.response_lengths).any():  # formatting tokens, as training leaves them out
        groups = (data.token_group(int(row))[0] for row in index.rows)
        whole_or = lambda g: g.counted or [np.ones(len(r), bool) for r in g.responses]
        values = np.where(np.concatenate([c for g in groups for c in whole_or(g)]), values, 0)
    ends = np.cumsum(index.response_lengths)
    sums = np.add.reduceat(values.astype(np.float64), ends - index.response_lengths)
    return [sums[a:b] for a, b in zip(index.response_offsets[:-1], index.response_offsets[1:], strict=True)]


def describe(row: dict[str, Any], group, lengths: Sequence[int], own: np.ndarray, ref: np.ndarray | None, beta: float) -> dict:
    """What is written of a row: of a pair by name, of candidates as lists in the row's own order."""
    rewards = None if ref is None else beta * (own - ref)
    ranked = own if rewards is None else rewards
    values: dict[str, Any] = {"logps": own, "length": lengths}
    if ref is not None and rewards is not None:
        values |= {"ref_logps": ref, "reward": rewards}
    if "chosen" in row or "chosen_ids" in row:
        sides = {"chosen": 0, "rejected": len(own) - 1}  # one and the same response where they are equal
        name = lambda side, k: f"ref_{side}_logps" if k == "ref_logps" else f"{side}_{k}"  # as TRL names its columns
        found = {name(side, k): v[i] for k, v in values.items() for side, i in sides.items()}
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in found.items()}
        return plain | {"margin": float(ranked[0] - ranked[-1])}
    # By a chat template a response is more than the row's text: its message has that.
    spelled = list(group.responses) if group.answers is None else [answer["content"] for answer in group.answers]
    texts = row.get("completions", row.get("responses", spelled))
    places = [spelled.index(text) for text in texts]
    best = int(np.argmax([ranked[p] for p in places]))
    return {**{k: [float(v[p]) for p in places] for k, v in values.items()}, "best": best}


def summarise(rows: list[dict[str, Any]], left_out: dict[str, int], args) -> dict[str, Any]:
    """Accuracy with its interval over the pairs, and means."""
    margins = np.asarray([r["margin"] for r in rows if "margin" in r])
    found: dict[str, Any] = {"model": args.model, "ref": args.ref or None, "beta": args.beta if args.ref else None}
    found |= {"rows": len(rows), "pairs": len(margins), "left_out": left_out}
    if len(margins):
        rate = statistics.wilson(float(np.sum(margins > 0) + 0.5 * np.sum(margins == 0)), len(margins))
        found |= {
            "accuracy": rate.value,
            "accuracy_low": rate.low,
            "accuracy_high": rate.high,
            "mean_margin": float(margins.mean()),
        }
        for key in ("chosen_logps", "rejected_logps", "chosen_length", "rejected_length", "chosen_reward", "rejected_reward"):
            if key in rows[0]:
                found[f"mean_{key}"] = float(np.mean([r[key] for r in rows if key in r]))
    return found


def score(args: argparse.Namespace) -> None:
    """Scores with the model, then with the reference (one of them in memory at a time), and writes."""
    data, index = read_rows(args)
    if args.ref:
        check_shared_tokenizer(data.tokenizer, args.ref, [(data, index)], setting="--ref")
    with Output(args.out) as out:
        _score_rows(args, data, index, out)


def _score_rows(args: argparse.Namespace, data: Dataset, index: Index, out: Output) -> None:
    quiet = out.path is None
    scores = []
    for name in filter(None, (args.model, args.ref)):
        loaded = load_model(name, args, quiet=quiet)
        scores.append(response_logps(loaded, data, index, args, name))
        del loaded
    place = {int(row): i for i, row in enumerate(index.rows)}
    written, left_out = [], collections.Counter()
    last = int(index.rows[-1]) if args.limit else data.records.size - 1
    for number in range(last + 1):
        row = {k: v for k, v in data.records.get(number).items() if v is not None}  # a null column is an absent one
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
        if len(index.responses(i)) != len(group.responses):  # one of them holds formatting tokens alone
            left_out["empty_response"] += 1
            out.write({"row": number, "left_out": DROPPED["empty_response"]})
            continue
        ref = scores[1][i] if len(scores) > 1 else None
        written.append(describe(row, group, index.counted(i), scores[0][i], ref, args.beta))
        out.write({"row": number, **written[-1]})
    out.close()
    summary = summarise(written, dict(left_out), args)
    if out.path is not None and not out.in_place:
        path = pathlib.Path(f"{out.path}.summary.json")
        check_output(path)
        path.write_text(finite_json(summary, indent=2) + "\n", encoding="utf-8")
    if summary["pairs"]:
        kind = f"implicit rewards, beta {args.beta:g}" if args.ref else "log-probs alone, without --ref"
        note(
            f"accuracy {summary['accuracy']:.1%} [{summary['accuracy_low']:.1%}, {summary['accuracy_high']:.1%}] on {summary['pairs']:,} pairs "
            f"({kind}), mean margin {summary['mean_margin']:+.3f}", out,
        )  # fmt: skip
    note(f"{len(written):,} rows scored, {sum(left_out.values())} left out: {args.out}", out)


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    return run_tool(score, parser(), argv)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
