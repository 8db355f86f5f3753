"""The main job: summarisation preferences, SFT then DPO.

    python -m dpojax.main --config=configs/tldr.py

Alone, it runs the embedded world on a CPU: posts, summaries and labels that dpojax generates itself.
Hardware: 2 CPU cores. Time: under 4 minutes. Expected: a win rate of the DPO policy over the SFT policy
clearly above 50 % by the world's true reward; README.md quotes the last measured one.

    python -m dpojax.main --config=configs/tldr.py:paper --config.model.init=DIR --config.data.train=FILE ...

`:paper` holds the TL;DR settings of Rafailov et al. 2023 (section 6 and appendix B; arXiv:2305.18290): GPT-J-6B
after SFT, beta 0.5, batch 64, RMSprop at 1e-6 with 150 warmup steps. It needs accelerators, the data and weights.

Every other config starts from this file; each setting is explained here.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dpojax.flags import did_you_mean


def get_config(arg: str = "") -> ConfigDict:
    """The run's settings; `arg` is "" (embedded default) or "paper"."""
    if arg not in ("", "paper"):
        raise ValueError(f"unknown argument {arg!r}; it is 'paper' or nothing{did_you_mean(arg, ('paper',))}")
    config = default()
    if arg == "paper":
        paper(config)
        config.loss.beta = 0.5
        config.data.prompt_template = "{prompt}\n\nTL;DR:"
    return config


