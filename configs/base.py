"""All settings, with their defaults and what they mean: every other config starts from this file.

    python -m dpojax.main --config=base --help

The defaults are what the field uses for full fine-tuning of a model that has seen SFT: one epoch,
AdamW at 1e-6 with a tenth of the steps as warmup, beta 0.1, 32 pairs a step (TRL's defaults: 1e-6
and 0.1; Tunstall et al. 2023, arXiv:2310.16944: 5e-7, 32 pairs, 10 % warmup). A setting that is
unset (a placeholder) has the value that its objective or optimizer was published with. Hardware and
time are those of the model that is trained; a config of one's own starts with

    from dpojax.configs import base

    def get_config():
        c = base.get_config()
        c.loss.beta = 0.5
        return c
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dpojax.config.model import SHARDING_RULES


def get_config() -> ConfigDict:
    """All settings with their defaults."""
    c = ConfigDict()
    c.stages = "sft,dpo"  # what is trained, one after another; or your own: file.py:name
    c.seed = 0
    c.batch_size = 32  # pairs per step
    c.batch_groups = 0  # groups per step, for data whose groups hold different numbers of pairs
    # -1: num_epochs of the data; 0: nothing is trained in the preference stage (SFT alone, or
    # evaluation alone)
    c.num_steps = -1
    c.num_epochs = 1.0  # in place of num_steps; 0: num_steps counts
    c.log_every_steps = 10
    c.eval_every_steps = 100
    c.checkpoint_every_steps = 200
    # .model, tokenizer.json or its folder; "": model.init's own, or the embedded world's
    c.tokenizer = ""
    c.self_check = "auto"  # auto skips it above 1B parameters; full; off
    c.export = False  # True writes WORKDIR/export, a Hugging Face directory

    c.data = ConfigDict()
    # .jsonl(.gz), .json, .parquet, .arrayrecord, folders and globs of them, hf:NAME,
    # comma-separated; "": the embedded world
    c.data.train = ""
    # the same, or several by name: helpful=a.jsonl,harmless=b.jsonl; "": eval_share of data.train,
    # or none
    c.data.eval = ""
    c.data.eval_share = 0.0  # of data.train's prompts, held out where data.eval is ""
    c.data.seed = -1  # of its order, flipped labels and the embedded world; -1: the run's seed
    c.data.shuffle = True
    c.data.flip_labels = 0.0  # share of training pairs whose labels are swapped (ablations)
    c.data.prompt_template = ""  # e.g. '{prompt}\n\nTL;DR:'
    # True: where there is a chat template, a prompt that is text is a user's message for it
    c.data.text_as_chat = False
    # BOS included; prompts are cut from the left; 0: half of the model's positions, 512 at most
    c.data.max_prompt_tokens = 0
    # EOS included; responses are cut from the right; 0: half of the model's positions, 512 at most
    c.data.max_response_tokens = 0
    # shared (prompt once, packed), slots (the same, by parts of a row; TPU), separate (the oracle)
    c.data.layout = "auto"
    c.data.row_tokens = 0  # 0: the multiple of 128 that wastes least on this data
    # per data shard; a step takes as many micro-batches as it needs
    c.data.micro_batch_tokens = 4096
    c.data.eval_max_pairs = 512  # 0: all
    c.data.on_bad_line = "error"  # or skip, up to
    c.data.max_bad_share = 0.01
    # .jinja file for message lists; "": the tokenizer's own, unless there is a prompt_template
    c.data.chat_template = ""
    # True: what a chat template puts around an answer counts in no log-prob (Llama 3)
    c.data.mask_template = False
    # formatting tokens, comma-separated, that count in no log-prob of the preference stage
    c.data.mask_tokens = ""
    c.data.workers = 0  # processes that tokenise and pack; 0: threads

    c.model = ConfigDict()
    c.model.init = ""  # Hugging Face directory, dpojax checkpoint, or "" for random weights
    c.model.dtype = "float32"  # of the computation; bfloat16 on accelerators
    c.model.param_dtype = "float32"  # bf16 masters lose updates at small learning rates
    # splash on TPUs, cudnn on NVIDIA GPUs where it can, xla elsewhere; full is the oracle
    c.model.attention = "auto"
    # none, dots (keep matrix products), attention, full (a layer's input), dots_offload,
    # full_offload
    c.model.remat = "dots"
    c.model.logps_chunk_tokens = 256  # logits exist for this many tokens at a time
    c.model.router_loss_weight = 0.0  # of a mixture of experts' load-balancing loss
    # fields of model.init's config.json that are known not to matter, comma-separated
    c.model.ignore_fields = ""
    # a config.json, or its folder: the model of random weights, in place of the sizes below
    c.model.shape = ""
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
    # -1: steps_from_random where model.init is "", none where it brings weights
    c.sft.num_steps = -1
    c.sft.steps_from_random = 240
    c.sft.data = ""  # "": the chosen responses; the embedded world has demonstrations of its own
    c.sft.batch_size = 16  # prompts
    c.sft.learning_rate = 3e-5
    c.sft.schedule = "cosine"
    c.sft.warmup_steps = 20
    # of its optimizer, where it has one (config.optim otherwise): a short run wants a short memory
    c.sft.b2 = 0.95

    c.reward_model = ConfigDict()
    c.reward_model.num_steps = -1  # of batch_size pairs; -1: one epoch of data.train
    c.reward_model.learning_rate = 1e-5
    c.reward_model.schedule = "cosine"
    c.reward_model.warmup_steps = 20
    # of (r_w + r_l)^2, which holds rewards around 0 (Eisenstein et al. 2023); 0: none
    c.reward_model.centring = 0.01
    # samples of the reference on which rewards get mean 0 and standard deviation 1; 0: none
    c.reward_model.norm_prompts = 256

    c.reward = ConfigDict()
    # of sampled responses, comma-separated and summed: world (the embedded world's own), exact,
    # numeric, regex (by the row's answer), model:DIR, implicit:DIR, judge:URL, file.py:name;
    # "": the world's own, where a world is the data, else sample.reward
    c.reward.terms = ""
    c.reward.weights = ""  # one for each term; "": 1 each
    c.reward.answer_column = "answer"
    c.reward.beta = 0.1  # of implicit:DIR, beta (log pi_DIR - log pi_reference)
    c.reward.judge_model = ""  # as its endpoint names it
    c.reward.judge_prompt = "tldr"  # helpful, or a file with {prompt}, {first} and {second}
    # the row's response that a response is compared with; "": the prompt's other responses
    c.reward.judge_against = "chosen"
    c.reward.judge_key = "DPOJAX_JUDGE_KEY"  # the environment variable that holds its key
    c.reward.judge_max_calls = 10000  # of a run; 0: any number
    c.reward.judge_calls_per_minute = 0  # 0: as many as the threads make
    c.reward.judge_threads = 8
    c.reward.judge_retries = 5
    c.reward.judge_timeout_s = 60.0

    c.policy_gradient = ConfigDict()
    # reinforce, rloo, grpo, dr_grpo, dapo, gspo or ppo: a row of a table whose settings follow
    c.policy_gradient.preset = "rloo"
    c.policy_gradient.num_samples = 8
    c.policy_gradient.beta = placeholder(float)
    c.policy_gradient.kl = placeholder(str)
    c.policy_gradient.clip_low = placeholder(float)
    c.policy_gradient.clip_high = placeholder(float)
    c.policy_gradient.scale = placeholder(str)
    c.policy_gradient.aggregate = placeholder(str)
    c.policy_gradient.epochs = placeholder(int)
    c.policy_gradient.redraws = 0
    c.policy_gradient.overlong_tokens = 0
    c.policy_gradient.value_model = ""
    c.policy_gradient.value_learning_rate = 1e-5
    c.policy_gradient.value_clip = 0.2
    c.policy_gradient.gamma = 1.0
    c.policy_gradient.lam = 0.95
    c.policy_gradient.target_kl = 0.0
    c.policy_gradient.horizon = 10000.0

    c.online_dpo = ConfigDict()
    c.online_dpo.num_samples = 2
    c.online_dpo.labels = "soft"
    c.online_dpo.pairs = "all"
    c.online_dpo.temperature = 1.0

    c.loss = ConfigDict()
    # an objective (dpo is sigmoid), a sum like 0.8*sigmoid+0.2*bco_pair, or your own
    # module:function
    c.loss.name = "sigmoid"
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
    # of the chosen response's negative log-likelihood, added
    c.loss.sft_weight = placeholder(float)
    c.loss.sft_normalize = placeholder(str)  # token (over the step's tokens) or pair
    c.loss.extra = ConfigDict()  # settings of your own function that are not above

    c.reference = ConfigDict()
    # another model as the reference; "": the policy before the preference stage
    c.reference.init = ""
    # live, cached, adapter (LoRA's base), none; auto: what the objective and lora.rank ask for
    c.reference.mode = "auto"
    # of the live tree: float32, bfloat16, int8, fp8, nf4; "": model.param_dtype
    c.reference.dtype = ""
    # or pinned_host: the live tree lies in the host's memory, and a layer at a time comes over
    c.reference.memory = "device"
    c.reference.rules = ConfigDict()  # its own sharding; empty: mesh.rules

    c.lora = ConfigDict()
    # 0: all parameters are trained; else adapters alone, and the base without them is the reference
    c.lora.rank = 0
    c.lora.alpha = 16.0  # an adapter counts alpha / rank
    c.lora.dropout = 0.0
    # patterns of the layers' linear maps, comma-separated: q, k, v, o, gate, up, down
    c.lora.targets = "*"
    # of the frozen base: float32, bfloat16, int8, fp8, nf4 (QLoRA); "": model.param_dtype
    c.lora.base_dtype = ""

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # rmsprop, adafactor, lion
    c.optim.learning_rate = 1e-6
    c.optim.schedule = "cosine"  # constant, linear
    c.optim.warmup_steps = 0
    # of the run's steps, in place of warmup_steps; 0: warmup_steps counts
    c.optim.warmup_ratio = 0.1
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0
    c.optim.b1 = placeholder(float)  # unset: as published
    c.optim.b2 = placeholder(float)
    c.optim.eps = placeholder(float)
    # a loss over this many times its running average is a spike: named and warned of
    c.optim.spike_factor = 100.0
    c.optim.skip_spikes = False  # True: and skipped, like a step that is not finite

    c.mesh = ConfigDict()
    c.mesh.data = -1  # -1: what is left
    c.mesh.fsdp = 1
    # devices that share each row's tokens, for long contexts; attention trades tokens for heads
    c.mesh.sequence = 1
    c.mesh.tensor = 1
    # TPU slices, or groups of hosts: the data axis alone crosses them. 0: as TPUs say
    c.mesh.num_slices = 0
    # logical axis -> mesh axis, or several, outermost first ("fsdp,sequence"); "" keeps it whole
    c.mesh.rules = ConfigDict(SHARDING_RULES)

    c.checkpoint = ConfigDict()
    c.checkpoint.keep = 2
    c.checkpoint.restore_step = -1  # -1: the newest
    # what a resumed run may change: data, tokenizer, model, dtype, loss, ... (comma-separated)
    c.checkpoint.allow_changed = ""

    c.sample = ConfigDict()
    c.sample.num_prompts = 16
    # of these, that every evaluation samples for the on-policy KL and reward; 0: none
    c.sample.kl_prompts = 0
    c.sample.max_new_tokens = 128
    c.sample.batch_size = 128
    c.sample.temperature = 1.0  # 0: greedy
    c.sample.top_k = 0  # 0: off
    c.sample.top_p = 1.0  # 1: off
    # module:function or file.py:function; "": the embedded world's own, no win rate elsewhere
    c.sample.reward = ""
    return c
