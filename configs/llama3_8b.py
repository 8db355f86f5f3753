"""Llama 3 8B: full fine-tuning on UltraFeedback-like pairs, on a TPU slice.

    python -m dpojax.plan --config=llama3_8b --topology=v5e:16x16
    python -m dpojax.main --config=llama3_8b --config.model.init=DIR
    --config.data.train=FILE --config.data.eval=FILE

Sizes and rates as in recipes:zephyr, but for the batch: a slice wants more pairs than 32 (the plan
says how many). Hardware: v5e:16x16, v6e:8x8 or v5p:2x2x2 (add `:v6e` or `:v5p` for their batches).
The plan predicts memory and time; no run of this size was measured.
"""

import pathlib

from ml_collections import ConfigDict

from dpojax.configs import recipes
from dpojax.errors import did_you_mean

SHAPES = pathlib.Path(__file__).parent / "shapes"  # config.json files of published models
BATCH = {"": 1024, "v6e": 448, "v5p": 128}


def get_config(arg: str = "") -> ConfigDict:
    """The settings; `arg` is "", "v6e" or "v5p"."""
    if arg not in BATCH:
        raise ValueError(
            f"unknown argument {arg!r}; it is v6e, v5p or nothing"
            f" (v5e){did_you_mean(arg, ('v6e', 'v5p'))}"
        )
    c = recipes.get_config("zephyr")
    c.batch_size = BATCH[arg]
    c.model.shape = str(SHAPES / "llama3_8b.json")
    c.model.remat = "full"
    c.data.micro_batch_tokens = 4096
    c.model.logps_chunk_tokens = 512
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c
