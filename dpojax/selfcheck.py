"""At start-up: does this very run compute its objective? Real groups through the run's own model -> CheckResult.

The run's packed rows, in the shape and on the kernel that training takes, are compared with plain sequences: one prompt with
one response each, a causal mask, a log-softmax over everything. The two share the layers of the model and nothing else.

What rounding explains is measured and not set. Plain sequences in the run's precision are compared with the same in float32;
in float32 the unit roundoff counts times the size of the logits and the square root of the depth. README.md says where
the check warns and where it refuses.

Legend: A data shards, T scored tokens and U tokens of a shard, S sequences, L their length, Q response tokens, B pairs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.data.packing import PackedBatch, PackShape, Segment, StepPlan, TokenGroup, by_response, pack_step, plan_step
from dpojax.data.pipeline import PackGroups
from dpojax.errors import NumericsError
from dpojax.losses import PairInfo, PairLogps
from dpojax.models import Model
from dpojax.objectives import Loss
from dpojax.train import PairResults, batch_scores, both_scores, micro_batch, pair_results, pairs_of

UNIT_ROUNDOFF = 2.0**-24  # of float32, in which every sum is taken whatever the precision of its operands
# How often the unit roundoff of a logit, times sqrt(depth), may be counted: SmolLM2-135M needs 0.44, random weights 0.36.
FLOAT32_SLACK = 16.0
# Packed rows differ from plain sequences by about as much as plain sequences in the run's precision from float32: 1.28 times
# in bfloat16 on SmolLM2-135M.
ROUNDING_SLACK = 3.0
# A healthy head differs from a plain log-softmax of the same hidden states by float32's rounding alone: less than 1e-6.
HEAD_BOUND = 2.5e-4
LOSS_BOUND = 1e-3  # of the mean loss from its closed form, relative
COUPLING_BOUND = 1e-4  # of a pair's loss alone from its loss among the others, relative
COARSE_NATS = 0.25  # the run's precision moves a token's log-prob by more: a warning
LEAST_TOKENS = 1024  # of the groups that are checked, on every data shard, as far as they fit a micro-batch
MOST_GROUPS = 8  # of a data shard


class CheckResult(NamedTuple):
    """What was measured."""

    loss: float
    expected: float | None  # None: the objective has no closed form at policy == reference
    noise_nats: float  # the largest |log-ratio| of a response where policy == reference
    layout_nats: float  # packed rows against plain sequences: root mean square of the tokens' differences
    allowed_nats: float  # the most of it that rounding explains
    rounding_nats: float  # what the run's precision does to plain sequences; 0 in float32
    num_tokens: int
    warnings: tuple[str, ...]


class PlainModels(NamedTuple):
    """The decoders that the run's own is compared with; the oracle's have plain causal attention over rows of one sequence."""

    exact: Model  # the oracle in float32
    rounded: Model | None  # the oracle as the run rounds; None where that is float32
    packed: Model | None  # packed rows in float32, so that rounding hides no fault of theirs; None where the run's are


# --- the groups, packed as in training and as plain sequences ---------------------------------------------------------


def _positions(pack: PackGroups, shape: PackShape) -> list[list[int]]:
    """The groups that each data shard checks, by their positions in the index: short ones first of those at the start.

    Two groups that fit one row are wanted, so that a leak between them shows.
    """
    index, shards = pack.index, shape.num_shards
    first = range(min(len(index.rows), max(64, 4 * shards)))
    total = {i: int(index.prompt_lengths[i]) + sum(index.responses(i)) for i in first}
    half = shape.row_tokens // 2
    candidates = sorted(first, key=lambda i: (total[i] > half, total[i] if total[i] > half else i))
    chosen: list[list[int]] = [[] for _ in range(shards)]
    for place, i in enumerate(candidates):
        of_shard = chosen[place % shards]
        enough = len(of_shard) >= 2 and sum(total[j] for j in of_shard) >= max(LEAST_TOKENS, shape.row_tokens // 2)
        if not enough and len(of_shard) < MOST_GROUPS and _plan(index, [*of_shard, i], shape) is not None:
            of_shard.append(i)
    return chosen


def _plan(index, positions: Sequence[int], shape: PackShape) -> StepPlan | None:
    """Where the groups of one data shard go in one micro-batch; None where they do not fit."""
    prompts = [int(index.prompt_lengths[i]) for i in positions]
    one_shard = dataclasses.replace(shape, num_micro=1, num_shards=1)
    try:
        return plan_step(prompts, [index.responses(i) for i in positions], one_shard)
    except ValueError:
        return None


def _plan_shards(index, chosen: Sequence[Sequence[int]], shape: PackShape) -> StepPlan:
    """One micro-batch in which every data shard holds groups of its own; groups are counted through all shards."""
    cells, start = [], 0
    for positions in chosen:
        plan = _plan(index, positions, shape) if positions else None
        rows = [] if plan is None else plan.cells[0][0]
        cells.append([[Segment(start + s.group, s.branches) for s in row] for row in rows])
        start += len(positions)
    return StepPlan([cells], sum(map(len, cells)), 0)


def _pack(pack: PackGroups, groups: Sequence[TokenGroup], plan: StepPlan, shape: PackShape, positions, shards) -> PackedBatch:
    """The batch of the plan. The closed form is that of one pair: weights and soft labels are left out by the caller."""
    index = pack.index
    return pack_step(
        plan,
        shape,
        lambda g: groups[g],
        prompt_lengths=[len(g.prompt) for g in groups],
        response_lengths=[[len(y) for y in g.responses] for g in groups],
        counted_lengths=[index.counted(i) for i in positions],
        pairs=[index.pairs(i) for i in positions],
        shards=shards,
        pad_id=pack.pad_id,
        with_ref=False,
    )


class Sequences(NamedTuple):
    """The same groups as rows that hold one sequence each, from the data alone: nothing here knows of packing."""

    tokens: np.ndarray  # [S, L]
    predictor: np.ndarray  # [Q], index into the S L tokens
    target: np.ndarray  # [Q]
    lengths: dict[tuple[int, int], int]  # (group, response) -> |y|, in the order of Q


def _sequences(groups: Sequence[TokenGroup], *, multiple: int) -> Sequences:
    """Every prompt with every response; the number of rows is a multiple of the data shards."""
    pairs = [(g, k) for g, group in enumerate(groups) for k in range(len(group.responses))]
    whole = [np.concatenate([groups[g].prompt, groups[g].responses[k]]) for g, k in pairs]
    length = -(-max(map(len, whole)) // 128) * 128
    tokens = np.zeros((-(-len(whole) // multiple) * multiple, length), np.int32)
    predictor, target = [], []
    for row, ((g, _), ids) in enumerate(zip(pairs, whole, strict=True)):
        tokens[row, : len(ids)] = ids
        before = np.arange(len(groups[g].prompt), len(ids)) - 1
        predictor.append(row * length + before)
        target.append(ids[before + 1])
    lengths = {(g, k): len(groups[g].responses[k]) for g, k in pairs}
    return Sequences(tokens, np.concatenate(predictor), np.concatenate(target), lengths)


def faults_in_rows(batch: PackedBatch, plan: StepPlan, groups: Sequence[TokenGroup]) -> list[str]:
    """What a packed batch of all data shards says that its groups do not: exact, whatever the precision.

    Every response must stand behind its whole prompt, each token at its own position, predicted by the token before it, and
    every pair must name its own responses.
    """
    shards = batch.predictor.shape[1]
    flat = lambda x: np.asarray(x).reshape(x.shape[0], shards, -1)
    tokens, positions, number, branch = map(flat, (batch.tokens, batch.positions, batch.group, batch.branch))
    row = np.broadcast_to(np.arange(tokens.shape[-1]) // batch.tokens.shape[-1], tokens.shape[1:])
    responses = [[len(y) for y in g.responses] for g in groups]
    fields = ("target", "predictor", "slot", "weight")
    read = {name: dict(by_response(plan, responses, np.asarray(getattr(batch, name)))) for name in fields}
    where = {(s.group, k): (m, a) for m, cells in enumerate(plan.cells) for a, cell in enumerate(cells)
             for in_row in cell for s in in_row for k in s.branches}  # fmt: skip
    faults, taken = [], set()
    for g, group in enumerate(groups):
        for k, ids in enumerate(group.responses):
            cell = where[g, k]
            predictor = read["predictor"][g, k]
            own_row, own_number = row[cell[1]][predictor[0]], number[cell][predictor[0]]
            here = (row[cell[1]] == own_row) & (number[cell] == own_number)
            prompt, answer = here & (branch[cell] == 0), here & (branch[cell] == k + 1)
            counted = np.ones(len(ids)) if group.counted is None else group.counted[k]
            size = len(group.prompt)
            checks = {
                "the targets are not its tokens": _equal(read["target"][g, k], ids),
                "its prompt is not the prompt": _equal(tokens[cell][prompt], group.prompt),
                "its tokens are not its tokens": _equal(tokens[cell][answer], ids),
                "the prompt's positions are wrong": _equal(positions[cell][prompt], np.arange(size)),
                "its positions are wrong": _equal(positions[cell][answer], size + np.arange(len(ids))),
                "a token is predicted at the wrong place": _equal(
                    predictor, [np.flatnonzero(prompt)[-1:].sum(), *np.flatnonzero(answer)[:-1]]
                ),
                "its weights are wrong": _equal(read["weight"][g, k], counted),
                "its tokens count for several responses": len(set(read["slot"][g, k].tolist())) == 1,
                "another group has its number": own_number > 0 and (cell, own_row, own_number, k) not in taken,
            }
            taken.add((cell, own_row, own_number, k))
            faults += [f"row {group.row}, response {k + 1}: {name}" for name, right in checks.items() if not right]
        for p in group.pairs:
            cell = where[g, p.chosen]
            slots = {k: int(read["slot"][g, k][0]) for k in (p.chosen, p.rejected)}
            named = (batch.row_id[cell] == group.row) & batch.valid[cell]
            named &= (batch.chosen[cell] == slots[p.chosen]) & (batch.rejected[cell] == slots[p.rejected])
            if not named.any():
                faults.append(f"row {group.row}: no pair has response {p.chosen + 1} chosen and {p.rejected + 1} rejected")
    expected = sum(len(g.pairs) for g in groups)
    if int(batch.valid.sum()) != expected:
        faults.append(f"{int(batch.valid.sum())} pairs where {expected} belong")
    return faults


def _equal(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def _with_other_tokens(batch: PackedBatch, shards: int) -> tuple[PackedBatch, np.ndarray]:
    """The batch with other tokens wherever a row's last response cannot see, and which scored tokens cannot change: [A, T].

    In each row the last group keeps its prompt and the first half of its last response. Padding, groups before it, other
    responses, and what follows in the response itself all change; the targets stay.
    """
    tokens, group, branch = (np.array(x[0]) for x in (batch.tokens, batch.group, batch.branch))
    keep = np.zeros(tokens.shape, bool)
    for r in range(len(tokens)):
        last = group[r] == group[r].max()
        answer = np.flatnonzero(last & (branch[r] == branch[r][last].max()))
        if group[r].max():
            keep[r] = last & (branch[r] == 0)
            keep[r, answer[: len(answer) // 2]] = True
    ids = np.unique(tokens[group > 0])
    rank = np.searchsorted(ids, tokens) % len(ids)
    changed = np.where(keep, tokens, ids[(rank + 1 + np.arange(tokens.size).reshape(tokens.shape) % 7) % len(ids)])
    predictor = np.asarray(batch.predictor[0])
    # A prompt that is kept predicts the first token of every response behind it.
    same = np.take_along_axis(keep.reshape(shards, -1), predictor, axis=1)
    used = np.arange(predictor.shape[1]) < np.array([[np.count_nonzero(b)] for b in branch.reshape(shards, -1)])
    return batch._replace(tokens=changed[None].astype(np.int32)), same & used


def _of_shards(batch: PackedBatch, held: Sequence[int], shards: int) -> PackedBatch:
    """The part of a batch of all data shards that belongs to those which this process holds."""

    def part(x):
        if x.ndim < 2:
            return x
        return x.reshape(x.shape[0], shards, -1, *x.shape[2:])[:, list(held)].reshape(x.shape[0], -1, *x.shape[2:])

    return jax.tree.map(part, batch)


# --- the programs -----------------------------------------------------------------------------------------------------


def plain_logps(model: Model, head: Any, hidden, predictor, target, count, *, chunk: int = 128):
    """(log-probs, log-sum-exp of the logits) of the targets: a log-softmax over everything, some tokens at a time.

    Args:
      hidden: [A, U, D]; predictor, target: [A, Q].
      count: most targets in use on any shard; those past it are 0.
    """
    size = predictor.shape[1]
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -size % chunk)))
    predictor, target = pad(predictor), pad(target)

    def part(i, found):
        index, ids = (jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1) for x in (predictor, target))
        states = jnp.take_along_axis(hidden, index[..., None], axis=1)
        logits = model.unembed(head, states.reshape(-1, states.shape[-1])).reshape(*index.shape, -1)
        chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        total = jax.nn.logsumexp(logits, axis=-1)
        put = lambda x, values: jax.lax.dynamic_update_slice_in_dim(x, values, i * chunk, axis=1)
        return put(found[0], chosen - total), put(found[1], total)

    zero = jnp.zeros(predictor.shape, jnp.float32)
    found = jax.lax.fori_loop(0, (count + chunk - 1) // chunk, part, (zero, zero))
    return found[0][:, :size], found[1][:, :size]


def _watched(model: Model, seen: list) -> Model:
    """The model, whose final hidden states are kept in `seen` while it is traced."""

    def hidden_states(*rows, **key):
        hidden = model.hidden_states(*rows, **key)
        seen.append(hidden)
        return hidden

    def routed(*rows, **key):
        assert model.routed is not None
        hidden, routing = model.routed(*rows, **key)
        seen.append(hidden)
        return hidden, routing

    return model._replace(hidden_states=hidden_states, routed=None if model.routed is None else routed)


class Packed(NamedTuple):
    """What one micro-batch gives, through the functions that training calls."""

    policy: Any  # [A, T] log-probs, nats
    ref: Any  # the same, or None
    plain: list  # (log-probs, log-sum-exp) of the same hidden states without the run's head: policy, then reference
    pairs: tuple[PairLogps, PairLogps | None, PairInfo]  # [A P]


def _packed_program(model: Model, loss: Loss, *, chunk: int):
    def packed(params, ref_params, batch: PackedBatch) -> Packed:
        mb, seen = micro_batch(batch, 0), []
        scores = both_scores(_watched(model, seen), loss, params, ref_params, mb, chunk=chunk, details=True)
        flat = [h.reshape(mb.predictor.shape[0], -1, h.shape[-1]) for h in seen]
        trees = (params, ref_params)[: len(seen)]
        where = mb.predictor, mb.target, mb.num_scored
        plain = [plain_logps(model, model.head(tree), h, *where) for tree, h in zip(trees, flat, strict=True)]
        return Packed(scores.policy.logps, scores.ref_logps, plain, pairs_of(loss, mb, scores))

    return packed


def _logps_program(model: Model, *, chunk: int):
    def logps(params, batch: PackedBatch):
        return batch_scores(model, params, micro_batch(batch, 0), chunk=chunk).logps

    return logps


def _plain_program(model: Model, *, rows: int):
    def plain(params, tokens, predictor, target):
        """Log-probs of the targets [Q], `rows` sequences at a time."""
        position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), (rows, tokens.shape[1]))
        one = jnp.ones_like(position)
        some = lambda ids: model.hidden_states(params, ids, position, one, one * 0)
        hidden = jax.lax.map(some, tokens.reshape(-1, rows, tokens.shape[1]))
        hidden = hidden.reshape(1, tokens.size, -1)
        return plain_logps(model, model.head(params), hidden, predictor[None], target[None], target.size)[0][0]

    return plain


class LossResults(NamedTuple):
    """The objective on the checked pairs, [B] each."""

    at_reference: PairResults
    together: PairResults  # of a policy that has moved
    alone: PairResults  # the same, each pair for itself; of coupled pairs, in the opposite order
    raised: PairResults  # the chosen response 1 nat likelier, the rejected one 1 nat less


def _loss_program(loss: Loss):
    def check(policy: PairLogps, ref: PairLogps | None, info: PairInfo) -> LossResults:
        if loss.coupled:
            info = info._replace(shift=np.float32(0))
        count = policy.chosen.shape[0]
        number = jnp.arange(count)

        def moved(chosen, rejected) -> PairLogps:
            heads = {}
            if policy.chosen_head is not None:
                heads = dict(chosen_head=policy.chosen_head + chosen, rejected_head=policy.rejected_head + rejected)
            return policy._replace(chosen=policy.chosen + chosen, rejected=policy.rejected + rejected, **heads)

        step = 0.3 * jnp.sin(12.9898 * number)
        far = moved(step * jnp.sqrt(policy.chosen_lengths), -step)
        given = (far, ref, info, number)
        if loss.coupled:
            turn = lambda x: x[::-1] if jnp.ndim(x) else x
            alone = jax.tree.map(turn, pair_results(loss, *jax.tree.map(turn, given)))
        else:
            axes = jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, given)
            split = jax.tree.map(lambda x: x[:, None] if jnp.ndim(x) else x, given)
            alone = jax.vmap(lambda *pair: pair_results(loss, *pair), in_axes=axes)(*split)
            alone = jax.tree.map(lambda x: x[:, 0], alone)
        results = [pair_results(loss, p, ref, info, number) for p in (policy, far, moved(1.0, -1.0))]
        return LossResults(results[0], results[1], alone, results[2])

    return check


# --- the check --------------------------------------------------------------------------------------------------------


def _rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def _spread(x, *, experts: bool) -> float:
    """Root mean square over tokens; with experts, of all but the 2 % that differ most.

    Where two experts are all but equally likely, rounding chooses between them, and that token differs by any amount.
    """
    size = np.sort(np.abs(np.asarray(x, np.float64)))
    return _rms(size[: max(1, int(0.98 * len(size)))] if experts else size)


def self_check(
    model: Model,
    plain: PlainModels,
    params,
    ref_params,
    pack: PackGroups,
    loss: Loss,
    *,
    depth: int,
    chunk: int,
    put: Callable[[PackedBatch], PackedBatch],
    program: Callable[..., Callable[..., Any]],
) -> CheckResult:
    """Checks rows, hidden states, head, reference and objective on the first groups of the data, where policy == reference.

    Args:
      model: the run's own, for rows of pack.shape.
      plain: the oracle.
      ref_params: None where the run has no reference.
      depth: layers.
      chunk: tokens whose logits exist at a time, as in training.
      put: host batch to the devices.
      program: (name, function, **jit options) -> the jitted function.
    Raises: NumericsError naming what disagrees.
    """
    most_pairs = int(np.diff(pack.index.pair_offsets).max(initial=1))
    shape = dataclasses.replace(
        pack.shape,
        num_micro=1,
        # A step may take fewer groups than are checked.
        num_slots=max(pack.shape.num_slots, MOST_GROUPS * pack.shape.num_lanes),
        num_pairs=max(pack.shape.num_pairs, MOST_GROUPS * most_pairs),
    )
    shards = shape.num_shards
    chosen = _positions(pack, shape)
    positions = [i for of_shard in chosen for i in of_shard]
    groups = [pack.token_group(i) for i in positions]
    plan = _plan_shards(pack.index, chosen, shape)
    batch = _pack(pack, groups, plan, shape, positions, range(shards))
    faults = faults_in_rows(batch, plan, groups)
    if faults:
        raise NumericsError(f"self-check: the packed rows are not the data's: {faults[0]} ({len(faults)} such faults)")
    ones = np.ones_like(batch.pair_weight)
    batch = batch._replace(pair_weight=ones, soft_label=batch.soft_label if loss.unpaired else ones)

    replicated = jax.sharding.NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, jax.sharding.PartitionSpec())
    packed = program("self_check", _packed_program(model, loss, chunk=chunk), out_shardings=replicated)
    run = lambda b: jax.device_get(packed(params, ref_params, put(_of_shards(b, pack.shards, shards))))
    first = run(batch)
    changed, same = _with_other_tokens(batch, shards)
    second = run(changed)

    rows = _sequences(groups, multiple=shards)
    oracle = {}
    for name, of_plain in (("exact", plain.exact), ("rounded", plain.rounded)):
        if of_plain is not None:
            compiled = program(f"self_check_{name}", _plain_program(of_plain, rows=shards), out_shardings=replicated)
            oracle[name] = np.asarray(compiled(params, rows.tokens, rows.predictor, rows.target))

    packed_exact = None
    if plain.packed is not None:
        compiled = program("self_check_packed", _logps_program(plain.packed, chunk=chunk), out_shardings=replicated)
        packed_exact = np.asarray(compiled(params, put(_of_shards(batch, pack.shards, shards))))

    policy, ref, info = first.pairs
    used = np.asarray(info.valid)
    only_used = lambda x: x if np.ndim(x) == 0 else np.asarray(x)[used]
    pairs = jax.tree.map(only_used, (policy, ref, info))
    results = jax.device_get(program("self_check_loss", _loss_program(loss))(*pairs))

    responses = [[len(y) for y in g.responses] for g in groups]
    by_token = lambda x: np.concatenate([v for _, v in sorted(by_response(plan, responses, np.asarray(x)[None]))])
    policy_tokens, ref_tokens, plain_tokens = jax.tree.map(by_token, (first.policy, first.ref, first.plain))
    experts = model.routed is not None
    tokens = _Tokens(
        policy=policy_tokens,
        ref=ref_tokens,
        plain=plain_tokens,
        exact=oracle["exact"],
        rounded=oracle.get("rounded"),
        packed_exact=None if packed_exact is None else by_token(packed_exact),
    )
    allowed = _allowed(tokens, depth, experts)
    _check_head(tokens, allowed)
    for name, of_pairs, logps in zip(("policy", "reference"), (policy, ref), (first.policy, first.ref), strict=True):
        if of_pairs is not None:
            _check_sums(name, jax.tree.map(only_used, of_pairs), batch, np.asarray(logps))
    warnings = _check_isolation(first, second, same, lambda: run(batch), experts=experts, allowed=allowed)
    layout_nats = _check_layout(tokens, allowed, experts=experts)
    noise_nats = _check_reference(tokens, pairs, allowed, experts=experts)
    mean, expected = _check_objective(loss, results, pairs, noise_nats)
    if allowed.rounding > COARSE_NATS:
        warnings.append(
            f"the precision of the computation moves a token's log-prob by {allowed.rounding:.2f} nats (root mean square); "
            "log-ratios of this size are noise (model.dtype=float32 is exact)"
        )
    return CheckResult(
        loss=mean,
        expected=expected,
        noise_nats=noise_nats,
        layout_nats=layout_nats,
        allowed_nats=allowed.layout,
        rounding_nats=allowed.rounding,
        num_tokens=len(tokens.policy),
        warnings=tuple(warnings),
    )


def _response_sums(batch: PackedBatch, logps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs of both responses of every valid pair, summed on the host in float64: [2, B]; and sums of |log-prob|."""
    shards = range(logps.shape[0])
    pairs = batch.chosen[0], batch.rejected[0]
    found = []
    for values in (logps, np.abs(logps)):
        terms = np.asarray(values, np.float64) * batch.weight[0]
        sums = np.stack([np.bincount(batch.slot[0, a], terms[a], batch.lengths.shape[2]) for a in shards])
        found.append(np.stack([np.take_along_axis(sums, p, axis=1)[batch.valid[0]] for p in pairs]))
    return found[0], found[1]


