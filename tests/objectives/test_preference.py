"""Objectives against TRL's frozen numbers, their exact optima, hand-written gradients, finite
differences and symmetries.
"""

import functools
import importlib.util
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import objective_cases as cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from runs import ask_trl

from dpojax.objectives.loss import make_loss
from dpojax.objectives.pairs import PairInfo, PairLogps, pair_logps
from dpojax.objectives.preference import dpo_gradient
from dpojax.objectives.settings import canonical_name
from dpojax.objectives.table import OBJECTIVES
from dpojax.training.metrics import ranked_right

CASES = pytest.mark.parametrize("label", cases.CASES)


def loss_of(label):
    case = cases.CASES[label]
    return make_loss(case.name, **case.settings)


def pair(chosen, rejected, lengths=(1, 1), *, everything=False):
    """Log-probs of pairs; with `everything`, also what the objectives that look inside a response
    read.
    """
    chosen, rejected = jnp.atleast_1d(jnp.asarray(chosen)), jnp.atleast_1d(jnp.asarray(rejected))
    sizes = [jnp.broadcast_to(jnp.asarray(n, jnp.int32), chosen.shape) for n in lengths]
    pairs = pair_logps(chosen, rejected, *sizes)
    if not everything:
        return pairs
    pairs = with_kl(with_heads(pairs), 0.1 * chosen**2 / 100, 0.05 * rejected**2 / 100)
    return PairLogps(
        chosen=pairs.chosen._replace(weight=jnp.full_like(chosen, 0.8)),
        rejected=pairs.rejected._replace(weight=jnp.full_like(rejected, 0.5)),
    )


def with_heads(pairs):
    """The pairs with some share of each response's log-prob in its first tokens."""
    return PairLogps(
        chosen=pairs.chosen._replace(head=0.6 * pairs.chosen.logps),
        rejected=pairs.rejected._replace(head=0.7 * pairs.rejected.logps),
    )


def with_kl(pairs, chosen, rejected):
    return PairLogps(
        chosen=pairs.chosen._replace(kl=chosen), rejected=pairs.rejected._replace(kl=rejected)
    )


def with_logps(pairs, chosen, rejected):
    return PairLogps(
        chosen=pairs.chosen._replace(logps=chosen), rejected=pairs.rejected._replace(logps=rejected)
    )


def info_of(n, dtype=np.float64):
    rng = np.random.default_rng(1)
    margin, label = rng.uniform(0.5, 2, n).astype(dtype), (np.arange(n) % 3 > 0).astype(dtype)
    return lambda loss: PairInfo(
        margin=jnp.asarray(margin),
        soft_label=jnp.asarray(label if loss.unpaired else np.ones_like(label)),
        mean_chosen_length=jnp.asarray(4.0, dtype),
        valid=jnp.ones(n, bool),
        shift=jnp.asarray(0.1, dtype),
    )


def random_pairs(seed, n=16, dtype=np.float32, everything=False):
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(1, 20, n) for _ in range(2)]
    return tuple(
        pair(*rng.normal(-30, 5, (2, n)).astype(dtype), lengths, everything=everything)
        for _ in range(2)
    )


# --- TRL ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", cases.FROZEN["losses"])
def test_values_and_gradients_are_trls(label):
    value, gradient = cases.trl_error(label)
    # TRL computes the alpha divergence and ORPO's odds in float32, and exo_pair's log(1 - e) of a
    # float32 e.
    bound = 1e-5 if label.endswith("alpha") else 1e-6
    assert value < bound and gradient < bound, (value, gradient)


has_oracles = all(importlib.util.find_spec(m) for m in ("torch", "trl"))


@pytest.mark.parity
@pytest.mark.skipif(
    not has_oracles, reason="torch and TRL are not installed: pip install .[parity]"
)
def test_trl_still_gives_the_frozen_objectives(tmp_path):
    out = tmp_path / "trl.json"
    found = ask_trl("trl_objectives.py", out, out, timeout=300)["losses"]
    assert set(found) == set(cases.FROZEN["losses"])
    for label, frozen in cases.FROZEN["losses"].items():
        np.testing.assert_allclose(found[label]["loss"], frozen["loss"], rtol=1e-6, err_msg=label)


