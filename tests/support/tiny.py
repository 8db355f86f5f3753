"""A tiny decoder and random token groups, for tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data.packing import PackShape
from dpojax.data.row_filling import StepLengths, pack_step
from dpojax.data.row_plan import RowShape, plan_step, step_shape
from dpojax.data.token_groups import TokenGroup, TokenPair
from dpojax.models.attention.blocks import blocked, masked
from dpojax.models.config import ModelConfig
from dpojax.models.decoder import make_decoder
from dpojax.training.state import new_state

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm="rms",
    norm_eps=1e-5,
    mlp="gated",
    activation="silu",
    rope_theta=10000.0,
    tie_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    max_positions=512,
    init_std=0.1,
)


def model(config=CONFIG, *, full=False, remat="none", dtype="float32"):
    return make_decoder(
        config,
        attention=masked() if full else blocked(block=16, chains=1),
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype("float32"),
        remat=remat,
    )


def params(m, seed=0):
    return jax.jit(m.init)(jax.random.key(seed))  # compiled: op by op it takes seconds


def groups(
    rng: np.random.Generator, count: int, *, responses: int = 2, longest: int = 30
) -> list[TokenGroup]:
    """Random groups; every two responses of a group make a pair."""
    made = []
    for row in range(count):

        def ids():
            return rng.integers(0, CONFIG.vocab_size, int(rng.integers(1, longest))).astype(
                np.int32
            )

        pairs = tuple(
            TokenPair(i, j, 1.0, 1.0, 0.0)
            for i in range(responses)
            for j in range(i + 1, responses)
        )
        made.append(TokenGroup(ids(), tuple(ids() for _ in range(responses)), pairs, row))
    return made


def pack(
    made: list[TokenGroup],
    *,
    layout="shared",
    row_tokens=128,
    shard_rows=2,
    num_shards=1,
    num_groups=None,
    shards=None,
    row_groups=0,
):
    """(batch, shape) of one step.

    In slots, the prompts' is as long as their longest and what is left over.
    """
    prompts = [len(g.prompt) for g in made]
    responses = [[len(r) for r in g.responses] for g in made]
    lanes, slots = max(map(len, responses)), None
    totals = sorted((x + sum(ys) for x, ys in zip(prompts, responses, strict=True)), reverse=True)
    if layout == "slots":
        own = max(48, *(y for ys in responses for y in ys))
        slots = (row_tokens - lanes * own, own)
        totals = [row_tokens] * len(made)
    shape: PackShape = step_shape(
        RowShape(
            layout=layout,
            row_tokens=row_tokens,
            shard_rows=shard_rows,
            row_groups=row_groups,
            slots=slots,
        ),
        num_shards=num_shards,
        num_groups=num_groups or len(made),
        max_responses=lanes,
        longest_sequence=max(x + max(ys) for x, ys in zip(prompts, responses, strict=True)),
        max_pairs=max(len(g.pairs) for g in made),
        longest=totals,
    )
    batch = pack_step(
        plan_step(prompts, responses, shape),
        shape,
        lambda i: made[i],
        StepLengths(
            prompts=prompts,
            responses=responses,
            counted=[
                [
                    len(r) if g.counted is None else int(c.sum())
                    for r, c in zip(g.responses, g.counted or g.responses, strict=True)
                ]
                for g in made
            ],
            pairs=[g.pairs for g in made],
        ),
        shards=list(range(num_shards)) if shards is None else shards,
        pad_id=0,
        with_ref=made[0].ref_logps is not None,
    )
    return batch, shape


def by_response(batch, logps):
    """Token log-probs [M, A, T] by (first pair row, response ids): comparable between layouts."""
    found = {}
    logps = np.asarray(logps)
    for m, a in np.ndindex(*logps.shape[:2]):
        used = batch.weight[m, a] > 0
        for s in np.unique(batch.response[m, a][used]):
            own = used & (batch.response[m, a] == s)
            found[tuple(batch.target[m, a][own].tolist())] = logps[m, a][own]
    return found


def rewards_by_response(batch, rewards):
    """Rewards [M, A, S] by (row, ids of the response): comparable between layouts."""
    found = {}
    for m, a, s in np.argwhere(np.asarray(batch.response_row) >= 0):
        own = (batch.response[m, a] == s) & (batch.weight[m, a] > 0)
        ids = tuple(batch.target[m, a][own].tolist())
        found[int(batch.response_row[m, a, s]), ids] = float(rewards[m, a, s])
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _log_softmax(hidden_states, head, unembed, p, tokens):
    one = jnp.ones_like(tokens)
    hidden = hidden_states(p, tokens, jnp.arange(tokens.shape[1])[None], one, one * 0)
    return jax.nn.log_softmax(unembed(head(p), hidden)[0], axis=-1)


def all_logps(m, p, ids):
    """log pi(. | prefix) after every token of one sequence, through log_softmax over everything.
    [len(ids), V].

    Zeros follow it up to a multiple of 32, so that few shapes are compiled; what comes later cannot
    be seen.
    """
    padded = jnp.asarray([[*ids, *[0] * (-len(ids) % 32)]])
    return np.asarray(_log_softmax(m.hidden_states, m.head, m.unembed, p, padded))[: len(ids)]


def naive_logps(m, p, prompt, response):
    """log pi(response | prompt) token by token, of one sequence alone."""
    logps = all_logps(m, p, [*prompt, *response])
    index = np.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
    return logps[index, np.asarray(response)]


def gradient_on(make_kernel, name: str, *, platform: str, remat: str):
    """(a function, its arguments): the gradient of a bf16 model's hidden states on an attention
    kernel.
    """
    config = dataclasses.replace(CONFIG, hidden_size=256, head_dim=128)
    batch, shape = pack(groups(np.random.default_rng(3), 3), row_tokens=128, row_groups=4)
    bf16, f32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
    kernel = make_kernel(name, config, shape, platform=platform)
    made = make_decoder(config, attention=kernel, dtype=bf16, param_dtype=f32, remat=remat)
    rows = [jnp.asarray(x[0]) for x in (batch.tokens, batch.positions, batch.group, batch.branch)]

    def total(p, *rows):
        return jnp.sum(made.hidden_states(p, *rows).astype(jnp.float32))

    return jax.grad(total), jax.eval_shape(made.init, jax.random.key(0)), *rows


def policy_state(optimizer, params, ref=None):
    """A training state of the policy alone at step 0; `ref`: a reference that moves."""
    memory = {"reward_mean": jnp.zeros(())}
    if ref is not None:
        memory["reference"] = ref
    return new_state({"policy": optimizer}, {"policy": params}, memory)


def frozen(reference=None, base=None):
    """The trees that a step does not change."""
    return {"reference": reference, "base": base}