class _Tokens(NamedTuple):
    """Log-probs of every scored token, response by response, [Q] each, nats."""

    policy: np.ndarray
    ref: np.ndarray | None
    plain: list  # (log-probs, log-sum-exp) of the same hidden states
    exact: np.ndarray  # plain sequences in float32
    rounded: np.ndarray | None  # and in the run's precision
    packed_exact: np.ndarray | None  # packed rows in float32, where the run's are not


class _Allowed(NamedTuple):
    """What rounding explains, nats of a token's log-prob, root mean square."""

    float32: float
    rounding: float  # measured
    layout: float


def cache_bound(values: np.ndarray, *, dtype: str, depth: int) -> float:
    """How far the log-probs of two programs that compute the same may lie apart, root mean square, nats.

    For stored log-probs, beside which there are no logits: these are taken for ten times as large.
    """
    unit = UNIT_ROUNDOFF if dtype == "float32" else UNIT_ROUNDOFF * 2**16
    slack = FLOAT32_SLACK if dtype == "float32" else 1.0
    return slack * unit * max(1.0, 10 * _rms(values)) * float(np.sqrt(2 * depth + 1))


def _allowed(tokens: _Tokens, depth: int, experts: bool) -> _Allowed:
    logps, totals = tokens.plain[0]
    unit = UNIT_ROUNDOFF * (_rms(totals) + _rms(logps))  # of a logit
    float32 = FLOAT32_SLACK * unit * float(np.sqrt(2 * depth + 1))  # each layer adds to the hidden states twice
    rounding = 0.0 if tokens.rounded is None else _spread(tokens.rounded - tokens.exact, experts=experts)
    return _Allowed(float32, rounding, float32 + ROUNDING_SLACK * rounding)


