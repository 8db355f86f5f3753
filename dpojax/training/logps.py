"""Hidden states -> log pi(y | x): only at response positions, chunked over tokens, in float32.

Legend: A data shards, U tokens of a shard's rows, T scored tokens of a shard, C tokens of a chunk,
V vocabulary, D model, S responses. No array of [rows, length, vocabulary] exists anywhere.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from dpojax.runtime.sharding import HeadSharding

Unembed = Callable[[Any, Array], Array]  # (head, hidden [..., D]) -> float32 logits [..., V]


class TokenScores(NamedTuple):
    """What is known of every scored token.

    Only `logps` and `kl` carry a gradient; what nobody asked for is None.
    """

    logps: Float[Array, "A T"]  # nats
    kl: Float[Array, "A T"] | None  # KL(ref(.|prefix) || pi(.|prefix)) over the vocabulary, nats
    ref_logps: Float[Array, "A T"] | None  # of the reference that `kl` was taken to, nats
    log_sum_sq: Float[Array, "A T"] | None  # log sum_v pi(v|prefix)^2, for WPO
    # the details; 0 where they were not wanted this time
    entropy: Float[Array, "A T"]  # of the next-token distribution, nats
    correct: Bool[Array, "A T"]  # the target is the most likely token
    mean_logit: Float[Array, "A T"]  # over the vocabulary, TRL's logits/*


class HeadInputs(NamedTuple):
    """What `Unembed` makes one model's logits of."""

    head: Any  # its parameters, or inside shard_map a device's part of them
    hidden: Float[Array, "A U D"]  # final hidden states of a shard's rows, flattened


class Targets(NamedTuple):
    """The scored tokens of every data shard."""

    predictor: Int[Array, "A T"]  # which token's hidden state predicts each scored token
    target: Int[Array, "A T"]  # the scored token ids
    count: Int[Array, ""]  # most scored tokens in use in any shard; the rest is padding


class ScoreOptions(NamedTuple):
    """The static settings of `token_scores`."""

    chunk: int  # C, tokens per chunk and shard
    squares: bool = False  # whether to compute `log_sum_sq`
    # the head is not trained: its gradient, two thirds of the backward pass's work with logits, is
    # not computed
    frozen: bool = False


def _is_target(target, vocab_size):
    # A comparison instead of a gather: it stays local when the vocabulary is sharded.
    return target[..., None] == jax.lax.broadcasted_iota(
        jnp.int32, (*target.shape, vocab_size), target.ndim
    )


def _target_logit(logits, target):
    return jax.lax.platform_dependent(
        # on a CPU, where the comparison is a pass of its own over the logits
        cpu=lambda: jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0],
        default=lambda: jnp.sum(
            jnp.where(_is_target(target, logits.shape[-1]), logits, 0.0), axis=-1
        ),
    )


def _chunk(x, first, size):
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)


def _gather(hidden, predictor):
    """The hidden states that predict a chunk, flat [A C, D].

    A matrix product of two dimensions is the fastest on a CPU.
    """
    return jnp.take_along_axis(hidden, predictor[..., None], axis=1).reshape(-1, hidden.shape[-1])


def _pad(x, size):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)))


def _flat_chunk(x, first, size):
    """A chunk as [A C], as `_gather` has its hidden states."""
    return _chunk(x, first, size).reshape(-1)


def _put_chunk(x, part, first):
    return jax.lax.dynamic_update_slice_in_dim(x, part.reshape(x.shape[0], -1), first, axis=1)