def test_where_dpojax_differs_from_trl_on_purpose():
    policy, ref = random_pairs(0)
    # cDPO: TRL 1.16 ignores label_smoothing under loss_type="sigmoid"; here it is Eq. 3 of the cDPO
    # note.
    smoothed, plain = (
        make_loss("sigmoid", beta=0.1, label_smoothing=e)(policy, ref).loss for e in (0.1, 0.0)
    )
    flipped = make_loss("sigmoid", beta=0.1)(policy.swapped(), ref.swapped()).loss
    np.testing.assert_allclose(smoothed, 0.9 * plain + 0.1 * flipped, rtol=1e-5)
    # AOT: TRL sorts each device's micro-batch; here the whole step's, which another cut of it
    # cannot change.
    whole = make_loss("aot", beta=0.1)(policy, ref).loss.mean()

    def cut(x, s):
        return jax.tree.map(lambda v: v[s], x)

    halves = [
        make_loss("aot", beta=0.1)(cut(policy, s), cut(ref, s)).loss.mean()
        for s in (slice(8), slice(8, 16))
    ]
    assert abs(whole - sum(halves) / 2) > 1e-3
    # A tie is half right: at policy == reference TRL's accuracy is 0.
    assert float(ranked_right(make_loss("sigmoid", beta=0.1)(policy, policy).margin).mean()) == 0.5


# --- values ---------------------------------------------------------------------------------------


@CASES
def test_value_at_policy_equal_reference_is_the_closed_form(label):
    loss = loss_of(label)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        lengths = [rng.integers(5, 20, 16) for _ in range(2)]
        policy = pair(*rng.uniform(-30, -5, (2, 16)), lengths, everything=True)
        if loss.needs("kl"):  # it is 0 there
            policy = with_kl(policy, jnp.zeros(16), jnp.zeros(16))
        info = info_of(16)(loss)._replace(shift=jnp.asarray(0.0))
        found = loss(policy, policy, info).loss
    expected = loss.at_reference(*jax.tree.map(np.asarray, (policy, info)))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_sigmoid_is_eq_7_computed_in_plain_python():
    policy, ref = random_pairs(1)
    found = make_loss("sigmoid", beta=0.3)(policy, ref)
    for i in range(16):
        a = float(policy.chosen.logps[i] - ref.chosen.logps[i])
        h = a - float(policy.rejected.logps[i] - ref.rejected.logps[i])
        assert math.isclose(found.loss[i], math.log1p(math.exp(-0.3 * h)), rel_tol=2e-5)
        assert math.isclose(found.chosen_rewards[i], 0.3 * a, rel_tol=1e-5)


def _by_hand(label, a, b, heads, kl, lengths, margin):
    """The objectives that TRL does not have, in plain Python, from their papers' equations."""

    def softplus(z):
        return math.log1p(math.exp(-z)) if z > -30 else -z  # -ls(z)

    h, s = a - b, cases.CASES[label].settings
    beta = s["beta"]
    return {
        "dpop": lambda: softplus(beta * (h - s["dpop_lambda"] * max(0.0, -a))),
        "r_dpo": lambda: softplus(beta * h + s["alpha"] * (lengths[0] - lengths[1])),
        "odpo": lambda: softplus(beta * h - s["alpha"] * math.log(margin)),
        "tdpo1": lambda: softplus(beta * h - beta * (kl[1] - kl[0])),
        "tdpo2": lambda: softplus(beta * h - s["alpha"] * beta * (kl[1] - kl[0])),
        "bco_pair_shift": lambda: softplus(beta * a - 0.1) + softplus(-(beta * b - 0.1)),
        "sigmoid, e .1 (cDPO)": lambda: 0.9 * softplus(beta * h) + 0.1 * softplus(-beta * h),
        "ipo, summed": lambda: (h - 1 / (2 * beta)) ** 2,
        "ld_dpo": lambda: softplus(
            beta * (heads[0] + s["alpha"] * (a - heads[0]) - heads[1] - s["alpha"] * (b - heads[1]))
        ),
    }[label]()


@pytest.mark.parametrize(
    "label",
    [
        "dpop",
        "r_dpo",
        "odpo",
        "tdpo1",
        "tdpo2",
        "bco_pair_shift",
        "sigmoid, e .1 (cDPO)",
        "ipo, summed",
        "ld_dpo",
    ],
)
def test_objectives_without_an_oracle_in_trl_follow_their_equations(label):
    with jax.enable_x64(True):
        policy, ref = random_pairs(2, dtype=np.float64, everything=True)
        loss = loss_of(label)
        info = info_of(16)(loss)
        found = loss(policy, ref, info).loss
        for i in range(16):

            def at(x, i=i):
                return float(x[i])

            a = at(policy.chosen.logps) - at(ref.chosen.logps)
            b = at(policy.rejected.logps) - at(ref.rejected.logps)
            heads = (
                at(policy.chosen.head) - at(ref.chosen.head),
                at(policy.rejected.head) - at(ref.rejected.head),
            )
            kl = (at(policy.chosen.kl), at(policy.rejected.kl))
            lengths = (at(policy.chosen.lengths), at(policy.rejected.lengths))
            assert math.isclose(
                at(found), _by_hand(label, a, b, heads, kl, lengths, at(info.margin)), rel_tol=1e-9
            )


