"""Mixtral 8x7B: a mixture of experts, its experts spread over the tensor axis.

    python -m dpojax.plan --config=mixtral_8x7b --topology=v5p:4x4x4
    python -m dpojax.main --config=mixtral_8x7b --config.model.init=DIR
    --config.data.train=FILE --config.data.eval=FILE

Hardware: 64 v5p chips. The plan predicts memory and time; no run of this size was measured.
"""

from ml_collections import ConfigDict

from dpojax.configs import llama3_8b


def get_config(arg: str = "") -> ConfigDict:
    """The settings; there are no arguments."""
    if arg:
        raise ValueError(f"unknown argument {arg!r}; there is none")
    c = llama3_8b.get_config()
    c.batch_size = 256
    c.model.shape = str(llama3_8b.SHAPES / "mixtral_8x7b.json")
    c.model.router_loss_weight = 0.02  # router_aux_loss_coef of its config.json
    c.reference.dtype = "bfloat16"
    c.mesh.tensor = 4
    return c
