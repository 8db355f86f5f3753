"""Every algorithm that trains on its own samples, against what is known exactly.

Two spaces whose responses are all enumerated: a table of logits in float64 (15 responses of up to
3 tokens), and a small transformer through the trainer's own step (2 prompts of 16 responses).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

import dpojax
from dpojax.algorithms.online_dpo import labelled_pairs
from dpojax.algorithms.preference import preference_gradients
from dpojax.data.rollouts import own_pairs
from dpojax.data.token_groups import TokenGroup
from dpojax.objectives import exact, exact_tokens
from dpojax.objectives.advantages import gae_advantages, token_rewards, whiten
from dpojax.objectives.loss import make_loss
from dpojax.objectives.policy_loss import make_policy_loss
from dpojax.runtime import sharding
from dpojax.runtime.mesh import MESH_AXES
from dpojax.training.policy_step import VALUE, Critic, PolicyGradients, make_policy_step
from dpojax.training.scores import make_token_logps_step
from dpojax.training.state import POLICY, new_state
from dpojax.training.update import Spikes, make_train_step

BETA = 0.3
GAE = {"gamma": 1.0, "lam": 0.95}  # of ppo
GROUP = 8  # samples to a prompt, where an algorithm is trained


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table.

    `exact_share` is what the expected gradient is of that of E[r] - beta KL; None: it has another
    direction. `reaches` is whether its theory promises pi*.
    """

    preset: str  # of make_policy_loss, or "online_dpo"
    settings: dict[str, Any]
    exact_share: float | None = None
    reaches: bool = True
    labels: str = ""  # of online_dpo


CASES = {
    "reinforce": Case("reinforce", {"beta": BETA}, 1.0),
    "reinforce, k2 in the loss": Case("reinforce", {"beta": BETA, "kl": "loss_k2_sequence"}, 1.0),
    "rloo": Case("rloo", {"beta": BETA}, 1.0),
    "rloo, k2 in the loss": Case("rloo", {"beta": BETA, "kl": "loss_k2_sequence"}, 1.0),
    "dr_grpo": Case("dr_grpo", {"beta": BETA}, 0.5),  # (G - 1) / G of two samples
    "grpo, KL in the reward": Case("grpo", {"beta": BETA, "kl": "reward"}),
    "grpo as published": Case("grpo", {"beta": BETA}, reaches=False),
    "dapo": Case("dapo", {"beta": BETA}),
    "gspo": Case("gspo", {"beta": BETA}),
    "ppo": Case("ppo", {"beta": BETA, "aggregate": "constant"}, 1.0),
    "online DPO, soft labels": Case("online_dpo", {"beta": BETA}, labels="soft"),
    "online DPO, sampled labels": Case("online_dpo", {"beta": BETA}, labels="sampled"),
    "online DPO, argmax": Case("online_dpo", {"beta": BETA}, reaches=False, labels="argmax"),
}

# --- a table of logits ----------------------------------------------------------------------------

_RNG = np.random.default_rng(21)
SPACE = exact_tokens.token_space(3, 3)
TABLE = _RNG.normal(0, 0.7, (SPACE.num_states, 3))
REF_TABLE = _RNG.normal(0, 0.7, (SPACE.num_states, 3))
REWARDS = _RNG.normal(0, 0.5, len(SPACE.tokens))


def token_logps(table: Any) -> np.ndarray:
    """[Y, T] in float64."""
    with jax.enable_x64(True):
        return np.asarray(exact_tokens.token_logps(SPACE, jnp.asarray(table)))


REF_LOGPS = token_logps(REF_TABLE)


def optimal_logps() -> np.ndarray:
    """log pi*, [Y]."""
    return exact.optimal_logps(REF_LOGPS.sum(-1), REWARDS, BETA)


def optimal_table() -> np.ndarray:
    """The table whose responses are distributed as pi*."""
    star = np.exp(optimal_logps())
    shares = np.zeros((SPACE.num_states, SPACE.vocab_size))
    for row, place in np.argwhere(SPACE.mask):
        shares[SPACE.states[row, place], SPACE.tokens[row, place]] += star[row]
    return np.log(shares)


def variation(table: Any) -> float:
    """Total variation between a table's responses and pi*."""
    return float(np.abs(np.exp(token_logps(table).sum(-1)) - np.exp(optimal_logps())).sum() / 2)


