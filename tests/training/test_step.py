"""The step: token scores against the full softmax, coupled objectives on any cut of the step,
moving references, what is logged.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import marks
import numpy as np
import objective_cases as cases
import optax
import pytest
import tiny

from dpojax.algorithms.preference import preference_gradients
from dpojax.data.packing import visible
from dpojax.data.token_groups import TokenPair
from dpojax.objectives.loss import make_loss
from dpojax.objectives.table import LOG2
from dpojax.runtime.log import accuracy_and_margin
from dpojax.training.logps import HeadInputs, Targets, token_logps
from dpojax.training.metrics import pair_scalars
from dpojax.training.micro_batches import micro_batch
from dpojax.training.pairs import PairResults, TokenSums, logps_of_pairs, pair_heads
from dpojax.training.scores import batch_scores
from dpojax.training.update import Spikes, make_train_step, moving_reference

MODEL = tiny.model(full=True)
PARAMS, REF = tiny.params(MODEL, 0), tiny.params(MODEL, 1)
SPIKES = Spikes(np.inf, False)


def none(x):
    return x


def groups(seed=0, count=4, **more):
    return tiny.groups(np.random.default_rng(seed), count, longest=12, **more)


def test_token_kl_and_squares_are_those_of_the_full_softmax_and_so_is_the_gradient():
    made = groups()
    batch, _ = tiny.pack(made, row_tokens=64, shard_rows=4)
    mb = micro_batch(batch, 0)
    scores = batch_scores(MODEL, PARAMS, mb, chunk=8, ref_params=REF, squares=True)
    found = {
        k: tiny.by_response(batch, np.asarray(getattr(scores, k))[None])
        for k in ("kl", "log_sum_sq", "ref_logps")
    }
    for g in made:
        for r in g.responses:
            rows = [
                tiny.all_logps(MODEL, p, [*g.prompt, *r])[len(g.prompt) - 1 : -1]
                for p in (PARAMS, REF)
            ]
            key = tuple(r.tolist())
            np.testing.assert_allclose(
                found["kl"][key], np.sum(np.exp(rows[1]) * (rows[1] - rows[0]), axis=-1), atol=1e-5
            )
            np.testing.assert_allclose(
                found["log_sum_sq"][key], np.log(np.sum(np.exp(2 * rows[0]), axis=-1)), atol=1e-5
            )
            np.testing.assert_allclose(
                found["ref_logps"][key], rows[1][np.arange(len(r)), r], atol=1e-5
            )

    def by_chunks(p):
        return jnp.sum(
            jnp.where(mb.weight > 0, batch_scores(MODEL, p, mb, chunk=8, ref_params=REF).kl, 0.0)
        )

    def naive(p):
        full = []
        for tree in (p, REF):
            hidden = MODEL.hidden_states(
                tree, mb.tokens, mb.positions, mb.group, mb.branch
            ).reshape(-1, 32)
            full.append(
                jax.nn.log_softmax(
                    MODEL.unembed(MODEL.head(tree), hidden[mb.predictor[0]]), axis=-1
                )
            )
        own = jnp.sum(jnp.exp(full[1]) * (full[1] - full[0]), axis=-1)
        return jnp.sum(jnp.where(mb.weight[0] > 0, own, 0.0))

    for a, b in zip(
        *(jax.tree.leaves(jax.jit(jax.grad(f))(PARAMS)) for f in (by_chunks, naive)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 6, 8, 64])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 13, 22, 23])
def test_scores_and_gradients_are_those_of_all_logits_at_once_for_every_count_and_chunk(
    count, chunk
):
    """Whole chunks, quarters and what neither divides; logits so
    large that exp of one overflows.
    """
    rng = np.random.default_rng(count)
    scored, vocabulary, width = 23, 11, 5
    hidden, head = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 30, width), (width, vocabulary))
    )
    head = 60 * head
    predictor, target = (jnp.asarray(rng.integers(0, n, (1, scored))) for n in (30, vocabulary))
    used = np.arange(scored) < count
    weight = jnp.asarray(rng.normal(size=scored), jnp.float32) * used

    def unembed(head, x):
        return x @ head

    def ours(head, hidden):
        targets = Targets(predictor, target, jnp.int32(count))
        found = token_logps(unembed, HeadInputs(head, hidden), targets, chunk=chunk)
        return jnp.sum(weight * found[0]), found

    def naive(head, hidden):
        logps = jax.nn.log_softmax(hidden[0, predictor[0]] @ head, axis=-1)[
            jnp.arange(scored), target[0]
        ]
        return jnp.sum(weight * logps), logps

    (_, logps), grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(
        head, hidden
    )
    (_, expected), oracle = jax.value_and_grad(naive, argnums=(0, 1), has_aux=True)(head, hidden)
    np.testing.assert_allclose(logps[0][used], expected[used], rtol=1e-5, atol=1e-4)
    for own, other in zip(grads, oracle, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-4, atol=2e-4)


def test_no_array_of_all_tokens_times_the_vocabulary_exists_in_a_tdpo_step():
    batch, _ = tiny.pack(groups(count=8), row_tokens=64, shard_rows=8)
    run = preference_gradients(MODEL, make_loss("tdpo2", beta=0.1, alpha=0.5), chunk=8)
    state = tiny.policy_state(optax.identity(), PARAMS)
    text = jax.make_jaxpr(lambda s: run(s, tiny.frozen(REF), batch, jnp.asarray(True), none).grads)(
        state
    )
    shapes = _shapes(text.jaxpr)
    # 32: the head's own size
    with_vocabulary = [s for s in shapes if 61 in s and int(np.prod(s)) > 61 * 32]
    assert shapes and not with_vocabulary, with_vocabulary[:3]


def _shapes(jaxpr):
    """Shapes of everything that a program computes, inner programs included."""
    found = []
    for eqn in jaxpr.eqns:
        found += [tuple(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape")]
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += _shapes(inner)
    return found


def test_heads_end_at_the_shorter_response_of_each_pair():
    made = groups(1, 3, responses=3)  # each response in two pairs, with different partners
    made = [
        g._replace(counted=tuple(np.arange(len(r)) % 3 != 1 for r in g.responses)) for g in made
    ]
    batch, _ = tiny.pack(made, row_tokens=128, shard_rows=3)
    mb = micro_batch(batch, 0)
    values = jnp.asarray(np.random.default_rng(0).normal(size=mb.weight.shape), jnp.float32)
    w, l = (np.asarray(x) for x in pair_heads(mb, values))
    sums = logps_of_pairs(mb, values)
    for p in np.flatnonzero(mb.valid[0]):
        own = [
            np.asarray(values)[0][(mb.response[0] == s) & (mb.weight[0] > 0)]
            for s in (mb.chosen[0, p], mb.rejected[0, p])
        ]
        limit = min(map(len, own))
        np.testing.assert_allclose([w[p], l[p]], [x[:limit].sum() for x in own], atol=1e-5)
        assert (int(sums.chosen.lengths[p]), int(sums.rejected.lengths[p])) == tuple(map(len, own))


@pytest.mark.parametrize("label", marks.cases(["sigmoid", "tdpo2"], ["wpo", "ld_dpo"]))
def test_two_passes_give_the_gradient_of_one(label):
    case = cases.CASES[label]
    loss = make_loss(case.name, **case.settings)
    one, g1, found = cases.step_gradients(loss, devices=1, shard_rows=2, two_passes=False)
    two, g2, other = cases.step_gradients(loss, devices=1, shard_rows=2, two_passes=True)
    assert abs(one - two) < 1e-6 * abs(one)
    np.testing.assert_allclose(g1, g2, atol=1e-6 * np.linalg.norm(g1))
    for key, value in found.scalars.items():
        np.testing.assert_allclose(other.scalars[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("1*aot+1*aot_unpaired+1*bco_pair_shift", {"beta": 0.1, "label_smoothing": 0.1}),
        ("kto", {"beta": 0.1, "desirable_weight": 1.5}),
    ],
)
def test_coupled_objectives_are_those_of_the_whole_step(name, settings):
    """Eight devices, and a micro-batch for every row: values and gradients as of one device and one
    micro-batch.
    """
    assert max(cases.split_differences(make_loss(name, **settings))) < 5e-6


def test_a_coupled_objectives_gradient_is_that_of_its_definition():
    """AOT by autodiff through everything at once, with no passes and no micro-batches."""
    loss = make_loss("aot_unpaired", beta=0.1)
    made = groups(3, 6)
    batch, _ = tiny.pack(made, row_tokens=64, shard_rows=6)
    few, _ = tiny.pack(made, row_tokens=64, shard_rows=1)
    assert int(few.num_micro) == 2

    mb = micro_batch(batch, 0)
    used = np.flatnonzero(mb.valid[0])

    def whole(p):
        ours, theirs = (
            logps_of_pairs(mb, batch_scores(MODEL, q, mb, chunk=16).logps) for q in (p, REF)
        )
        theirs = jax.lax.stop_gradient(theirs)
        a = ours.chosen.logps[used] - theirs.chosen.logps[used]
        b = ours.rejected.logps[used] - theirs.rejected.logps[used]
        return -jnp.mean(jax.nn.log_sigmoid(0.1 * (jnp.sort(a) - jnp.sort(b))))

    run = preference_gradients(MODEL, loss, chunk=16)
    found = jax.jit(lambda s: run(s, tiny.frozen(REF), few, jnp.asarray(False), none))(
        tiny.policy_state(optax.identity(), PARAMS)
    )
    value, gradient = jax.jit(jax.value_and_grad(whole))(PARAMS)
    np.testing.assert_allclose(found.loss, value, rtol=1e-5)
    norm = float(optax.tree.norm(gradient))
    for a, b in zip(jax.tree.leaves(found.grads), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * norm)


@functools.cache
def _moving_step(alpha, tau):
    loss = make_loss("tr_dpo", beta=0.1, alpha=alpha, tau=tau)
    optimizer = optax.sgd(0.5)
    step = make_train_step(
        preference_gradients(MODEL, loss, chunk=32),
        {"policy": optimizer},
        none,
        spikes=SPIKES,
        remember=moving_reference(*loss.moving),
    )
    return jax.jit(step), optimizer


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_moving_reference_moves_every_tau_steps_that_were_taken(alpha):
    step, optimizer = _moving_step(alpha, 2.0)
    batch, _ = tiny.pack(groups(), row_tokens=64, shard_rows=4)
    broken = batch._replace(pair_weight=batch.pair_weight * np.nan)
    state = tiny.policy_state(optimizer, PARAMS, PARAMS)
    refs, params = [state.memory["reference"]], []
    for b in (batch, broken, batch, batch):
        state, metrics = step(state, tiny.frozen(), b, np.bool_(False))
        refs.append(state.memory["reference"])
        params.append(state.policy)

    def leaf(tree):
        return np.asarray(tree["layers"]["q"])

    assert int(state.skipped) == 1 and not bool(metrics.skipped == 0)
    # 1 taken; skipped: nothing changes; 2 taken: it moves; 3 taken: it stays
    for before, after in ((0, 1), (1, 2), (3, 4)):
        np.testing.assert_array_equal(leaf(refs[before]), leaf(refs[after]))
    np.testing.assert_allclose(
        leaf(refs[3]), alpha * leaf(params[2]) + (1 - alpha) * leaf(refs[2]), rtol=1e-6, atol=1e-7
    )
    assert np.abs(leaf(refs[3]) - leaf(refs[2])).max() > 1e-6


def test_the_shift_of_bco_is_the_running_mean_of_the_rewards():
    loss = make_loss("bco_pair_shift", beta=0.1)
    batch, _ = tiny.pack(groups(), row_tokens=64, shard_rows=4)
    optimizer = optax.set_to_zero()
    step = jax.jit(
        make_train_step(
            preference_gradients(MODEL, loss, chunk=32), {"policy": optimizer}, none, spikes=SPIKES
        )
    )
    state, metrics = step(
        tiny.policy_state(optimizer, PARAMS), tiny.frozen(REF), batch, np.bool_(False)
    )
    mean = (
        float(metrics.scalars["rewards/chosen"]) + float(metrics.scalars["rewards/rejected"])
    ) / 2
    np.testing.assert_allclose(state.memory["reward_mean"], mean, rtol=1e-5)
    other, _ = tiny.pack(groups(9), row_tokens=64, shard_rows=4)
    state, metrics = step(state, tiny.frozen(REF), other, np.bool_(False))
    second = (
        float(metrics.scalars["rewards/chosen"]) + float(metrics.scalars["rewards/rejected"])
    ) / 2
    np.testing.assert_allclose(state.memory["reward_mean"], (mean + second) / 2, rtol=1e-4)


def test_formatting_tokens_count_in_no_sum_and_no_length():
    made = groups(4)
    masked = [
        g._replace(counted=tuple(np.arange(len(r)) > 0 for r in g.responses))
        for g in made
        if min(map(len, g.responses)) > 1
    ]
    batch, _ = tiny.pack(masked, row_tokens=64, shard_rows=4)
    mb = micro_batch(batch, 0)
    found = logps_of_pairs(mb, batch_scores(MODEL, PARAMS, mb, chunk=16).logps)
    for p in np.flatnonzero(mb.valid[0]):
        g = next(g for g in masked if g.row == mb.row_id[0, p])
        expected = [tiny.naive_logps(MODEL, PARAMS, g.prompt, r)[1:].sum() for r in g.responses]
        np.testing.assert_allclose(
            [found.chosen.logps[p], found.rejected.logps[p]], expected, atol=2e-5
        )
        assert int(found.chosen.lengths[p]) == len(g.responses[0]) - 1
    assert int(batch.num_chosen_tokens) == sum(len(g.responses[0]) - 1 for g in masked)


def test_a_reference_free_objective_needs_no_reference_and_no_reference_changes_it():
    loss = make_loss("simpo", beta=2.0, gamma=0.5)
    batch, _ = tiny.pack(groups(), row_tokens=64, shard_rows=4)
    run = jax.jit(
        lambda r: preference_gradients(MODEL, loss, chunk=32)(
            tiny.policy_state(optax.identity(), PARAMS),
            tiny.frozen(r),
            batch,
            jnp.asarray(False),
            none,
        )
    )
    alone, beside = run(None), run(REF)
    np.testing.assert_allclose(alone.loss, beside.loss, rtol=1e-6)
    assert "displacement" in beside.scalars and "displacement" not in alone.scalars


# --- what is logged -------------------------------------------------------------------------------


def results(n=9, **changes):
    rng = np.random.default_rng(0)

    def normal():
        return rng.normal(0, 1, n).astype(np.float32)

    made: dict = {k: normal() for k in PairResults._fields}
    made |= {"tokens": TokenSums(*(normal() for _ in TokenSums._fields))}
    made |= {k: rng.integers(1, 20, n) for k in ("chosen_lengths", "rejected_lengths")}
    made |= {"row_id": np.arange(n), "label": np.ones(n, np.float32)}
    return PairResults(**{**made, **changes})


def test_diagnostics_are_those_computed_by_hand():
    r = results()
    found = {k: float(v) for k, v in pair_scalars(r, unpaired=False).items()}
    margin, longer = r.chosen_rewards - r.rejected_rewards, r.chosen_lengths - r.rejected_lengths
    expected = {
        "rewards/accuracies": np.mean(margin > 0),
        "objective/accuracy": np.mean(r.margin > 0),
        "objective/margins": np.mean(r.margin),
        "displacement": np.mean(r.policy_chosen < r.ref_chosen),
        "lengths/chosen": r.chosen_lengths.mean(),
        "rewards/accuracies_chosen_longer": np.mean(margin[longer > 0] > 0),
        "rewards/accuracies_chosen_shorter": np.mean(margin[longer < 0] > 0),
        "entropy": (
            (r.tokens.chosen_entropy + r.tokens.rejected_entropy).sum()
            / (r.chosen_lengths + r.rejected_lengths).sum()
        ),
        **{f"gradient_weight/q{q}": np.quantile(np.abs(r.pull), q / 100) for q in (10, 50, 90)},
    }
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)
    # padding is left out, wherever it stands
    padded = jax.tree.map(lambda x: np.concatenate([x[:4], x[:3] * 50, x[4:]]), r)._replace(
        row_id=np.r_[np.arange(4), -1, -1, -1, np.arange(5)]
    )
    for key, value in pair_scalars(padded, unpaired=False).items():
        np.testing.assert_allclose(value, found[key], rtol=1e-5, err_msg=key)
    always = pair_scalars(results(rejected_lengths=np.zeros(9, int)), unpaired=False)
    assert np.isnan(always["rewards/accuracies_chosen_shorter"])  # there is no such pair


def test_unpaired_metrics_go_by_the_label():
    r = results(label=np.array([1, 1, 0, 0, 0, 1, 0, 1, 1], np.float32))
    good = r.label > 0.5
    found = {k: float(v) for k, v in pair_scalars(r, unpaired=True, mismatched=True).items()}
    np.testing.assert_allclose(found["rewards/chosen"], r.chosen_rewards[good].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["rewards/rejected"], r.chosen_rewards[~good].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["logps/rejected"], r.policy_chosen[~good].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        found["kl"], max(0.0, (r.policy_rejected - r.ref_rejected).mean()), rtol=1e-5, atol=1e-7
    )


def test_a_step_of_one_label_has_no_margin_and_its_line_has_none():
    r = results(label=np.ones(9, np.float32))
    found = {k: float(v) for k, v in pair_scalars(r, unpaired=True, mismatched=True).items()}
    assert np.isnan(found["rewards/margins"]) and np.isnan(found["logps/rejected"])
    line = accuracy_and_margin(found)
    assert "accuracy" in line and "nan" not in line and "margin" not in line


@pytest.mark.parametrize("label", ["sigmoid", "ld_dpo"])
def test_the_gradient_weight_of_dpo_is_half_at_the_reference(label):
    batch, _ = tiny.pack(groups(), row_tokens=64, shard_rows=4)
    run = preference_gradients(
        MODEL,
        make_loss("sigmoid" if label == "sigmoid" else "ld_dpo", **cases.CASES[label].settings),
        chunk=32,
    )
    found = jax.jit(lambda s: run(s, tiny.frozen(PARAMS), batch, jnp.asarray(True), none))(
        tiny.policy_state(optax.identity(), PARAMS)
    )
    for q in (10, 50, 90):
        np.testing.assert_allclose(found.scalars[f"gradient_weight/q{q}"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(found.loss, LOG2, rtol=1e-6)


def test_weights_and_labels_of_the_data_reach_the_loss():
    made = groups(5)
    weighted = [g._replace(pairs=(TokenPair(0, 1, 0.5, 0.8, 0.0),)) for g in made]
    total = {}
    for name, gs in (("plain", made), ("weighted", weighted)):
        batch, _ = tiny.pack(gs, row_tokens=64, shard_rows=4)
        run = preference_gradients(MODEL, make_loss("sigmoid", beta=1.0), chunk=32)
        found = jax.jit(lambda s, b, run=run: run(s, tiny.frozen(REF), b, jnp.asarray(True), none))(
            tiny.policy_state(optax.identity(), PARAMS), batch
        )
        total[name] = float(found.loss)
        h = np.asarray(found.scalars["rewards/margins"])
    # -ls(-h) = -ls(h) + h: the soft label only adds its share of the mean margin
    np.testing.assert_allclose(total["weighted"], 0.5 * (total["plain"] + 0.2 * h), rtol=1e-5)


def test_useful_flops_are_those_of_every_matrix_once_per_token():
    from dpojax.runtime.devices import peak_flops
    from dpojax.training.flops import forward_flops

    c = dataclasses.replace(tiny.CONFIG, windows=(0, 3))
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    layer = attention + 3 * c.hidden_size * c.intermediate_size
    rng = np.random.default_rng(0)
    made = tiny.groups(rng, 6, responses=3, longest=9)
    # Every visible pair of a query and a key, from the rule itself.
    batch, _ = tiny.pack(made)
    i, j = np.indices((batch.tokens.shape[2],) * 2)

    def side(x, axis):
        return np.expand_dims(x, axis)

    pairs = 0
    for window in c.windows:
        args = [side(x, axis) for x in (batch.group, batch.branch) for axis in (3, 2)]
        distance = side(batch.positions, 3) - side(batch.positions, 2)
        pairs += int(visible(i, j, *args, distance, window or 10**6).sum())
    prompts, responses = (
        [len(g.prompt) for g in made],
        [[len(r) for r in g.responses] for g in made],
    )
    tokens, scored = sum(prompts) + sum(map(sum, responses)), sum(map(sum, responses))
    expected = (
        2 * c.num_layers * layer * tokens
        + 4 * c.num_heads * c.head_dim * pairs
        + 2 * c.hidden_size * c.vocab_size * scored
    )
    assert forward_flops(c, prompts, responses) == expected
    assert (
        peak_flops("TPU v5 lite") == 197e12
        and peak_flops("TPU v5p") == 459e12
        and peak_flops("cpu") is None
    )
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
