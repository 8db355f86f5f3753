"""A model from disk, for research from Python: its log-probs of responses, and its samples."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dpojax.data.open_tokenizer import stop_ids
from dpojax.data.prompts import PromptReader
from dpojax.data.records import in_memory
from dpojax.data.rollouts import Rollout, lone, lone_batches, lone_shape
from dpojax.data.row_plan import by_response
from dpojax.data.written import Writing
from dpojax.errors import ConfigError, NumericsError
from dpojax.generation.decoding import SampleSettings, compile_sampler
from dpojax.generation.loaded import LOGPS_CHUNK_TOKENS, Loaded, Text, load_model, open_text
from dpojax.generation.sampler import (
    draw,
    fetch_whole,
    prompt_width,
    rows_put,
    whole_batch,
)
from dpojax.models.placed import check_positions
from dpojax.runtime import sharding
from dpojax.runtime.mesh import local_shards, num_shards
from dpojax.training.scores import make_token_logps_step

Text_ = str | Sequence[int] | Sequence[dict[str, Any]]
LIMITS = "the prompts or the responses"
ROUND_TOKENS = 64  # rows grow in such steps: one program serves all calls of similar lengths


def open_model(path: str, *, dtype: str = "float32", tensor: int = 1) -> "OpenModel":
    """The model at `path`: Hugging Face weights, a PEFT adapter, a dpojax run, or llama2.c.

    Its text is written as the run that trained it wrote it, or as its own chat template says.

    Args:
      path: of the folder or the file.
      dtype: of the computation and the weights: float32 or bfloat16.
      tensor: devices that share each layer; the others share the rows.
    Raises: ConfigError naming what is not there, or does not fit together.

    >>> policy = dpojax.open_model(folder)
    >>> logps = policy.logps(["a b"], ["c d"])  # nats
    >>> logps.shape
    (1,)
    """
    arguments = argparse.Namespace(
        dtype=dtype,
        tensor=tensor,
        ignore_fields="",
        tokenizer="",
        chat_template="",
        prompt_template=None,
        chat=None,
        max_prompt_tokens=None,
        max_response_tokens=None,
        mask_tokens=None,
        mask_template=None,
    )
    loaded = load_model(str(path), arguments, quiet=True)
    text = open_text(str(path), arguments, Writing(), needed=False)
    return OpenModel(loaded, text)


class OpenModel:
    """A model on the devices, with the way its text is written."""

    def __init__(self, loaded: Loaded, text: Text):
        """Takes what `open_model` read."""
        self.loaded = loaded
        self.text = text
        step = make_token_logps_step(loaded.model, chunk=LOGPS_CHUNK_TOKENS)
        everywhere = jax.sharding.NamedSharding(loaded.mesh, jax.sharding.PartitionSpec())
        self._token_logps = jax.jit(step, out_shardings=everywhere)
        self._samplers: dict[SampleSettings, Any] = {}

    @property
    def params(self) -> Any:
        """The parameters, on the devices; `model` takes them."""
        return self.loaded.params

    @property
    def model(self) -> Any:
        """Pure functions of parameters and tokens: see dpojax.models.decoder.Model."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer beside the weights; None where there is none."""
        return self.text.tokenizer

    def logps(
        self,
        prompts: Sequence[Text_],
        responses: Sequence[str | Sequence[int]],
        per_token: bool = False,
        *,
        batch_size: int = 8,
    ) -> Any:
        """log pi(response | prompt) of every pair of a prompt and a response.

        Args:
          prompts: N texts, lists of token ids, or lists of messages for the chat template.
          responses: N texts or lists of ids; EOS is added to a text, and ids are taken as they are.
          per_token: whether each token's log-prob is returned instead of their sum.
          batch_size: responses at a time.
        Returns: nats: [N] float64; per token a list of N float32 arrays [|y|].
        Raises: ConfigError for text without a tokenizer, or sequences that the model cannot hold;
          DataError for what cannot be read; NumericsError for a log-prob that is not finite.
        """
        if len(prompts) != len(responses):
            raise ConfigError(
                f"there are {len(prompts)} prompts and {len(responses)} responses; each response"
                " stands with its prompt"
            )
        rollouts = [
            self.tokens(prompt, response, number)
            for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
        values = self._score(rollouts, batch_size)
        if per_token:
            return values
        return np.asarray([np.sum(tokens, dtype=np.float64) for tokens in values])

    def tokens(self, prompt: Text_, response: str | Sequence[int], number: int) -> Rollout:
        """A prompt and its response as ids, EOS included.

        Raises: Dropped for a text that is empty; ConfigError for text without a tokenizer.
        """
        where = f"response {number}"
        if isinstance(response, str):
            row: dict[str, Any] = {"prompt": _plain(prompt), "response": response}
            if not isinstance(prompt, str):
                row = {"prompt": _plain(prompt), "completion": [_assistant(response)]}
            data = self.text.dataset(in_memory("responses", [row]), "score")
            _, group, _ = data.read_row(row, number, where)
            return lone(group.prompt.tolist(), group.responses[0].tolist(), number)
        ids = [int(token) for token in response]
        return lone(self._prompt_ids(prompt, where), ids, number)

    def _prompt_ids(self, prompt: Text_, where: str) -> list[int]:
        """A prompt as ids."""
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return [int(token) for token in prompt]  # pyright: ignore[reportArgumentType]
        tokenizer = self.text.tokenizer
        if tokenizer is None:
            raise ConfigError(f"{where}: it is text, and there is no tokenizer beside the weights")
        reader = PromptReader(tokenizer, self.text.chat, self.text.writing)
        return reader.read({"prompt": _plain(prompt)}, where).ids

    def _score(self, rollouts: Sequence[Rollout], batch_size: int) -> list[np.ndarray]:
        """The log-prob of each response token, nats."""
        loaded = self.loaded
        longest_prompt = max(len(rollout.prompt) for rollout in rollouts)
        longest_response = max(len(rollout.responses[0]) for rollout in rollouts)
        check_positions(loaded.config, longest_prompt + longest_response, LIMITS)
        largest = max(max(*r.prompt, *r.responses[0]) for r in rollouts)
        if largest >= loaded.config.vocab_size:
            raise ConfigError(f"a token id is {largest}, the model has {loaded.config.vocab_size}")
        count = min(batch_size, len(rollouts))
        pad_id = 0
        if self.text.tokenizer is not None:
            pad_id = self.text.tokenizer.pad_id
        shape = lone_shape(
            rollouts, count=count, num_shards=num_shards(loaded.mesh), multiple=ROUND_TOKENS
        )
        shards = tuple(local_shards(loaded.mesh))
        values: list[np.ndarray] = []
        for part in lone_batches(rollouts, shape, count=count, shards=shards, pad_id=pad_id):
            batch = sharding.put_batch(part.batch, loaded.mesh)
            logps = np.asarray(self._token_logps(loaded.params, batch))
            responses = part.sizes.responses
            of_group = {g: v for (g, _), v in by_response(part.plan, responses, logps)}
            values += [np.asarray(of_group[g]) for g in range(len(responses))]
        for number, tokens in enumerate(values):
            if not np.isfinite(tokens).all():
                raise NumericsError(
                    f"response {number}: a token's log-prob is not finite; compute in float32, or"
                    " look at the weights"
                )
        return values

    def sample(
        self,
        prompts: Sequence[Text_],
        num_samples: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> list[list[str]]:
        """Responses to every prompt, as text without EOS.

        Args:
          prompts: N texts, lists of token ids, or lists of messages for the chat template.
          num_samples: of each prompt, which is read once.
          temperature: 0 takes the likeliest token.
          seed: a draw depends on it and on the prompt's place in the list.
        Returns: N lists of `num_samples` texts.
        Raises: ConfigError without a tokenizer, or for sequences that the model cannot hold.
        """
        tokenizer = self.text.tokenizer
        if tokenizer is None:
            raise ConfigError("there is no tokenizer beside the weights; samples are text")
        if num_samples < 1 or max_new_tokens < 1 or temperature < 0:
            raise ConfigError(
                f"num_samples={num_samples}, max_new_tokens={max_new_tokens},"
                f" temperature={temperature}: the first two must be at least 1, the last at least 0"
            )
        ids = [self._prompt_ids(prompt, f"prompt {n}") for n, prompt in enumerate(prompts)]
        config = self.loaded.config
        check_positions(config, max(map(len, ids)) + max_new_tokens, "max_new_tokens")
        ends = stop_ids(tokenizer, self.text.chat)
        settings = SampleSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            eos_ids=ends,
            pad_id=tokenizer.pad_id,
            num_samples=num_samples,
        )
        responses = draw(
            self._sampler(settings),
            self.loaded.params,
            ids,
            settings=settings,
            seed=seed,
            width=prompt_width(ids),
            batch_size=whole_batch(16, len(ids), self.loaded.mesh),
            put=rows_put(self.loaded.mesh),
            fetch=fetch_whole,
            shards=num_shards(self.loaded.mesh),
            progress=lambda count: None,
        )
        texts = [tokenizer.decode(response.without_end(ends)) for response in responses]
        return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]

    def _sampler(self, settings: SampleSettings) -> Any:
        """The compiled sampler of these settings."""
        if settings not in self._samplers:

            def jit(name: str, function: Callable[..., Any], **options: Any) -> Any:
                return jax.jit(function, **options)

            mesh = self.loaded.mesh
            self._samplers[settings] = compile_sampler(self.loaded.model, settings, mesh, jit)
        return self._samplers[settings]


def _plain(prompt: Text_) -> Any:
    """A prompt as a row of a file would hold it."""
    if isinstance(prompt, str):
        return prompt
    return list(prompt)


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
