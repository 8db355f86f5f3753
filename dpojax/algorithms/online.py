"""Batches that are sampled between two steps: K responses to each prompt, and their rewards."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpojax.algorithms.face import Inputs
from dpojax.config.schema import Config
from dpojax.data.batches import step_positions
from dpojax.data.open_tokenizer import stop_ids
from dpojax.data.packing import PackedBatch, PackShape
from dpojax.data.rollouts import Rollout, own_pairs, pack_rollouts, rollout_shape
from dpojax.data.shapes import StepSizes
from dpojax.data.token_groups import TokenPair
from dpojax.errors import ConfigError
from dpojax.generation.decoding import SampleSettings, compile_sampler
from dpojax.generation.rewards import Rewards
from dpojax.generation.sampler import (
    draw,
    fetch_whole,
    prompt_width,
    rows_put,
)
from dpojax.models.placed import check_positions
from dpojax.runtime.context import Job
from dpojax.runtime.mesh import local_shards, num_shards
from dpojax.training.gradients import full_params
from dpojax.training.state import TrainState

# (prompts, responses), texts -> a number for each response; None or NaN: it has none. Or the run's
# rewards, which are told the rows' columns as well.
Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]] | Rewards
# rewards [prompts, K] -> what each response is worth, [prompts, K]
Worth = Callable[[np.ndarray], np.ndarray]
# (step, rewards [prompts, K]) -> the pairs of each prompt's responses
Pairing = Callable[[int, np.ndarray], list[tuple[TokenPair, ...]]]


def paired_by_worth(worth: Worth) -> Pairing:
    """Each response as a pair of itself, weighed by what it is worth."""

    def pairs(step: int, rewards: np.ndarray) -> list[tuple[TokenPair, ...]]:
        del step
        weights = worth(rewards)
        return [own_pairs(weights[i].tolist(), rewards[i].tolist()) for i in range(len(rewards))]

    return pairs


def prompts_at_once(batch_size: int, num_prompts: int, num_samples: int, shards: int) -> int:
    """Prompts whose responses are drawn together, a multiple of the data shards.

    Args:
      batch_size: responses that are drawn at a time.
    """
    prompts = min(num_prompts, max(1, batch_size // num_samples))
    return -(-prompts // shards) * shards


def sampled_shape(
    config: Config,
    *,
    prompt_tokens: int,
    num_prompts: int,
    num_samples: int,
    num_pairs: int,
    num_shards: int,
) -> PackShape:
    """The rows of a step of so many prompts, whatever is sampled; a run's and a plan's."""
    return rollout_shape(
        prompt_tokens=prompt_tokens,
        response_tokens=config.sample.max_new_tokens,
        num_prompts=num_prompts,
        num_samples=num_samples,
        num_pairs=num_pairs,
        num_shards=num_shards,
        micro_batch_tokens=config.data.micro_batch_tokens,
    )


class OnlineBatches:
    """(step, state) -> responses of the state's own policy, packed with what they are worth.

    Prompts, draws and so the whole step are a function of seed, step and state: a run that was
    killed goes on to the same bits.
    """

    def __init__(  # noqa: PLR0913  # what is drawn, scored and paired, by keyword
        self,
        job: Job,
        inputs: Inputs,
        reward: Reward,
        worth: Worth | None = None,
        *,
        num_samples: int,
        pairing: Pairing | None = None,
        num_pairs: int | None = None,
        temperature: float = 1.0,
        redraws: int = 0,
    ):
        """Prepares the sampler.

        Args:
          reward: scores texts.
          worth: makes advantages of the scores of a step; None: every response is worth 1.
          num_samples: K, of each prompt.
          pairing: makes pairs of the scores, in place of `worth`.
          num_pairs: of a prompt, at most; None: K.
          temperature: that is drawn at. At 1 it is the policy's own distribution, which a policy
            gradient scores.
          redraws: how often the prompts whose rewards are all equal are drawn again (DAPO, Yu et
            al. 2025, arXiv:2503.14476, Eq. 11).
        Raises: ConfigError without a tokenizer, or for responses that the model cannot hold.
        """
        data = inputs.data
        if data.tokenizer is None:
            raise ConfigError("tokenizer is '': sampled responses are judged as text; name one")
        self.job = job
        self.tokenizer = data.tokenizer
        self.data = data.train
        self.reward = reward
        self.pairing = pairing or paired_by_worth(worth or np.ones_like)
        self.num_prompts = inputs.groups
        self.redraws = redraws
        # trained parameters of the policy -> all of them: a stage with adapters sets it
        self.full = full_params({})
        config = job.config
        index = data.train_index
        longest = int(max(index.prompt_lengths))
        new_tokens = config.sample.max_new_tokens
        check_positions(inputs.policy.config, longest + new_tokens, "sample.max_new_tokens")
        self.index = index
        self.positions = step_positions(
            index,
            num_groups=self.num_prompts,
            seed=config.data_seed,
            shuffle=config.data.shuffle,
        )
        self.settings = SampleSettings(
            max_new_tokens=new_tokens,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            eos_ids=stop_ids(self.tokenizer, self.data.reader.chat),
            pad_id=self.tokenizer.pad_id,
            num_samples=num_samples,
        )
        self.width = prompt_width([[0] * longest])
        self.prompts_drawn = prompts_at_once(
            config.sample.batch_size, self.num_prompts, num_samples, num_shards(job.mesh)
        )
        self.sampler = compile_sampler(
            inputs.policy.model, self.settings, job.mesh, job.program, name="rollout"
        )
        self.shape: PackShape = sampled_shape(
            config,
            prompt_tokens=longest,
            num_prompts=self.num_prompts,
            num_samples=num_samples,
            num_pairs=num_samples if num_pairs is None else num_pairs,
            num_shards=num_shards(job.mesh),
        )

    def __call__(self, step: int, state: TrainState) -> tuple[PackedBatch, StepSizes]:
        """Draws, scores and packs the responses of a step."""
        params = self.full(state.policy)
        rows = [int(self.index.rows[i]) for i in self._positions(step)]
        prompts = [self.data.token_group(row)[0].prompt.tolist() for row in rows]
        responses = self._draw((step,), params, prompts)
        rewards = self._score(rows, responses)
        for again in range(1, self.redraws + 1):
            dull = np.flatnonzero(~varies(rewards))
            if not len(dull):
                break
            drawn = self._draw((step, again), params, [prompts[i] for i in dull])
            scores = self._score([rows[i] for i in dull], drawn)
            for place, i in enumerate(dull):
                responses[i] = drawn[place]
                rewards[i] = scores[place]
        pairs = self.pairing(step, rewards)
        rollouts = [Rollout(prompts[i], responses[i], pairs[i], row) for i, row in enumerate(rows)]
        shards = tuple(local_shards(self.job.mesh))
        return pack_rollouts(rollouts, self.shape, shards=shards, pad_id=self.settings.pad_id)

    def _positions(self, step: int) -> list[int]:
        """The groups of a step."""
        positions = self.positions[step - 1]
        assert positions is not None  # a shuffle leaves none out
        return positions

    def _draw(
        self, number: tuple[int, ...], params: Any, prompts: Sequence[list[int]]
    ) -> list[list[list[int]]]:
        """K responses to each prompt, as token ids.

        Args:
          number: of the draw: the step, and which time it is drawn again.
        """
        entropy = [self.job.config.seed, *number]
        seed = np.random.SeedSequence(entropy).generate_state(1)[0]
        shards = num_shards(self.job.mesh)
        drawn = draw(
            self.sampler,
            params,
            prompts,
            settings=self.settings,
            seed=int(seed >> 1),
            width=self.width,
            batch_size=self.prompts_drawn,
            put=rows_put(self.job.mesh),
            fetch=fetch_whole,
            shards=shards,
            progress=lambda count: None,
        )
        samples = self.settings.num_samples
        ids = [response.ids for response in drawn]
        return [ids[i : i + samples] for i in range(0, len(ids), samples)]

    def _score(self, rows: Sequence[int], responses: Sequence[Sequence[list[int]]]) -> np.ndarray:
        """The rewards, [prompts, K]."""
        prompts = []
        texts = []
        columns = []
        for row, group in zip(rows, responses, strict=True):
            prompt, _ = self.data.plain_texts(row)
            own = self.data.columns(row)
            for ids in group:
                ended = bool(ids) and ids[-1] in self.settings.eos_ids
                prompts.append(prompt)
                columns.append(own)
                texts.append(self.tokenizer.decode(ids[:-1] if ended else ids))
        if isinstance(self.reward, Rewards):
            scores = self.reward(prompts, texts, columns).total
        else:
            scores = np.asarray(self.reward(prompts, texts), np.float64)
        return scores.reshape(len(rows), self.settings.num_samples)


def varies(rewards: np.ndarray) -> np.ndarray:
    """Whether a prompt has two different rewards, [prompts]; NaN is no reward."""
    known = np.where(np.isnan(rewards), np.inf, rewards)
    least = known.min(axis=1)
    return np.where(np.isnan(rewards), -np.inf, rewards).max(axis=1) > least