def test_tdpo2_stops_the_gradient_of_the_chosen_side_and_tdpo1_does_not():
    policy, ref = random_pairs(2, everything=True)
    for name, more, stopped in (("tdpo1", {}, False), ("tdpo2", {"alpha": 0.5}, True)):
        loss = make_loss(name, beta=0.1, **more)
        grad = jax.grad(lambda p, loss=loss: loss(p, ref).loss.sum(), allow_int=True)(policy)
        assert bool(np.any(grad.chosen.kl)) != stopped and np.any(grad.rejected.kl)


def test_eq_8_by_hand_equals_autodiff():
    policy, ref = random_pairs(2)
    loss = make_loss("sigmoid", beta=0.1)
    grad = jax.grad(lambda p: loss(p, ref).loss.sum(), allow_int=True)(policy)
    by_hand = dpo_gradient(policy, ref, beta=0.1)
    np.testing.assert_allclose(grad.chosen.logps, by_hand[0], rtol=1e-5)
    np.testing.assert_allclose(grad.rejected.logps, by_hand[1], rtol=1e-5)


@CASES
def test_gradient_is_the_finite_difference(label):
    loss = loss_of(label)
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        lengths = [rng.integers(5, 20, 8) for _ in range(2)]
        policy, ref = (
            pair(*(rng.uniform(-30, -10, (1, 8)) + rng.normal(0, 1, (2, 8))), lengths)
            for _ in range(2)
        )
        ref = with_logps(
            policy,
            policy.chosen.logps + rng.normal(0, 1, 8),
            policy.rejected.logps + rng.normal(0, 1, 8),
        )
        ref = with_heads(ref)
        ones = jnp.ones(8)
        info = info_of(8)(loss)

        def value(c, r):
            pairs = with_heads(with_logps(policy, jnp.asarray(c), jnp.asarray(r)))
            pairs = PairLogps(*(side._replace(kl=ones, weight=ones) for side in pairs))
            return loss(pairs, ref, info).loss

        start = (policy.chosen.logps, policy.rejected.logps)
        if loss.unpaired:  # z0 has no gradient, by definition: only the labelled response is moved
            check_grads(
                lambda c: value(c, policy.rejected.logps), start[:1], order=1, modes=["rev"]
            )
        else:
            check_grads(value, start, order=1, modes=["rev"])


def test_the_reference_and_ktos_point_get_no_gradient():
    policy, ref = random_pairs(4)
    grad = jax.grad(lambda r: make_loss("sigmoid", beta=0.1)(policy, r).loss.sum(), allow_int=True)(
        ref
    )
    assert not np.any(grad.chosen.logps) and not np.any(grad.rejected.logps)
    kto, info = make_loss("kto", beta=0.1), PairInfo(soft_label=jnp.asarray([0.0, 1.0] * 8))
    above = with_logps(policy, policy.chosen.logps, ref.rejected.logps + 3)  # z0 = 3
    grad = jax.grad(lambda p: kto(p, ref, info).loss.sum(), allow_int=True)(above)
    assert np.all(grad.chosen.logps != 0) and not np.any(grad.rejected.logps)


def test_ktos_point_is_the_mean_over_the_step_and_never_negative():
    policy, ref = random_pairs(4)
    kto, info = make_loss("kto", beta=0.1), PairInfo(soft_label=jnp.ones(16))
    plain = jax.nn.sigmoid(-0.1 * (policy.chosen.logps - ref.chosen.logps))
    below = kto(with_logps(policy, policy.chosen.logps, ref.rejected.logps - 5), ref, info).loss
    np.testing.assert_allclose(below, plain, rtol=1e-5)
    above = kto(with_logps(policy, policy.chosen.logps, ref.rejected.logps + 3), ref, info).loss
    np.testing.assert_allclose(
        above, jax.nn.sigmoid(-0.1 * (policy.chosen.logps - ref.chosen.logps - 3)), rtol=1e-4
    )
    padded = info._replace(valid=jnp.arange(16) < 15)
    # padding holds anything
    far = with_logps(policy, policy.chosen.logps, (ref.rejected.logps + 3).at[15].set(1e6))
    np.testing.assert_allclose(kto(far, ref, padded).loss[:15], above[:15], rtol=1e-4)


