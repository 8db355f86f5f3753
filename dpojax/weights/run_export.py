"""A trained policy -> WORKDIR/export, a Hugging Face directory, and WORKDIR/adapter for PEFT."""

import shutil
from typing import Any

import jax

from dpojax.data.open import Data
from dpojax.data.tokenizer_files import copy_companions
from dpojax.data.tokenizers import Tokenizer
from dpojax.models import lora
from dpojax.models.config import ModelConfig
from dpojax.runtime.context import Job
from dpojax.weights import peft
from dpojax.weights.export import export_params, llama_fields, reward_model_fields
from dpojax.weights.huggingface import num_tensors
from dpojax.weights.open import NORMALISATION, Weights


def export_policy(
    job: Job, data: Data, model: ModelConfig, weights: Weights | None, params: Any
) -> None:
    """Writes the export; adapters are merged there, and written alone as well.

    Args:
      weights: that the run started from; None: random ones.
      params: all of the policy's, adapters beside their base.
    """
    c = job.config
    fields = None
    if weights is not None:
        fields = weights.fields
    if fields is None:
        fields = _llama_fields(model, data.tokenizer)
    if model.scalar_head:
        ids = (None, None) if data.tokenizer is None else _padding(data.tokenizer)
        fields = reward_model_fields(fields, pad_id=ids[0], eos_id=ids[1])
    elif c.lora.rank:
        _export_adapters(job, data, model, weights, params)
        scale = c.lora.alpha / c.lora.rank
        params = jax.jit(lambda tree: lora.merge(tree, model, scale))(params)
    progress = job.progress("export", num_tensors(model), "tensors")
    export_params(
        params,
        model,
        job.workdir / "export",
        fields=fields,
        dtype=c.model.param_dtype,
        companions=job.workdir / "tokenizer",
        write=job.main_process,
        progress=progress,
    )
    normalisation = job.workdir / NORMALISATION
    if model.scalar_head and job.main_process and normalisation.is_file():
        shutil.copyfile(normalisation, job.workdir / "export" / NORMALISATION)
    progress.close(str(job.workdir / "export"))


def _padding(tokenizer: Tokenizer) -> tuple[int, int]:
    return tokenizer.pad_id, tokenizer.eos_id


def _llama_fields(model: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A config.json for a model of random weights, with its tokenizer's ids."""
    if tokenizer is None:
        return llama_fields(model, bos_id=None, eos_id=None)
    return llama_fields(model, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)


def _no_base(job: Job, data: Data, weights: Weights | None) -> str:
    """Why PEFT could not open the adapters' base; "" where it can."""
    if data.sft is not None:
        return "they stand on the result of the SFT stage"
    if weights is None:
        return "they stand on random weights"
    if weights.base is None:
        return (
            f"they stand on {job.config.model.init}, which is no Hugging Face directory and no"
            " plain adapter of one"
        )
    return ""


def _export_adapters(
    job: Job, data: Data, model: ModelConfig, weights: Weights | None, params: Any
) -> None:
    """The adapters in WORKDIR/adapter, where PEFT can open their base; else no such folder, and a
    line that says why.

    Over an adapter they are written together with it, on its base: the ranks add up.
    """
    c = job.config
    folder = job.workdir / "adapter"
    reason = _no_base(job, data, weights)
    if job.main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier export, perhaps on another base
    if reason:
        job.say(
            f"the adapters are not exported alone: {reason}; {job.workdir / 'export'} holds the"
            " merged weights"
        )
        return
    assert weights is not None and weights.base is not None
    adapters = {
        "layers": {
            k: v for k, v in params["layers"].items() if k.endswith((lora.LORA_A, lora.LORA_B))
        }
    }
    adapters = jax.jit(lambda tree: tree, out_shardings=job.replicated)(adapters)
    scale = c.lora.alpha / c.lora.rank
    if weights.adapters is not None:
        under, under_scale = weights.adapters()
        adapters, scale = lora.stack(under, under_scale, adapters, scale)
    if job.main_process:
        peft.export_adapters(adapters, model, folder, scale=scale, base=str(weights.base))
        # the base's may write its text otherwise
        copy_companions(job.workdir / "tokenizer", folder)
