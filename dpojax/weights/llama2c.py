"""llama2.c checkpoints (version 0: seven numbers, then float32 weights) -> a Llama, tensor by
tensor.

The format is that of github.com/karpathy/llama2.c: its rotary pairs are neighbours, so that the
rows of q and k are put into the order that Hugging Face's Llama has.
"""

import math
import pathlib
import re
from collections.abc import Collection

import numpy as np

from dpojax.errors import ConfigError
from dpojax.models.config import ModelConfig

HEADER = (
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "vocab_size",
    "max_positions",
)

HEADER_BYTES = 4 * len(HEADER)

NORM_EPS = 1e-5  # fixed in its rmsnorm()


class Llama2cTensors:
    """The tensors of a file under the names of Hugging Face's Llama, mapped into memory."""

    def __init__(self, stacks: dict[str, np.ndarray], config: ModelConfig):
        self.stacks = stacks
        self.config = config

    def names(self) -> Collection[str]:
        layers = range(self.config.num_layers)
        # A name without {i} is the same in every layer.
        return {name.format(i=i) for name in self.stacks for i in layers}

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        layer = re.search(r"\.(\d+)\.", name)
        pattern = re.sub(r"\.\d+\.", ".{i}.", name)
        tensor = self.stacks[pattern]
        if layer is not None:
            tensor = tensor[int(layer[1])]
        if pattern.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = self.config.head_dim // 2
            tensor = (
                tensor.reshape(-1, pairs, 2, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
            )
        assert tensor.shape == shape, (name, tensor.shape, shape)
        return tensor


def open_checkpoint(path: pathlib.Path) -> tuple[ModelConfig, Llama2cTensors]:
    """The decoder and its tensors.

    Raises ConfigError for a file of another size than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES)[: size // 4 * 4], np.int32)
    if (
        len(header) < 7
        or (header[:5] < 1).any()
        or header[5] in (0, -(2**31))
        or header[6] < 1
        or header[0] % header[3]
    ):
        raise ConfigError(
            f"{path}: not a llama2.c checkpoint (version 0): its header is {header.tolist()}"
        )
    sizes = dict(zip(HEADER, header.tolist(), strict=True))
    tied = sizes["vocab_size"] > 0
    sizes["vocab_size"] = abs(sizes["vocab_size"])
    head_dim = sizes["hidden_size"] // sizes["num_heads"]
    if sizes["num_heads"] % sizes["num_kv_heads"] or head_dim % 2:
        raise ConfigError(
            f"{path}: not a llama2.c checkpoint (version 0): its header is {header.tolist()}"
        )
    config = ModelConfig(
        **sizes,
        head_dim=head_dim,
        norm="rms",
        norm_eps=NORM_EPS,
        mlp="gated",
        activation="silu",
        rope_theta=10000.0,
        tie_embeddings=tied,
        attention_bias=False,
        mlp_bias=False,
        init_std=0.02,
    )
    n = config.num_layers
    d = config.hidden_size
    f = config.intermediate_size
    v = config.vocab_size
    kv = config.num_kv_heads * head_dim
    layer = "model.layers.{i}."
    shapes = {
        "model.embed_tokens.weight": (v, d),
        f"{layer}input_layernorm.weight": (n, d),
        f"{layer}self_attn.q_proj.weight": (n, d, d),
        f"{layer}self_attn.k_proj.weight": (n, kv, d),
        f"{layer}self_attn.v_proj.weight": (n, kv, d),
        f"{layer}self_attn.o_proj.weight": (n, d, d),
        f"{layer}post_attention_layernorm.weight": (n, d),
        f"{layer}mlp.gate_proj.weight": (n, f, d),
        f"{layer}mlp.down_proj.weight": (n, d, f),
        f"{layer}mlp.up_proj.weight": (n, f, d),
        "model.norm.weight": (d,),
        # Tables of the rotary angles, which dpojax computes itself.
        "": (config.max_positions, head_dim),
    }
    if not tied:
        shapes["lm_head.weight"] = (v, d)
    expected = HEADER_BYTES + 4 * sum(math.prod(shape) for shape in shapes.values())
    if size != expected:
        raise ConfigError(
            f"{path}: it has {size} bytes, and a llama2.c checkpoint with the header"
            f" {header.tolist()} has {expected}"
        )
    stacks = {}
    offset = HEADER_BYTES
    for name, shape in shapes.items():
        if name:
            stacks[name] = np.memmap(path, np.float32, "r", offset, shape)
        offset += 4 * math.prod(shape)
    return config, Llama2cTensors(stacks, config)
