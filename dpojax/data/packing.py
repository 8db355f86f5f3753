"""What a packed batch is: prefix-shared rows with static shapes; and the attention rule.

`row_plan.py` says which row each group goes to, and `row_filling.py` writes the tokens. A row holds
groups one after another, each `[x | y_1 | y_2 | ... | y_K]`: the prompt once, then its responses. K
= 2 is the DPO triple. Packing is a pure function of one step's groups.

In the layout "slots" a row has 1 + K parts of fixed lengths, [x x' ... | y_1 y_1' ... | y_2 y_2'
...]: the same tokens under the same rule in another order, for a kernel with a static mask. In
"separate", the oracle, a row is one prompt with one response.

Legend: M micro-batches of a step, A data shards, R rows of a micro-batch over all shards, L row
length, T scored tokens, S responses and P pairs of one shard's micro-batch.
"""

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def visible(  # noqa: PLR0913  # both sides of one rule
    query, key, query_group, key_group, query_branch, key_branch, distance=None, window=None
):
    """The one attention rule: may the query at row index `query` see the key at row index `key`?

    A key is visible iff it is not later, it belongs to the same group (0 is padding), and it is in
    the group's prompt (branch 0) or in the query's own response. Arguments broadcast against each
    other.

    Args:
      distance: the query's position minus the key's; positions, not row indices, for layers with a
        window.
      window: a key is seen only at a distance below it; None: at any.
    """
    same_group = (key_group == query_group) & (query_group != 0)
    seen = (key <= query) & same_group & ((key_branch == 0) | (key_branch == query_branch))
    if window is None:
        return seen
    return seen & (distance < window)


class PackedBatch(NamedTuple):
    """One optimizer step's groups in prefix-shared rows.

    They are cut into micro-batches of one static shape.

    Indices stay inside a data shard: shard a owns rows [a R/A, (a+1) R/A) of every micro-batch.
    """

    tokens: Int[Array, "M R L"]
    positions: Int[Array, "M R L"]  # each response restarts at |x|
    group: Int[Array, "M R L"]  # counted from 1 in each row; 0 = padding
    branch: Int[Array, "M R L"]  # 0 = prompt, k = the k-th response
    # scored tokens, first in, no gaps; `weight` is 0 at padding
    # index into the shard's R/A * L tokens of the token that predicts this one
    predictor: Int[Array, "M A T"]
    target: Int[Array, "M A T"]
    response: Int[Array, "M A T"]  # the number of the response that it belongs to, < S
    weight: Float[Array, "M A T"]  # 0 at formatting tokens too
    ref_logps: Float[Array, "M A T"] | None  # cached log ref(target | prefix), nats
    # pairs; `valid` is False at padding
    chosen: Int[Array, "M A P"]  # number of the response
    rejected: Int[Array, "M A P"]
    pair_weight: Float[Array, "M A P"]
    soft_label: Float[Array, "M A P"]
    margin: Float[Array, "M A P"]
    row_id: Int[Array, "M A P"]  # row of the source, -1 at padding
    valid: Bool[Array, "M A P"]
    # responses
    lengths: Int[Array, "M A S"]  # scored tokens that count
    # index into the shard's tokens of the last one, EOS included: where a reward is read; 0 at
    # padding
    last: Int[Array, "M A S"]
    response_row: Int[Array, "M A S"]  # row of the source, -1 at padding
    # of the whole step, from the host's plan: the same on every process
    num_micro: Int[Array, ""]  # micro-batches in use, <= M
    num_scored: Int[Array, " M"]  # most scored tokens of any shard
    num_pairs: Int[Array, ""]
    num_chosen_tokens: Int[Array, ""]  # sum of |y_w| over the step's pairs
    # sum of |y| over the step's responses; as |y_w| above, of tokens that count
    num_response_tokens: Int[Array, ""]
    num_tokens: Int[Array, ""]  # sum of |x| + |y_1| + ... over the step's groups


@dataclasses.dataclass(frozen=True)
class PackShape:
    """The static shape of a PackedBatch, and what attention kernels may rely on in it."""

    layout: str  # "shared", "slots" or "separate"
    num_micro: int  # M
    shard_rows: int  # R / A
    num_shards: int  # A
    row_tokens: int  # L
    num_responses: int  # S
    num_pairs: int  # P
    num_lanes: int = 1  # most responses of a group
    longest: int = 0  # most tokens of a prompt and one response; 0: as many as a row
    row_groups: int = 0  # most groups of a row; 0: as many as fit
    # tokens of the prompts' and of each response's part of a row, in layout "slots"
    slots: tuple[int, int] | None = None

    @property
    def part_tokens(self) -> tuple[int, ...]:
        """Tokens of every part of a row.

        A row is one part, or in layout "slots" the prompts' and each response's.
        """
        if self.slots is None:
            return (self.row_tokens,)
        prompts, responses = self.slots
        return (prompts, *[responses] * self.num_lanes)

    @property
    def part_starts(self) -> tuple[int, ...]:
        """The column at which every part of a row begins."""
        return tuple(itertools.accumulate((0, *self.part_tokens[:-1])))

    def part_of(self, branch: int) -> int:
        """The part of a row that holds a group's prompt (branch 0), or its k-th response."""
        if self.slots is None:
            return 0
        return branch


def abstract_batch(shape: PackShape, *, with_ref: bool) -> PackedBatch:
    """The ShapeDtypeStructs of a global batch: what `pack_step` makes, of all shards together."""
    m = shape.num_micro
    a = shape.num_shards
    scored = shape.shard_rows * shape.row_tokens

    def of_row(dtype):
        return jax.ShapeDtypeStruct((m, a * shape.shard_rows, shape.row_tokens), dtype)

    def of_scored(dtype):
        return jax.ShapeDtypeStruct((m, a, scored), dtype)

    def of_pair(dtype):
        return jax.ShapeDtypeStruct((m, a, shape.num_pairs), dtype)

    def of_response(dtype):
        return jax.ShapeDtypeStruct((m, a, shape.num_responses), dtype)

    ref_logps: Any = None
    if with_ref:
        ref_logps = of_scored(np.float32)
    scalar: Any = jax.ShapeDtypeStruct((), np.int32)
    return PackedBatch(
        tokens=of_row(np.int32),
        positions=of_row(np.int32),
        group=of_row(np.int32),
        branch=of_row(np.int32),
        predictor=of_scored(np.int32),
        target=of_scored(np.int32),
        response=of_scored(np.int32),
        weight=of_scored(np.float32),
        ref_logps=ref_logps,
        chosen=of_pair(np.int32),
        rejected=of_pair(np.int32),
        pair_weight=of_pair(np.float32),
        soft_label=of_pair(np.float32),
        margin=of_pair(np.float32),
        row_id=of_pair(np.int32),
        valid=of_pair(np.bool_),
        lengths=of_response(np.int32),
        last=of_response(np.int32),
        response_row=of_response(np.int32),
        num_micro=scalar,
        num_scored=jax.ShapeDtypeStruct((m,), np.int32),
        num_pairs=scalar,
        num_chosen_tokens=scalar,
        num_response_tokens=scalar,
        num_tokens=scalar,
    )  # pyright: ignore[reportArgumentType]  # shapes stand for arrays