def test_padding_does_not_move_the_sorted_objectives():
    policy, ref = random_pairs(5)
    garbage = jax.tree.map(
        lambda x: jnp.concatenate([x, x[:4] * 100 if x.dtype == jnp.float32 else x[:4]]),
        (policy, ref),
    )
    for name in ("aot", "aot_unpaired"):
        loss = make_loss(name, beta=0.1)
        plain = loss(policy, ref).loss
        padded = loss(*garbage, PairInfo(valid=jnp.arange(20) < 16)).loss
        np.testing.assert_allclose(padded[:16], plain, rtol=1e-5)


# --- optima ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [k for k, c in cases.CASES.items() if callable(c.optimum)])
def test_the_population_loss_is_least_at_the_exact_optimum(label):
    assert cases.optimum_distance(cases.CASES[label]) < 2e-3


@pytest.mark.parametrize("p", [0.55, 0.9, 0.99])
@pytest.mark.parametrize(
    "label", ["sigmoid", "nca_pair", "bco_pair", "sppo_hard", "exo_pair", "hinge"]
)
def test_optima_hold_for_other_preferences(label, p, monkeypatch):
    monkeypatch.setattr(cases, "P", p)
    case = cases.CASES[label]
    if label == "sigmoid":
        case = case._replace(optimum=lambda s, r: s["beta"] * (r[0] - r[1]) - cases.logit(p))
    if label == "exo_pair":
        case = case._replace(
            optimum=lambda s, r: s["beta"] * (r[0] - r[1]) - (2 * p - 1) * cases.logit(1 - 1e-3)
        )
    assert cases.optimum_distance(case._replace(p=p)) < 2e-3


@pytest.mark.parametrize("label", ["apo_zero", "apo_down", "aot", "kto", "apo_zero_unpaired"])
def test_objectives_without_a_finite_optimum_fall_all_the_way(label):
    loss, ref = loss_of(label), np.log([0.5, 0.5])
    preferences = np.array([0.75, 0.25]) if loss.unpaired else np.array([[0.5, 0.75], [0.25, 0.5]])
    if loss.coupled and not loss.unpaired:
        preferences = np.array([[0.5, 1.0], [0.0, 0.5]])
    value = cases.exact.make_population_loss(loss, ref, preferences)
    # apo_down pushes the winning side down too, only less
    way = np.array([-1.0, -3.0]) if label == "apo_down" else np.array([1.0, -1.0])
    found = [value(ref + way * size)[0] for size in (0, 5, 20, 80, 300)]
    assert all(x > y for x, y in itertools.pairwise(found))


def test_discopop_has_a_local_minimum_of_the_wrong_sign():
    loss = loss_of("discopop")  # at p = 1, near z = -0.119
    z = np.linspace(-0.3, 0.3, 2001)
    zero = np.zeros_like(z, np.float32)
    value = np.asarray(loss(pair(np.float32(z / 0.05), zero), pair(zero, zero)).loss)
    inside = value[1:-1]
    minima = z[1:-1][(inside < value[:-2]) & (inside < value[2:])]
    assert any(abs(m + 0.119) < 2e-3 for m in minima)


def test_soft_labels_and_both_orders_are_one_population():
    ref, preferences = np.log([0.2, 0.3, 0.5]), exact_preferences()
    margins = np.array([[0.0, 2.0, -1.0], [-2.0, 0.0, 0.5], [1.0, -0.5, 0.0]])
    policy = np.log([0.3, 0.3, 0.4])
    for label in ("sigmoid", "odpo", "ipo", "nca_pair", "cpo", "orpo", "sft", "r_dpo"):
        loss = loss_of(label)
        soft, both = (
            cases.exact.population_loss(
                loss, policy, ref, preferences, margins=margins, lengths=np.array([3, 5, 4]), soft=s
            )
            for s in (True, False)
        )
        # whose token normalisation asks for the mean length of what was labelled as chosen
        if label not in ("cpo", "sft"):
            np.testing.assert_allclose(soft, both, rtol=1e-12, err_msg=label)
    with pytest.raises(ValueError, match="whole batches"):
        cases.exact.population_loss(loss_of("aot"), policy, ref, preferences)


def exact_preferences():
    return cases.exact.bradley_terry(np.array([0.3, -0.5, 1.0]))


# --- properties -----------------------------------------------------------------------------------

VALUES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8)


