"""IMDb: controlled sentiment, K ranked completions to a prefix of a review.

    python -m dpojax.main --config=imdb --config.data.train=FILE --config.data.eval=FILE
    --config.model.init=DIR
    python -m dpojax.main --config=imdb:paper ...

Rows: {prompt, chosen, rejected, score_chosen, score_rejected}, or {prompt, responses, scores} with
4 completions, which make 6 pairs that share 4 response forwards. `:paper` holds the settings of
Rafailov et al. 2023: gpt2-large after SFT, pairs ranked by a sentiment classifier, beta swept over
0.05, 0.1, 1 and 5, evaluation every 100 steps. Hardware: accelerators; not measured.
"""

from ml_collections import ConfigDict

from dpojax.configs import tldr


def get_config(arg: str = "") -> ConfigDict:
    """The run's settings; `arg` is "" or "paper"."""
    config = tldr.get_config(arg)
    config.loss.beta = 0.1
    config.data.prompt_template = ""
    config.data.max_prompt_tokens = 128
    config.data.max_response_tokens = 128
    config.sft.num_steps = 0
    if arg == "paper":
        config.batch_size = 66  # a multiple of the 6 pairs of a prompt; the paper's 64 is none
        config.num_steps = 2272  # one epoch of 25,000 prompts x 6 pairs
        config.eval_every_steps = 100
    else:
        config.num_steps = 200
        config.optim.learning_rate = 1e-4
        config.sample.num_prompts = 64
    return config
