"""At start-up: does this very run compute DPO? A few real triples, through the real model and both layouts."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dpojax.config import LossConfig
from dpojax.data.packing import PackedBatch, by_response, plan_step
from dpojax.data.pipeline import PackGroups, make_shape
from dpojax.errors import NumericsError
from dpojax.losses import closed_form, make_loss
from dpojax.models import Model
from dpojax.train import make_eval_step, make_token_logps_step

# |log-ratio| over the sum of |token log-probs| of a response, where policy == reference.
RATIO_BOUND = {"float32": 1e-6, "bfloat16": 1e-2}
# Largest difference of a token's log-prob between the layouts, nats.
LAYOUT_BOUND = {"float32": 2e-5, "bfloat16": 0.25}


class CheckResult(NamedTuple):
    """What was measured."""

    loss: float
    expected: float
    worst_ratio: float  # |log-ratio| / sum |token log-probs|
    worst_layout: float  # nats


def self_check(
    model: Model,
    params,
    ref_params,
    pack: PackGroups,
    loss: LossConfig,
    *,
    dtype: str,
    num_shards: int,
    put: Callable[[PackedBatch], PackedBatch],
    program: Callable[..., Callable[..., Any]],
    max_triples: int = 4,
) -> CheckResult:
    """Checks the loss, the rewards and the packing on the first triples of the data.

    At policy == reference the loss must have its closed-form value (log 2 for DPO) and the rewards must be
    0 within RATIO_BOUND; the separate layout must give the same token log-probs within LAYOUT_BOUND.

    Args:
      pack: the first groups of its index are used.
      put: host batch to the devices.
      program: (name, function, **jit options) -> the jitted function.
    Raises: NumericsError naming what disagrees.
    """
    count = min(max_triples, len(pack.index.rows))
    picked, index = range(count), pack.index.first(count)
    replicated = jax.sharding.NamedSharding(next(iter(jax.tree.leaves(params))).sharding.mesh, jax.sharding.PartitionSpec())
    prompts, responses = index.prompt_lengths.tolist(), [index.responses(i) for i in picked]
    tokens: dict[str, dict[tuple[int, int], np.ndarray]] = {}
    results = None
    for layout in ("shared", "separate"):
        shape = make_shape(
            [index], layout=layout, num_groups=count, num_shards=num_shards, micro_batch_tokens=4096, row_tokens=0
        )
        batch, _ = PackGroups(pack.data, index, shape, pack.shards, pack.pad_id)(picked)
        # The closed form is that of one pair: the data's weights and soft labels are left out.
        batch = batch._replace(pair_weight=np.ones_like(batch.pair_weight), soft_label=np.ones_like(batch.soft_label))
        on_device, chunk = put(batch), 128
        run = program(f"self_check_{layout}", make_token_logps_step(model, chunk=chunk), out_shardings=replicated)
        logps = np.asarray(run(params, on_device))
        tokens[layout] = dict(by_response(plan_step(prompts, responses, shape), responses, logps))
        if layout == "shared":
            step = make_eval_step(model, make_loss(loss.name, **{**loss.settings(), "sft_weight": None}), chunk=chunk)
            run = program("self_check_loss", step, out_shardings=replicated)
            results = jax.device_get(run(params, ref_params, on_device))
    assert results is not None
    valid = results.row_id >= 0
    expected = closed_form(loss.name, **loss.settings())
    mean = float(results.loss[valid].mean())
    scale = np.concatenate([np.abs(results.policy_chosen[valid]), np.abs(results.policy_rejected[valid])])
    ratio = np.concatenate([
        np.abs(results.policy_chosen - results.ref_chosen)[valid],
        np.abs(results.policy_rejected - results.ref_rejected)[valid],
    ])  # fmt: skip
    worst_ratio = float((ratio / np.maximum(scale, 1e-9)).max())
    a, b = tokens["shared"], tokens["separate"]
    worst_layout = max(float(np.abs(a[k] - b[k]).max()) for k in a)
    result = CheckResult(mean, expected, worst_ratio, worst_layout)
    if not worst_ratio <= RATIO_BOUND[dtype]:
        raise NumericsError(
            f"self-check: at policy == reference a log-ratio is {worst_ratio:.1e} of its log-prob, over {RATIO_BOUND[dtype]:.0e}: "
            "the reference is computed differently from the policy (see reference.dtype)"
        )
    if not math.isclose(mean, expected, rel_tol=1e-3 if dtype == "float32" else 0.2):
        raise NumericsError(f"self-check: the {loss.name} loss at policy == reference is {mean:.6f}, not {expected:.6f}")
    if not worst_layout <= LAYOUT_BOUND[dtype]:
        raise NumericsError(f"self-check: the layouts differ by {worst_layout:.1e} nats in a token's log-prob")
    return result
