"""Policy and reference answer held-out prompts: side by side with win rate and KL."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpojax.data.dataset import Dataset
from dpojax.data.index import Index
from dpojax.data.open import Data
from dpojax.data.open_tokenizer import stop_ids
from dpojax.data.tokenizers import Tokenizer
from dpojax.evaluation import statistics
from dpojax.evaluation.on_policy import OnPolicy
from dpojax.generation import rewards
from dpojax.generation.decoding import SampleSettings, compile_sampler
from dpojax.generation.rewards import reward_name
from dpojax.generation.sampler import (
    draw,
    fetch_whole,
    prompt_width,
    rows_put,
    whole_batch,
)
from dpojax.generation.scorer import make_scorer, score_batches
from dpojax.models.placed import Policy, check_positions
from dpojax.runtime.context import Job
from dpojax.runtime.mesh import num_shards
from dpojax.weights import reference


class Sampling:
    """Answers to held-out prompts: from the policy alone for its KL while it trains, and side by
    side with the reference.
    """

    def __init__(self, job: Job, data: Data, policy: Policy):
        assert data.tokenizer is not None and data.eval is not None and data.eval_index is not None
        self.job = job
        self.tokenizer = data.tokenizer
        self.eval_data = data.eval
        c = job.config.sample
        shards = num_shards(job.mesh)
        self.shards = shards
        self.rows, self.prompts = distinct_prompts(data.eval, data.eval_index, c.num_prompts)
        batch_size = whole_batch(c.batch_size, len(self.rows), job.mesh)
        width = prompt_width(self.prompts)
        check_positions(
            policy.config, max(map(len, self.prompts)) + c.max_new_tokens, "sample.max_new_tokens"
        )
        put = rows_put(job.mesh)
        self.common = dict(width=width, batch_size=batch_size, put=put, fetch=fetch_whole)
        ends = stop_ids(self.tokenizer, data.train.reader.chat)
        settings = SampleSettings(
            c.max_new_tokens, c.temperature, c.top_k, c.top_p, ends, self.tokenizer.pad_id
        )
        own = (
            settings
            if self.from_the_policy
            else dataclasses.replace(settings, temperature=1.0, top_k=0, top_p=1.0)
        )
        self.settings = settings
        self.own_settings = own
        make = functools.partial(compile_sampler, policy.model, mesh=job.mesh, jit=job.program)
        self.sampler = make(settings)
        self.own_sampler = self.sampler if self.from_the_policy else make(own, name="kl_sampler")
        scorer = make_scorer(
            policy.model,
            prompt_width=width,
            num_shards=shards,
            chunk=job.config.model.logps_chunk_tokens,
        )
        self.scorer = job.program("scorer", scorer, out_shardings=job.replicated)
        self._scorer_function = scorer
        self._ref_scorer = None
        self._of_reference: tuple[Any, list[list[int]]] | None = None  # the tree, and its samples

    @property
    def from_the_policy(self) -> bool:
        """Whether sample.* draws from the policy's own distribution, not from a filtered or
        sharpened one.
        """
        c = self.job.config.sample
        return (c.temperature, c.top_k, c.top_p) == (1.0, 0, 1.0)

    def on_policy(self, params, ref) -> OnPolicy:
        """The KL to the reference, and the reward where there is one, of the policy's own samples
        to the first sample.kl_prompts prompts.
        """
        prompts = self.prompts[: self.job.config.sample.kl_prompts]
        options = dict(
            settings=self.own_settings, seed=self.job.config.seed, progress=lambda n: None
        )
        drawn = draw(
            self.own_sampler, params, prompts, **options, **self.common, shards=self.shards
        )
        ids = [response.ids for response in drawn]
        reward = None
        if reward_name(self.job.config):
            texts = self._texts(ids)
            reward = np.asarray(_scores(self.job, self._asked(len(prompts)), texts))
        return OnPolicy(
            log_ratio=self._log_ratio(params, ref, prompts, ids),
            length=np.array([len(response) for response in ids]),
            reward=reward,
        )

    def _texts(self, responses: Sequence[list[int]]) -> list[str]:
        """What was answered, without the end of sequence."""
        tokenizer = self.tokenizer
        return [tokenizer.decode(_without_eos(ids, tokenizer)) for ids in responses]

    def _asked(self, count: int) -> list[str]:
        """The first prompts as their rows give them."""
        asked = (self.eval_data.text_group(row).prompt for row in self.rows[:count])
        return [p if isinstance(p, str) else self.tokenizer.decode(p) for p in asked]

    def _log_ratio(self, params, ref, prompts, responses) -> np.ndarray:
        score = functools.partial(
            score_batches,
            prompts=prompts,
            responses=responses,
            max_new_tokens=self.job.config.sample.max_new_tokens,
            pad_id=self.tokenizer.pad_id,
            **self.common,
        )
        if not reference.same_layout(ref, params) and self._ref_scorer is None:
            # A program of its own for a reference of its own dtype or shardings, so that no copy of
            # it is needed.
            self._ref_scorer = self.job.program(
                "reference_scorer", self._scorer_function, out_shardings=self.job.replicated
            )
        return score(self.scorer, params) - score(self._ref_scorer or self.scorer, ref)

    def compare(self, params, ref) -> dict[str, Any]:
        """Policy and reference answer the same prompts.

        `ref` may have another dtype and sharding than `params`.
        """
        job = self.job
        tokenizer = self.tokenizer
        sampled = {}
        # another run of a sweep has asked for them
        if self._of_reference and self._of_reference[0] is ref:
            sampled["reference"] = self._of_reference[1]
        for name, tree, seed in (
            ("policy", params, job.config.seed),
            ("reference", ref, job.config.seed + 1),
        ):
            if name in sampled:
                continue
            progress = job.progress(f"sampling from the {name}", len(self.prompts), "prompts")
            tree = reference.like(tree, params)
            options = dict(settings=self.settings, seed=seed, progress=progress)
            drawn = draw(
                self.sampler, tree, self.prompts, **options, **self.common, shards=self.shards
            )
            sampled[name] = [response.ids for response in drawn]
            progress.close(f"{sum(map(len, sampled[name])):,} tokens")
        self._of_reference = (ref, sampled["reference"])
        texts = {name: self._texts(ids) for name, ids in sampled.items()}
        result = {
            "prompts": [tokenizer.decode(p) for p in self.prompts],
            "texts": texts,
            "ids": sampled,
        }
        result["prompt_texts"] = self._asked(len(self.rows))
        if self.from_the_policy:
            log_ratio = self._log_ratio(params, ref, self.prompts, sampled["policy"])
            result["kl"], result["kl_error"] = statistics.mean_with_error(log_ratio.tolist())
        return result


def distinct_prompts(data: Dataset, index: Index, limit: int) -> tuple[list[int], list[list[int]]]:
    """The first `limit` held-out prompts, each once: (source rows, token ids).

    Published files repeat theirs.
    """
    found: dict[tuple[int, ...], int] = {}
    for row in index.rows.tolist():
        found.setdefault(tuple(data.token_group(row)[0].prompt.tolist()), row)
        if len(found) == limit:
            break
    return list(found.values()), list(map(list, found))


def _without_eos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_id else ids


def _scores(job: Job, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The responses' scores by sample.reward, or by the embedded world's own reward."""
    spec = reward_name(job.config)
    scores = rewards.load_reward(spec)(prompts, responses)
    return rewards.check_scores(spec, scores, len(responses))


