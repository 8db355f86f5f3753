"""Llama 3 70B: full fine-tuning with a live reference, spread over a pod.

    python -m dpojax.plan --config=llama3_70b --topology=v5p:4x4x4
    python -m dpojax.plan --config=llama3_70b:v6e --topology=v6e:16x16
    python -m dpojax.main --config=llama3_70b --config.model.init=DIR
    --config.data.train=FILE --config.data.eval=FILE

Hardware: 64 v5p chips, or 256 v6e chips. The plan predicts memory and time; no run of this size was
measured.
"""

from ml_collections import ConfigDict

from dpojax.configs import llama3_8b
from dpojax.errors import did_you_mean

BATCH = {"": 256, "v6e": 896}


def get_config(arg: str = "") -> ConfigDict:
    """The settings; `arg` is "" (v5p) or "v6e"."""
    if arg not in BATCH:
        raise ValueError(
            f"unknown argument {arg!r}; it is v6e or nothing (v5p){did_you_mean(arg, ('v6e',))}"
        )
    c = llama3_8b.get_config()
    c.batch_size = BATCH[arg]
    c.model.shape = str(llama3_8b.SHAPES / "llama3_70b.json")
    c.optim.learning_rate = 2e-7  # Tulu 3's for 70B (arXiv:2411.15124)
    c.reference.dtype = "bfloat16"
    if arg == "v6e":  # a third of a v5p's memory
        c.data.micro_batch_tokens = 3072
        c.model.logps_chunk_tokens = 256
    return c
