"""The start-up check: every healthy model passes, every seeded fault is refused, whatever
precision, depth and scale.
"""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from objective_cases import CASES

from dpojax.data.batches import PackGroups
from dpojax.data.dataset import Dataset
from dpojax.data.index import build_index
from dpojax.data.packing import PackedBatch, visible
from dpojax.data.records import open_records
from dpojax.data.rows import RowReader
from dpojax.data.shapes import make_shape
from dpojax.data.tokens import Limits
from dpojax.errors import NumericsError
from dpojax.models.attention import blocks
from dpojax.models.config import ModelConfig
from dpojax.models.decoder import make_decoder
from dpojax.objectives.loss import Loss, make_loss
from dpojax.objectives.pairs import PairInfo, PairLogps, ResponseLogps
from dpojax.objectives.table import OBJECTIVES, Objective
from dpojax.training import gradients, pairs, scores, selfcheck, selfcheck_programs, selfcheck_rows

STEP = (gradients, pairs, scores, selfcheck_programs)

DEEP = dataclasses.replace(
    tiny.CONFIG, num_layers=30, hidden_size=96, head_dim=24, intermediate_size=192, init_std=0.05
)
CONFIGS = {"tiny": tiny.CONFIG, "deep": DEEP}
PRECISIONS = ("float32", "bfloat16")


class Case(NamedTuple):
    """What the check takes."""

    config: ModelConfig
    model: selfcheck.Model
    plain: selfcheck.PlainModels
    params: dict
    pack: PackGroups
    compiled: dict

    def program(self, name, function, **options):
        """The oracle is compiled once a case; the run's own program anew, since it may hold a
        fault.
        """
        jitted = jax.jit(function, **options)
        return (
            jitted
            if name in ("self_check", "self_check_packed")
            else self.compiled.setdefault(name, jitted)
        )


def decoder(config, dtype, kernel):
    precision = jnp.dtype(dtype)
    options = dict(dtype=precision, param_dtype=jnp.dtype("float32"), remat="dots")
    return make_decoder(config, attention=kernel, **options)


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """Pairs as ids, in the rows of a step of one: the check takes more groups than that."""
    rng = np.random.default_rng(0)

    def ids(low, high):
        return rng.integers(0, tiny.CONFIG.vocab_size, int(rng.integers(low, high))).tolist()

    rows = [
        {"prompt_ids": ids(5, 40), "chosen_ids": ids(4, 40), "rejected_ids": ids(4, 40)}
        for _ in range(24)
    ]
    path = tmp_path_factory.mktemp("pairs") / "ids.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Dataset(open_records(str(path)), RowReader(""), None, Limits(64, 64))
    index = build_index(data, on_bad_line="error", max_bad_share=0.0, progress=lambda row: None)
    shape = make_shape(
        [index], layout="shared", num_groups=1, num_shards=1, micro_batch_tokens=512, row_tokens=256
    )
    return PackGroups(data, index, shape, (0,), 0)


def make_case(pack, config, dtype, scale=1.0) -> Case:
    kernel = blocks.blocked(block=64, chains=1)
    exact = decoder(config, "float32", blocks.causal())
    models = selfcheck.PlainModels(exact, None, None)
    if dtype != "float32":
        models = selfcheck.PlainModels(
            exact, decoder(config, dtype, blocks.causal()), decoder(config, "float32", kernel)
        )
    mesh = jax.make_mesh(
        (1,), ("data",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,)
    )
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(tiny.params(exact), replicated)
    params = {**params, "final_norm": params["final_norm"] * scale}
    return Case(config, decoder(config, dtype, kernel), models, params, pack, {})


def run(case: Case, *, ref_params=None, loss="sigmoid", model=None):
    ref = case.params if ref_params is None else ref_params
    model, plain = model or (case.model, case.plain)
    return selfcheck.self_check(
        model,
        plain,
        case.params,
        ref,
        case.pack,
        make_loss(loss, beta=0.1),
        selfcheck.CheckedRun(
            depth=case.config.num_layers,
            chunk=64,
            put=lambda batch: jax.tree.map(jnp.asarray, batch),
            program=case.program,
        ),
    )


@pytest.fixture(scope="module", params=PRECISIONS)
def case(request, pack):
    return make_case(pack, tiny.CONFIG, request.param)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_a_healthy_model_passes_whatever_the_size_of_its_logits(pack, scale):
    found = run(make_case(pack, tiny.CONFIG, "float32", scale))
    assert (
        abs(found.loss - np.log(2)) < 1e-6
        and found.layout_nats < found.allowed_nats / 4
        and not found.warnings
    )