def _check_head(tokens: _Tokens, allowed: _Allowed) -> None:
    """The run's log-probs against a plain log-softmax of the same hidden states."""
    for name, logps, plain in zip(("policy", "reference"), (tokens.policy, tokens.ref), tokens.plain, strict=False):
        assert logps is not None
        off, bound = _rms(logps - plain[0]), HEAD_BOUND * _rms(plain[0]) + allowed.float32 / FLOAT32_SLACK
        if not off <= bound:
            raise NumericsError(
                f"self-check: the {name}'s log-probs are not the log-softmax of its hidden states: they differ by {off:.1e} "
                f"nats, and rounding explains {bound:.1e} (root mean square of {len(logps)} tokens)"
            )


def _check_sums(name: str, pairs: PairLogps, batch: PackedBatch, logps: np.ndarray) -> None:
    """A pair's log-probs are the sums of the tokens of its own responses: chosen first."""
    sums, sizes = _response_sums(batch, logps)
    given = np.stack([pairs.chosen, pairs.rejected])
    over = np.abs(given - sums) - HEAD_BOUND * sizes
    if not (over <= 1e-6).all():
        pair = int(np.argmax(over.max(axis=0)))
        raise NumericsError(
            f"self-check: the {name}'s log-probs of a pair are {given[0, pair]:.4f} and {given[1, pair]:.4f}, the sums over the "
            f"tokens of its chosen and its rejected response {sums[0, pair]:.4f} and {sums[1, pair]:.4f}"
        )


