"""A reward model -> the reward of every response of a dataset."""

from collections.abc import Callable

import numpy as np

from dpojax.data.batches import PackGroups, eval_batches
from dpojax.data.packing import PackedBatch
from dpojax.data.row_plan import plan_step, response_numbers
from dpojax.errors import NumericsError


def dataset_rewards(
    pack: PackGroups,
    rewards_of: Callable[[PackedBatch], np.ndarray],
    *,
    num_groups: int,
    progress: Callable[[int], None],
) -> list[np.ndarray]:
    """r(x, y_k) of every response of every group, in the index's order; [K] each.

    Args:
      rewards_of: batch -> [M, A, S] on the host, of all data shards.
      num_groups: of a batch.
      progress: called with the number of groups done.
    Raises: NumericsError naming the first row with a reward that is not finite.
    """
    index = pack.index
    count = len(index.rows)
    rewards = [np.zeros(len(index.responses(i)), np.float32) for i in range(count)]
    for step, (batch, sizes) in enumerate(eval_batches(pack, num_groups=num_groups, count=count)):
        first = step * num_groups
        values = rewards_of(batch)
        plan = plan_step(sizes.prompts, sizes.responses, pack.shape)
        for (group, k), place in response_numbers(plan):
            rewards[first + group][k] = values[place]
        progress(min(first + num_groups, count))
    for i, values in enumerate(rewards):
        if not np.isfinite(values).all():
            row = pack.data.records.where(int(index.rows[i]))
            raise NumericsError(
                f"{row}: the reward of a response is {values[~np.isfinite(values)][0]}; the weights"
                " are finite, so that their products overflow: compute in float32 (--dtype)"
            )
    return rewards
