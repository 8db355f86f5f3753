"""What a decoder is: one frozen record of every choice that changes its forward pass."""

import dataclasses
from typing import Any

from dpojax.untrusted.plain_data import number_fault

NORMS = ("rms", "layer")

MLPS = ("gated", "plain")

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

ROPE_SCALINGS = ("linear", "llama3", "yarn", "longrope")

SIZES = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    ),
    "max_positions",
)

MAX_LAYERS = 10_000  # a hundred times as many as the deepest model has


def _check_positive(name: str, value: Any) -> None:
    """Raises ValueError, naming the field, for what is no finite number > 0."""
    fault = number_fault(value, float)
    if fault is None and value <= 0:
        fault = "it must be > 0"
    if fault is not None:
        raise ValueError(f"{name} is {value!r}; {fault}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts; rope.py has the equations."""

    kind: str  # one of ROPE_SCALINGS
    factor: float
    original_max_positions: int
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # yarn, longrope: multiplies cosine and sine
    # longrope: divides each frequency, up to original_max_positions
    short_factors: tuple[float, ...] = ()

    def __post_init__(self):
        numbers = (
            "factor",
            "original_max_positions",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
        )
        for field in (*numbers, "attention_factor"):
            _check_positive(f"the rotary scaling's {field}", getattr(self, field))
        for factor in self.short_factors:
            _check_positive("the rotary scaling's short_factor", factor)
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            used = self.kind == ("llama3" if low == "low_freq_factor" else "yarn")
            if used and getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"the rotary scaling's {low} is {getattr(self, low)}; it must be under {high},"
                    f" {getattr(self, high)}"
                )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of a decoder.

    A checkpoint or a config defines each; those with a default do nothing at it.
    """

    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F; of one expert in a mixture
    num_layers: int  # N
    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key and value heads; divides num_heads
    head_dim: int  # E
    norm: str  # one of NORMS
    norm_eps: float
    mlp: str  # one of MLPS
    activation: str  # one of ACTIVATIONS
    rope_theta: float
    tie_embeddings: bool
    attention_bias: bool  # of the maps to queries, keys and values
    mlp_bias: bool
    max_positions: int  # what the model was made for
    init_std: float  # standard deviation of random weights
    family: str = "llama"  # whose names an export takes, a key of families.table.FAMILIES
    output_bias: bool | None = None  # of attention's output map; None: as attention_bias
    head_bias: bool = False  # of the map to the vocabulary
    # A map to one number stands in place of the map to the vocabulary: a reward or a value.
    scalar_head: bool = False
    positions: str = "rotary"  # or "learned": a table of max_positions rows
    hard_max_positions: bool = False  # positions past max_positions cannot be computed
    rotary_dim: int | None = None  # leading dimensions of a head that are turned; None: all
    rope_interleaved: bool = False  # pairs (x_2i, x_2i+1), not (x_i, x_{i + E/2})
    rope_scaling: RopeScaling | None = None  # not of windowed layers with a local_rope_theta
    local_rope_theta: float | None = None  # of windowed layers; None: rope_theta
    windows: tuple[int, ...] = ()  # of each layer, 0 = none; () = none anywhere
    # or "parallel": attention and mlp read the same x; "parallel_shared": through one norm
    residual: str = "sequential"
    norm_placement: str = "pre"  # before attention and mlp; or "post": after them; or "both"
    norm_offset: bool = False  # scales are stored minus 1
    # RMSNorm of queries and keys: of each "head", or of all heads together, "full"
    qk_norm: str = "none"
    query_scale: float | None = None  # of the scores; None: E^-0.5
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embed_scale: float = 1.0
    num_experts: int = 0  # X, of a mixture; 0: one mlp
    experts_per_token: int = 0
    renormalise_experts: bool = False  # the chosen experts' weights sum to 1

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The config of a checkpoint's meta: what `dataclasses.asdict` made, through JSON."""

        def plain(given):
            return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}

        scaling = values.get("rope_scaling")
        return cls(**{**plain(values), "rope_scaling": scaling and RopeScaling(**plain(scaling))})

    def __post_init__(self):
        choices: dict[str, tuple[Any, ...]] = {
            "norm": NORMS,
            "mlp": MLPS,
            "activation": ACTIVATIONS,
            "positions": ("rotary", "learned"),
            "residual": ("sequential", "parallel", "parallel_shared"),
            "norm_placement": ("pre", "post", "both"),
            "qk_norm": ("none", "head", "full"),
        }
        for field, allowed in choices.items():
            value = getattr(self, field)
            if value not in allowed:
                raise ValueError(
                    f"model.{field} is {value!r}; it must be one of {', '.join(allowed)}"
                )
        for field in SIZES:
            value = getattr(self, field)
            fault = number_fault(value, int)
            if fault is None and value < 1:
                fault = "it must be at least 1"
            if fault is not None:
                raise ValueError(f"model.{field} is {value!r}; {fault}")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(
                f"model.num_layers is {self.num_layers}; it must be at most {MAX_LAYERS:,}"
            )
        for field in ("norm_eps", "rope_theta", "init_std", "embed_scale"):
            _check_positive(f"model.{field}", getattr(self, field))
        for field in ("local_rope_theta", "query_scale", "attention_softcap", "logits_softcap"):
            if getattr(self, field) is not None:
                _check_positive(f"model.{field}", getattr(self, field))
        if self.norm_eps >= 1:
            raise ValueError(f"model.norm_eps is {self.norm_eps}; it must be under 1")
        for field in ("rope_theta", "local_rope_theta"):
            if (getattr(self, field) or 1) < 1:
                raise ValueError(
                    f"model.{field} is {getattr(self, field)}; it must be at least 1: it is the"
                    " base of wavelengths"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_kv_heads is {self.num_kv_heads}; it must divide model.num_heads,"
                f" {self.num_heads}"
            )
        if self.positions == "rotary" and (self.turned % 2 or not 0 < self.turned <= self.head_dim):
            raise ValueError(
                f"model.head_dim is {self.head_dim}, of which {self.turned} are turned; rotary"
                " embeddings need an even number"
            )
        scaling = self.rope_scaling
        if (
            scaling is not None
            and scaling.kind == "longrope"
            and len(scaling.short_factors) != self.turned // 2
        ):
            raise ValueError(
                f"short_factor has {len(scaling.short_factors)} values for {self.turned // 2}"
                " rotary pairs"
            )
        if any(number_fault(w, int) or w < 0 for w in self.windows):
            raise ValueError(
                f"model.windows is {self.windows!r:.80}; each must be a number of tokens, or 0"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(
                f"model.windows has {len(self.windows)} entries for {self.num_layers} layers"
            )
        if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model.experts_per_token is {self.experts_per_token}; it must be in"
                f" 1..{self.num_experts}"
            )

    @property
    def turned(self) -> int:
        """Dimensions of a head that rotary embeddings turn."""
        if self.rotary_dim is None:
            return self.head_dim
        return self.rotary_dim

    @property
    def scale(self) -> float:
        """What the scores are multiplied by."""
        if self.query_scale is None:
            return self.head_dim**-0.5
        return self.query_scale

    @property
    def out_bias(self) -> bool:
        """Whether attention's output map has a bias."""
        if self.output_bias is None:
            return self.attention_bias
        return self.output_bias
