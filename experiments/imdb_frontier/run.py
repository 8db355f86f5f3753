"""Reward against KL on IMDb: Fig. 2 (left) of Rafailov et al. 2023, from the reviews to the figure.

    python experiments/imdb_frontier/run.py --data=DIR --out=DIR [--scale=0.1] [--seeds=0,1,2]

DIR of --data holds imdb/train.jsonl.gz and imdb/test.jsonl.gz, the 50,000 labelled reviews. Every
stage leaves its files in --out, and a stage whose files are there is skipped: the same command goes
on after a kill, and more seeds or arms (--arms) are added to what is there. Writes frontier.json,
frontier.png and table.md.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import gold
import numpy as np
import tokenizers
from draw import draw_frontier, write_table

from dpojax import exact
from dpojax.command_line import Output
from dpojax.evaluation.on_policy import read_on_policy
from dpojax.evaluation.statistics import paired_difference
from dpojax.runtime.subprocess_run import run_in_process
from dpojax.untrusted.plain_data import read_whole_lines

HERE = pathlib.Path(__file__).parent
CONFIG = HERE / "config.py"
REWARD = f"{HERE / 'gold.py'}:positive"
VOCABULARY = 4096
SAMPLES = 4  # completions of a prefix, so 6 pairs
NEW_TOKENS = 32
PROMPTS = 512  # of the test split, on which every method is evaluated
FRONTIER_PROMPTS = 64
FULL = {"prefixes": 25_000, "lm_steps": 742, "frontier_samples": 1024, "policy_prompts": 25_600}
GROUPS = 32  # prefixes of a step
PAIRS = GROUPS * SAMPLES * (SAMPLES - 1) // 2
BETAS = {
    "DPO": (0.05, 0.1, 1.0, 5.0),
    "IPO": (0.05, 0.1, 1.0),
    "PPO-GT": (0.02, 0.05, 0.1),
    "RLOO-GT": (0.02, 0.05, 0.1),
    "PPO": (0.05, 0.2),
    "online DPO": (0.02, 0.1),
    "Preferred-FT": (1.0,),
}
ARMS = tuple(BETAS)


class Arm(NamedTuple):
    """One run: a method at one setting and seed."""

    method: str
    setting: str
    seed: int
    folder: pathlib.Path
    gold_calls: int  # until its last step


class Work(NamedTuple):
    """Where things lie, and how much of them is made."""

    data: pathlib.Path
    out: pathlib.Path
    scale: float

    def count(self, what: str, least: int = 1) -> int:
        """So many of what FULL names."""
        return max(least, round(FULL[what] * self.scale))

    @property
    def steps(self) -> int:
        """Of an offline method: one epoch of the prefixes."""
        return max(1, self.count("prefixes") // GROUPS)

    @property
    def updates(self) -> int:
        """Of a method that samples."""
        return max(1, self.count("policy_prompts") // 64 // SAMPLES)

    @property
    def environment(self) -> dict[str, str]:
        """What a run is told beside its flags."""
        return {gold.VARIABLE: str(self.out / "gold_classifier.json"), "PYTHONPATH": str(HERE)}


def write_lines(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """A file that is there is whole."""
    with Output(str(path)) as file:
        for row in rows:
            file.write(row)


def say(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {message}", flush=True)


def prefix_words(rng: np.random.Generator, text: str) -> str:
    """The first 2 to 6 words of a review, about 2 to 8 tokens."""
    return " ".join(text.split()[: int(rng.integers(2, 7))])


# --- what every method starts from ----------------------------------------------------------------


def make_gold(work: Work) -> None:
    """The gold reward, and what it is worth."""
    if (work.out / "gold.json").exists():
        return
    say("gold reward: training on the labels of the test split")
    texts, labels = gold.read_reviews(work.data / "imdb/test.jsonl.gz")
    trained, found = gold.train_gold(texts, labels)
    gold.save_gold(trained, work.out / "gold_classifier.json")
    (work.out / "gold.json").write_text(json.dumps(found, indent=1))
    say(f"gold reward: {found}")


def make_language_model(work: Work) -> None:
    """Tokenizer and language model of the train split: the reference of every method."""
    if (work.out / "lm/export/config.json").exists():
        return
    texts, _ = gold.read_reviews(work.data / "imdb/train.jsonl.gz")
    rng = np.random.default_rng([0, 1])
    place = work.out / "tokenizer.json"
    if not place.exists():
        say(f"tokenizer: {VOCABULARY} pieces")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        # The bytes of the reviews alone: a policy cannot write control characters then.
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "<s>", "</s>"],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.save(str(place))
    rows = []
    for text in texts:
        prefix = prefix_words(rng, text)
        rows.append({"prompt": prefix, "completion": text[len(prefix) :]})
    held_out = len(rows) // 20
    write_lines(work.out / "reviews.jsonl", rows[held_out:])
    write_lines(work.out / "reviews_held_out.jsonl", rows[:held_out])
    # by the root: a smaller experiment still wants a language model that writes sentences
    steps = max(20, round(FULL["lm_steps"] * work.scale**0.5))
    say(f"language model: {steps} steps of 64 reviews")
    run_in_process(
        work.out / "lm",
        f"{CONFIG}:lm",
        {
            "tokenizer": place,
            "data.train": work.out / "reviews.jsonl",
            "sft.num_steps": steps,
        },
    )


def sample(work: Work, name: str, prefixes: Sequence[str], count: int, seed: int) -> pathlib.Path:
    """`count` completions of the language model to each prefix, by python -m dpojax.generate."""
    path = work.out / f"{name}.jsonl"
    if not path.exists():
        say(f"{name}: {count} completions to each of {len(prefixes):,} prefixes")
        prompts = work.out / f"{name}_prefixes.jsonl"
        write_lines(prompts, [{"prompt": prefix} for prefix in prefixes])
        flags = {
            "model": work.out / "lm/export",
            "prompts": prompts,
            "num_samples": count,
            "max_new_tokens": NEW_TOKENS,
            "batch_size": max(1, 512 // count),
            "seed": seed,
            "out": path,
        }
        argv = [f"--{key}={value}" for key, value in flags.items()]
        subprocess.run([sys.executable, "-m", "dpojax.generate", *argv], check=True)
    return path


def ranked(work: Work, name: str, prefixes: Sequence[str], seed: int) -> pathlib.Path:
    """Completions with their gold rewards, as rows that make 6 pairs; labels are the argmax."""
    path = work.out / f"{name}_ranked.jsonl"
    if not path.exists():
        rows = read_whole_lines(sample(work, name, prefixes, SAMPLES, seed))
        found = []
        for row in rows:
            texts = [response["text"] for response in row["responses"]]
            scores = gold.positive([row["prompt"]] * len(texts), texts)
            found.append({"prompt": row["prompt"], "responses": texts, "scores": scores})
        write_lines(path, found)
    return path


def make_pairs(work: Work) -> tuple[pathlib.Path, pathlib.Path]:
    """Training pairs from prefixes of the train split, held-out ones from the test split."""
    os.environ |= work.environment
    rng = np.random.default_rng([0, 2])
    texts, _ = gold.read_reviews(work.data / "imdb/train.jsonl.gz")
    own = [prefix_words(rng, text) for text in texts[: work.count("prefixes")]]
    texts, _ = gold.read_reviews(work.data / "imdb/test.jsonl.gz")
    other = list(dict.fromkeys(prefix_words(rng, text) for text in texts))[:PROMPTS]
    return ranked(work, "train", own, 1), ranked(work, "test", other, 2)


# --- the methods ----------------------------------------------------------------------------------


def settings_of(work: Work, method: str, beta: float, seed: int) -> dict[str, Any]:
    """The settings of a method's run, over those of config.py."""
    offline = {
        "num_steps": work.steps,
        "eval_every_steps": max(1, work.steps // 10),
        "batch_size": PAIRS,
        "seed": seed,
        "loss.beta": beta,
    }
    online = {
        "num_steps": work.updates,
        "eval_every_steps": max(1, work.updates // 10),
        "batch_size": 64 * PAIRS // GROUPS,  # 64 prompts: rows of preferences count in pairs
        "seed": seed,
        "optim.learning_rate": 1e-3,
    }
    gradient = {"stages": "policy_gradient", "policy_gradient.num_samples": SAMPLES}
    gradient |= {"policy_gradient.beta": beta, **online}
    return {
        "DPO": offline,
        "IPO": {**offline, "loss.name": "ipo"},
        "Preferred-FT": {**offline, "loss.name": "sft"},
        "RLOO-GT": {**gradient, "policy_gradient.preset": "rloo", "reward.terms": REWARD},
        "PPO-GT": {**gradient, "policy_gradient.preset": "ppo", "reward.terms": REWARD}
        | {"policy_gradient.value_learning_rate": 1e-3},
        "PPO": {**gradient, "policy_gradient.preset": "ppo"}
        | {"reward.terms": f"model:{work.out / f'reward_model-{seed}'}"}
        | {"policy_gradient.value_model": work.out / f"reward_model-{seed}"}
        | {"policy_gradient.value_learning_rate": 1e-3},
        "online DPO": {
            **online,
            "stages": "online_dpo",
            "online_dpo.num_samples": SAMPLES,
            "reward.terms": REWARD,
            "reward.weights": 1 / beta,
            "loss.beta": 1.0,
        },
    }[method]


def gold_calls(work: Work, method: str) -> int:
    """How often a method asks the gold reward until its last step."""
    if method.endswith("-GT") or method == "online DPO":
        return work.updates * 64 * SAMPLES
    return work.count("prefixes") * SAMPLES


def train(work: Work, method: str, beta: float, seed: int) -> Arm:
    """One run to its end; a finished one is only read."""
    name = f"{method.replace(' ', '_')}-{beta:g}-{seed}"
    train_rows, test_rows = work.out / "train_ranked.jsonl", work.out / "test_ranked.jsonl"
    common = {
        "model.init": work.out / "lm/export",
        "data.train": train_rows,
        "data.eval": test_rows,
    }
    if method == "PPO" and not (work.out / f"reward_model-{seed}/summary.json").exists():
        say(f"reward model, seed {seed}")
        steps = {"reward_model.num_steps": work.steps, "batch_size": PAIRS, "seed": seed}
        eval_every = {"eval_every_steps": work.steps}
        run_in_process(
            work.out / f"reward_model-{seed}",
            f"{CONFIG}:reward_model",
            {**common, **steps, **eval_every},
        )
    folder = work.out / "runs" / name
    if not (folder / "summary.json").exists():
        say(f"{method}, beta {beta:g}, seed {seed}")
    began = time.monotonic()
    run_in_process(
        folder,
        f"{CONFIG}:policy",
        {**common, "sample.reward": REWARD, **settings_of(work, method, beta, seed)},
        environment=work.environment,
    )
    minutes = folder / "minutes.json"
    if not minutes.exists():
        minutes.write_text(json.dumps((time.monotonic() - began) / 60))
    return Arm(method, f"{beta:g}", seed, folder, gold_calls(work, method))


# --- what is measured -----------------------------------------------------------------------------


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """A mean over prompts with its bootstrap interval at 95 %."""
    found = paired_difference(values, np.zeros_like(values), resamples=2000)
    return found.value, found.low, found.high


def points_of(arm: Arm) -> list[dict[str, Any]]:
    """Every evaluation of a run."""
    evaluations = read_on_policy(arm.folder)
    steps = max(row["step"] for row in evaluations)
    summary = json.loads((arm.folder / "summary.json").read_text())
    minutes = json.loads((arm.folder / "minutes.json").read_text())
    flops = None  # of a step; a run of one step has no time of its own
    if "useful_tflops" in summary:
        flops = summary["useful_tflops"] * 1e12 * summary["step_time_p50_s"]
    found = []
    for row in evaluations:
        reward, low, high = interval(np.array(row["reward"]))
        found.append(
            {
                "method": arm.method,
                "setting": arm.setting,
                "seed": arm.seed,
                "step": row["step"],
                "reward": reward,
                "reward_low": low,
                "reward_high": high,
                "kl": float(np.mean(row["log_ratio"])),
                "kl_error": float(np.std(row["log_ratio"]) / np.sqrt(len(row["log_ratio"]))),
                "length": float(np.mean(row["length"])),
                "auditor": None,
                "gold_calls": round(arm.gold_calls * row["step"] / max(1, steps)),
                "flops": None if flops is None else flops * row["step"],
                "minutes": minutes,
            }
        )
    return found


def exact_frontier(work: Work) -> dict[str, Any]:
    """The tilted reference and best of n, from many samples of the reference to some prompts.

    Nothing has more reward at its KL than the tilted reference (Eq. 4 of the paper). Its estimate
    is biased once the KL comes near log M, the number of samples: it is drawn to KL 4.
    """
    path = work.out / "exact.json"
    if not path.exists():
        rows = read_whole_lines(work.out / "test_ranked.jsonl")[:FRONTIER_PROMPTS]
        count = work.count("frontier_samples", least=128)
        drawn = read_whole_lines(
            sample(work, "frontier", [row["prompt"] for row in rows], count, 3)
        )
        rewards = np.array(
            [
                gold.positive([row["prompt"]] * count, [r["text"] for r in row["responses"]])
                for row in drawn
            ]
        )
        uniform = np.full_like(rewards, -np.log(count))
        betas = np.geomspace(3.0, 0.02, 40)
        tilted = exact.tilted_frontier(uniform, rewards, betas)
        sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= count]
        found = {
            "samples": count,
            "prompts": len(drawn),
            "betas": betas.tolist(),
            "kl": tilted.kl.mean(axis=1).tolist(),
            "reward": tilted.reward.mean(axis=1).tolist(),
            "best_of": [
                {
                    "n": n,
                    "kl": float(np.mean(exact.best_of_n_kl(uniform, rewards, n))),
                    "reward": float(
                        np.mean(np.sum(exact.best_of_n(uniform, rewards, n) * rewards, axis=1))
                    ),
                }
                for n in sizes
            ],
        }
        path.write_text(json.dumps(found, indent=1))
    return json.loads(path.read_text())


def main() -> None:
    flags = argparse.ArgumentParser(description=f"{__doc__}")
    flags.add_argument("--data", type=pathlib.Path, required=True)
    flags.add_argument("--out", type=pathlib.Path, required=True)
    flags.add_argument("--scale", type=float, default=1.0, help="share of the paper's prefixes")
    flags.add_argument("--seeds", default="0", help="comma-separated")
    flags.add_argument("--arms", default=",".join(ARMS), help=f"out of {', '.join(ARMS)}")
    args = flags.parse_args()
    work = Work(args.data.resolve(), args.out.resolve(), args.scale)
    work.out.mkdir(parents=True, exist_ok=True)
    make_gold(work)
    make_language_model(work)
    make_pairs(work)
    reference = exact_frontier(work)
    points = []
    for seed in map(int, args.seeds.split(",")):
        for method in args.arms.split(","):
            for beta in BETAS[method]:
                points += points_of(train(work, method, beta, seed))
                (work.out / "frontier.json").write_text(json.dumps(points, indent=1))
                draw_frontier(points, reference, work.out / "frontier.png")
    write_table(points, reference, work.out / "table.md")
    say(f"done: {work.out / 'frontier.png'}")


if __name__ == "__main__":
    main()