@functools.cache
def _value_and_gradient(label, dtype):
    loss = loss_of(label)

    def run(a, b, lengths):
        zero = jnp.zeros_like(a)
        # Log-probs are at most 0: the reference is as likely as the policy may become.
        policy = pair(a - 1e4, b - 1e4, lengths, everything=True)
        policy = with_kl(policy, jnp.abs(a), jnp.abs(b))
        ref = pair(zero - 1e4, zero - 1e4, lengths, everything=True)
        info = jax.tree.map(
            lambda x: x.astype(dtype) if x.dtype.kind == "f" else x, info_of(8, np.float32)(loss)
        )
        return loss(policy, ref, info).loss

    return jax.jit(
        jax.value_and_grad(lambda a, b, n: run(a, b, n).astype(jnp.float32).sum(), argnums=(0, 1))
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@CASES
def test_extreme_log_ratios_stay_finite(label, dtype):
    @settings(deadline=None, max_examples=15)
    @given(VALUES, VALUES)
    def check(a, b):
        found = _value_and_gradient(label, dtype)(
            jnp.asarray(a, dtype), jnp.asarray(b, dtype), (jnp.int32(3), jnp.int32(5))
        )
        assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in jax.tree.leaves(found))

    check()
    ends = (
        jnp.asarray([1e4, -1e4, 1e4, -1e4, 0, 1e-3, -80, 80], dtype),
        jnp.asarray([1e4, 1e4, -1e4, -1e4, 0, 0, 80, -80], dtype),
    )
    found = _value_and_gradient(label, dtype)(*ends, (jnp.int32(1), jnp.int32(1)))
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in jax.tree.leaves(found))


NATS = st.floats(-50, 50, width=32)
DIFFERENCES = [
    "sigmoid",
    "robust",
    "hinge",
    "ipo, summed",
    "exo_pair",
    "discopop",
    "odpo",
    "r_dpo",
    "sigmoid, e .1 (cDPO)",
]


@settings(deadline=None, max_examples=60)
@given(
    NATS,
    NATS,
    st.floats(0, 1, width=32),
    st.sampled_from(
        [
            k
            for k, c in cases.CASES.items()
            if c.name
            in (
                "sigmoid",
                "ipo",
                "hinge",
                "nca_pair",
                "sppo_hard",
                "simpo",
                "r_dpo",
                "exo_pair",
                "dpop",
            )
        ]
    ),
)
def test_swapping_the_responses_swaps_the_soft_label(a, b, p, label):
    loss = loss_of(label)
    with jax.enable_x64(True):

        def info(share):
            return PairInfo(
                soft_label=jnp.asarray([share]),
                margin=jnp.ones(1),
                mean_chosen_length=jnp.asarray(3.0),
            )

        zero, policy = (
            pair(np.float64(0), np.float64(0), (3, 5)),
            pair(np.float64(a), np.float64(b), (3, 5)),
        )
        one = loss(policy, zero, info(np.float64(p))).loss
        other = loss(policy.swapped(), zero.swapped(), info(1 - np.float64(p))).loss
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(NATS, NATS, st.floats(-20, 20, width=32), st.sampled_from(DIFFERENCES))
def test_a_shift_of_both_log_ratios_changes_no_difference_loss(a, b, shift, label):
    """What depends on x alone, as log Z(x) or a reward's offset, cancels."""
    loss, ref, info = loss_of(label), pair(0.0, 0.0, (3, 5)), PairInfo(margin=jnp.full(1, 1.5))
    with jax.enable_x64(True):
        plain, moved = (
            loss(pair(np.float64(a) + s, np.float64(b) + s, (3, 5)), ref, info).loss
            for s in (0.0, shift)
        )
        np.testing.assert_allclose(plain, moved, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    NATS,
    NATS,
    st.floats(0.0625, 5, width=32),
    st.sampled_from(["sigmoid", "hinge", "nca_pair", "bco_pair", "apo_zero", "apo_down", "tdpo1"]),
)
def test_beta_only_scales_the_log_ratios(a, b, beta, name):
    with jax.enable_x64(True):
        ref = pair(0.0, 0.0, everything=True)

        def policy(s):
            pairs = pair(np.float64(a) * s, np.float64(b) * s)
            return with_kl(pairs, jnp.ones(1) * s, 2 * jnp.ones(1) * s)

        scaled, unit = (
            make_loss(name, beta=beta)(policy(1.0), ref).loss,
            make_loss(name, beta=1.0)(policy(beta), ref).loss,
        )
        np.testing.assert_allclose(scaled, unit, rtol=1e-9, atol=1e-12)


def test_soft_label_is_the_weighted_mean_of_both_orders():
    policy, ref = random_pairs(5)
    loss = make_loss("sigmoid", beta=0.1)
    mixed = loss(policy, ref, PairInfo(soft_label=jnp.full(16, 0.3))).loss
    expected = 0.3 * loss(policy, ref).loss + 0.7 * loss(policy.swapped(), ref.swapped()).loss
    np.testing.assert_allclose(mixed, expected, rtol=1e-5)


