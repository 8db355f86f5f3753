"""Hidden states -> log pi(y | x): only at response positions, chunked over tokens, in float32.

Legend: A data shards, U tokens of a shard's rows, T scored tokens of a shard, C tokens of a chunk,
V vocabulary, D model, S responses. No array of [rows, length, vocabulary] exists anywhere.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

Unembed = Callable[[Any, Array], Array]  # (head, hidden [..., D]) -> float32 logits [..., V]


class TokenScores(NamedTuple):
    """What is known of every scored token. Only `logps` and `kl` carry a gradient; what nobody asked for is None."""

    logps: Float[Array, "A T"]  # nats
    kl: Float[Array, "A T"] | None  # KL(ref(.|prefix) || pi(.|prefix)) over the vocabulary, nats
    ref_logps: Float[Array, "A T"] | None  # of the reference that `kl` was taken to, nats
    log_sum_sq: Float[Array, "A T"] | None  # log sum_v pi(v|prefix)^2, for WPO
    # the details; 0 where they were not wanted this time
    entropy: Float[Array, "A T"]  # of the next-token distribution, nats
    correct: Bool[Array, "A T"]  # the target is the most likely token
    mean_logit: Float[Array, "A T"]  # over the vocabulary, TRL's logits/*


class Reference(NamedTuple):
    """The reference's side of the same tokens, where its full distributions are needed."""

    head: Any
    hidden: Float[Array, "A U D"]


class Spread(NamedTuple):
    """How the head lies on the mesh: every data shard scores its own tokens with the whole head, gathered once a pass."""

    mesh: Mesh
    axes: tuple[str, ...]  # over which rows are spread
    specs: tuple[tuple[str, P], ...]  # name in the head -> its dimensions' mesh axes, out of `axes`
    cast: Callable[[Any], Any]  # the head in the dtype of the computation, so that half the bytes travel

    def gather(self, head: Any) -> Any:
        """A device's part -> the whole head, inside shard_map."""
        return self._each(self.cast(head), lambda x, dim, axes: jax.lax.all_gather(x, axes, axis=dim, tiled=True))

    def scatter(self, grads: Any) -> Any:
        """The gradients of the whole head on every shard -> a device's part of their sum.

        The sum over axes that a parameter is not split over is taken by shard_map's own transpose.
        """
        return self._each(grads, lambda x, dim, axes: jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True))

    def _each(self, tree: Any, move: Callable[[Array, int, tuple[str, ...]], Array]) -> Any:
        out = dict(tree)
        for name, spec in self.specs:
            for dim, axes in enumerate(spec):
                if axes:
                    out[name] = move(out[name], dim, (axes,) if isinstance(axes, str) else axes)
        return out


def _is_target(target, vocab_size):
    # A comparison instead of a gather: it stays local when the vocabulary is sharded.
    return target[..., None] == jax.lax.broadcasted_iota(jnp.int32, (*target.shape, vocab_size), target.ndim)


def _target_logit(logits, target):
    return jax.lax.platform_dependent(
        # on a CPU, where the comparison is a pass of its own over the logits
        cpu=lambda: jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0],
        default=lambda: jnp.sum(jnp.where(_is_target(target, logits.shape[-1]), logits, 0.0), axis=-1),
    )


def _chunk(x, first, size):
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)


def _gather(hidden, predictor):
    """The hidden states that predict a chunk, flat [A C, D]: a matrix product of two dimensions is the fastest on a CPU."""
    return jnp.take_along_axis(hidden, predictor[..., None], axis=1).reshape(-1, hidden.shape[-1])


def _pad(x, size):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)))


def _flat_chunk(x, first, size):
    """A chunk as [A C], as `_gather` has its hidden states."""
    return _chunk(x, first, size).reshape(-1)


def _put_chunk(x, part, first):
    return jax.lax.dynamic_update_slice_in_dim(x, part.reshape(x.shape[0], -1), first, axis=1)


def _each_chunk(count, chunk: int, body: Callable[[Any, int, Any], Any], carry: Any) -> Any:
    """body(first token, number of tokens, carry) over `count` tokens: by chunks, then by quarters of one.

    The trip counts are read from `count`: large products, and yet little work on padding.
    """
    part = chunk // 4 if chunk % 4 == 0 else chunk
    full, rest = count // chunk, -(-(count % chunk) // part)
    carry = jax.lax.fori_loop(0, full, lambda i, carry: body(i * chunk, chunk, carry), carry)
    return jax.lax.fori_loop(0, rest, lambda i, carry: body(full * chunk + i * part, part, carry), carry)


