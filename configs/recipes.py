"""Published recipes: the hyper-parameters of well-known preference-tuned models, with their
sources.

    python -m dpojax.main --config=recipes:NAME --config.model.init=DIR
    --config.data.train=FILE --config.data.eval=FILE

| NAME   | model of the paper     | objective                        | source           |
|--------|------------------------|----------------------------------|------------------|
| zephyr | Mistral-7B after SFT   | sigmoid, beta 0.1                | arXiv:2310.16944 |
| llama3 | Llama 3                | sigmoid, beta 0.1, + 0.2 sft     | arXiv:2407.21783 |
| tulu3  | Llama-3.1-8B after SFT | sigmoid_norm, beta 5             | arXiv:2411.15124 |
| simpo  | Llama-3-8B-Instruct    | simpo, beta 2.5, gamma 0.55 beta | arXiv:2405.14734 |
| orpo   | Mistral-7B             | orpo, lambda 0.1                 | arXiv:2403.07691 |

Llama 3 also masks the formatting tokens of both responses: name them in data.mask_tokens.

Those that train on their own samples take --config.data.train=FILE of prompts, and what a response
is worth in --config.reward.terms (a reward model's folder, or answers that are compared):

| NAME         | model of the paper        | algorithm                       | source           |
|--------------|---------------------------|---------------------------------|------------------|
| instructgpt  | GPT-3 6B after SFT        | PPO, beta 0.02                  | arXiv:2203.02155 |
| deepseekmath | DeepSeekMath-Instruct 7B  | GRPO, k3 in the loss, beta 0.04 | arXiv:2402.03300 |
| dapo         | Qwen2.5-32B               | DAPO, no KL                     | arXiv:2503.14476 |
| tulu31       | Llama-3.1-Tulu-3-8B-DPO   | GRPO, k3 in the loss, beta 0.01 | arXiv:2411.15124 |
| olmo3        | Olmo-3-7B-Think-DPO       | GRPO, centred, no KL            | arXiv:2512.13961 |
| oaif         | PaLM 2-XS after SFT       | online DPO of two samples       | arXiv:2402.04792 |

What differs from the papers is said beside each setting. Hardware: accelerators; the time and the
results depend on them and on the model, and were not measured.
"""

from ml_collections import ConfigDict

from dpojax.configs import tldr
from dpojax.errors import did_you_mean

OFFLINE = ("zephyr", "llama3", "tulu3", "simpo", "orpo")
ONLINE = ("instructgpt", "deepseekmath", "dapo", "tulu31", "olmo3", "oaif")
NAMES = OFFLINE + ONLINE


def get_config(arg: str = "") -> ConfigDict:
    """The settings of the recipe `arg`."""
    if arg in ONLINE:
        return online(arg)
    if arg not in NAMES:
        raise ValueError(
            f"unknown recipe {arg!r}; it is one of {', '.join(NAMES)}{did_you_mean(arg, NAMES)}"
        )
    return offline(arg)


def offline(arg: str) -> ConfigDict:
    """Preferences that are given."""
    c = tldr.get_config("paper")
    c.data.max_prompt_tokens = 1024
    c.data.max_response_tokens = 1024
    c.data.prompt_template = ""  # all of them were trained through a chat template
    c.data.text_as_chat = True
    c.optim.name = "adamw"
    c.optim.clip_norm = 1.0
    c.optim.schedule = "linear"
    c.batch_size = 128
    c.num_steps = 2000
    c.optim.warmup_steps = 200
    if arg == "zephyr":
        c.batch_size = 32
        c.loss.beta = 0.1  # its authors advise 0.01 since
        c.optim.learning_rate = 5e-7
    elif arg == "llama3":
        c.loss.beta = 0.1
        c.loss.sft_weight = 0.2
        c.optim.learning_rate = 1e-5
    elif arg == "tulu3":
        c.loss.name = "sigmoid_norm"
        c.loss.beta = 5.0
        c.optim.learning_rate = 5e-7  # 2e-7 at 70B
    elif arg == "simpo":
        c.loss.name = "simpo"
        c.loss.beta = 2.5
        c.loss.gamma = 0.55 * 2.5
        c.optim.learning_rate = 1e-6
        c.optim.schedule = "cosine"
    else:
        c.loss.name = "orpo"
        c.loss.beta = None
        c.loss.orpo_lambda = 0.1
        c.optim.learning_rate = 5e-6
    return c


