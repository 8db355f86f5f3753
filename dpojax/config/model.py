"""Settings of the models: the policy, its adapters and its reference, and where they lie."""

import dataclasses
from typing import Annotated

from dpojax.config.limits import Count, CountOrZero, Finite, NotNegative, OneOf, require
from dpojax.errors import did_you_mean

LOGICAL_AXES = (
    *(
        "vocab",
        "embed",
        "heads",
        "kv_heads",
        "head_dim",
        "mlp",
        "norm",
        "layers",
        "positions",
        "experts",
        "router",
        "lora",
    ),
)

# Logical axis -> mesh axis, where a config's mesh.rules say nothing else; "" keeps it whole.
SHARDING_RULES = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "norm": "",
    "layers": "",
    "experts": "tensor",
}

QUANTISED = ("int8", "fp8", "nf4")

# what a frozen tree may be stored in; "": model.param_dtype
STORED = ("", "float32", "bfloat16", *QUANTISED)

Stored = Annotated[str, OneOf(STORED)]
Dtype = Annotated[str, OneOf(("float32", "bfloat16"))]

ATTENTION = ("auto", "xla", "cudnn", "splash", "full")
REMAT = ("none", "dots", "attention", "full", "dots_offload", "full_offload")
REFERENCE_MODES = ("auto", "live", "cached", "adapter", "none")

REQUIRED_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
)

SIZES = (
    *REQUIRED_SIZES,
    *(
        "norm",
        "norm_eps",
        "mlp",
        "activation",
        "rope_theta",
        "tie_embeddings",
        "attention_bias",
        "mlp_bias",
    ),
    *("max_positions", "init_std"),
)


def check_axes(field: str, rules: dict[str, str]) -> None:
    """Raises ConfigError for a rule of an axis that no parameter has."""
    for axis in rules:
        near = did_you_mean(axis, LOGICAL_AXES)
        must = f"a rule for one of the axes {', '.join(LOGICAL_AXES)}{near}"
        require(axis in LOGICAL_AXES, f"{field}.{axis}", rules[axis], must)


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """The policy: where it comes from and how it is computed; sizes for random weights only."""

    init: str  # Hugging Face directory, dpojax checkpoint folder, or "" for random weights
    dtype: Dtype  # of the computation; bfloat16 on accelerators
    param_dtype: Dtype
    # of the stored parameters; bfloat16 ones lose updates at small learning rates
    attention: Annotated[str, OneOf(ATTENTION)]
    # splash on TPUs, cudnn on NVIDIA GPUs where it can, xla elsewhere; full is the oracle
    remat: Annotated[str, OneOf(REMAT)]
    # what is kept for the backward pass: matrix products (dots), attention, a layer's input (full)
    logps_chunk_tokens: Count  # logits exist for this many tokens at a time
    router_loss_weight: NotNegative  # of the load-balancing loss of a mixture of experts; 0 = none
    ignore_fields: str  # comma-separated fields of config.json that are known not to matter
    shape: str  # a config.json, or its folder: the model of random weights, in place of the sizes
    # below
    hidden_size: int | None  # D, the width of the hidden states
    intermediate_size: int | None  # F, of the MLP
    num_layers: int | None  # N, decoder layers
    num_heads: int | None  # H, query heads
    num_kv_heads: int | None  # K, which divides num_heads
    head_dim: int | None  # E, the width of a head
    norm: str | None  # rms, layer
    norm_eps: float | None  # added to a variance before its root
    mlp: str | None  # gated or plain
    activation: str | None  # of the MLP, as config.json names it: silu, gelu
    rope_theta: float | None  # base of the rotary positions
    tie_embeddings: bool | None  # the head is the embedding
    attention_bias: bool | None  # of q, k, v and o
    mlp_bias: bool | None  # of the MLP's maps
    max_positions: int | None  # the longest sequence
    init_std: Annotated[float | None, Finite()]  # standard deviation of random weights

    def check(self) -> None:
        """Random weights need every size."""
        if self.init or self.shape:
            return
        for size in SIZES:
            value = getattr(self, size)
            must = "set, as model.init is '' (random weights)"
            require(value is not None, f"model.{size}", value, must)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters that are trained in the preference stage, in place of the parameters."""

    rank: CountOrZero  # of the adapters; 0 = none: all parameters are trained
    alpha: float  # an adapter counts alpha / rank
    dropout: float  # share of the adapters' input that is dropped in training
    targets: str  # comma-separated patterns of the layers' linear maps: q, k, v, o, gate, up, down
    base_dtype: Stored  # that the frozen base is stored in; nf4 is QLoRA; "" = model.param_dtype


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """Where the reference log-probs come from."""

    init: str  # a model of the policy's architecture; "" = the policy before the preference stage
    mode: Annotated[str, OneOf(REFERENCE_MODES)]
    # its parameters (live), their log-probs computed once (cached), the adapters' base (adapter);
    # auto: none where the objective takes none, adapter under LoRA, else live
    dtype: Stored  # that the live tree is stored in; "" = model.param_dtype
    memory: Annotated[str, OneOf(("device", "pinned_host"))]
    # where the live tree lies; pinned_host: in the host's memory, a layer at a time comes over
    rules: dict[str, str]  # logical axis -> mesh axis, its own; empty = mesh.rules

    def check(self) -> None:
        """Rules that look at this section alone."""
        check_axes("reference.rules", self.rules)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes (-1 = what is left), and which logical axis goes to which."""

    data: int  # devices that share a step's rows; -1: what is left
    fsdp: int  # devices that share rows and parameters
    sequence: int  # devices that share each row's tokens; attention exchanges them for heads
    tensor: int  # devices that share each layer
    num_slices: CountOrZero
    # groups of devices with a fast network inside; the data axis alone crosses them. 0: as TPUs say
    rules: dict[str, str]  # logical axis -> mesh axis, or several, outermost first (fsdp,sequence);
    # '' keeps it whole

    def check(self) -> None:
        """Rules that look at this section alone."""
        check_axes("mesh.rules", self.rules)
