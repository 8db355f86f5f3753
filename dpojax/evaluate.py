"""Policy and reference -> metrics of held-out pairs, and their samples side by side with win rate and KL."""

import functools
from typing import Any

import jax
import numpy as np

from dpojax import reference, sampling, sharding, winrate
from dpojax.config import Config
from dpojax.data.pipeline import PackGroups, eval_batches
from dpojax.data.tokens import Tokenizer
from dpojax.datasets import Data
from dpojax.errors import ConfigError
from dpojax.job import Job
from dpojax.policy import Policy
from dpojax.programs import Program
from dpojax.train import PairResults

WORLD_REWARD = "dpojax.data.world:true_reward"


def evaluate_pairs(job: Job, program: Program, params, ref, pack: PackGroups, groups: int) -> PairResults:
    """Per-pair results of the held-out pairs, flat, padding removed."""
    parts, count = [], pack.index.groups_within(job.config.data.eval_max_pairs)
    progress = job.progress("evaluation", count, "prompts")
    for i, (batch, _) in enumerate(eval_batches(pack, num_groups=groups, count=count)):
        progress(i * groups)
        found = jax.device_get(program(params, ref, job.put(batch)))
        used = found.row_id >= 0
        parts.append(jax.tree.map(lambda x, used=used: np.asarray(x)[used], found))
    progress.clear()
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def eval_scalars(r: PairResults) -> dict[str, float]:
    """TRL's evaluation metrics (prefix eval_): means over the held-out pairs, or over their tokens where TRL's are."""
    margin = r.chosen_rewards - r.rejected_rewards
    means = {
        "loss": r.loss,
        "rewards/chosen": r.chosen_rewards,
        "rewards/rejected": r.rejected_rewards,
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0) + 0.5 * (margin == 0),
        "logps/chosen": r.policy_chosen,
        "logps/rejected": r.policy_rejected,
        "displacement": r.policy_chosen < r.ref_chosen,  # chosen responses that became less likely
    }
    chosen, rejected = int(r.chosen_lengths.sum()), int(r.rejected_lengths.sum())
    by_token = {
        "logits/chosen": r.chosen_logits.sum() / chosen,
        "logits/rejected": r.rejected_logits.sum() / rejected,
        "entropy": r.entropy.sum() / (chosen + rejected),
        "mean_token_accuracy": r.correct.sum() / chosen,
    }
    return {f"eval_{k}": float(np.mean(v)) for k, v in {**means, **by_token}.items()}


def generate_samples(job: Job, data: Data, policy: Policy, params, ref) -> dict[str, Any]:
    """Policy and reference answer the same held-out prompts. `ref` may have another dtype and sharding than `params`."""
    c, tokenizer = job.config.sample, data.tokenizer
    assert tokenizer is not None
    shards = sharding.num_shards(job.mesh)
    rows, prompts = _distinct_prompts(data, c.num_prompts)
    count = len(rows)
    batch = -(-min(c.batch_size, count) // shards) * shards
    settings = sampling.SampleSettings(c.max_new_tokens, c.temperature, c.top_k, c.top_p, tokenizer.eos_id, tokenizer.pad_id)
    sampler = job.program("sampler", sampling.make_sampler(policy.model, settings), out_shardings=job.replicated)
    rows_sharding = sharding.rows_sharding(job.mesh, leading=0)
    put = lambda x: jax.make_array_from_callback(x.shape, rows_sharding, lambda index: x[index])
    common = dict(batch_size=batch, pad_id=tokenizer.pad_id, put=put, fetch=np.asarray)
    sampled = {}
    for name, tree, seed in (("policy", params, job.config.seed), ("reference", ref, job.config.seed + 1)):
        progress = job.progress(f"sampling from the {name}", count, "prompts")
        sampled[name], _ = sampling.generate(
            sampler, reference.like(tree, params), prompts, seed=seed, progress=progress, **common
        )
        progress.close(f"{sum(map(len, sampled[name])):,} tokens")
    width = sampling.prompt_width(prompts)
    scorer = job.program(
        "scorer",
        sampling.make_scorer(policy.model, prompt_width=width, num_shards=shards, chunk=job.config.model.logps_chunk_tokens),
        out_shardings=job.replicated,
    )
    score = functools.partial(
        sampling.score_batches,
        scorer,
        prompts=prompts,
        responses=sampled["policy"],
        max_new_tokens=c.max_new_tokens,
        **common,
    )
    texts = {name: [tokenizer.decode(_without_eos(r, tokenizer)) for r in ids] for name, ids in sampled.items()}
    result = {"prompts": [tokenizer.decode(p) for p in prompts], "texts": texts, "ids": sampled}
    result["prompt_texts"] = [g if isinstance(g, str) else tokenizer.decode(g) for g in
                              (data.eval.text_group(r).prompt for r in rows)]  # fmt: skip
    if (c.temperature, c.top_k, c.top_p) == (1.0, 0, 1.0):  # else the samples do not come from the policy itself
        log_ratio = score(params) - score(reference.like(ref, params))
        result["kl"], result["kl_error"] = winrate.mean_with_error(log_ratio)
    return result


def _distinct_prompts(data: Data, limit: int) -> tuple[list[int], list[list[int]]]:
    """The first `limit` held-out prompts, each once: (source rows, token ids). Published files repeat theirs."""
    found: dict[tuple[int, ...], int] = {}
    for row in data.eval_index.rows.tolist():
        found.setdefault(tuple(data.eval.token_group(row)[0].prompt.tolist()), row)
        if len(found) == limit:
            break
    return list(found.values()), list(map(list, found))


def _without_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids


def reward_name(config: Config) -> str:
    """The function that judges samples: sample.reward, or the embedded world's own where the world is the data; else ""."""
    return config.sample.reward or ("" if config.data.train else WORLD_REWARD)


def judge_samples(job: Job, samples: dict[str, Any]) -> dict[str, Any]:
    """Length, diversity and KL of the samples, and the win rate where there is a reward."""
    ids = samples["ids"]
    lengths = {name: np.array([len(r) for r in ids[name]]) for name in ids}
    found: dict[str, Any] = {
        "num_samples": len(ids["policy"]),
        "mean_length": float(lengths["policy"].mean()),
        "reference_mean_length": float(lengths["reference"].mean()),
        "distinct_2": winrate.distinct_n(ids["policy"], 2),
        "reference_distinct_2": winrate.distinct_n(ids["reference"], 2),
    }
    if "kl" in samples:
        found |= {"kl": samples["kl"], "kl_standard_error": samples["kl_error"]}
    if reward_name(job.config):
        reward = winrate.load_reward(reward_name(job.config))
        scores = {name: list(map(float, reward(samples["prompt_texts"], samples["texts"][name]))) for name in ids}
        for own in scores.values():
            if len(own) != len(ids["policy"]):
                raise ConfigError(
                    f"sample.reward={reward_name(job.config)!r} gave {len(own)} scores for {len(ids['policy'])} responses"
                )
        rate = winrate.win_rate(scores["policy"], scores["reference"])
        difference = lengths["policy"] - lengths["reference"]
        found |= {
            "win_rate": rate.value,
            "win_rate_low": rate.low,
            "win_rate_high": rate.high,
            "win_rate_length_controlled": winrate.length_controlled_win_rate(
                scores["policy"], scores["reference"], difference.tolist()
            ),
            "mean_reward": float(np.mean(scores["policy"])),
            "reference_mean_reward": float(np.mean(scores["reference"])),
        }
        samples["scores"] = scores
    return found
