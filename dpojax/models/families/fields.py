"""Fields of a config.json: which are read, which must have a value, which say nothing."""

import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from dpojax.errors import ConfigError
from dpojax.untrusted.plain_data import number_fault

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

# Fields that do not change the forward pass of training.
INERT = {
    *(
        "architectures",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
    ),
    *(
        "pad_token_id",
        "_name_or_path",
        "pretraining_tp",
        "initializer_range",
        "unk_token_id",
        "id2label",
        "label2id",
    ),
    *(
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "is_encoder_decoder",
        "chunk_size_feed_forward",
    ),
    *(
        "problem_type",
        "tokenizer_class",
        "model_type",
        "_attn_implementation",
        "attn_implementation",
        "auto_map",
        "num_labels",
    ),
    *(
        "cache_implementation",
        "task_specific_params",
        "gradient_checkpointing",
        "n_ctx",
        "is_decoder",
        "_sliding_window_pattern",
    ),
    *(
        "attention_dropout",
        "hidden_dropout",
        "classifier_dropout",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
    ),
    *(
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    ),
    *("output_router_logits", "router_aux_loss_coef"),  # of training: model.router_loss_weight
    *(
        "transformers.js_config",
        "is_llama_config",
        "unsloth_version",
        "unsloth_fixed",
        "_attn_implementation_autoset",
    ),
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
    *(
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "early_stopping",
        "repetition_penalty",
        "length_penalty",
    ),
    *(
        "diversity_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "suppress_tokens",
    ),
    *(
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
    ),
    *(
        "decoder_start_token_id",
        "sep_token_id",
        "prefix",
        "finetuning_task",
        "remove_invalid_values",
        "output_scores",
    ),
    *(
        "n_special",
        "predict_special_tokens",
        "output_past",
        "_num_labels",
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
    ),
    *(
        "return_dict_in_generate",
        "tie_encoder_decoder",
        "torchscript",
        "tf_legacy_loss",
        "use_bfloat16",
    ),
}

# Fields that must have these values in the families whose code reads them (`Family.refused`):
# others would change the forward
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
    # what transformers takes where the file is silent; a function is given what was read so far
    default: Any = REQUIRED


class Source(NamedTuple):
    """Where a parameter lies in a checkpoint: the tensor `name` + ".weight" or ".bias"."""

    name: str  # with {i} for the layer and {e} for the expert
    # the parameters whose outputs follow one another in the tensor; (): it is alone
    parts: tuple[str, ...] = ()
    per_head: bool = False  # they follow one another within each head
    transposed: bool = True  # stored as [outputs, inputs], as torch's Linear; else as Conv1D


class Fields:
    """The fields of a config.json; remembers which were read."""

    def __init__(self, values: dict[str, Any], path: pathlib.Path):
        self.values = values
        self.path = path
        self.taken = set()

    def take(self, field: Field, known: Mapping[str, Any] = {}) -> Any:  # never written
        """The field's value, or its default.

        Raises ConfigError if it is missing or of another type.
        """
        self.taken.add(field.name)
        value = self.values.get(field.name)
        if value is None and (
            field.default is REQUIRED or field.name not in self.values or callable(field.default)
        ):
            if field.default is REQUIRED:
                raise ConfigError(f"{self.path}: the field {field.name!r} is missing")
            if callable(field.default):
                return field.default(known)
            return field.default
        if value is None and field.kind is bool:  # as Python reads it
            return False
        kinds = field.kind if isinstance(field.kind, tuple) else (field.kind,)
        right = value is None or (
            isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
        )
        if not right:
            wanted = " or ".join(k.__name__ for k in kinds)
            raise ConfigError(
                f"{self.path}: {field.name} is {value!r:.80}, of type {type(value).__name__}; it"
                f" must be {wanted}"
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

    def check_rest(self, family: "Family", ignore: Collection[str]) -> None:
        """Raises ConfigError for the first field that was not read.

        Fields that are known to be harmless pass.
        """
        refused = {*REFUSED_EVERYWHERE, *family.refused}
        for name, value in self.values.items():
            if name in self.taken or name in INERT or name in family.inert or name in ignore:
                continue
            if name in NEUTRAL and name not in refused:
                continue
            if name not in NEUTRAL:
                raise ConfigError(
                    f"{self.path}: the field {name!r} ({value!r:.80}) is not known; it might change"
                    f" the forward pass (model.ignore_fields={name} if it does not)"
                )
            if value not in NEUTRAL[name]:
                raise ConfigError(
                    f"{self.path}: {name} is {value!r:.80}, which this version does not compute"
                )


NUMBER = (int, float)


class Family(NamedTuple):
    """How one model_type reads."""

    fields: Mapping[str, Field]  # of ModelConfig -> config.json
    fixed: Mapping[str, Any]  # what the architecture fixes
    names: Mapping[str, Source]  # parameter -> tensor
    windows: Callable[[Fields, int], tuple[int, ...]] | None = None
    rope: Callable[[Fields, dict], dict[str, Any]] | None = None
    inert: Collection[str] = ()  # fields that say nothing in this family
    # fields of NEUTRAL that its code reads, and that are computed at these values alone
    refused: Collection[str] = ()
    finish: Callable[[dict], dict] = lambda values: values  # what follows from the fields together