def online(arg: str) -> ConfigDict:
    """Training on the policy's own samples, drawn at temperature 1."""
    c = tldr.get_config("paper")
    c.stages = "policy_gradient"
    c.data.prompt_template = ""  # all of them were trained through a chat template
    c.data.text_as_chat = True
    c.optim.name = "adamw"
    c.optim.clip_norm = 1.0
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 0
    c.reward.terms = "numeric"  # 1 for the number of the row's column "answer", else 0
    c.eval_every_steps = 50
    c.checkpoint_every_steps = 50
    if arg == "instructgpt":
        instructgpt(c)
    elif arg == "deepseekmath":
        c.policy_gradient.preset = "grpo"
        c.policy_gradient.beta = 0.04
        c.policy_gradient.num_samples = 64
        c.batch_size = 16  # prompts: 1,024 responses a step
        c.optim.learning_rate = 1e-6
        c.data.max_prompt_tokens = 1024
        c.sample.max_new_tokens = 1024
        c.reward.terms = ""  # model:DIR, a reward model of mathematics
    elif arg == "dapo":
        dapo(c)
    elif arg == "tulu31":
        c.policy_gradient.preset = "grpo"
        c.policy_gradient.beta = 0.01
        c.policy_gradient.num_samples = 16
        c.batch_size = 48  # prompts: 12 learners take 4 each
        c.optim.learning_rate = 5e-7
        c.data.max_prompt_tokens = 2048
        c.sample.max_new_tokens = 2048
    elif arg == "olmo3":
        # Its 8 steps of asynchrony and the correction for them fall away: samples are those of the
        # policy that is trained.
        c.policy_gradient.preset = "dapo"
        c.policy_gradient.scale = "none"
        c.policy_gradient.beta = 0.0
        c.policy_gradient.clip_low = 0.2
        c.policy_gradient.clip_high = 0.272
        c.policy_gradient.num_samples = 8
        c.policy_gradient.redraws = 2  # it draws until the batch is full
        c.batch_size = 64
        c.optim.learning_rate = 1e-6  # 2e-6 at 32B
        c.data.max_prompt_tokens = 2048
        c.sample.max_new_tokens = 32768
    else:
        c.stages = "online_dpo"
        c.loss.beta = 0.1
        c.online_dpo.num_samples = 2
        c.online_dpo.labels = "argmax"
        c.online_dpo.temperature = 0.9
        c.batch_size = 128
        c.optim.name = "adafactor"
        c.optim.learning_rate = 5e-7
        c.optim.warmup_steps = 150
        c.reward.terms = ""  # judge:URL, a model that compares two responses
    return c


def instructgpt(c: ConfigDict) -> None:
    """PPO on a learned reward (its appendix C.4), without the gradients of pretraining text."""
    c.policy_gradient.preset = "ppo"
    c.policy_gradient.beta = 0.02
    c.policy_gradient.num_samples = 1
    # Its 8 minibatches of 64 from 512 samples are 8 steps of 64 here, each on samples of its own.
    c.policy_gradient.epochs = 1
    c.policy_gradient.value_learning_rate = 9e-6
    c.batch_size = 64
    c.num_steps = 4000  # 256,000 episodes
    c.optim.warmup_steps = 80
    c.optim.b2 = 0.95
    c.optim.learning_rate = 5e-6  # its appendix C.4 names none for the policy
    c.data.max_prompt_tokens = 1024
    c.sample.max_new_tokens = 1024
    # model:DIR, a run's reward model; name it in policy_gradient.value_model as well
    c.reward.terms = ""


def dapo(c: ConfigDict) -> None:
    """DAPO (its section 4.1)."""
    c.policy_gradient.preset = "dapo"
    c.policy_gradient.num_samples = 16
    c.policy_gradient.redraws = 10  # it draws until the batch is full, ten times at most
    c.policy_gradient.overlong_tokens = 4096
    # Its 16 minibatches of 32 prompts from 512 are 16 steps of 32 here, each on samples of its own.
    c.batch_size = 32
    c.optim.learning_rate = 1e-6
    c.optim.weight_decay = 0.1
    c.optim.warmup_steps = 320  # of 20 rounds of sampling
    c.data.max_prompt_tokens = 2048
    c.sample.max_new_tokens = 20480