def _check_isolation(first: Packed, second: Packed, same: np.ndarray, again: Callable[[], Packed], *, experts: bool,
                     allowed: _Allowed) -> list[str]:  # fmt: skip
    """A response whose prompt and tokens are the same has the same log-probs to the bit, whatever stands beside it."""
    off = np.abs(np.asarray(first.policy) - np.asarray(second.policy))[same]
    if off.max(initial=0.0) == 0:
        return []
    # Experts take their tokens in groups whose sizes are the neighbours' too, and some devices add up in no fixed order.
    varies = experts or np.any(np.asarray(again().policy) != np.asarray(first.policy))
    if varies and _spread(off, experts=experts) <= allowed.layout:
        return [
            f"the same rows give log-probs that differ by up to {off.max():.1e} nats: this device's sums have no fixed order"
        ]
    raise NumericsError(
        f"self-check: {np.count_nonzero(off)} of {off.size} tokens change by up to {off.max():.1e} nats with the padding, another "
        "response, another group or a later token: a mask leaks"
    )


def _check_layout(tokens: _Tokens, allowed: _Allowed, *, experts: bool) -> float:
    """Packed rows on the run's kernel against plain sequences; root mean square of the tokens' differences, nats."""
    plain = tokens.exact if tokens.rounded is None else tokens.rounded
    pairs = [(tokens.policy, plain, allowed.layout)]
    if tokens.packed_exact is not None:
        pairs.append((tokens.packed_exact, tokens.exact, allowed.float32))
    spreads = []
    for logps, right, bound in pairs:
        off = np.abs(logps - right)
        spreads.append(_spread(off, experts=experts))
        if not spreads[-1] <= bound:
            raise NumericsError(
                f"self-check: packed rows give other log-probs than plain sequences: {spreads[-1]:.1e} nats, and rounding explains "
                f"{bound:.1e} (root mean square of {off.size} tokens; largest {off.max():.1e}): a position, a mask or the "
                "attention kernel is wrong (model.attention=full avoids the kernels)"
            )
    return spreads[0]


