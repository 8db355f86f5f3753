"""config.json of every family -> ModelConfig, and what each family calls its tensors: rows of one table.

A field that can change the forward pass is mapped here or it is an error. Dropout is inert: it acts in training alone,
and DPO trains without it (as TRL's disable_dropout does).
"""

import math
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from dpojax.errors import ConfigError
from dpojax.models.config import MAX_LAYERS, SIZES, ModelConfig, RopeScaling
from dpojax.plain_data import number_fault, read_json

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_fast": "gelu_tanh", "relu": "relu"}  # fmt: skip
# Fields that do not change the forward pass of training.
INERT = {
    *("architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id"),
    *("pad_token_id", "_name_or_path", "pretraining_tp", "initializer_range", "unk_token_id", "id2label", "label2id"),
    *("output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "chunk_size_feed_forward"),
    *("problem_type", "tokenizer_class", "model_type", "_attn_implementation", "attn_implementation", "auto_map", "num_labels"),
    *(
        "cache_implementation",
        "task_specific_params",
        "gradient_checkpointing",
        "n_ctx",
        "is_decoder",
        "_sliding_window_pattern",
    ),
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("output_router_logits", "router_aux_loss_coef"),  # of training: model.router_loss_weight
    *("transformers.js_config", "is_llama_config", "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset"),
    # of generation, and of other kinds of models: older files hold all of them
    *(
        "max_length",
        "min_length",
        "max_new_tokens",
        "max_sequence_length",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    ),
    *("num_beams", "num_beam_groups", "num_return_sequences", "early_stopping", "repetition_penalty", "length_penalty"),
    *("diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("decoder_start_token_id", "sep_token_id", "prefix", "finetuning_task", "remove_invalid_values", "output_scores"),
    *(
        "n_special",
        "predict_special_tokens",
        "output_past",
        "_num_labels",
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
    ),
    *("return_dict_in_generate", "tie_encoder_decoder", "torchscript", "tf_legacy_loss", "use_bfloat16"),
}
# Fields that must have these values in the families whose code reads them (`Family.refused`): others would change the forward
# pass there. Elsewhere transformers ignores them, and so does this.
NEUTRAL: dict[str, tuple] = {
    "sliding_window": (None,),
    "layer_types": (None,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "rotary": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "pruned_heads": ({}, None),
    "use_qk_norm": (False,),
    "rope_scaling": (None,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "router_jitter_noise": (0, None),
    "quantization_config": (None,),
}
REFUSED_EVERYWHERE = ("quantization_config", "pruned_heads")
REQUIRED = object()


class Field(NamedTuple):
    """A field of config.json."""

    name: str
    kind: Any  # type or types of its value
    default: Any = REQUIRED  # what transformers takes where the file is silent; a function is given what was read so far


class Source(NamedTuple):
    """Where a parameter lies in a checkpoint: the tensor `name` + ".weight" or ".bias"."""

    name: str  # with {i} for the layer and {e} for the expert
    parts: tuple[str, ...] = ()  # the parameters whose outputs follow one another in the tensor; (): it is alone
    per_head: bool = False  # they follow one another within each head
    transposed: bool = True  # stored as [outputs, inputs], as torch's Linear; else as Conv1D


class Family(NamedTuple):
    """How one model_type reads."""

    fields: Mapping[str, Field]  # of ModelConfig -> config.json
    fixed: Mapping[str, Any]  # what the architecture fixes
    names: Mapping[str, Source]  # parameter -> tensor
    windows: Callable[["Fields", int], tuple[int, ...]] | None = None
    rope: Callable[["Fields", dict], dict[str, Any]] | None = None
    inert: Collection[str] = ()  # fields that say nothing in this family
    refused: Collection[str] = ()  # fields of NEUTRAL that its code reads, and that are computed at these values alone
    finish: Callable[[dict], dict] = lambda values: values  # what follows from the fields together


class Fields:
    """The fields of a config.json; remembers which were read."""

    def __init__(self, values: dict[str, Any], path: pathlib.Path):
        self.values, self.path, self.taken = values, path, set()

    def take(self, field: Field, known: Mapping[str, Any] = {}) -> Any:  # never written
        """The field's value, or its default. Raises ConfigError if it is missing or of another type."""
        self.taken.add(field.name)
        value = self.values.get(field.name)
        if value is None and (field.default is REQUIRED or field.name not in self.values or callable(field.default)):
            if field.default is REQUIRED:
                raise ConfigError(f"{self.path}: the field {field.name!r} is missing")
            return field.default(known) if callable(field.default) else field.default
        if value is None and field.kind is bool:  # as Python reads it
            return False
        kinds = field.kind if isinstance(field.kind, tuple) else (field.kind,)
        right = value is None or (isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds))
        if not right:
            wanted = " or ".join(k.__name__ for k in kinds)
            raise ConfigError(
                f"{self.path}: {field.name} is {value!r:.80}, of type {type(value).__name__}; it must be {wanted}"
            )
        fault = number_fault(value, type(value)) if type(value) in (int, float) else None
        if fault is not None:
            raise ConfigError(f"{self.path}: {field.name} is {value!r:.80}; {fault}")
        return value

    def take_float(self, name: str, default: float) -> float:
        """A number that null is no value of."""
        value = self.take(Field(name, NUMBER, default))
        if value is None:
            raise ConfigError(f"{self.path}: {name} is null; it must be a number")
        return float(value)

    def check_rest(self, family: Family, ignore: Collection[str]) -> None:
        """Raises ConfigError for the first field that was not read and is not known to be harmless."""
        refused = {*REFUSED_EVERYWHERE, *family.refused}
        for name, value in self.values.items():
            if name in self.taken or name in INERT or name in family.inert or name in ignore:
                continue
            if name in NEUTRAL and name not in refused:
                continue
            if name not in NEUTRAL:
                raise ConfigError(
                    f"{self.path}: the field {name!r} ({value!r:.80}) is not known; it might change the forward pass "
                    f"(model.ignore_fields={name} if it does not)"
                )
            if value not in NEUTRAL[name]:
                raise ConfigError(f"{self.path}: {name} is {value!r:.80}, which this version does not compute")


NUMBER = (int, float)


# --- rotary embeddings ------------------------------------------------------------------------------------------------


def _scaling(fields: Fields, given: dict[str, Any], known: Mapping[str, Any]) -> tuple[RopeScaling | None, bool]:
    """(scaling, whether positions past max_positions cannot be computed) of a rope_scaling or rope_parameters."""
    left = {k: v for k, v in given.items() if k not in ("rope_theta", "partial_rotary_factor")}
    kind = left.pop("rope_type", left.pop("type", "default"))
    left.pop("type", None)
    kind = {"su": "longrope", "yarn": "longrope"}.get(kind, kind) if known["family"] == "phi3" else kind

    def number(name, default=REQUIRED):
        stored: Any = left.pop(name, None)
        value: Any = default if stored is None else stored
        if value is REQUIRED:
            raise ConfigError(f"{fields.path}: the rotary scaling {kind!r} lacks {name}")
        fault = number_fault(value, float)
        if fault is None and value <= 0 and not name.startswith("mscale"):
            fault = "it must be > 0"
        if fault is not None:
            raise ConfigError(f"{fields.path}: the rotary scaling {kind!r} has {name}={value!r:.80}; {fault}")
        return float(value)

    longest = fields.take(Field("original_max_position_embeddings", int, known["max_positions"]))
    scaling, hard = None, False
    if kind == "dynamic":  # as without scaling up to max_positions; past it the angles depend on the sequence's length
        number("factor")
        hard = True
    elif kind == "linear":
        scaling = RopeScaling("linear", number("factor"), known["max_positions"])
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            number("factor"),
            int(number("original_max_position_embeddings")),
            low_freq_factor=number("low_freq_factor"),
            high_freq_factor=number("high_freq_factor"),
        )
    elif kind == "yarn":
        original = int(number("original_max_position_embeddings", longest))
        factor = number("factor", known["max_positions"] / original)
        scale = lambda m: 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0
        mscale, mscale_all = number("mscale", 0.0), number("mscale_all_dim", 0.0)
        inferred = scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0)
        scaling = RopeScaling(
            "yarn",
            factor,
            original,
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=bool(left.pop("truncate", True)),
            attention_factor=number("attention_factor", inferred),
        )
    elif kind == "longrope":
        original = int(number("original_max_position_embeddings", longest))
        factor = number("factor", known["max_positions"] / original)
        inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        factors = tuple(map(float, left.pop("short_factor", None) or ()))
        left.pop("long_factor", None)
        if not factors:
            raise ConfigError(f"{fields.path}: the rotary scaling 'longrope' has no short_factor")
        attention_factor = number("attention_factor", inferred)
        scaling = RopeScaling("longrope", factor, original, attention_factor=attention_factor, short_factors=factors)
        hard = True  # past the original context it takes other factors, for the whole sequence
    elif kind != "default":
        raise ConfigError(f"{fields.path}: the rotary scaling {kind!r} is not one that this version computes")
    if left:
        raise ConfigError(f"{fields.path}: the rotary scaling {kind!r} has {left}, which this version does not compute")
    return scaling, hard


def _rope(fields: Fields, known: dict, *, theta="rope_theta", default_theta=10000.0, part="", default_part=1.0):
    """rope_theta, rope_scaling and rotary_dim, in the new spelling (rope_parameters) or the old one.

    Args:
      theta: the field of the base.
      part: the field of the share of a head that is turned; "": the family's code turns all of it, whatever a file says.
    """
    new = fields.take(Field("rope_parameters", dict, None))
    old = fields.take(Field("rope_scaling", dict, None))
    given = old or new or {}
    inner = Fields(given, fields.path)
    base = inner.take_float("rope_theta", fields.take_float(theta, default_theta))
    share = 1.0
    if part:
        share = inner.take_float("partial_rotary_factor", fields.take_float(part, default_part))
    scaling, hard = _scaling(fields, given, known)
    stretched = scaling is not None or hard  # transformers' code of these kinds reads the share in every family, and fails
    if stretched and not part and fields.values.get("partial_rotary_factor", given.get("partial_rotary_factor", 1)) != 1:
        raise ConfigError(f"{fields.path}: partial_rotary_factor with a rotary scaling is not computed for this family")
    found = {"rope_theta": float(base), "rope_scaling": scaling, "hard_max_positions": hard}
    if hard and scaling is not None:
        found["max_positions"] = scaling.original_max_positions
    if share != 1:
        found["rotary_dim"] = int(known["head_dim"] * share)
    return found


def _neox_rope(fields: Fields, known: dict) -> dict[str, Any]:
    fields.take(Field("partial_rotary_factor", NUMBER, None))
    return _rope(fields, known, theta="rotary_emb_base", part="rotary_pct", default_part=0.25)


def _gptj_rope(fields: Fields, known: dict) -> dict[str, Any]:
    del known
    return {"rope_theta": 10000.0, "rotary_dim": fields.take(Field("rotary_dim", int, 64))}


def _phi3_rope(fields: Fields, known: dict) -> dict[str, Any]:
    return _rope(fields, known, part="partial_rotary_factor")


def _mixtral_rope(fields: Fields, known: dict) -> dict[str, Any]:
    return _rope(fields, known, default_theta=1e6)


def _gemma3_rope(fields: Fields, known: dict) -> dict[str, Any]:
    """Two bases: full layers stretch theirs, windowed layers have a local one."""
    new, old = fields.take(Field("rope_parameters", dict, None)), fields.take(Field("rope_scaling", dict, None))
    theta = fields.take_float("rope_theta", 1e6)
    local = fields.take_float("rope_local_base_freq", 1e4)
    full = {**((new or {}).get("full_attention") or {}), **(old or {})}
    windowed = (new or {}).get("sliding_attention") or {}
    if set(new or {}) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{fields.path}: rope_parameters is {new}; it must hold full_attention and sliding_attention")
    scaling, hard = _scaling(fields, full, known)
    if _scaling(fields, windowed, known) != (None, False):
        raise ConfigError(f"{fields.path}: windowed layers with a rotary scaling, {windowed}, are not computed by this version")
    return {
        "rope_theta": Fields(full, fields.path).take_float("rope_theta", theta),
        "rope_scaling": scaling,
        "hard_max_positions": hard,
        "local_rope_theta": Fields(windowed, fields.path).take_float("rope_theta", local),
    }


# --- windows ----------------------------------------------------------------------------------------------------------


def _by_layer(fields: Fields, layers: int, window: int | None, is_windowed: Callable[[int], bool]) -> tuple[int, ...]:
    """Windows by layer_types where the file has them, else by `is_windowed`."""
    types = fields.take(Field("layer_types", list, None))
    if types is None:
        types = ["sliding_attention" if is_windowed(i) else "full_attention" for i in range(layers)]
    if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise ConfigError(
            f"{fields.path}: layer_types is {types!r:.200}; it must name full_attention or sliding_attention {layers} times"
        )
    if window is None and "sliding_attention" in types:
        raise ConfigError(f"{fields.path}: layer_types has sliding_attention, and there is no sliding_window")
    return tuple((window or 0) if t == "sliding_attention" else 0 for t in types)


def _all_windows(default: int | None):
    def windows(fields: Fields, layers: int) -> tuple[int, ...]:
        return (fields.take(Field("sliding_window", int, default)) or 0,) * layers

    return windows


def _qwen_window(fields: Fields) -> int | None:
    used, window = fields.take(Field("use_sliding_window", bool, False)), fields.take(Field("sliding_window", int, 4096))
    return window if used else None


def _qwen_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    window, first = _qwen_window(fields), fields.take(Field("max_window_layers", int, 28))
    return _by_layer(fields, layers, window, lambda i: window is not None and i >= first)


def _qwen_moe_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    return (_qwen_window(fields) or 0,) * layers


def _gemma2_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    return _by_layer(fields, layers, fields.take(Field("sliding_window", int, 4096)), lambda i: i % 2 == 0)


def _gemma3_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    every = fields.take(Field("sliding_window_pattern", int, 6))
    return _by_layer(fields, layers, fields.take(Field("sliding_window", int, 4096)), lambda i: (i + 1) % every != 0)


# --- the families -----------------------------------------------------------------------------------------------------

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
LAYER = "model.layers.{i}."


def _llama_names(**others: str | Source) -> dict[str, Source]:
    names: dict[str, str | Source] = {
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "unembed": "lm_head",
        "attention_norm": f"{LAYER}input_layernorm",
        "mlp_norm": f"{LAYER}post_attention_layernorm",
        **{x: f"{LAYER}self_attn.{x}_proj" for x in "qkvo"},
        "q_norm": f"{LAYER}self_attn.q_norm",
        "k_norm": f"{LAYER}self_attn.k_norm",
        **{x: f"{LAYER}mlp.{x}_proj" for x in ("gate", "up", "down")},
        **others,
    }
    return {k: Source(v) if isinstance(v, str) else v for k, v in names.items()}


LLAMA_NAMES = _llama_names()
POST_NORMS = {
    "attention_post_norm": f"{LAYER}post_attention_layernorm",
    "mlp_norm": f"{LAYER}pre_feedforward_layernorm",
    "mlp_post_norm": f"{LAYER}post_feedforward_layernorm",
}
QKV = ("q", "k", "v")


def _gpt_names(**names: str | Source) -> dict[str, Source]:
    return {k: Source(v) if isinstance(v, str) else v for k, v in names.items()}


def _gpt2_names() -> dict[str, Source]:
    layer, conv = "transformer.h.{i}.", lambda name, parts=(): Source(name, parts, transposed=False)
    return _gpt_names(
        embed="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        unembed="lm_head",
        attention_norm=f"{layer}ln_1",
        mlp_norm=f"{layer}ln_2",
        **{x: conv(f"{layer}attn.c_attn", QKV) for x in QKV},
        o=conv(f"{layer}attn.c_proj"),
        up=conv(f"{layer}mlp.c_fc"),
        down=conv(f"{layer}mlp.c_proj"),
    )


def _gptj_names() -> dict[str, Source]:
    layer = "transformer.h.{i}."
    return _gpt_names(
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        unembed="lm_head",
        attention_norm=f"{layer}ln_1",
        **{x: f"{layer}attn.{x}_proj" for x in QKV},
        o=f"{layer}attn.out_proj",
        up=f"{layer}mlp.fc_in",
        down=f"{layer}mlp.fc_out",
    )


def _neox_names() -> dict[str, Source]:
    layer = "gpt_neox.layers.{i}."
    return _gpt_names(
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        unembed="embed_out",
        attention_norm=f"{layer}input_layernorm",
        mlp_norm=f"{layer}post_attention_layernorm",
        **{x: Source(f"{layer}attention.query_key_value", QKV, per_head=True) for x in QKV},
        o=f"{layer}attention.dense",
        up=f"{layer}mlp.dense_h_to_4h",
        down=f"{layer}mlp.dense_4h_to_h",
    )


def _gpt_fields(eps: str = "layer_norm_epsilon", tied: bool = True) -> dict[str, Field]:
    heads = lambda c: c["num_heads"]
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
GEMMA = {**COMMON, "tie_embeddings": Field("tie_word_embeddings", bool, True), "attention_bias": BIAS}
GEMMA["head_dim"] = Field("head_dim", int, 256)
GEMMA2 = {
    **GEMMA,
    "activation": Field("hidden_activation", str, "gelu_pytorch_tanh"),
    "query_scale": Field("query_pre_attn_scalar", NUMBER, 256),
}


def _gemma(values: dict) -> dict:
    # The first configs say "gelu" and mean its tanh form; transformers reads them so.
    activation = "gelu_tanh" if values["activation"] == "gelu" else values["activation"]
    return {**values, "activation": activation, "embed_scale": values["hidden_size"] ** 0.5}


def _gemma2(values: dict) -> dict:
    if values["query_scale"] <= 0:
        raise ValueError(f"query_pre_attn_scalar is {values['query_scale']}; it must be > 0")
    return {**values, "embed_scale": values["hidden_size"] ** 0.5, "query_scale": values["query_scale"] ** -0.5}


def _neox(values: dict) -> dict:
    parallel = values.pop("parallel")
    return {**values, "residual": "parallel" if parallel else "sequential"}


def _moe_names(experts: str, gate: str, up: str, down: str, router: str) -> dict[str, Source]:
    names = {k: f"{LAYER}{experts}.{{e}}.{v}" for k, v in {"gate": gate, "up": up, "down": down}.items()}
    return _llama_names(**names, router=f"{LAYER}{router}")


BOTH_WAYS = ("use_bidirectional_attention",)
MISTRAL = Family({**COMMON}, LLAMA, LLAMA_NAMES, _all_windows(4096), _rope)
QWEN2 = Family(COMMON, {**LLAMA, "attention_bias": True, "output_bias": False}, LLAMA_NAMES, _qwen_windows, _rope)
EXPERTS = {"experts_per_token": Field("num_experts_per_tok", int, 2)}
QWEN3 = {**LLAMA, "qk_norm": "head"}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        {**COMMON, "attention_bias": BIAS, "mlp_bias": Field("mlp_bias", bool, False)}, LLAMA, LLAMA_NAMES, rope=_rope
    ),
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": Family(
        {**COMMON, "attention_bias": BIAS, "head_dim": Field("head_dim", int, 128)}, QWEN3, LLAMA_NAMES, _qwen_windows, _rope
    ),
    "phi3": Family(
        COMMON,
        LLAMA,
        _llama_names(
            **{x: Source(f"{LAYER}self_attn.qkv_proj", QKV) for x in QKV},
            **{x: Source(f"{LAYER}mlp.gate_up_proj", ("gate", "up")) for x in ("gate", "up")},
        ),
        _all_windows(None),
        _phi3_rope,
    ),
    "olmo2": Family(
        {**COMMON, "attention_bias": BIAS, "norm_eps": Field("rms_norm_eps", NUMBER, 1e-5)},
        {**LLAMA, "qk_norm": "full", "norm_placement": "post"},
        _llama_names(**POST_NORMS),
        rope=_rope,
    ),
    "gemma": Family(
        {**GEMMA, "activation": Field("hidden_act", str, "gelu_pytorch_tanh")},
        GEMMA_FIXED,
        LLAMA_NAMES,
        rope=_rope,
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
        _llama_names(**POST_NORMS),
        _gemma2_windows,
        _rope,
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
        _llama_names(**POST_NORMS),
        _gemma3_windows,
        _gemma3_rope,
        ("hidden_act",),
        BOTH_WAYS,
        _gemma2,
    ),
    "mixtral": Family(
        {**COMMON, **EXPERTS, "num_experts": Field("num_local_experts", int), "norm_eps": Field("rms_norm_eps", NUMBER, 1e-5)},
        {**LLAMA, "renormalise_experts": True},
        _moe_names("block_sparse_moe.experts", "w1", "w3", "w2", "block_sparse_moe.gate"),
        _all_windows(None),
        _mixtral_rope,
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
        _moe_names("mlp.experts", "gate_proj", "up_proj", "down_proj", "mlp.gate"),
        _qwen_moe_windows,
        _rope,
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
        _gpt2_names(),
        refused=(*("add_cross_attention", "reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx", "scale_attn_weights"),),
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
        _gptj_names(),
        rope=_gptj_rope,
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
        _neox_names(),
        rope=_neox_rope,
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
    names |= {"rope_theta": "rope_theta", "local_rope_theta": "rope_local_base_freq", "init_std": "initializer_range"}
    for ours, theirs in names.items():
        message = re.sub(rf"\bmodel\.{ours}\b", theirs, message)
    return message


def model_config(values: dict[str, Any], path: pathlib.Path, ignore: Collection[str] = ()) -> ModelConfig:
    """The decoder that the fields of a config.json describe.

    Args:
      ignore: fields that are known not to matter, from model.ignore_fields.
    Raises: ConfigError for another family, or a field that is not known to be harmless.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(f"{path}: model_type is {name!r}; this version reads {', '.join(sorted(FAMILIES))}")
    family, fields = FAMILIES[name], Fields(values, path)
    known: dict[str, Any] = {**family.fixed, "family": name}
    try:
        for ours, field in family.fields.items():
            known[ours] = fields.take(field, known)
            if ours in SIZES and known[ours] < 1:  # others are derived from it
                raise ValueError(f"model.{ours} is {known[ours]}; it must be at least 1")
        if known["num_layers"] > MAX_LAYERS:  # windows are written out for each
            name = family.fields["num_layers"].name
            raise ConfigError(f"{path}: {name} is {known['num_layers']:,}; it must be at most {MAX_LAYERS:,}")
        if known.get("num_experts", 0) is None:  # transformers writes it under its other name too
            known["num_experts"] = fields.take(Field("num_local_experts", int))
        activation = known["activation"]
        if activation not in ACTIVATIONS:
            raise ConfigError(f"{path}: the activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        known["activation"] = ACTIVATIONS[activation]
        if known["norm_eps"] is None:
            raise ConfigError(f"{path}: {family.fields['norm_eps'].name} is null; it must be a number")
        known["norm_eps"] = float(known["norm_eps"])
        # The weights are loaded: nothing is drawn by it.
        known["init_std"] = float(fields.take(Field("initializer_range", NUMBER, 0.02)) or 0.02)
        if family.windows:
            known["windows"] = family.windows(fields, known["num_layers"])
        if family.rope:
            known |= family.rope(fields, known)
        if not any(known.get("windows", ())):
            known["windows"] = ()
        config = ModelConfig(**family.finish(known))
    except ConfigError:
        raise
    except (ValueError, TypeError, ArithmeticError, AttributeError, KeyError) as error:
        raise ConfigError(f"{path}: {_in_their_words(str(error), family)}") from error
    fields.check_rest(family, ignore)
    return config
