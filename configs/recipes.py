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

Llama 3 also masks the formatting tokens of both responses: name them in data.mask_tokens. Hardware:
accelerators; the time and the results depend on them and on the model, and were not measured.
"""

from ml_collections import ConfigDict

from dpojax.configs import tldr
from dpojax.errors import did_you_mean

NAMES = ("zephyr", "llama3", "tulu3", "simpo", "orpo")


def get_config(arg: str = "") -> ConfigDict:
    """The settings of the recipe `arg`."""
    if arg not in NAMES:
        raise ValueError(
            f"unknown recipe {arg!r}; it is one of {', '.join(NAMES)}{did_you_mean(arg, NAMES)}"
        )
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