def test_sft_term_is_the_mean_over_the_chosen_tokens_of_the_batch():
    policy, ref = random_pairs(5)
    with_term = make_loss("sigmoid", beta=0.1, sft_weight=0.2)(policy, ref).loss
    without = make_loss("sigmoid", beta=0.1)(policy, ref).loss
    token_mean = -float(policy.chosen.logps.sum()) / float(policy.chosen.lengths.sum())
    assert math.isclose(float((with_term - without).mean()), 0.2 * token_mean, rel_tol=1e-4)
    pairwise = (
        make_loss("sigmoid", beta=0.1, sft_weight=0.2, sft_normalize="pair")(policy, ref).loss
        - without
    )
    np.testing.assert_allclose(
        pairwise, -0.2 * policy.chosen.logps / policy.chosen.lengths, rtol=1e-3, atol=1e-6
    )


def test_weight_scales_and_silences_a_pair():
    policy, ref = random_pairs(6)
    weight = jnp.asarray([0.0, 2.0] * 8)
    plain = make_loss("sigmoid", beta=0.1)(policy, ref).loss
    np.testing.assert_allclose(
        make_loss("sigmoid", beta=0.1)(policy, ref, PairInfo(weight=weight)).loss, plain * weight
    )


def test_a_sum_is_the_sum_of_its_terms():
    policy, ref = random_pairs(7)

    def value(name, **s):
        return make_loss(name, **s)(policy, ref).loss

    both = value("0.8*sigmoid + 0.2*bco_pair+1*sft", beta=0.1)
    parts = 0.8 * value("sigmoid", beta=0.1) + 0.2 * value("bco_pair", beta=0.1) + value("sft")
    np.testing.assert_allclose(both, parts, rtol=1e-6)
    np.testing.assert_allclose(value("mpo", beta=0.1), both, rtol=1e-6)
    np.testing.assert_allclose(
        value("1*ipo+0.5*sft", beta=0.1), value("ipo", beta=0.1, sft_weight=0.5), rtol=1e-6
    )


def test_rewards_and_margins_carry_no_gradient_and_margins_are_the_objectives_own():
    policy, ref = random_pairs(8)
    for name, more in (("ipo", {}), ("simpo", {"gamma": 0.5}), ("r_dpo", {"alpha": 0.3})):
        loss = make_loss(name, beta=0.1, **more)
        grad = jax.grad(
            lambda p, loss=loss: sum(x.sum() for x in loss(p, ref)[1:]), allow_int=True
        )(policy)
        assert not np.any(grad.chosen.logps) and not np.any(grad.rejected.logps)
    a, b = policy.chosen.logps - ref.chosen.logps, policy.rejected.logps - ref.rejected.logps
    per_token = a / policy.chosen.lengths - b / policy.rejected.lengths
    np.testing.assert_allclose(make_loss("ipo", beta=0.1)(policy, ref).margin, per_token, rtol=1e-5)
    # Under the Jensen-Shannon divergence f'(u) = log(2u / (1 + u)), so that the difference is of
    # log-sigmoids.
    trained = jax.nn.log_sigmoid(a) - jax.nn.log_sigmoid(b)
    np.testing.assert_allclose(
        make_loss("sigmoid", beta=0.1, f_divergence="js")(policy, ref).margin,
        trained,
        rtol=1e-5,
        atol=1e-6,
    )


# --- settings -------------------------------------------------------------------------------------


