"""config.json of every family -> ModelConfig: one row for each family.

A field that can change the forward pass is mapped here or it is an error. Dropout is inert: it acts
in training alone, and DPO trains without it (as TRL's disable_dropout does).
"""

import pathlib
import re
from collections.abc import Collection
from typing import Any

from dpojax.errors import ConfigError
from dpojax.models.config import MAX_LAYERS, SIZES, ModelConfig
from dpojax.models.families.fields import ACTIVATIONS, NUMBER, Family, Field, Fields, Source
from dpojax.models.families.names import (
    LAYER,
    LLAMA_NAMES,
    POST_NORMS,
    QKV,
    gpt2_names,
    gptj_names,
    llama_names,
    moe_names,
    neox_names,
)
from dpojax.models.families.rotary import (
    all_windows,
    gemma2_windows,
    gemma3_rope,
    gemma3_windows,
    gptj_rope,
    mixtral_rope,
    neox_rope,
    phi3_rope,
    plain_rope,
    qwen_moe_windows,
    qwen_windows,
)
from dpojax.untrusted.plain_data import read_json

# How transformers names a decoder with a head of labels.
CLASSIFIER = "ForSequenceClassification"

# --- the families ---------------------------------------------------------------------------------

COMMON = {
    "vocab_size": Field("vocab_size", int),
    "hidden_size": Field("hidden_size", int),
    "intermediate_size": Field("intermediate_size", int),
    "num_layers": Field("num_hidden_layers", int),
    "num_heads": Field("num_attention_heads", int),
    "num_kv_heads": Field("num_key_value_heads", int, lambda c: c["num_heads"]),
    "head_dim": Field("head_dim", int, lambda c: c["hidden_size"] // c["num_heads"]),
    "norm_eps": Field("rms_norm_eps", NUMBER, 1e-6),
    "activation": Field("hidden_act", str, "silu"),
    "tie_embeddings": Field("tie_word_embeddings", bool, False),
    "max_positions": Field("max_position_embeddings", int),
}

LLAMA = {"norm": "rms", "mlp": "gated", "attention_bias": False, "mlp_bias": False}

BIAS = Field("attention_bias", bool, False)


def _gpt_fields(eps: str = "layer_norm_epsilon", tied: bool = True) -> dict[str, Field]:
    def heads(c):
        return c["num_heads"]

    return {
        "vocab_size": Field("vocab_size", int),
        "hidden_size": Field("n_embd", int),
        "intermediate_size": Field("n_inner", int, lambda c: 4 * c["hidden_size"]),
        "num_layers": Field("n_layer", int),
        "num_heads": Field("n_head", int),
        "norm_eps": Field(eps, NUMBER, 1e-5),
        "activation": Field("activation_function", str, "gelu_new"),
        "tie_embeddings": Field("tie_word_embeddings", bool, tied),
        "max_positions": Field("n_positions", int),
        "num_kv_heads": Field("", int, heads),
        "head_dim": Field("", int, lambda c: c["hidden_size"] // c["num_heads"]),
    }


GEMMA_FIXED = {
    **LLAMA, "norm_offset": True, "output_bias": None,
}  # fmt: skip

GEMMA = {
    **COMMON,
    "tie_embeddings": Field("tie_word_embeddings", bool, True),
    "attention_bias": BIAS,
}

GEMMA["head_dim"] = Field("head_dim", int, 256)

GEMMA2 = {
    **GEMMA,
    "activation": Field("hidden_activation", str, "gelu_pytorch_tanh"),
    "query_scale": Field("query_pre_attn_scalar", NUMBER, 256),
}


def _gemma(values: dict) -> dict:
    # The first configs say "gelu" and mean its tanh form; transformers reads them so.
    activation = values["activation"]
    if activation == "gelu":
        activation = "gelu_tanh"
    return {**values, "activation": activation, "embed_scale": values["hidden_size"] ** 0.5}


def _gemma2(values: dict) -> dict:
    if values["query_scale"] <= 0:
        raise ValueError(f"query_pre_attn_scalar is {values['query_scale']}; it must be > 0")
    return {
        **values,
        "embed_scale": values["hidden_size"] ** 0.5,
        "query_scale": values["query_scale"] ** -0.5,
    }


def _neox(values: dict) -> dict:
    residual = "sequential"
    if values.pop("parallel"):
        residual = "parallel"
    return {**values, "residual": residual}


BOTH_WAYS = ("use_bidirectional_attention",)

MISTRAL = Family({**COMMON}, LLAMA, LLAMA_NAMES, all_windows(4096), plain_rope)

QWEN2 = Family(
    COMMON,
    {**LLAMA, "attention_bias": True, "output_bias": False},
    LLAMA_NAMES,
    qwen_windows,
    plain_rope,
)

EXPERTS = {"experts_per_token": Field("num_experts_per_tok", int, 2)}

QWEN3 = {**LLAMA, "qk_norm": "head"}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        {**COMMON, "attention_bias": BIAS, "mlp_bias": Field("mlp_bias", bool, False)},
        LLAMA,
        LLAMA_NAMES,
        rope=plain_rope,
    ),
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": Family(
        {**COMMON, "attention_bias": BIAS, "head_dim": Field("head_dim", int, 128)},
        QWEN3,
        LLAMA_NAMES,
        qwen_windows,
        plain_rope,
    ),
    "phi3": Family(
        COMMON,
        LLAMA,
        llama_names(
            **{x: Source(f"{LAYER}self_attn.qkv_proj", QKV) for x in QKV},
            **{x: Source(f"{LAYER}mlp.gate_up_proj", ("gate", "up")) for x in ("gate", "up")},
        ),
        all_windows(None),
        phi3_rope,
    ),
    "olmo2": Family(
        {**COMMON, "attention_bias": BIAS, "norm_eps": Field("rms_norm_eps", NUMBER, 1e-5)},
        {**LLAMA, "qk_norm": "full", "norm_placement": "post"},
        llama_names(**POST_NORMS),
        rope=plain_rope,
    ),
    "gemma": Family(
        {**GEMMA, "activation": Field("hidden_act", str, "gelu_pytorch_tanh")},
        GEMMA_FIXED,
        LLAMA_NAMES,
        rope=plain_rope,
        inert=("hidden_activation",),
        refused=BOTH_WAYS,
        finish=_gemma,
    ),
    "gemma2": Family(
        {
            **GEMMA2,
            "attention_softcap": Field("attn_logit_softcapping", NUMBER, 50.0),
            "logits_softcap": Field("final_logit_softcapping", NUMBER, 30.0),
        },
        {**GEMMA_FIXED, "norm_placement": "both"},
        llama_names(**POST_NORMS),
        gemma2_windows,
        plain_rope,
        ("hidden_act", "sliding_window_size"),
        BOTH_WAYS,
        _gemma2,
    ),
    "gemma3_text": Family(
        {
            **GEMMA2,
            "attention_softcap": Field("attn_logit_softcapping", NUMBER, None),
            "logits_softcap": Field("final_logit_softcapping", NUMBER, None),
        },
        {**GEMMA_FIXED, "norm_placement": "both", "qk_norm": "head"},
        llama_names(**POST_NORMS),
        gemma3_windows,
        gemma3_rope,
        ("hidden_act",),
        BOTH_WAYS,
        _gemma2,
    ),
    "mixtral": Family(
        {
            **COMMON,
            **EXPERTS,
            "num_experts": Field("num_local_experts", int),
            "norm_eps": Field("rms_norm_eps", NUMBER, 1e-5),
        },
        {**LLAMA, "renormalise_experts": True},
        moe_names("block_sparse_moe.experts", "w1", "w3", "w2", "block_sparse_moe.gate"),
        all_windows(None),
        mixtral_rope,
        refused=("router_jitter_noise",),
    ),
    "qwen3_moe": Family(
        {
            **COMMON,
            "attention_bias": BIAS,
            "intermediate_size": Field("moe_intermediate_size", int),
            "num_experts": Field("num_experts", int, None),
            "experts_per_token": Field("num_experts_per_tok", int, 8),
            "renormalise_experts": Field("norm_topk_prob", bool, False),
        },
        QWEN3,
        moe_names("mlp.experts", "gate_proj", "up_proj", "down_proj", "mlp.gate"),
        qwen_moe_windows,
        plain_rope,
        ("intermediate_size", "max_window_layers"),
        ("decoder_sparse_step", "mlp_only_layers"),
    ),
    "gpt2": Family(
        _gpt_fields(),
        {
            "norm": "layer",
            "mlp": "plain",
            "attention_bias": True,
            "mlp_bias": True,
            "positions": "learned",
            "hard_max_positions": True,
            "rope_theta": 1.0,
        },
        gpt2_names(),
        refused=(
            *(
                "add_cross_attention",
                "reorder_and_upcast_attn",
                "scale_attn_by_inverse_layer_idx",
                "scale_attn_weights",
            ),
        ),
    ),
    "gptj": Family(
        _gpt_fields(tied=False),
        {
            "norm": "layer",
            "mlp": "plain",
            "attention_bias": False,
            "mlp_bias": True,
            "head_bias": True,
            "rope_interleaved": True,
            "residual": "parallel_shared",
        },
        gptj_names(),
        rope=gptj_rope,
    ),
    "gpt_neox": Family(
        {
            **{k: v for k, v in COMMON.items() if k not in ("num_kv_heads", "head_dim")},
            "num_kv_heads": Field("", int, lambda c: c["num_heads"]),
            "head_dim": Field("", int, lambda c: c["hidden_size"] // c["num_heads"]),
            "norm_eps": Field("layer_norm_eps", NUMBER, 1e-5),
            "activation": Field("hidden_act", str, "gelu"),
            "attention_bias": Field("attention_bias", bool, True),
            "parallel": Field("use_parallel_residual", bool, True),
        },
        {"norm": "layer", "mlp": "plain", "mlp_bias": True},
        neox_names(),
        rope=neox_rope,
        finish=_neox,
    ),
}