def default() -> ConfigDict:
    """The embedded world; the base of every config."""
    c = ConfigDict()
    c.seed = 0
    c.batch_size = 32  # pairs per step
    c.batch_groups = 0  # groups per step, for data whose groups hold different numbers of pairs
    c.num_steps = (
        150  # -1: num_epochs of the data; 0: nothing is trained in the preference stage (SFT alone, or evaluation alone)
    )
    c.num_epochs = 0.0  # in place of num_steps; 0: num_steps counts
    c.log_every_steps = 10
    c.eval_every_steps = 50
    c.checkpoint_every_steps = 100
    c.tokenizer = ""  # .model, tokenizer.json or its folder; "": model.init's own, or the embedded world's
    c.self_check = "auto"  # auto skips it above 1B parameters; full; off
    c.export = False  # True writes WORKDIR/export, a Hugging Face directory

    c.data = ConfigDict()
    # .jsonl(.gz), .json, .parquet, .arrayrecord, folders and globs of them, hf:NAME, comma-separated; "": the embedded world
    c.data.train = ""
    c.data.eval = ""  # the same, or several by name: helpful=a.jsonl,harmless=b.jsonl; "": eval_share of data.train, or none
    c.data.eval_share = 0.0  # of data.train's prompts, held out where data.eval is ""
    c.data.seed = -1  # of its order, flipped labels and the embedded world; -1: the run's seed
    c.data.shuffle = True
    c.data.flip_labels = 0.0  # share of training pairs whose labels are swapped (ablations)
    c.data.prompt_template = ""  # e.g. '{prompt}\n\nTL;DR:'
    c.data.text_as_chat = False  # True: where there is a chat template, a prompt that is text is a user's message for it
    c.data.max_prompt_tokens = 512  # BOS included; prompts are cut from the left; 0: half of the model's positions, 512 at most
    c.data.max_response_tokens = 128  # EOS included; responses are cut from the right; 0: the same
    c.data.layout = "auto"  # shared (prompt once, packed), slots (the same, by parts of a row; TPU), separate (the oracle)
    c.data.row_tokens = 0  # 0: the multiple of 128 that wastes least on this data
    c.data.micro_batch_tokens = 4096  # per data shard; a step takes as many micro-batches as it needs
    c.data.eval_max_pairs = 512  # 0: all
    c.data.on_bad_line = "error"  # or skip, up to
    c.data.max_bad_share = 0.01
    c.data.chat_template = ""  # .jinja file for message lists; "": the tokenizer's own, unless there is a prompt_template
    c.data.mask_template = False  # True: what a chat template puts around an answer counts in no log-prob (Llama 3)
    c.data.mask_tokens = ""  # formatting tokens, comma-separated, that count in no log-prob of the preference stage
    c.data.workers = 0  # processes that tokenise and pack; 0: threads

    c.model = ConfigDict()
    c.model.init = ""  # Hugging Face directory, dpojax checkpoint, or "" for random weights
    c.model.dtype = "float32"  # of the computation; bfloat16 on accelerators
    c.model.param_dtype = "float32"  # bf16 masters lose updates at small learning rates
    c.model.attention = "auto"  # splash on TPUs, cudnn on NVIDIA GPUs where it can, xla elsewhere; full is the oracle
    c.model.remat = "dots"  # none, dots (keep matrix products), attention, full (a layer's input), dots_offload, full_offload
    c.model.logps_chunk_tokens = 256  # logits exist for this many tokens at a time
    c.model.router_loss_weight = 0.0  # of a mixture of experts' load-balancing loss
    c.model.ignore_fields = ""  # fields of model.init's config.json that are known not to matter, comma-separated
    c.model.shape = ""  # a config.json, or its folder: the model of random weights, in place of the sizes below
    # Sizes of random weights; model.init brings its own.
    c.model.hidden_size = 128
    c.model.intermediate_size = 352
    c.model.num_layers = 2
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 32
    c.model.norm = "rms"
    c.model.norm_eps = 1e-5
    c.model.mlp = "gated"
    c.model.activation = "silu"
    c.model.rope_theta = 10000.0
    c.model.tie_embeddings = True
    c.model.attention_bias = False
    c.model.mlp_bias = False
    c.model.max_positions = 1024
    c.model.init_std = 0.08

    c.sft = ConfigDict()
    c.sft.num_steps = -1  # -1: steps_from_random where model.init is "", none where it brings weights
    c.sft.steps_from_random = 240
    c.sft.data = ""  # "": the chosen responses; the embedded world has demonstrations of its own
    c.sft.batch_size = 16  # prompts
    c.sft.learning_rate = 5e-3
    c.sft.schedule = "cosine"
    c.sft.warmup_steps = 50
    c.sft.b2 = 0.95  # of its optimizer, where it has one (config.optim otherwise): a short run wants a short memory

    c.loss = ConfigDict()
    c.loss.name = "sigmoid"  # an objective, a sum like 0.8*sigmoid+0.2*bco_pair, or your own module:function
    c.loss.beta = 0.1
    c.loss.label_smoothing = placeholder(float)
    c.loss.average = placeholder(bool)  # ipo: log-ratios per token; unset: True
    c.loss.tau = placeholder(float)  # discopop; tr_*: steps between two moves of the reference
    c.loss.gamma = placeholder(float)  # simpo
    c.loss.alpha = placeholder(float)  # r_dpo, odpo, tdpo2, ld_dpo, cpo, tr_*
    c.loss.dpop_lambda = placeholder(float)
    c.loss.orpo_lambda = placeholder(float)
    c.loss.desirable_weight = placeholder(float)  # kto; unset: 1
    c.loss.undesirable_weight = placeholder(float)
    c.loss.f_divergence = placeholder(str)  # reverse_kl, forward_kl, js, alpha; unset: reverse_kl
    c.loss.f_alpha = placeholder(float)
    c.loss.sft_weight = placeholder(float)  # of the chosen response's negative log-likelihood, added
    c.loss.sft_normalize = placeholder(str)  # token (over the step's tokens) or pair
    c.loss.extra = ConfigDict()  # settings of your own function that are not above

    c.reference = ConfigDict()
    c.reference.init = ""  # another model as the reference; "": the policy before the preference stage
    c.reference.mode = "auto"  # live, cached, adapter (LoRA's base), none; auto: what the objective and lora.rank ask for
    c.reference.dtype = ""  # of the live tree: float32, bfloat16, int8, fp8, nf4; "": model.param_dtype
    c.reference.memory = "device"  # or pinned_host: the live tree lies in the host's memory, and a layer at a time comes over
    c.reference.rules = ConfigDict()  # its own sharding; empty: mesh.rules

    c.lora = ConfigDict()
    c.lora.rank = 0  # 0: all parameters are trained; else adapters alone, and the base without them is the reference
    c.lora.alpha = 16.0  # an adapter counts alpha / rank
    c.lora.dropout = 0.0
    c.lora.targets = "*"  # patterns of the layers' linear maps, comma-separated: q, k, v, o, gate, up, down
    c.lora.base_dtype = ""  # of the frozen base: float32, bfloat16, int8, fp8, nf4 (QLoRA); "": model.param_dtype

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # rmsprop, adafactor, lion
    c.optim.learning_rate = 1e-4
    c.optim.schedule = "linear"  # constant, cosine
    c.optim.warmup_steps = 15
    c.optim.warmup_ratio = 0.0  # of the run's steps, in place of warmup_steps; 0: warmup_steps counts
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0
    c.optim.b1 = placeholder(float)  # unset: as published
    c.optim.b2 = placeholder(float)
    c.optim.eps = placeholder(float)
    c.optim.spike_factor = 100.0  # a loss over this many times its running average is a spike: named and warned of
    c.optim.skip_spikes = False  # True: and skipped, like a step that is not finite

    c.mesh = ConfigDict()
    c.mesh.data = -1  # -1: what is left
    c.mesh.fsdp = 1
    c.mesh.sequence = 1  # devices that share each row's tokens, for long contexts; attention trades tokens for heads
    c.mesh.tensor = 1
    c.mesh.num_slices = 0  # TPU slices, or groups of hosts: the data axis alone crosses them. 0: as TPUs say
    # logical axis -> mesh axis, or several, outermost first ("fsdp,sequence"); "" keeps it whole
    c.mesh.rules = ConfigDict(
        dict(
            vocab="tensor", embed="fsdp", heads="tensor", kv_heads="tensor", mlp="tensor", norm="", layers="", experts="tensor"
        )
    )

    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 2
    c.checkpoint.restore_step = -1  # -1: the newest
    c.checkpoint.allow_changed = ""  # what a resumed run may change: data, tokenizer, model, dtype, loss, ... (comma-separated)

    c.sample = ConfigDict()
    c.sample.num_prompts = 512
    c.sample.kl_prompts = 128  # of these, that every evaluation samples for the on-policy KL; 0: none
    c.sample.max_new_tokens = 48
    c.sample.batch_size = 128
    c.sample.temperature = 1.0  # 0: greedy
    c.sample.top_k = 0  # 0: off
    c.sample.top_p = 1.0  # 1: off
    c.sample.reward = ""  # module:function or file.py:function; "": the embedded world's own, no win rate elsewhere
    return c


def paper(c: ConfigDict) -> None:
    """The hyper-parameters that Rafailov et al. 2023 share between their experiments (appendix B)."""
    c.batch_size = 64
    c.num_steps = 1450  # about one epoch of the 92,858 TL;DR comparisons
    c.eval_every_steps = 312
    c.checkpoint_every_steps = 312
    c.data.max_prompt_tokens = 256
    c.data.max_response_tokens = 256
    c.data.micro_batch_tokens = 8192
    c.data.eval_max_pairs = 0
    c.data.workers = 4
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.model.logps_chunk_tokens = 1024
    c.sft.num_steps = 0  # the policy starts from an SFT checkpoint
    c.loss.beta = 0.1
    c.optim.name = "rmsprop"
    c.optim.learning_rate = 1e-6
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 150
    c.optim.clip_norm = 10.0
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.sample.num_prompts = 256
    c.sample.max_new_tokens = 128