def test_dpo_is_another_name_of_sigmoid_wherever_a_loss_is_named():
    for name in ("dpo", "0.8*dpo+0.2*bco_pair", "wpo*dpo", "dpo + 1*sft"):
        named = make_loss(name, beta=0.1)
        assert named.name == name.replace("dpo", "sigmoid")
        assert named.terms[0].name == "sigmoid"
    for name in ("dpop", "tr_dpo", "r_dpo", "dpo.py:dpo", "dpo:dpo", "a/dpo:dpo", "./dpo.py:loss"):
        assert canonical_name(name) == name
    assert canonical_name("mine:dpo+dpo") == "mine:dpo+sigmoid"


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        (dict(name="sigmoid", beta=-1.0), "loss.beta is -1.0"),
        (dict(name="sigmoid", beta=math.nan), "loss.beta is nan"),
        (dict(name="sigmoid"), "loss.beta is not set"),
        (dict(name="sigmoid", beta=0.1, label_smoothing=0.5), "loss.label_smoothing is 0.5"),
        (dict(name="hinge", beta=0.1, label_smoothing=0.1), "hinge takes only"),
        (dict(name="dpoo", beta=0.1), "loss.name holds 'dpoo'.*did you mean dpo"),
        (dict(name="ipo", beta=0.1, average="yes"), "loss.average is 'yes'"),
        (dict(name="exo_pair", beta=0.1), "loss.label_smoothing is not set.*1e-3"),
        (dict(name="robust", beta=0.1), "loss.label_smoothing is not set"),
        (dict(name="simpo", beta=2.0), "loss.gamma is not set"),
        (dict(name="orpo", beta=0.1, orpo_lambda=0.1), "loss.beta is 0.1, but orpo"),
        (dict(name="discopop", beta=0.05), "loss.tau is not set.*.05"),
        (dict(name="discopop", beta=0.05, tau=2.0), "loss.tau is 2.0"),
        (dict(name="tr_dpo", beta=0.1, alpha=0.6, tau=1.5), "loss.tau is 1.5"),
        (dict(name="tr_dpo", beta=0.1, alpha=1.5, tau=2.0), "loss.alpha is 1.5"),
        (
            dict(name="nca_pair", beta=0.1, f_divergence="js"),
            "loss.f_divergence is 'js', but nca_pair",
        ),
        (dict(name="sft", f_divergence="js"), "loss.f_divergence is 'js', but sft takes"),
        (dict(name="sigmoid", beta=0.1, f_divergence="js", f_alpha=0.5), "loss.f_alpha is 0.5"),
        (dict(name="sigmoid", beta=0.1, f_divergence="alpha"), "loss.f_alpha is not set"),
        (dict(name="sigmoid", beta=0.1, f_divergence="kl"), "loss.f_divergence is 'kl'"),
        (dict(name="sigmoid", beta=0.1, sft_normalize="pair"), "loss.sft_normalize is 'pair'"),
        (
            dict(name="kto", beta=0.1, sft_weight=0.1),
            "loss.sft_weight is 0.1, but kto takes only beta",
        ),
        (dict(name="0.5*sigmoid+0.5*kto", beta=0.1), "unpaired objectives stand alone"),
        (dict(name="-1*sigmoid", beta=0.1), "must be > 0"),
        (dict(name="half*sigmoid", beta=0.1), "neither a number nor wpo"),
        (dict(name="tr_dpo+tdpo1", beta=0.1, alpha=0.6, tau=2.0), "needs a fixed reference"),
        (dict(name="cpo+r_dpo", beta=0.1, alpha=0.6), "different things by loss.alpha"),
        (dict(name="tr_dpo+r_dpo", beta=0.1, alpha=0.6, tau=2.0), "different things by loss.alpha"),
        (
            dict(name="sigmoid", beta=0.1, extra={"kappa": 1.0}),
            "loss.extra.kappa is 1.0, but sigmoid takes only beta",
        ),
        (dict(name="sigmoid", beta=0.1, extra={"beta": 1.0}), "loss.extra.beta"),
        (dict(name="nowhere.py:loss", beta=0.1), "loss.name='nowhere.py:loss'"),
    ],
)
def test_bad_settings_fail_when_the_loss_is_made_and_name_the_field(kwargs, names):
    with pytest.raises(ValueError, match=names):
        make_loss(**kwargs)