def _online_loss(case: Case) -> Callable[..., Any]:
    """(log-probs [N, T], rewards [N], labels [N / 2]) -> the mean loss of pairs that follow one
    another.
    """
    loss = make_loss("sigmoid", **case.settings)

    def mean(logps, ref_logps, label):
        def pairs(of):
            totals = jnp.sum(of, axis=-1).reshape(-1, 2)
            ones = jnp.ones(len(totals))
            return dpojax.pair_logps(totals[:, 0], totals[:, 1], ones, ones)

        info = dpojax.PairInfo(soft_label=label)
        return jnp.mean(loss(pairs(logps), pairs(ref_logps), info).loss)

    return mean


def _labels(case: Case, rewards: Any, key: Any = None) -> Any:
    """P(the first of a pair is preferred), [N / 2]; as a label of each pair."""
    gap = rewards.reshape(-1, 2)[:, 0] - rewards.reshape(-1, 2)[:, 1]
    soft = jax.nn.sigmoid(gap)
    if case.labels == "argmax":
        return jnp.heaviside(gap, 0.5)
    if case.labels == "sampled" and key is not None:
        return (jax.random.uniform(key, soft.shape) < soft).astype(soft.dtype)
    return soft  # the mean over sampled labels


def expected_gradient(case: Case, table: np.ndarray) -> np.ndarray:
    """What a step of two samples to a prompt descends on average: over all 225 groups of two."""
    if case.preset == "ppo":
        return _ppo_gradient(case, table)
    places = np.array(list(itertools.product(range(len(SPACE.tokens)), repeat=2)))
    mask = jnp.asarray(SPACE.mask)
    of_pairs = _online_loss(case) if case.labels else None
    loss = None if case.labels else make_policy_loss(case.preset, **case.settings)

    def mean(x):
        logps = exact_tokens.token_logps(SPACE, x)
        weights = jax.lax.stop_gradient(jnp.exp(jnp.sum(logps, axis=-1)))
        rewards = jnp.asarray(REWARDS)
        refs = jnp.asarray(REF_LOGPS)

        def of_group(two):
            if of_pairs is not None:
                return of_pairs(logps[two], refs[two], _labels(case, rewards[two]))
            assert loss is not None
            group = jnp.zeros(2, jnp.int32)
            return loss(logps[two], logps[two], refs[two], rewards[two], mask[two], group).loss

        return jnp.sum(jnp.prod(weights[places], axis=-1) * jax.vmap(of_group)(places))

    with jax.enable_x64(True):
        return np.asarray(jax.jit(jax.grad(mean))(jnp.asarray(table)))


def _ppo_gradient(case: Case, table: np.ndarray) -> np.ndarray:
    """With the exact values, lambda 0.95, each response as a step of its own."""
    rewards = _ppo_rewards(table)
    values = exact_tokens.state_values(SPACE, table, rewards)
    with jax.enable_x64(True):
        found = gae_advantages(
            *map(jnp.asarray, (rewards, values, SPACE.mask)), gamma=1.0, lam=0.95
        )
    loss = make_policy_loss("ppo", **case.settings)

    def losses(logps):
        def alone(row, mask, of_tokens):
            given = dict(mask=mask[None], advantages=of_tokens[None])
            return loss(row[None], row[None], None, **given).loss

        return jax.vmap(alone)(logps, SPACE.mask, found.advantages)

    return exact_tokens.expected_gradient(SPACE, table, losses)


def _ppo_rewards(table: Any) -> np.ndarray:
    arrays = (REWARDS, token_logps(table), REF_LOGPS, SPACE.mask)
    with jax.enable_x64(True):
        return np.asarray(token_rewards(*map(jnp.asarray, arrays), beta=BETA))


class GradientError(NamedTuple):
    """How an expected gradient differs from that of E[r] - beta KL."""

    relative: float  # of the exact share of it; NaN where none is promised
    degrees: float  # between the two


def gradient_error(case: Case) -> GradientError:
    """At a policy away from the reference."""
    found = -expected_gradient(case, TABLE)
    want = exact_tokens.regularised_gradient(SPACE, TABLE, REF_TABLE, REWARDS, BETA)
    cosine = np.sum(found * want) / np.linalg.norm(found) / np.linalg.norm(want)
    relative = float("nan")
    if case.exact_share is not None:
        want = case.exact_share * want
        relative = float(np.linalg.norm(found - want) / np.linalg.norm(want))
    return GradientError(relative, float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))))


def slope_at_optimum(case: Case) -> float:
    """The expected gradient at pi*, relative to that at the reference."""
    at_star = np.linalg.norm(expected_gradient(case, optimal_table()))
    return float(at_star / np.linalg.norm(expected_gradient(case, REF_TABLE)))


