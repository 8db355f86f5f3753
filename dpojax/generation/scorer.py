"""log pi(response | prompt) of responses by the training forward, in batches of one shape.

Legend: R prompts of a batch, P prompt length (padded on the left), T response tokens.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpojax.models.decoder import Model
from dpojax.training.logps import HeadInputs, Targets, token_logps


def make_scorer(
    model: Model, *, prompt_width: int, num_shards: int, chunk: int
) -> Callable[..., Float[Array, " R"]]:
    """The function (params, tokens [R, P + T], valid [R, P + T]) -> log pi(response | prompt) [R],
    to be jitted.

    Prompts are padded on the left to `prompt_width`, responses on the right.
    """

    def score(params, tokens, valid):
        rows, width = tokens.shape
        # A row of this call is one group: right padding has group 0, left padding too.
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
        group = valid.astype(jnp.int32)
        hidden = model.hidden_states(params, tokens, positions, group, jnp.zeros_like(group))
        hidden = hidden.reshape(num_shards, -1, hidden.shape[-1])
        per_shard = rows // num_shards
        columns = jnp.arange(prompt_width, width) - 1
        predictor = (jnp.arange(per_shard)[:, None] * width + columns).reshape(-1)
        predictor = jnp.broadcast_to(predictor, (num_shards, predictor.size))
        target = tokens[:, prompt_width:].reshape(num_shards, -1)
        logps: Array = token_logps(
            model.unembed,
            HeadInputs(head=model.head(params), hidden=hidden),
            Targets(predictor, target, count=jnp.asarray(target.shape[1])),
            chunk=chunk,
        )
        return jnp.sum(jnp.where(valid[:, prompt_width:], logps.reshape(rows, -1), 0.0), axis=1)

    return score


def score_batches(  # noqa: PLR0913  # settings of several kinds, by keyword
    scorer: Callable[..., Array],
    params,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    width: int,
    batch_size: int,
    max_new_tokens: int,
    pad_id: int,
    put: Callable[[np.ndarray], Array],
    fetch: Callable[[Array], np.ndarray],
) -> np.ndarray:
    """log pi(response | prompt) of every prompt under `params`, in batches of one shape. nats."""
    sums: list[float] = []
    for start in range(0, len(prompts), batch_size):
        numbers = [min(i, len(prompts) - 1) for i in range(start, start + batch_size)]
        tokens = np.full((batch_size, width + max_new_tokens), pad_id, np.int32)
        valid = np.zeros(tokens.shape, bool)
        for row, i in enumerate(numbers):
            place = slice(width - len(prompts[i]), width + len(responses[i]))
            tokens[row, place] = [*prompts[i], *responses[i]]
            valid[row, place] = True
        sums.extend(fetch(scorer(params, put(tokens), put(valid)))[: len(prompts) - start].tolist())
    return np.asarray(sums)