def test_a_users_own_function_brings_its_settings_and_a_row_what_it_needs(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import jax\nfrom dpojax.objectives.table import Objective\ndef mine(x, *, beta, kappa,"
        " floor=0.0):\n    return jax.nn.softplus(-beta * x.h) + kappa + floor\ndef batch(x, *,"
        " beta):\n    return beta * (x.h - x.h.mean())\nrow = Objective(batch, coupled=True)\n"
    )
    policy, ref = random_pairs(9)
    own = make_loss(f"{tmp_path}/mine.py:mine", beta=0.1, extra={"kappa": 2.0})
    np.testing.assert_allclose(
        own(policy, ref).loss, make_loss("sigmoid", beta=0.1)(policy, ref).loss + 2, rtol=1e-6
    )
    assert own.source and not own.coupled and own.at_reference(policy, PairInfo()) is None
    summed = make_loss(f"0.5*{tmp_path}/mine.py:mine+1*ipo", beta=0.1, extra={"kappa": 2.0})
    np.testing.assert_allclose(
        summed(policy, ref).loss,
        0.5 * own(policy, ref).loss + make_loss("ipo", beta=0.1)(policy, ref).loss,
        rtol=1e-5,
    )
    assert make_loss(f"{tmp_path}/mine.py:row", beta=0.1).coupled
    with pytest.raises(ValueError, match="kappa"):
        make_loss(f"{tmp_path}/mine.py:mine", beta=0.1)
    # its own defaults count, and another file is another loss
    (tmp_path / "mine.py").write_text(
        "def mine(x, *, beta, label_smoothing=0.25, average=False):\n    return beta * x.a\n"
    )
    again = make_loss(f"{tmp_path}/mine.py:mine", beta=0.1)
    assert again.terms[0].settings == {"beta": 0.1, "label_smoothing": 0.25, "average": False}
    assert again.source != own.source and make_loss("sigmoid", beta=0.1).source == ""
    assert set(OBJECTIVES) <= {c.name for c in cases.CASES.values()}


def test_a_pair_without_soft_label_is_never_seen_the_other_way_round(tmp_path):
    (tmp_path / "steep.py").write_text(
        "import jax.numpy as jnp\ndef steep(x, *, beta):\n    return jnp.exp(-beta * x.h)\n"
    )
    loss, zero = make_loss(f"{tmp_path}/steep.py:steep", beta=0.1), pair(0.0, 0.0)
    info = PairInfo(soft_label=jnp.ones(1))
    value, slope = jax.value_and_grad(lambda a: loss(pair(a, 0.0), zero, info).loss.sum())(
        jnp.float32(1000.0)
    )
    assert value == 0 and slope == 0  # exp(+100) of the other order is no float32


def test_shorthands_stand_in_sums_and_exponents_are_no_sums():
    policy, ref = random_pairs(7)

    def value(name, **s):
        return make_loss(name, **s)(policy, ref).loss

    np.testing.assert_allclose(
        value("0.5*mpo+1e+1*ipo", beta=0.1),
        0.5 * value("mpo", beta=0.1) + 10 * value("ipo", beta=0.1),
        rtol=1e-5,
    )


def test_a_soft_label_weighs_the_sft_term_too():
    policy, ref = random_pairs(7)
    info = PairInfo(soft_label=jnp.full(16, 0.8), mean_chosen_length=jnp.asarray(9.0))
    found = make_loss("sft")(policy, ref, info).loss
    weighted = 0.8 * policy.chosen.logps + 0.2 * policy.rejected.logps
    np.testing.assert_allclose(found, -weighted / 9, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sigmoid", {"beta": 0.3}),
        ("sigmoid_norm", {"beta": 2.0}),
        ("simpo", {"beta": 2.0, "gamma": 0.0}),
        ("sft+simpo", {"beta": 2.0, "gamma": 0.0}),
        *(("sigmoid", {"beta": 0.3, "f_divergence": f}) for f in ("forward_kl", "js")),
        *(("sigmoid_norm", {"beta": 2.0, "f_divergence": f}) for f in ("forward_kl", "js")),
        ("sigmoid", {"beta": 0.3, "f_divergence": "alpha", "f_alpha": 0.5}),
    ],
)
def test_the_logged_accuracy_is_that_of_what_is_trained(name, settings):
    """A pair counts as right exactly where its loss is less than that of the pair with exchanged
    labels.
    """
    rng = np.random.default_rng(0)
    lengths = [jnp.asarray(rng.integers(1, 40, 200)) for _ in range(2)]

    def draw():
        return [jnp.asarray(-rng.uniform(0.5, 2.0, 200) * n, jnp.float32) for n in lengths]

    policy, ref = (pair_logps(*draw(), *lengths) for _ in range(2))
    loss = make_loss(name, **settings)
    # the SFT term has no opinion of pairs
    preference = make_loss(name.removeprefix("sft+"), **settings)
    margin = loss(policy, ref if loss.uses_reference else None).margin
    reference = (ref, ref.swapped()) if loss.uses_reference else (None, None)
    right = preference(policy, reference[0]).loss < preference(policy.swapped(), reference[1]).loss
    np.testing.assert_array_equal(margin > 0, right)


@pytest.mark.parametrize(
    ("name", "settings"), [("simpo", {"beta": 2.0, "gamma": 0.5}), ("orpo", {"orpo_lambda": 0.3})]
)
def test_rewards_of_per_token_objectives_are_those_of_a_token_as_trl_logs_them(name, settings):
    # TRL 1.16: CPOTrainer (simpo) and ORPOTrainer take average log-probs, times beta.
    policy = pair_logps(*map(jnp.asarray, ([-10.0, -40.0], [-30.0, -20.0], [5, 40], [30, 10])))
    out = make_loss(name, **settings)(policy, None)
    beta = next(iter(settings.values()))
    np.testing.assert_allclose(out.chosen_rewards, beta * np.array([-2.0, -1.0]), rtol=1e-6)
    np.testing.assert_allclose(out.rejected_rewards, beta * np.array([-1.0, -2.0]), rtol=1e-6)
    np.testing.assert_array_equal(out.chosen_rewards > out.rejected_rewards, out.margin > 0)
