"""What each family calls its tensors on disk: name of a parameter -> `Source`."""

from dpojax.models.families.fields import Source

LAYER = "model.layers.{i}."


def as_sources(**names: str | Source) -> dict[str, Source]:
    """Names of parameters -> where they lie on disk; a text names a tensor that is taken whole."""
    sources = {}
    for name, source in names.items():
        if isinstance(source, str):
            source = Source(source)
        sources[name] = source
    return sources


def llama_names(**others: str | Source) -> dict[str, Source]:
    """Llama's names, with those that differ."""
    names: dict[str, str | Source] = {
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "unembed": "lm_head",
        "score": "score",
        "attention_norm": f"{LAYER}input_layernorm",
        "mlp_norm": f"{LAYER}post_attention_layernorm",
        **{x: f"{LAYER}self_attn.{x}_proj" for x in "qkvo"},
        "q_norm": f"{LAYER}self_attn.q_norm",
        "k_norm": f"{LAYER}self_attn.k_norm",
        **{x: f"{LAYER}mlp.{x}_proj" for x in ("gate", "up", "down")},
        **others,
    }
    return as_sources(**names)


LLAMA_NAMES = llama_names()

POST_NORMS = {
    "attention_post_norm": f"{LAYER}post_attention_layernorm",
    "mlp_norm": f"{LAYER}pre_feedforward_layernorm",
    "mlp_post_norm": f"{LAYER}post_feedforward_layernorm",
}

QKV = ("q", "k", "v")


def gpt2_names() -> dict[str, Source]:
    layer = "transformer.h.{i}."

    def conv(name, parts=()):
        return Source(name, parts, transposed=False)

    return as_sources(
        embed="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        unembed="lm_head",
        score="score",
        attention_norm=f"{layer}ln_1",
        mlp_norm=f"{layer}ln_2",
        **{x: conv(f"{layer}attn.c_attn", QKV) for x in QKV},
        o=conv(f"{layer}attn.c_proj"),
        up=conv(f"{layer}mlp.c_fc"),
        down=conv(f"{layer}mlp.c_proj"),
    )


def gptj_names() -> dict[str, Source]:
    layer = "transformer.h.{i}."
    return as_sources(
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        unembed="lm_head",
        score="score",
        attention_norm=f"{layer}ln_1",
        **{x: f"{layer}attn.{x}_proj" for x in QKV},
        o=f"{layer}attn.out_proj",
        up=f"{layer}mlp.fc_in",
        down=f"{layer}mlp.fc_out",
    )


def neox_names() -> dict[str, Source]:
    layer = "gpt_neox.layers.{i}."
    return as_sources(
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        unembed="embed_out",
        score="score",
        attention_norm=f"{layer}input_layernorm",
        mlp_norm=f"{layer}post_attention_layernorm",
        **{x: Source(f"{layer}attention.query_key_value", QKV, per_head=True) for x in QKV},
        o=f"{layer}attention.dense",
        up=f"{layer}mlp.dense_h_to_4h",
        down=f"{layer}mlp.dense_4h_to_h",
    )


def moe_names(experts: str, gate: str, up: str, down: str, router: str) -> dict[str, Source]:
    """Llama's names with experts in place of one mlp."""
    names = {
        k: f"{LAYER}{experts}.{{e}}.{v}" for k, v in {"gate": gate, "up": up, "down": down}.items()
    }
    return llama_names(**names, router=f"{LAYER}{router}")
