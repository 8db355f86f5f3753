"""What a decoder is: one frozen record of every choice that changes its forward pass."""

import dataclasses

NORMS = ("rms", "layer")
MLPS = ("gated", "plain")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a decoder. No field has a default: a checkpoint or a config defines each."""

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # N
    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key and value heads; divides num_heads
    head_dim: int  # E, even (rotary embeddings turn pairs)
    norm: str  # one of NORMS
    norm_eps: float
    mlp: str  # one of MLPS
    activation: str  # one of ACTIVATIONS
    rope_theta: float
    tie_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_positions: int  # what the model was made for; rotary embeddings go on, with a warning
    init_std: float  # standard deviation of random weights

    def __post_init__(self):
        choices = {"norm": NORMS, "mlp": MLPS, "activation": ACTIVATIONS}
        for field, allowed in choices.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(f"model.{field} is {value!r}; it must be one of {', '.join(allowed)}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for field in (*sizes, "head_dim", "max_positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"model.{field} is {getattr(self, field)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"model.num_kv_heads is {self.num_kv_heads}; it must divide model.num_heads, {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; rotary embeddings need an even number")
