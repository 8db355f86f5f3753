"""Work of a step -> the time that compute, memory and links need for it at least."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dpojax.cost.step_work import RECOMPUTED, Prepared, StepWork
from dpojax.cost.traffic import BETWEEN, Traffic
from dpojax.data.packing import PackShape
from dpojax.models.config import ModelConfig
from dpojax.models.params import layer_rows, num_params
from dpojax.runtime.devices import BETWEEN_SLICES, Chip
from dpojax.training.flops import layer_work

RESOURCES = ("compute", "HBM", "interconnect", BETWEEN)


class Roofline(NamedTuple):
    """Seconds of a step if one resource alone took time.

    They work at the same time: a step takes at least the largest of them.
    """

    compute: float
    hbm: float
    ici: float
    dcn: float  # from slice to slice

    @property
    def seconds(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return RESOURCES[int(np.argmax(self))]


def roofline(program: Prepared, work: StepWork, traffic: Sequence[Traffic], chip: Chip) -> Roofline:
    """The step's time on the chip's published figures: of all that is executed, useful or not.

    Compute: every token of every computed row through the layers (with what remat computes again),
      attention as its kernel computes it, and the vocabulary five times (forward, again in the
      backward pass, twice for gradients, and once for each scoring: by the reference, by the
      policy that drew the samples).
    HBM: weights once a pass, inputs and outputs of every matrix product, logits in float32,
      gradients and the optimizer.
    Interconnect: the collectives of the compiled program over all links of a chip. Between slices:
      what of them leaves a slice.
    """
    config = program.config
    model = program.model
    shape = program.shape
    step = program.step
    backward = 2.0  # gradients of inputs and of weights
    if config.lora.rank:
        backward = 1.0  # the frozen base takes no gradients of weights
    passes = step.updates * (1 + RECOMPUTED[config.model.remat] + backward) + step.scorings
    head_passes = step.updates * (2 + backward) + step.scorings
    # Devices that share a row's work.
    split = program.mesh.shape["tensor"] * program.mesh.shape["sequence"]
    tokens = shape.shard_rows * shape.row_tokens

    work_of_layer = layer_work(model)
    # Kernels compute attention's scores again in the backward pass, which takes 2.5 forward passes.
    with_gradient = 1 + config.model.remat.startswith("full") + 2.5
    attention_passes = step.updates * with_gradient + step.scorings
    attention = shape.shard_rows * _pairs_of_row(shape) * work_of_layer.pair * attention_passes
    nets = 1 + step.has_value_net  # a value net has layers of its own, and no vocabulary
    layers = nets * model.num_layers * (tokens * work_of_layer.token * passes + attention)
    head = 2.0 * model.hidden_size * model.vocab_size * work.scored * head_passes
    compute = work.micro * (layers + head) / split / chip.peak

    weights = nets * 2.0 * num_params(model) / split * passes
    width = sum(inputs + outputs for inputs, outputs in map_sizes(model))
    activations = nets * 2.0 * tokens * model.num_layers * width * passes / split
    logits = 4.0 * work.scored * model.vocab_size * 2 * head_passes / split
    trained = program.memory["parameters"]
    of_micro_batches = work.micro * (weights * 2 + activations + logits + 3 * trained)
    of_update = 2 * (trained + program.memory["optimizer"])
    between = sum(kind.sent for kind in traffic if kind.kind == BETWEEN)
    inside = sum(kind.sent for kind in traffic if kind.kind != BETWEEN)
    return Roofline(
        compute=compute,
        hbm=(of_micro_batches + of_update) / chip.bandwidth,
        ici=inside / chip.links,
        dcn=between / BETWEEN_SLICES,
    )


def _pairs_of_row(shape: PackShape) -> float:
    """Pairs of a query and a key of a row for which attention's kernel computes a score."""
    if shape.slots is not None:
        prompt, response = shape.slots
        in_response = response * response / 2 + prompt * response
        return prompt * prompt / 2 + shape.num_lanes * in_response
    longest = min(shape.longest or shape.row_tokens, shape.row_tokens)
    return shape.num_lanes * (shape.row_tokens * longest - longest * longest / 2)


def map_sizes(model: ModelConfig) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of every linear map that a token meets in a layer."""
    for row in layer_rows(model):
        if row.in_dims:
            inputs, outputs = row.map_shape
            times = 1
            if row.experts:
                times = model.experts_per_token
            yield times * math.prod(inputs), times * math.prod(outputs)