def test_a_healthy_model_passes_in_either_precision(case):
    found = run(case)
    assert abs(found.loss - np.log(2)) < 1e-5 and found.num_tokens > 100
    # The bound is no wider than what the precision itself does to the log-probs.
    assert found.allowed_nats < 1e-4 + 4 * found.rounding_nats


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_a_healthy_deep_model_passes(pack, dtype, scale):
    run(make_case(pack, DEEP, dtype, scale))


# --- seeded faults --------------------------------------------------------------------------------


def in_rows(change):
    """A fault of the packed rows: `change` alters a copy of the batch in place."""

    def seed(monkeypatch, case):
        pack_step = selfcheck_rows.pack_step

        def faulty(*args, **options) -> PackedBatch:
            batch = jax.tree.map(np.array, pack_step(*args, **options))
            return change(batch) or batch

        monkeypatch.setattr(selfcheck_rows, "pack_step", faulty)
        return case.model, case.plain

    return seed


def late_positions(batch):
    batch.positions[batch.branch > 0] += 1


def lost_token(batch):
    batch.weight[0, 0, 3] = 0


def other_target(batch):
    batch.target[0, 0, 5] += 1


def early_predictor(batch):
    first = np.flatnonzero(np.diff(batch.response[0, 0], prepend=-1) > 0)[1]
    batch.predictor[0, 0, first] -= 1


def swapped_pair(batch):
    return batch._replace(chosen=batch.rejected, rejected=batch.chosen)


def in_rule(rule):
    """A fault of the attention rule."""

    def seed(monkeypatch, case):
        monkeypatch.setattr(blocks, "visible", rule)
        return case.model, case.plain

    return seed


def between_branches(
    query, key, query_group, key_group, query_branch, key_branch, distance=None, window=None
):
    return visible(query, key, query_group, key_group, query_branch * 0, key_branch * 0)


def between_groups(
    query, key, query_group, key_group, query_branch, key_branch, distance=None, window=None
):
    return visible(query, key, query_group * 0 + 1, key_group * 0 + 1, query_branch, key_branch)


def of_the_next_token(query, key, *rest, distance=None, window=None):
    return visible(query + 1, key, *rest)


def without_itself(query, key, *rest, distance=None, window=None):
    return visible(query - 1, key, *rest)


def without_the_prompt(
    query, key, query_group, key_group, query_branch, key_branch, distance=None, window=None
):
    seen = visible(query, key, query_group, key_group, query_branch, key_branch)
    return seen & (key_branch == query_branch)


def in_model(change):
    """A fault between the rows and the layers: (tokens, positions, group, branch) -> the same,
    changed.
    """

    def seed(monkeypatch, case):
        def faulty(model):
            if model is None:
                return None

            def changed(params, *rows, **key):
                return model.hidden_states(params, *change(*rows), **key)

            return model._replace(hidden_states=changed)

        return faulty(case.model), case.plain._replace(packed=faulty(case.plain.packed))

    return seed


def positions_by_row(tokens, positions, group, branch):
    """Positions count on through the row."""
    return tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), group, branch


def shifted_branches(tokens, positions, group, branch):
    return tokens, positions + (branch > 0), group, branch


def dropped_token(tokens, positions, group, branch):
    """The last prompt token is not there for the responses."""
    last = (branch == 0) & (jnp.roll(branch, -1, axis=1) > 0)
    return jnp.where(last, 0, tokens), positions, group, branch


def in_train(name, change):
    """A fault of a function that every step calls."""

    def seed(monkeypatch, case):
        function = next(getattr(module, name) for module in STEP if hasattr(module, name))
        for module in STEP:
            if hasattr(module, name):
                monkeypatch.setattr(
                    module, name, lambda *args, **options: change(function(*args, **options))
                )
        return case.model, case.plain

    return seed


def scaled(scores):
    return scores._replace(logps=scores.logps * 1.001)


