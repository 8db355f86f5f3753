"""Policy and reference -> metrics of held-out pairs, and their samples side by side with win rate and KL."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dpojax import reference, sampling, sharding, winrate
from dpojax.config import Config
from dpojax.data.index import Dataset, Index
from dpojax.data.pipeline import PackGroups, eval_batches
from dpojax.data.sources import Part
from dpojax.data.tokens import Tokenizer, stop_ids
from dpojax.datasets import Data
from dpojax.errors import NumericsError
from dpojax.evaluation import statistics
from dpojax.job import Job
from dpojax.objectives import Loss
from dpojax.policy import Policy, check_positions
from dpojax.programs import Program
from dpojax.train import PairResults, pair_scalars

WORLD_REWARD = "dpojax.data.world:true_reward"


def evaluate_pairs(job: Job, program: Program, params, ref, shift, pack: PackGroups, groups: int) -> PairResults:
    """Per-pair results of the held-out pairs, flat, padding removed; `shift` is the state's reward_mean."""
    parts, count = [], pack.index.groups_within(job.config.data.eval_max_pairs)
    progress = job.progress("evaluation", count, "prompts")
    for i, (batch, _) in enumerate(eval_batches(pack, num_groups=groups, count=count)):
        progress(i * groups)
        found = jax.device_get(program(params, ref, job.put(batch), shift))
        used = found.row_id >= 0
        parts.append(jax.tree.map(lambda x, used=used: np.asarray(x)[used], found))
    progress.clear()
    results = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
    check_finite(results, pack)
    return results


def check_finite(results: PairResults, pack: PackGroups) -> None:
    """Raises NumericsError naming the first held-out row with a log-prob that is not finite."""
    logps = {
        "policy's": (results.policy_chosen, results.policy_rejected),
        "reference's": (results.ref_chosen, results.ref_rejected),
    }
    for model, both in logps.items():
        for values in both:
            if values is None:
                continue
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                row = pack.data.records.where(int(results.row_id[bad[0]]))
                raise NumericsError(
                    f"{row}: the {model} log-prob of a response is {values[bad[0]]}, and of {len(bad)} of {len(values)} held-out "
                    "responses it is no finite number; compute in float32 (model.dtype), or lower the learning rate"
                )


def eval_scalars(r: PairResults, loss: Loss, parts: Sequence[Part] = ()) -> dict[str, float]:
    """The metrics of the training step with the prefix eval_, over the held-out pairs; of a named part with eval_NAME_."""
    found = _scalars(r, loss, "eval_")
    for part in parts:
        inside = (r.row_id >= part.start) & (r.row_id < part.stop)
        found |= _scalars(jax.tree.map(lambda x, inside=inside: x[inside], r), loss, f"eval_{part.name}_")
    return found


def _scalars(r: PairResults, loss: Loss, prefix: str) -> dict[str, float]:
    means = pair_scalars(r, unpaired=loss.unpaired, mismatched=loss.needs("mismatched"))
    scalars = {"loss": np.mean(r.loss), **means}
    return {f"{prefix}{k}": float(v) for k, v in scalars.items()}


