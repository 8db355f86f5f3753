"""32k tokens of context on Llama 3.1 8B: every row's tokens are shared by four chips.

    python -m dpojax.plan --config=long_context --topology=v5p:4x4x4
    python -m dpojax.main --config=long_context --config.model.init=DIR
    --config.data.train=FILE --config.data.eval=FILE

A prompt of up to 28k tokens and two responses of up to 2k make a row of 32,768. Outside attention a
chip holds a quarter of a row's tokens; for attention the four trade tokens for heads (DeepSpeed
Ulysses, arXiv:2309.14509), so that every kernel works on whole sequences. Hardware: 64 v5p chips.
The plan predicts memory and time; no run of this size was measured.
"""

from ml_collections import ConfigDict

from dpojax.configs import llama3_8b


def get_config(arg: str = "") -> ConfigDict:
    """The settings; there are no arguments."""
    if arg:
        raise ValueError(f"unknown argument {arg!r}; there is none")
    c = llama3_8b.get_config()
    c.batch_size = 32
    c.data.max_prompt_tokens = 28_672
    c.data.max_response_tokens = 2048
    c.data.row_tokens = 32_768
    c.data.micro_batch_tokens = 32_768
    c.model.shape = str(llama3_8b.SHAPES / "llama31_8b.json")
    c.mesh.sequence = 4
    c.mesh.rules.embed = "fsdp,sequence"
    return c