FAULTS = {
    "a wrong position in the rows": in_rows(late_positions),
    "a token that does not count": in_rows(lost_token),
    "another target": in_rows(other_target),
    "a first token predicted one too early": in_rows(early_predictor),
    "a swapped pair in the rows": in_rows(swapped_pair),
    "a leak between branches": in_rule(between_branches),
    "a leak between groups": in_rule(between_groups),
    "a token that sees the next": in_rule(of_the_next_token),
    "a token that does not see itself": in_rule(without_itself),
    "a response that does not see its prompt": in_rule(without_the_prompt),
    "positions that go on through the row": in_model(positions_by_row),
    "positions one too late behind the prompt": in_model(shifted_branches),
    "a dropped prompt token": in_model(dropped_token),
    "a swapped pair in the step": in_train("gather_pairs", lambda pair: pair[::-1]),
    "log-probs scaled by 1e-3": in_train("scores_by_shard", scaled),
    "sums scaled by 1e-3": in_train("response_sums", lambda sums: sums * 1.001),
}


# The fast tests take what costs no compilation, and the four that bf16's rounding hides best.
HARD = (
    "a leak between branches",
    "a leak between groups",
    "positions one too late behind the prompt",
    "log-probs scaled by 1e-3",
)


EACH_FAULT = [
    pytest.param(
        name, marks=() if name.endswith("in the rows") or name in HARD else pytest.mark.slow
    )
    for name in FAULTS
]


@pytest.mark.parametrize("fault", EACH_FAULT)
def test_a_seeded_fault_is_refused(monkeypatch, case, fault):
    model = FAULTS[fault](monkeypatch, case)
    with pytest.raises(NumericsError, match="self-check"):
        run(case, model=model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    "fault",
    [pytest.param(name, marks=() if name in HARD else pytest.mark.exhaustive) for name in FAULTS],
)
def test_a_seeded_fault_is_refused_in_a_deep_model(monkeypatch, pack, dtype, fault):
    case = make_case(pack, DEEP, dtype)
    model = FAULTS[fault](monkeypatch, case)
    with pytest.raises(NumericsError, match="self-check"):
        run(case, model=model)


def test_a_reference_that_is_not_the_policy_is_refused(case):
    ref = jax.tree.map(lambda x: x * 1.01, case.params)
    with pytest.raises(NumericsError, match="reference"):
        run(case, ref_params=ref)


# --- the objective, on pairs alone ----------------------------------------------------------------


def objective_on_pairs(loss: Loss):
    """What the check does with the objective, on made-up pairs where policy == reference."""
    rng, count = np.random.default_rng(0), 6

    def logps():
        return -rng.uniform(1, 60, count).astype(np.float32)

    lengths = rng.integers(1, 30, (2, count)).astype(np.int32)
    chosen, rejected = logps(), logps()
    zero = np.zeros(count, np.float32)
    weights = rng.uniform(0, 1, (2, count)).astype(np.float32)

    def response(logps, lengths, weight):
        return ResponseLogps(
            logps,
            lengths,
            head=logps / 2 if loss.needs("head") else None,
            kl=zero if loss.needs("kl") else None,
            weight=weight if loss.needs("wpo") else None,
        )

    policy = PairLogps(
        chosen=response(chosen, lengths[0], weights[0]),
        rejected=response(rejected, lengths[1], weights[1]),
    )
    ones = np.ones(count, np.float32)
    label = (np.arange(count) % 2).astype(np.float32) if loss.unpaired else ones
    info = PairInfo(ones, label, ones, np.float32(lengths[0].mean()), ones > 0)
    pairs = (policy, policy, info)
    results = jax.device_get(jax.jit(selfcheck_programs.loss_program(loss))(*pairs))
    return selfcheck._check_objective(loss, results, pairs, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.exhaustive] * ("," in name)) for name in CASES],
)
def test_every_objective_passes(name):
    mean, expected = objective_on_pairs(make_loss(CASES[name].name, **CASES[name].settings))
    assert expected is None or abs(mean - expected) < 1e-4 * max(1, abs(expected))


def centred(x, *, beta):
    return -jax.nn.log_sigmoid(beta * (x.h - x.h.mean()))


def upside_down(x, *, beta):
    return jax.nn.softplus(beta * x.h)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective(centred), "coupled=True"),
        (Objective(upside_down, margin=lambda x, s: -x.h), "swapped"),
    ],
)
def test_a_loss_that_is_not_one_of_pairs_is_refused(monkeypatch, objective, message):
    monkeypatch.setitem(OBJECTIVES, "mine", objective)
    with pytest.raises(NumericsError, match=message):
        objective_on_pairs(make_loss("mine", beta=0.1))