class Sampling:
    """Answers to held-out prompts: from the policy alone for its KL while it trains, and side by side with the reference."""

    def __init__(self, job: Job, data: Data, policy: Policy):
        assert data.tokenizer is not None and data.eval is not None and data.eval_index is not None
        self.job, self.tokenizer, self.eval_data = job, data.tokenizer, data.eval
        c = job.config.sample
        shards = sharding.num_shards(job.mesh)
        self.rows, self.prompts = _distinct_prompts(data.eval, data.eval_index, c.num_prompts)
        batch_size = sampling.whole_batch(c.batch_size, len(self.rows), job.mesh)
        width = sampling.prompt_width(self.prompts)
        check_positions(policy.config, max(map(len, self.prompts)) + c.max_new_tokens, "sample.max_new_tokens")
        put = sampling.rows_put(job.mesh)
        self.common = dict(width=width, batch_size=batch_size, put=put, fetch=sampling.fetch_whole)
        ends = stop_ids(self.tokenizer, data.train.reader.chat)
        settings = sampling.SampleSettings(c.max_new_tokens, c.temperature, c.top_k, c.top_p, ends, self.tokenizer.pad_id)
        own = settings if self.from_the_policy else dataclasses.replace(settings, temperature=1.0, top_k=0, top_p=1.0)
        self.settings, self.own_settings = settings, own
        make = functools.partial(sampling.compile_sampler, policy.model, mesh=job.mesh, jit=job.program)
        self.sampler = make(settings)
        self.own_sampler = self.sampler if self.from_the_policy else make(own, name="kl_sampler")
        scorer = sampling.make_scorer(
            policy.model,
            prompt_width=width,
            num_shards=shards,
            chunk=job.config.model.logps_chunk_tokens,
        )
        self.scorer = job.program("scorer", scorer, out_shardings=job.replicated)
        self._scorer_function, self._ref_scorer = scorer, None
        self._of_reference: tuple[Any, list[list[int]]] | None = None  # the tree, and its samples

    @property
    def from_the_policy(self) -> bool:
        """Whether sample.* draws from the policy's own distribution, not from a filtered or sharpened one."""
        c = self.job.config.sample
        return (c.temperature, c.top_k, c.top_p) == (1.0, 0, 1.0)

    @property
    def kl_count(self) -> int:
        """How many prompts `kl` samples."""
        return min(self.job.config.sample.kl_prompts, len(self.prompts))

    def kl(self, params, ref) -> tuple[float, float]:
        """On-policy KL(policy || reference) and its standard error, nats, over the first sample.kl_prompts prompts."""
        prompts = self.prompts[: self.job.config.sample.kl_prompts]
        options = dict(settings=self.own_settings, seed=self.job.config.seed, progress=lambda n: None)
        drawn = sampling.generate(self.own_sampler, params, prompts, **options, **self.common)
        return statistics.mean_with_error(self._log_ratio(params, ref, prompts, [r.ids for r in drawn]))

    def _log_ratio(self, params, ref, prompts, responses) -> np.ndarray:
        score = functools.partial(
            sampling.score_batches,
            prompts=prompts,
            responses=responses,
            max_new_tokens=self.job.config.sample.max_new_tokens,
            pad_id=self.tokenizer.pad_id,
            **self.common,
        )
        if not reference.same_layout(ref, params) and self._ref_scorer is None:
            # A program of its own for a reference of its own dtype or shardings, so that no copy of it is needed.
            self._ref_scorer = self.job.program("reference_scorer", self._scorer_function, out_shardings=self.job.replicated)
        return score(self.scorer, params) - score(self._ref_scorer or self.scorer, ref)

    def compare(self, params, ref) -> dict[str, Any]:
        """Policy and reference answer the same prompts. `ref` may have another dtype and sharding than `params`."""
        job, tokenizer = self.job, self.tokenizer
        sampled = {}
        if self._of_reference and self._of_reference[0] is ref:  # another run of a sweep has asked for them
            sampled["reference"] = self._of_reference[1]
        for name, tree, seed in (("policy", params, job.config.seed), ("reference", ref, job.config.seed + 1)):
            if name in sampled:
                continue
            progress = job.progress(f"sampling from the {name}", len(self.prompts), "prompts")
            tree = reference.like(tree, params)
            options = dict(settings=self.settings, seed=seed, progress=progress)
            sampled[name] = [r.ids for r in sampling.generate(self.sampler, tree, self.prompts, **options, **self.common)]
            progress.close(f"{sum(map(len, sampled[name])):,} tokens")
        self._of_reference = (ref, sampled["reference"])
        texts = {name: [tokenizer.decode(_without_eos(r, tokenizer)) for r in ids] for name, ids in sampled.items()}
        result = {"prompts": [tokenizer.decode(p) for p in self.prompts], "texts": texts, "ids": sampled}
        asked = (self.eval_data.text_group(row).prompt for row in self.rows)
        result["prompt_texts"] = [p if isinstance(p, str) else tokenizer.decode(p) for p in asked]
        if self.from_the_policy:
            log_ratio = self._log_ratio(params, ref, self.prompts, sampled["policy"])
            result["kl"], result["kl_error"] = statistics.mean_with_error(log_ratio.tolist())
        return result


def _distinct_prompts(data: Dataset, index: Index, limit: int) -> tuple[list[int], list[list[int]]]:
    """The first `limit` held-out prompts, each once: (source rows, token ids). Published files repeat theirs."""
    found: dict[tuple[int, ...], int] = {}
    for row in index.rows.tolist():
        found.setdefault(tuple(data.token_group(row)[0].prompt.tolist()), row)
        if len(found) == limit:
            break
    return list(found.values()), list(map(list, found))


def _without_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids


def reward_name(config: Config) -> str:
    """The function that judges samples: sample.reward, or the embedded world's own where the world is the data; else ""."""
    return config.sample.reward or (WORLD_REWARD if config.embedded else "")


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
        spec = reward_name(job.config)
        reward = winrate.load_reward(spec)
        judged = {name: reward(samples["prompt_texts"], samples["texts"][name]) for name in ids}
        scores = {name: winrate.check_scores(spec, values, len(ids["policy"])) for name, values in judged.items()}
        rate = statistics.win_rate(scores["policy"], scores["reference"])
        difference = lengths["policy"] - lengths["reference"]
        found |= {
            "win_rate": rate.value,
            "win_rate_low": rate.low,
            "win_rate_high": rate.high,
            "win_rate_length_controlled": statistics.length_controlled_win_rate(
                scores["policy"], scores["reference"], difference.tolist()
            ),
            "mean_reward": float(np.mean(scores["policy"])),
            "reference_mean_reward": float(np.mean(scores["reference"])),
        }
        samples["scores"] = scores
    return found