def fitting_chunk(chunk: int, length: int) -> int:
    """No more than the scored tokens, rounded up far enough to leave usual chunks as they are: the rest would be padding."""
    return min(chunk, -(-length // 4096) * 4096)


def scores_by_shard(
    unembed: Unembed, spread: Spread | None, head: Any, hidden: Array, ref: Reference | None, *where: Array, settings: tuple
) -> TokenScores:
    """`token_scores` with every data shard on its own devices, so that nothing travels but the head: once a pass.

    Args:
      spread: how the head lies on the mesh; None: on one device, or as the compiler sees fit.
      where: predictor, target, count and details of `token_scores`, whose other arguments these are too.
      settings: its chunk, squares and frozen.
    """
    settings = (fitting_chunk(settings[0], where[1].shape[1]), *settings[1:])
    if spread is None or set(head) != {name for name, _ in spread.specs}:
        return token_scores(unembed, None, head, hidden, ref, *where, *settings)
    rows, own = P(spread.axes), dict(spread.specs)
    of_ref = None if ref is None else Reference(jax.tree.map(lambda x: P(), ref.head), rows)
    mapped = jax.shard_map(
        lambda *arrays: token_scores(unembed, spread, *arrays, *settings),
        mesh=spread.mesh,
        in_specs=(own, rows, of_ref, rows, rows, P(), P()),
        out_specs=rows,
        axis_names=set(spread.axes),
        check_vma=False,
    )
    return mapped(head, hidden, ref, *where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 9, 10, 11))
def token_scores(
    unembed: Unembed,
    spread: Spread | None,
    head: Any,
    hidden: Float[Array, "A U D"],
    ref: Reference | None,
    predictor: Int[Array, "A T"],
    target: Int[Array, "A T"],
    count: Int[Array, ""],
    details: Bool[Array, ""],
    chunk: int,
    squares: bool,
    frozen: bool = False,
) -> TokenScores:
    """log pi(target | prefix) of every scored token, in nats, and what else is wanted of it.

    The logits exist one chunk of tokens at a time, in both passes: the backward pass computes them anew from their
    log-sum-exp and accumulates the head's gradient in float32. Work follows `count`, not T; the tokens past it are 0.

    Args:
      unembed: (head, hidden) -> float32 logits.
      spread: how the head lies on the mesh, inside shard_map; None: it is whole.
      head: parameters of `unembed`, or a device's part of them.
      hidden: final hidden states of a shard's rows, flattened.
      ref: the reference's head and hidden states, for `kl`; it gets no gradient.
      predictor: which token's hidden state predicts each scored token.
      target: the scored token ids.
      count: most scored tokens in use in any shard; the rest is padding.
      details: whether to compute the details; they are 0 if not.
      chunk: C, tokens per chunk and shard.
      squares: whether to compute `log_sum_sq`.
      frozen: the head is not trained: its gradient, two thirds of the backward pass's work with logits, is not computed.
    """
    return _scores(unembed, spread, head, hidden, ref, predictor, target, count, details, chunk, squares)[0]


def _scores(unembed, spread, head, hidden, ref, predictor, target, count, details, chunk, squares):
    """The scores, and the log-sum-exp of the logits of every token that was computed, the last chunk's padding included."""
    target, predictor, length = _pad(target, chunk), _pad(predictor, chunk), target.shape[1]
    head = head if spread is None else spread.gather(head)

    def body(first, size, out):
        y, index = _flat_chunk(target, first, size), _chunk(predictor, first, size)
        logits = unembed(head, _gather(hidden, index))
        lse, own = jax.nn.logsumexp(logits, axis=-1), _target_logit(logits, y)
        logps = own - lse
        kl = ref_logps = log_sum_sq = None
        if ref is not None:
            ref_log_p = jax.nn.log_softmax(unembed(ref.head, _gather(ref.hidden, index)), axis=-1)
            kl = jnp.sum(jnp.exp(ref_log_p) * (ref_log_p - logits + lse[..., None]), axis=-1)
            ref_logps = _target_logit(ref_log_p, y)
        if squares:
            log_sum_sq = jax.nn.logsumexp(2 * (logits - lse[..., None]), axis=-1)

        def describe():
            entropy = lse - jnp.sum(jnp.exp(logits - lse[..., None]) * logits, axis=-1)
            return entropy, own >= logits.max(axis=-1), logits.mean(axis=-1)

        zero = jnp.zeros_like(logps)
        described = jax.lax.cond(details, describe, lambda: (zero, zero.astype(bool), zero))
        part = TokenScores(logps, kl, ref_logps, log_sum_sq, *described), lse
        return jax.tree.map(lambda o, p: _put_chunk(o, p, first), out, part)

    zero = jnp.zeros(target.shape, jnp.float32)
    asked = lambda wanted: zero if wanted else None
    on = ref is not None
    start = TokenScores(zero, asked(on), asked(on), asked(squares), zero, jnp.zeros(target.shape, bool), zero)
    scores, lse = _each_chunk(count, chunk, body, (start, zero))
    return jax.tree.map(lambda x: x[:, :length], scores), lse


def _token_scores_fwd(unembed, spread, head, hidden, ref, predictor, target, count, details, chunk, squares, frozen):
    del frozen
    scores, lse = _scores(unembed, spread, head, hidden, ref, predictor, target, count, details, chunk, squares)
    return scores, (head, hidden, ref, predictor, target, count, lse)


def _token_scores_bwd(unembed, spread, chunk, squares, frozen, residuals, cotangents):
    del squares
    head, hidden, ref, predictor, target, count, lse = residuals
    target, predictor, cotangent = _pad(target, chunk), _pad(predictor, chunk), _pad(cotangents.logps, chunk)
    kl_cotangent = None if ref is None else _pad(cotangents.kl, chunk)
    shard = jnp.arange(hidden.shape[0])[:, None]
    part, head = head, head if spread is None else spread.gather(head)

    def body(first, size, carry):
        d_head, d_hidden = carry
        index = _chunk(predictor, first, size)
        y, g, own_lse = (_flat_chunk(x, first, size) for x in (target, cotangent, lse))
        if frozen:
            logits, pullback = jax.vjp(functools.partial(unembed, head), _gather(hidden, index))
        else:
            logits, pullback = jax.vjp(unembed, head, _gather(hidden, index))
        p = jnp.exp(logits - own_lse[..., None])
        d_logits = (_is_target(y, logits.shape[-1]) - p) * g[..., None]
        if ref is not None:
            q = jax.nn.softmax(unembed(ref.head, _gather(ref.hidden, index)), axis=-1)
            d_logits = d_logits + (p - q) * _flat_chunk(kl_cotangent, first, size)[..., None]
        *d_head_chunk, d_hidden_chunk = pullback(d_logits)
        if not frozen:
            d_head = jax.tree.map(lambda total, part: total + part.astype(jnp.float32), d_head, *d_head_chunk)
        d_hidden_chunk = d_hidden_chunk.astype(jnp.float32).reshape(*index.shape, -1)
        return d_head, d_hidden.at[shard, index].add(d_hidden_chunk)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (() if frozen else head, hidden))
    d_head, d_hidden = _each_chunk(count, chunk, body, zeros)
    if frozen:
        d_head = jax.tree.map(jnp.zeros_like, part)
    else:
        d_head = d_head if spread is None else spread.scatter(d_head)
        d_head = jax.tree.map(lambda g, x: g.astype(x.dtype), d_head, part)
    return d_head, d_hidden.astype(hidden.dtype), None, None, None, None, None


token_scores.defvjp(_token_scores_fwd, _token_scores_bwd)


def token_logps(unembed: Unembed, head, hidden, predictor, target, count, chunk: int) -> Float[Array, "A T"]:
    """`token_scores` without anything else."""
    off, chunk = jnp.asarray(False), fitting_chunk(chunk, target.shape[1])
    scores: TokenScores = token_scores(unembed, None, head, hidden, None, predictor, target, count, off, chunk, False, False)
    return scores.logps


def response_sums(
    values: Float[Array, "A T"], weight: Float[Array, "A T"], slot: Int[Array, "A T"], num_slots: int
) -> Float[Array, "A S"]:
    """Sums per-token values over each response: log pi(y | x) when the values are token log-probs."""
    # `where` and not a product: padding may hold anything, and 0 * inf is nan.
    values = jnp.where(weight > 0, values * weight, 0.0)
    return jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_slots))(values, slot)