def train_table(case: Case, *, steps: int = 300, samples: int = 4096) -> np.ndarray:
    """The table after so many steps of Adam on samples of its own, from the reference."""
    schedule = optax.cosine_decay_schedule(0.05, steps)
    optimizer = optax.adam(schedule)
    mask = jnp.asarray(SPACE.mask)
    states = jnp.asarray(SPACE.states)
    group = jnp.repeat(jnp.arange(samples // GROUP), GROUP)
    online = _online_loss(case) if case.labels else None
    loss = None if case.labels else make_policy_loss(case.preset, **case.settings)

    def step(carry, key):
        trees, state = carry
        everything = exact_tokens.token_logps(SPACE, trees[POLICY])
        drawn = jax.random.categorical(key, jnp.sum(everything, axis=-1), shape=(samples,))
        refs = jnp.asarray(REF_LOGPS)[drawn]
        rewards = jnp.asarray(REWARDS)[drawn]
        old = everything[drawn]
        inside = mask[drawn]
        label = _labels(case, rewards, jax.random.fold_in(key, 1)) if online else None
        if case.preset == "ppo":
            of_tokens = token_rewards(rewards, old, refs, inside, beta=BETA)
            values = trees[VALUE][states[drawn]] * inside
            estimates = gae_advantages(of_tokens, values, inside, **GAE)
            advantages = whiten(estimates.advantages, inside)

        def total(own):
            logps = exact_tokens.token_logps(SPACE, own[POLICY])[drawn]
            if online is not None:
                return online(logps, refs, label)
            assert loss is not None
            if case.preset != "ppo":
                return loss(logps, old, refs, rewards, inside, group).loss
            error = (own[VALUE][states[drawn]] - estimates.returns) * inside
            of_values = 0.5 * jnp.sum(jnp.square(error)) / jnp.sum(inside)
            return loss(logps, old, None, mask=inside, advantages=advantages).loss + of_values

        updates, state = optimizer.update(jax.grad(total)(trees), state)
        return (optax.apply_updates(trees, updates), state), None

    def train(trees, keys):
        carry: Any = jax.lax.scan(step, (trees, optimizer.init(trees)), keys)[0]
        return carry[0][POLICY]

    with jax.enable_x64(True):
        trees = {POLICY: jnp.asarray(REF_TABLE), VALUE: jnp.zeros(SPACE.num_states)}
        return np.asarray(jax.jit(train)(trees, jax.random.split(jax.random.key(0), steps)))


# --- a transformer --------------------------------------------------------------------------------

VOCABULARY, LENGTH = 4, 2
RESPONSES = np.array(list(itertools.product(range(VOCABULARY), repeat=LENGTH)), np.int32)
PROMPTS = (np.array([1, 0], np.int32), np.array([2, 3, 3], np.int32))
PROMPT_REWARDS = np.random.default_rng(3).normal(0, 0.5, (len(PROMPTS), len(RESPONSES)))
SPIKES = Spikes(np.inf, False)
GROUPS = 32  # of each prompt, in a step


@functools.cache
def small_model(scalar_head: bool = False):
    """Two layers over four tokens."""
    config = dataclasses.replace(
        tiny.CONFIG,
        vocab_size=VOCABULARY,
        num_layers=2,
        init_std=0.15,
        scalar_head=scalar_head,
    )
    return tiny.model(config, full=True)


def _every_response() -> Any:
    """Both prompts with all of their responses."""
    made = []
    for row, prompt in enumerate(PROMPTS):
        pairs = own_pairs([1.0] * len(RESPONSES), [0.0] * len(RESPONSES))
        made.append(TokenGroup(prompt, tuple(RESPONSES), pairs, row))
    return tiny.pack(made, row_tokens=64, shard_rows=2)[0]


@functools.cache
def _space_logps() -> Callable[[Any], np.ndarray]:
    """parameters -> log pi(y | x), [prompts, responses]."""
    batch = _every_response()
    score = jax.jit(make_token_logps_step(small_model(), chunk=64))
    place = {tuple(ids): i for i, ids in enumerate(RESPONSES.tolist())}

    def logps(params: Any) -> np.ndarray:
        found = np.zeros((len(PROMPTS), len(RESPONSES)))
        values = np.asarray(score(params, batch))
        for m, s in np.ndindex(batch.response_row.shape[0], batch.response_row.shape[2]):
            row = int(batch.response_row[m, 0, s])
            if row < 0:
                continue
            own = (batch.response[m, 0] == s) & (batch.weight[m, 0] > 0)
            ids = tuple(batch.target[m, 0][own].tolist())
            found[row, place[ids]] = values[m, 0][own].sum()
        return found

    return logps


def _sampled_groups(case: Case, logps: np.ndarray, rng: np.random.Generator) -> list[TokenGroup]:
    """Samples of each prompt, as the stage hands them to the packer."""
    made = []
    for row, prompt in enumerate(PROMPTS):
        shares = np.exp(logps[row])
        drawn = rng.choice(len(RESPONSES), (GROUPS, GROUP), p=shares / shares.sum())
        for places in drawn:
            rewards = PROMPT_REWARDS[row, places]
            if case.labels:
                pairs = labelled_pairs(rewards, pairs="all", labels=case.labels, draws=rng)
            else:
                pairs = own_pairs([1.0] * GROUP, rewards.tolist())
            made.append(TokenGroup(prompt, tuple(RESPONSES[places]), pairs, len(made)))
    return made


def trainer_step(
    case: Case, optimizer: optax.GradientTransformation
) -> tuple[Callable[..., Any], Any]:
    """The trainer's own step of an algorithm, and its state before the first one."""
    model = small_model()
    trees = {POLICY: tiny.params(model, 0)}
    optimizers = {POLICY: optimizer}
    if case.labels:
        loss = make_loss("sigmoid", **case.settings)
        gradients = preference_gradients(model, loss, chunk=64)
        step = make_train_step(gradients, optimizers, lambda tree: tree, spikes=SPIKES)
        return step, tiny.policy_state(optimizers[POLICY], trees[POLICY])
    critic = None
    if case.preset == "ppo":
        critic = Critic(
            small_model(True), clip=0.2, gamma=1.0, lam=0.95, target_kl=0.0, horizon=1.0
        )
        trees[VALUE] = tiny.params(critic.model, 2)
        optimizers[VALUE] = optimizer
    gradients = PolicyGradients(
        model,
        make_policy_loss(case.preset, **case.settings),
        critic,
        width=LENGTH,
        chunk=64,
        overlong_tokens=0,
    )
    step = make_policy_step(gradients, optimizers, lambda tree: tree, spikes=SPIKES)
    return step, new_state(optimizers, trees)


def train_transformer(case: Case, *, steps: int = 400, rate: float = 3e-3) -> tuple[float, float]:
    """Total variation to pi* before and after the trainer's own steps, the worst prompt's."""
    logps = _space_logps()
    step, state = trainer_step(case, optax.adam(optax.cosine_decay_schedule(rate, steps)))
    compiled = jax.jit(step)
    ref = state.params[POLICY]
    star = exact.optimal_logps(logps(ref), PROMPT_REWARDS, BETA)

    def distance(params: Any) -> float:
        return float(np.abs(np.exp(logps(params)) - np.exp(star)).sum(-1).max() / 2)

    before = distance(ref)
    for i in range(steps):
        made = _sampled_groups(case, logps(state.params[POLICY]), np.random.default_rng(i))
        batch, _ = tiny.pack(made, row_tokens=128, shard_rows=16)
        state, _ = compiled(state, tiny.frozen(ref), batch, np.bool_(False))
    return before, distance(state.params[POLICY])


# --- one device and eight -------------------------------------------------------------------------


def _first_update(case: Case, *, devices: int, shard_rows: int) -> np.ndarray:
    """What one step of plain descent changes, on so many devices and micro-batches."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]).reshape(devices, 1, 1, 1), MESH_AXES)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    settings = case.settings | ({"epochs": 1} if case.preset == "ppo" else {})
    step, state = trainer_step(dataclasses.replace(case, settings=settings), optax.sgd(1.0))
    made = _sampled_groups(case, np.log(np.full((2, 16), 1 / 16)), np.random.default_rng(0))
    batch, _ = tiny.pack(made[::4], row_tokens=64, shard_rows=shard_rows, num_shards=devices)
    ref = jax.device_put(tiny.params(small_model(), 5), whole)
    run = jax.jit(step, out_shardings=whole)
    after, _ = run(
        jax.device_put(state, whole),
        tiny.frozen(ref),
        sharding.put_batch(batch, mesh),
        np.bool_(False),
    )
    moved = [
        np.asarray(a - b).ravel()
        for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True)
    ]
    return np.concatenate(moved)


def split_differences(case: Case) -> tuple[float, float]:
    """(1 device against 8, one micro-batch against many): the relative error of the update."""
    update = _first_update(case, devices=1, shard_rows=64)
    found = []
    for devices, rows in ((8, 1), (1, 1)):
        other = _first_update(case, devices=devices, shard_rows=rows)
        found.append(float(np.linalg.norm(other - update) / np.linalg.norm(update)))
    return found[0], found[1]
