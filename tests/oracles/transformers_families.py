"""Random transformers models of every family, to compare with: windows are shorter than the
sequence, heads are grouped, norms and biases do something.
"""

import pathlib
from typing import Any

VOCAB, LENGTH = 67, 40
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.15,
)
GPT = dict(vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=6, n_positions=64, initializer_range=0.15)
LLAMA3 = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=1000.0)
LONG = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.3, 1.7],
    long_factor=[1.0, 2.0, 3.0, 4.0],
    rope_theta=1e4,
    original_max_position_embeddings=64,
)
BOTH = dict(
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
    sliding_attention=dict(rope_type="default", rope_theta=1e4),
)
# name -> (transformers' config class, its arguments); windows are shorter than the sequence, heads
# are grouped
CASES = {
    "llama": (
        "LlamaConfig",
        dict(
            head_dim=10,
            rope_parameters={**LLAMA3, "rope_theta": 5e3},
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "llama linear": (
        "LlamaConfig",
        dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
    ),
    "llama dynamic": (
        "LlamaConfig",
        dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
    ),
    "mistral": ("MistralConfig", dict(sliding_window=7)),
    "qwen2": (
        "Qwen2Config",
        dict(
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
            tie_word_embeddings=True,
            rope_parameters=YARN,
        ),
    ),
    "qwen3": ("Qwen3Config", dict(head_dim=12)),
    "phi3": (
        "Phi3Config",
        dict(
            pad_token_id=0,
            eos_token_id=1,
            sliding_window=9,
            rope_parameters=dict(rope_type="default", partial_rotary_factor=0.5, rope_theta=1e4),
        ),
    ),
    "phi3 longrope": (
        "Phi3Config",
        dict(
            pad_token_id=0,
            eos_token_id=1,
            original_max_position_embeddings=64,
            max_position_embeddings=256,
            rope_parameters=LONG,
        ),
    ),
    "olmo2": ("Olmo2Config", {}),
    "gemma": ("GemmaConfig", dict(head_dim=14)),
    "gemma2": (
        "Gemma2Config",
        dict(
            head_dim=14,
            sliding_window=6,
            query_pre_attn_scalar=20,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=4.0,
        ),
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        dict(
            num_hidden_layers=7,
            head_dim=14,
            sliding_window=6,
            query_pre_attn_scalar=20,
            rope_parameters=BOTH,
        ),
    ),
    "mixtral": (
        "MixtralConfig",
        dict(num_local_experts=5, num_experts_per_tok=2, sliding_window=8),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(
            head_dim=12,
            num_experts=5,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=True,
        ),
    ),
    "gpt2": ("GPT2Config", GPT),
    "gptj": ("GPTJConfig", dict(**GPT, rotary_dim=4)),
    "gpt_neox": ("GPTNeoXConfig", dict(rotary_pct=0.5)),
    "gpt_neox sequential": ("GPTNeoXConfig", dict(use_parallel_residual=False)),
}


def theirs(name: str, folder: pathlib.Path, head: str = "AutoModelForCausalLM", **fields: Any):
    """A random transformers model, saved in several files.

    `fields` are those of its config that its head takes.
    """
    import torch
    import transformers

    kind, own = CASES[name]
    own = own if own.get("n_embd") else SIZES | own
    if kind == "GPTNeoXConfig":
        own = {k: v for k, v in own.items() if k != "num_key_value_heads"}
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**own, **fields})
    model = (
        getattr(transformers, head)
        .from_config(config, dtype=torch.float32, attn_implementation="eager")
        .eval()
    )
    for p in model.parameters():
        if p.ndim == 1:  # norms and biases that do something
            p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(folder, max_shard_size="40kB")
    return model


def their_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()
