"""A policy's answers to held-out prompts whose answers can be verified -> pass@1."""

from collections.abc import Callable
from typing import Any

import numpy as np

from dpojax.config.online import VERIFIABLE
from dpojax.config.schema import Config
from dpojax.data.open import Data
from dpojax.data.open_tokenizer import stop_ids
from dpojax.evaluation.samples import distinct_prompts
from dpojax.evaluation.statistics import Interval, wilson
from dpojax.generation.decoding import SampleSettings, compile_sampler
from dpojax.generation.sampler import (
    draw,
    fetch_whole,
    prompt_width,
    rows_put,
    whole_batch,
)
from dpojax.generation.verifiable import Verifier
from dpojax.models.placed import Policy, check_positions
from dpojax.runtime.context import Job
from dpojax.runtime.mesh import num_shards
from dpojax.training.findings import EVAL_COLOR, Line, Panel
from dpojax.training.gradients import full_params
from dpojax.training.stage import Evaluation, Hook
from dpojax.training.state import TrainState

KEY = "eval_pass@1"
LOW = f"{KEY}/low"
HIGH = f"{KEY}/high"


def open_verifier(config: Config) -> Verifier | None:
    """What verifies a run's responses: the first term of reward.terms that compares with the row's
    answer, or the exact answer of the world of sorting; None: nothing does.
    """
    terms = config.reward.term_list()
    for term in terms:
        if term.kind in VERIFIABLE:
            return Verifier(term.kind, config.reward.answer_column)
    own_reward = not terms or any(term.kind == "world" for term in terms)
    if config.world == "sorting" and own_reward:
        return Verifier("exact", "answer")
    return None


def pass_rate_hooks(
    job: Job,
    data: Data,
    policy: Policy,
    *,
    prefix: str,
    num_steps: int,
    full: Callable[[Any], Any] | None = None,
) -> tuple[Hook, ...]:
    """The hook that measures pass@1 while a stage trains `policy`; () where nothing is verified.

    Args:
      prefix: of the stage's keys in metrics.jsonl.
      num_steps: of the stage; pass@1 is measured after the last one too.
      full: trained parameters of the policy -> all of them; None: all are trained.
    """
    verifier = open_verifier(job.config)
    if verifier is None or data.tokenizer is None or not job.config.sample.num_prompts:
        return ()
    if data.eval is None or data.eval_index is None:
        return ()
    hook = PassRate(job, data, policy, verifier, prefix=prefix, num_steps=num_steps)
    if full is not None:
        hook.full = full
    return (hook,)


def pass_rate_panel(prefix: str) -> Panel:
    """pass@1 over a stage's steps, for the report."""
    line = Line(f"{prefix}{KEY}", "held-out", EVAL_COLOR)
    return Panel("pass@1", (line,), band=(f"{prefix}{LOW}", f"{prefix}{HIGH}"))


class PassRate(Evaluation):
    """pass@1 on held-out prompts: the share whose one sampled response is verified as right.

    Responses are drawn as sample.* says, by the run's seed, so that two evaluations of the same
    policy agree.
    """

    def __init__(
        self,
        job: Job,
        data: Data,
        policy: Policy,
        verifier: Verifier,
        *,
        prefix: str,
        num_steps: int,
    ):
        """Prepares the sampler. Raises: ConfigError for responses that the model cannot hold."""
        assert data.tokenizer is not None
        assert data.eval is not None and data.eval_index is not None
        self.job = job
        self.verifier = verifier
        self.tokenizer = data.tokenizer
        self.prefix = prefix
        self.num_steps = num_steps
        # trained parameters of the policy -> all of them, where a stage trains adapters
        self.full = full_params({})
        c = job.config.sample
        rows, self.prompts = distinct_prompts(data.eval, data.eval_index, c.num_prompts)
        self.columns = [data.eval.columns(row) for row in rows]
        longest = max(map(len, self.prompts))
        check_positions(policy.config, longest + c.max_new_tokens, "sample.max_new_tokens")
        self.settings = SampleSettings(
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            top_k=c.top_k,
            top_p=c.top_p,
            eos_ids=stop_ids(data.tokenizer, data.eval.reader.chat),
            pad_id=data.tokenizer.pad_id,
        )
        self.sampler = compile_sampler(
            policy.model, self.settings, job.mesh, job.program, name="pass_rate_sampler"
        )

    def run(self, step: int, state: TrainState) -> None:
        """Measures, logs and says pass@1."""
        interval = self.measure(self.full(state.policy))
        values = {KEY: interval.value, LOW: interval.low, HIGH: interval.high}
        self.job.log.write(step, {f"{self.prefix}{key}": v for key, v in values.items()})
        self.job.say(f"eval {step}  {self.describe(interval)}")

    def describe(self, interval: Interval) -> str:
        """pass@1 with its interval, and how it was drawn, in words."""
        how = "greedy"
        if self.settings.temperature:
            how = f"at temperature {self.settings.temperature:g}"
        return (
            f"pass@1 {interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}] {how}, on"
            f" {len(self.prompts)} held-out prompts"
        )

    def measure(self, params: Any) -> Interval:
        """pass@1 of a policy's parameters, with Wilson's interval at 95 %."""
        job = self.job
        drawn = draw(
            self.sampler,
            params,
            self.prompts,
            settings=self.settings,
            seed=job.config.seed,
            width=prompt_width(self.prompts),
            batch_size=whole_batch(job.config.sample.batch_size, len(self.prompts), job.mesh),
            put=rows_put(job.mesh),
            fetch=fetch_whole,
            shards=num_shards(job.mesh),
            progress=lambda count: None,
        )
        ends = self.settings.eos_ids
        texts = [self.tokenizer.decode(response.without_end(ends)) for response in drawn]
        scores = self.verifier(texts, texts, self.columns)
        verified = np.array([score for score in scores if score is not None])
        return wilson(float((verified == 1).sum()), len(verified))