def _check_reference(tokens: _Tokens, pairs, allowed: _Allowed, *, experts: bool) -> float:
    """The largest |log-ratio| of a response, nats; policy == reference, so that its tokens differ by rounding at most."""
    policy, ref = pairs[:2]
    if ref is None:
        return 0.0
    off = _spread(tokens.policy - tokens.ref, experts=experts)
    if not off <= allowed.layout:
        raise NumericsError(
            f"self-check: policy and reference have the same weights, and the log-probs of a token differ by {off:.1e} nats "
            f"(root mean square; rounding explains {allowed.layout:.1e}): the reference is computed differently"
        )
    return float(np.abs([policy.chosen - ref.chosen, policy.rejected - ref.rejected]).max())


def _check_objective(loss: Loss, results: LossResults, pairs, noise_nats: float) -> tuple[float, float | None]:
    """(the mean loss at policy == reference, its closed form)."""
    policy, _, info = pairs
    mean = float(np.mean(results.at_reference.loss))
    closed = loss.at_reference(*jax.tree.map(lambda x: np.asarray(x, np.float64), (policy, info)))
    expected = None if closed is None else float(np.mean(closed))
    slope = loss.reward_scale * float(np.abs(results.together.pull).max())
    if expected is not None:
        bound = LOSS_BOUND * max(abs(expected), 0.1) + 2 * slope * noise_nats
        if not abs(mean - expected) <= bound:
            raise NumericsError(
                f"self-check: the {loss.name} loss at policy == reference is {mean:.6f}, not {expected:.6f} (+- {bound:.1e})"
            )
    together, alone = results.together.loss, results.alone.loss
    off = np.abs(together - alone) / (1 + np.abs(together))
    if not off.max() <= COUPLING_BOUND:
        raise NumericsError(
            f"self-check: a pair's {loss.name} loss depends on the order of the pairs or on its neighbours: "
            f"{together[off.argmax()]:.6f} among them, {alone[off.argmax()]:.6f} without (an objective of your own that looks at "
            "several pairs is an Objective(function, coupled=True))"
        )
    if not loss.unpaired and not (results.raised.margin > results.at_reference.margin).all():
        raise NumericsError(
            f"self-check: the margin of the {loss.name} loss does not grow where the chosen response becomes likelier and the "
            "rejected one less likely: they are swapped"
        )
    return mean, expected