def _each_chunk(count, chunk: int, body: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """body(first token, number of tokens, carry) over `count` tokens.

    By chunks, then by quarters of one.

    The trip counts are read from `count`: large products, and yet little work on padding.
    """
    quarter = chunk
    if chunk % 4 == 0:
        quarter = chunk // 4
    full = count // chunk
    quarters = -(-(count % chunk) // quarter)
    carry = jax.lax.fori_loop(0, full, lambda i, carry: body(i * chunk, chunk, carry), carry)
    return jax.lax.fori_loop(
        0, quarters, lambda i, carry: body(full * chunk + i * quarter, quarter, carry), carry
    )


def fitting_chunk(chunk: int, length: int) -> int:
    """The chunk, or the scored tokens where they are fewer, rounded up to a multiple of 4096.

    A larger chunk would compute logits of padding.
    """
    return min(chunk, -(-length // 4096) * 4096)


def scores_by_shard(
    unembed: Unembed,
    sharding: HeadSharding | None,
    policy: HeadInputs,
    ref: HeadInputs | None,
    targets: Targets,
    details: Bool[Array, ""],
    options: ScoreOptions,
) -> TokenScores:
    """`token_scores` with every data shard on its own devices.

    Nothing travels between them but the head, once a pass. Arguments as in `token_scores`, whose
    head lies as `sharding` says; None: on one device, or as the compiler sees fit.
    """
    options = options._replace(chunk=fitting_chunk(options.chunk, targets.target.shape[1]))
    if sharding is None or set(policy.head) != {name for name, _ in sharding.specs}:
        return token_scores(unembed, None, policy, ref, targets, details, options)
    rows = P(sharding.axes)
    ref_specs = None
    if ref is not None:
        ref_specs = HeadInputs(head=jax.tree.map(lambda x: P(), ref.head), hidden=rows)
    mapped = jax.shard_map(
        lambda *arrays: token_scores(unembed, sharding, *arrays, options),
        mesh=sharding.mesh,
        in_specs=(
            HeadInputs(head=dict(sharding.specs), hidden=rows),
            ref_specs,
            Targets(predictor=rows, target=rows, count=P()),
            P(),
        ),
        out_specs=rows,
        axis_names=set(sharding.axes),
        check_vma=False,
    )
    return mapped(policy, ref, targets, details)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 6))
def token_scores(
    unembed: Unembed,
    sharding: HeadSharding | None,
    policy: HeadInputs,
    ref: HeadInputs | None,
    targets: Targets,
    details: Bool[Array, ""],
    options: ScoreOptions,
) -> TokenScores:
    """log pi(target | prefix) of every scored token, in nats, and what else is wanted of it.

    The logits exist one chunk of tokens at a time, in both passes: the backward pass computes them
    anew from their log-sum-exp and accumulates the head's gradient in float32. Work follows
    `targets.count`, not T; the tokens past it are 0.

    Args:
      unembed: (head, hidden) -> float32 logits.
      sharding: how the head lies on the mesh, inside shard_map; None: every device has all of it.
      policy: the model that is scored.
      ref: the reference, for `kl`; it gets no gradient.
      targets: the scored tokens.
      details: whether to compute the details; they are 0 if not.
      options: static settings.
    """
    return _scores(unembed, sharding, policy, ref, targets, details, options)[0]


def _gathered(sharding: HeadSharding | None, head: Any) -> Any:
    """All of the head, of which a device may hold a part."""
    if sharding is None:
        return head
    return sharding.gather(head)


def _scores(unembed, sharding, policy, ref, targets, details, options):
    """The scores, and the log-sum-exp of the logits of every computed token.

    The last chunk's padding is computed too.
    """
    length = targets.target.shape[1]
    target = _pad(targets.target, options.chunk)
    predictor = _pad(targets.predictor, options.chunk)
    head = _gathered(sharding, policy.head)

    def body(first, size, out):
        y = _flat_chunk(target, first, size)
        index = _chunk(predictor, first, size)
        logits = unembed(head, _gather(policy.hidden, index))
        lse = jax.nn.logsumexp(logits, axis=-1)
        target_logit = _target_logit(logits, y)
        logps = target_logit - lse
        kl = None
        ref_logps = None
        if ref is not None:
            ref_log_p = jax.nn.log_softmax(unembed(ref.head, _gather(ref.hidden, index)), axis=-1)
            kl = jnp.sum(jnp.exp(ref_log_p) * (ref_log_p - logits + lse[..., None]), axis=-1)
            ref_logps = _target_logit(ref_log_p, y)
        log_sum_sq = None
        if options.squares:
            log_sum_sq = jax.nn.logsumexp(2 * (logits - lse[..., None]), axis=-1)

        def describe():
            entropy = lse - jnp.sum(jnp.exp(logits - lse[..., None]) * logits, axis=-1)
            return entropy, target_logit >= logits.max(axis=-1), logits.mean(axis=-1)

        zero = jnp.zeros_like(logps)
        entropy, correct, mean_logit = jax.lax.cond(
            details, describe, lambda: (zero, zero.astype(bool), zero)
        )
        scores = TokenScores(
            logps=logps,
            kl=kl,
            ref_logps=ref_logps,
            log_sum_sq=log_sum_sq,
            entropy=entropy,
            correct=correct,
            mean_logit=mean_logit,
        )
        return jax.tree.map(lambda o, p: _put_chunk(o, p, first), out, (scores, lse))

    zero = jnp.zeros(target.shape, jnp.float32)

    def wanted_zero(wanted):
        return zero if wanted else None

    empty = TokenScores(
        logps=zero,
        kl=wanted_zero(ref is not None),
        ref_logps=wanted_zero(ref is not None),
        log_sum_sq=wanted_zero(options.squares),
        entropy=zero,
        correct=jnp.zeros(target.shape, bool),
        mean_logit=zero,
    )
    scores, lse = _each_chunk(targets.count, options.chunk, body, (empty, zero))
    return jax.tree.map(lambda x: x[:, :length], scores), lse


class _Residuals(NamedTuple):
    """What the backward pass needs of the forward pass."""

    policy: HeadInputs
    ref: HeadInputs | None
    targets: Targets
    lse: Array  # log-sum-exp of every token's logits, the last chunk's padding included


def _token_scores_fwd(unembed, sharding, policy, ref, targets, details, options):
    scores, lse = _scores(unembed, sharding, policy, ref, targets, details, options)
    return scores, _Residuals(policy, ref, targets, lse)


def _token_scores_bwd(unembed, sharding, options, residuals: _Residuals, cotangents: TokenScores):
    ref = residuals.ref
    hidden = residuals.policy.hidden
    target = _pad(residuals.targets.target, options.chunk)
    predictor = _pad(residuals.targets.predictor, options.chunk)
    cotangent = _pad(cotangents.logps, options.chunk)
    kl_cotangent = None
    if ref is not None:
        kl_cotangent = _pad(cotangents.kl, options.chunk)
    shard = jnp.arange(hidden.shape[0])[:, None]
    head = _gathered(sharding, residuals.policy.head)

    def body(first, size, carry):
        d_head, d_hidden = carry
        index = _chunk(predictor, first, size)
        y = _flat_chunk(target, first, size)
        g = _flat_chunk(cotangent, first, size)
        lse = _flat_chunk(residuals.lse, first, size)
        if options.frozen:
            logits, pullback = jax.vjp(functools.partial(unembed, head), _gather(hidden, index))
        else:
            logits, pullback = jax.vjp(unembed, head, _gather(hidden, index))
        p = jnp.exp(logits - lse[..., None])
        d_logits = (_is_target(y, logits.shape[-1]) - p) * g[..., None]
        if ref is not None:
            q = jax.nn.softmax(unembed(ref.head, _gather(ref.hidden, index)), axis=-1)
            d_logits = d_logits + (p - q) * _flat_chunk(kl_cotangent, first, size)[..., None]
        *d_head_chunk, d_hidden_chunk = pullback(d_logits)
        if not options.frozen:
            d_head = jax.tree.map(
                lambda total, part: total + part.astype(jnp.float32), d_head, *d_head_chunk
            )
        d_hidden_chunk = d_hidden_chunk.astype(jnp.float32).reshape(*index.shape, -1)
        return d_head, d_hidden.at[shard, index].add(d_hidden_chunk)

    trained = head
    if options.frozen:
        trained = ()
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (trained, hidden))
    d_head, d_hidden = _each_chunk(residuals.targets.count, options.chunk, body, zeros)
    if options.frozen:
        d_head = jax.tree.map(jnp.zeros_like, residuals.policy.head)
    else:
        if sharding is not None:
            d_head = sharding.scatter(d_head)
        d_head = jax.tree.map(lambda g, x: g.astype(x.dtype), d_head, residuals.policy.head)
    d_policy = HeadInputs(head=d_head, hidden=d_hidden.astype(hidden.dtype))
    return d_policy, None, None, None


token_scores.defvjp(_token_scores_fwd, _token_scores_bwd)


def token_logps(
    unembed: Unembed, policy: HeadInputs, targets: Targets, *, chunk: int
) -> Float[Array, "A T"]:
    """`token_scores` without anything but the log-probs, nats."""
    options = ScoreOptions(chunk=fitting_chunk(chunk, targets.target.shape[1]))
    no_details = jnp.asarray(False)
    scores: TokenScores = token_scores(unembed, None, policy, None, targets, no_details, options)
    return scores.logps


def response_sums(
    values: Float[Array, "A T"],
    weight: Float[Array, "A T"],
    response: Int[Array, "A T"],
    num_responses: int,
) -> Float[Array, "A S"]:
    """Sums per-token values over each response: log pi(y | x) of token log-probs."""
    # `where` and not a product: padding may hold anything, and 0 * inf is nan.
    values = jnp.where(weight > 0, values * weight, 0.0)
    return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_responses))(values, response)