def judge_samples(job: Job, samples: dict[str, Any]) -> dict[str, Any]:
    """Length, diversity and KL of the samples, and the win rate where there is a reward."""
    ids = samples["ids"]
    lengths = {name: np.array([len(r) for r in ids[name]]) for name in ids}
    found: dict[str, Any] = {
        "num_samples": len(ids["policy"]),
        "mean_length": float(lengths["policy"].mean()),
        "reference_mean_length": float(lengths["reference"].mean()),
        "distinct_2": distinct_n(ids["policy"], 2),
        "reference_distinct_2": distinct_n(ids["reference"], 2),
    }
    if "kl" in samples:
        found |= {"kl": samples["kl"], "kl_standard_error": samples["kl_error"]}
    if reward_name(job.config):
        prompts = samples["prompt_texts"]
        scores = {name: _scores(job, prompts, samples["texts"][name]) for name in ids}
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


def sample_rows(samples: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples as rows of WORKDIR/samples.jsonl: what `dpojax.compare` pairs by prompt."""
    rows = []
    scores = samples.get("scores")
    for i, prompt in enumerate(samples["prompt_texts"]):
        row: dict[str, Any] = {"prompt": prompt}
        for name in samples["ids"]:
            row[name] = samples["texts"][name][i]
            row[f"{name}_tokens"] = len(samples["ids"][name][i])
            if scores is not None:
                row[f"{name}_score"] = scores[name][i]
        rows.append(row)
    return rows


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of the responses (Li et al. 2016, arXiv:1510.03055)."""
    grams = [tuple(r[i : i + n]) for r in responses for i in range(len(r) - n + 1)]
    return len(set(grams)) / max(1, len(grams))