def read_fields(folder: pathlib.Path) -> dict[str, Any]:
    """The fields of a directory's config.json. Raises ConfigError for a missing or damaged file."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.init={str(folder)!r}: there is no config.json in it")
    return read_json(path)


def _in_their_words(message: str, family: Family) -> str:
    """A message about a field of ModelConfig under the name that config.json has for it."""
    names = {ours: field.name for ours, field in family.fields.items() if field.name}
    names |= {
        "rope_theta": "rope_theta",
        "local_rope_theta": "rope_local_base_freq",
        "init_std": "initializer_range",
    }
    for ours, theirs in names.items():
        message = re.sub(rf"\bmodel\.{ours}\b", theirs, message)
    return message


def _has_scalar_head(values: dict[str, Any], path: pathlib.Path) -> bool:
    """Whether a config.json describes a reward model: a classifier with one label.

    Raises: ConfigError for a classifier with several.
    """
    architectures = list(values.get("architectures") or [])
    if not any(str(name).endswith(CLASSIFIER) for name in architectures):
        return False
    # transformers takes two where the file is silent.
    labels = values.get("num_labels", len(values.get("id2label") or (0, 1)))
    if labels != 1:
        raise ConfigError(
            f"{path}: {architectures[0]} has {labels} labels (id2label); a reward model has 1"
        )
    return True


def model_config(
    values: dict[str, Any], path: pathlib.Path, ignore: Collection[str] = ()
) -> ModelConfig:
    """The decoder that the fields of a config.json describe.

    Args:
      ignore: fields that are known not to matter, from model.ignore_fields.
    Raises: ConfigError for another family, or a field that is not known to be harmless.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"{path}: model_type is {name!r}; this version reads {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[name]
    fields = Fields(values, path)
    known: dict[str, Any] = {**family.fixed, "family": name}
    try:
        for ours, field in family.fields.items():
            known[ours] = fields.take(field, known)
            if ours in SIZES and known[ours] < 1:  # others are derived from it
                raise ValueError(f"model.{ours} is {known[ours]}; it must be at least 1")
        if known["num_layers"] > MAX_LAYERS:  # windows are written out for each
            name = family.fields["num_layers"].name
            raise ConfigError(
                f"{path}: {name} is {known['num_layers']:,}; it must be at most {MAX_LAYERS:,}"
            )
        if known.get("num_experts", 0) is None:  # transformers writes it under its other name too
            known["num_experts"] = fields.take(Field("num_local_experts", int))
        activation = known["activation"]
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"{path}: the activation is {activation!r}; it must be one of"
                f" {', '.join(ACTIVATIONS)}"
            )
        known["activation"] = ACTIVATIONS[activation]
        if known["norm_eps"] is None:
            raise ConfigError(
                f"{path}: {family.fields['norm_eps'].name} is null; it must be a number"
            )
        known["norm_eps"] = float(known["norm_eps"])
        # The weights are loaded: nothing is drawn by it.
        known["init_std"] = float(fields.take(Field("initializer_range", NUMBER, 0.02)) or 0.02)
        if family.windows:
            known["windows"] = family.windows(fields, known["num_layers"])
        if family.rope:
            known |= family.rope(fields, known)
        if not any(known.get("windows", ())):
            known["windows"] = ()
        known["scalar_head"] = _has_scalar_head(values, path)
        config = ModelConfig(**family.finish(known))
    except ConfigError:
        raise
    except (ValueError, TypeError, ArithmeticError, AttributeError, KeyError) as error:
        raise ConfigError(f"{path}: {_in_their_words(str(error), family)}") from error
    fields.check_rest(family, ignore)
    return config
