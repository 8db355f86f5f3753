"""Where weights come from: a Hugging Face directory, PEFT adapters over one, a dpojax run, or a llama2.c file.

Everything that takes a model (--config.model.init, convert, generate, score) opens it here.
"""

import pathlib
import re
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpojax.checkpoint import Checkpoints, newest_step
from dpojax.config import QUANTISED
from dpojax.data.tokens import COMPANIONS
from dpojax.errors import CheckpointError, ConfigError, NumericsError
from dpojax.models import ModelConfig, hf, llama2c, lora, peft
from dpojax.models.families import model_config, read_fields
from dpojax.models.quantise import store_as
from dpojax.models.table import param_shapes
from dpojax.plain_data import existing_path, read_json

Progress = Callable[[int], None]
MAX_ADAPTERS = 16  # that may stand on one another


class Weights(NamedTuple):
    """A model on disk, before any of its weights is read."""

    config: ModelConfig
    fields: dict[str, Any] | None  # of config.json, where it came from one
    companions: pathlib.Path | None  # the folder whose tokenizer files belong to it
    # (shardings, dtype, progress) -> the parameters, adapters merged; shardings shaped like the parameters
    load: Callable[[Any, Any, Progress], Any]
    # The Hugging Face directory that these weights are, or of which they are `adapters` away; None: no folder holds such a base.
    base: pathlib.Path | None = None
    adapters: Callable[[], tuple[Any, float]] | None = None  # () -> (tree of A and B, their scale): what is merged into `base`


def ignored_fields(names: str) -> frozenset[str]:
    """Comma-separated names of fields, as model.ignore_fields and --ignore_fields give them."""
    return frozenset(n.strip() for n in names.split(",") if n.strip())


def read_shape(path: str, *, ignore: Collection[str] = ()) -> ModelConfig:
    """The model that a config.json, or the one in a folder, describes. Raises: ConfigError if there is none."""
    place = existing_path(path)
    file = place / "config.json" if place is not None and place.is_dir() else place
    if file is None or not file.is_file():
        raise ConfigError(f"model.shape={path!r:.300}: there is no config.json")
    return model_config(read_json(file), file, ignore)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # ORGANISATION/NAME


def _not_there(path: str, setting: str) -> ConfigError:
    """What to say of a model that does not exist: a name on the Hugging Face Hub is fetched first."""
    where = f"{setting}={path!r}: there is no such file or folder"
    if not _HUB_ID.fullmatch(path):
        return ConfigError(where)
    name = path.rpartition("/")[2]
    return ConfigError(
        f"{where}, and dpojax fetches nothing; if it is a name on the Hugging Face Hub: hf download {path} --local-dir {name}, "
        f"then {setting}={name} (pip install huggingface_hub has the command hf)"
    )


def open_weights(path: str, *, ignore: Collection[str] = (), setting: str = "model.init") -> Weights:
    """The weights at `path`.

    Args:
      path: a directory (Hugging Face, PEFT adapter, dpojax workdir or checkpoint), or a llama2.c `.bin` file.
      ignore: fields of config.json that are known not to matter.
      setting: what names the path, for messages.
    Raises: ConfigError if there are none, or they cannot be read. Its `load` raises NumericsError for weights that are not finite.
    """
    weights = _open(path, ignore, setting, ())

    def load(shardings, dtype, progress):
        params = weights.load(shardings, dtype, progress)
        if (name := hf.non_finite_tensor(params, weights.config)) is not None:
            raise NumericsError(
                f"{path}: the tensor {name} holds NaN or Inf in {jnp.dtype(dtype).name}: the weights are damaged, or larger than "
                "that type holds"
            )
        return params

    return weights._replace(load=load)


def _open(path: str, ignore: Collection[str], setting: str, above: tuple[pathlib.Path, ...]) -> Weights:
    """As `open_weights`; `above`: the adapters that stand on these weights, the outermost first."""
    place = existing_path(path)
    if place is None:
        raise _not_there(path, setting)
    if place.is_file():
        return _from_llama2c(place)
    if not place.is_dir():
        raise ConfigError(f"{setting}={path!r:.300}: it is a pipe or a device, and not a folder")
    chain = (*above, place.resolve())
    if chain[-1] in above or len(chain) > MAX_ADAPTERS:
        names = " -> ".join(str(p) for p in chain[-4:])
        raise ConfigError(f"model.init={str(chain[0])!r}: its adapters stand on one another, without a model: {names}")
    if (place / peft.CONFIG).is_file():
        return _from_peft(place, ignore, chain)
    if (place / "config.json").is_file():
        return _from_directory(place, ignore)
    if (step := newest_step(place)) is not None:
        return _from_checkpoint(step, ignore, chain)
    raise ConfigError(f"{setting}={path!r:.300}: neither a Hugging Face directory nor a dpojax checkpoint")


def _from_directory(folder: pathlib.Path, ignore: Collection[str]) -> Weights:
    fields = read_fields(folder)
    config = hf.read_config(folder, ignore)
    if not config.tie_embeddings and model_config(fields, folder / "config.json", ignore).tie_embeddings:
        note = f"{folder}: config.json ties the head to the embedding, the weights hold another lm_head.weight, which is used"
        print(note, file=sys.stderr, flush=True)  # the standard output may be a file of rows
        fields = {**fields, "tie_word_embeddings": False}
    load = lambda shardings, dtype, progress: hf.load_params(folder, config, shardings, dtype, progress)
    return Weights(config, fields, folder, load, base=folder.resolve())


def _stacked(inner: Weights, adapters: Callable[[], tuple[Any, float]]) -> Callable[[], tuple[Any, float]]:
    """The adapters together with those under them, as adapters of the first base: their ranks add up."""

    def stacked() -> tuple[Any, float]:
        tree, scale = adapters()
        if inner.adapters is None:
            return tree, scale
        return lora.stack(*inner.adapters(), tree, scale)

    return stacked


def _from_llama2c(path: pathlib.Path) -> Weights:
    config, tensors = llama2c.open_checkpoint(path)
    load = lambda shardings, dtype, progress: hf.load_params(tensors, config, shardings, dtype, progress)
    return Weights(config, hf.llama_fields(config, bos_id=1, eos_id=2), None, load)


def _from_peft(folder: pathlib.Path, ignore: Collection[str], above: tuple[pathlib.Path, ...]) -> Weights:
    settings = peft.read_settings(folder)
    base = _open(str(peft.base_folder(folder, settings)), ignore, "base_model_name_or_path", above)

    def load(shardings, dtype, progress):
        params = base.load(shardings, dtype, progress)
        adapters, scale = peft.load_adapters(folder, settings, base.config)
        merged = jax.jit(lambda p, a: lora.merge(lora.join(p, a), base.config, scale), out_shardings=shardings)
        return merged(params, adapters)

    own = folder if any((folder / n).is_file() for n in COMPANIONS) else base.companions
    adapters = _stacked(base, lambda: peft.load_adapters(folder, settings, base.config))
    return base._replace(load=load, companions=own, adapters=adapters)


def _from_checkpoint(step: pathlib.Path, ignore: Collection[str], above: tuple[pathlib.Path, ...]) -> Weights:
    if not step.name.isdigit():
        raise ConfigError(f"{step}: the folder of a checkpoint is named by its step, a number")
    found, number = Checkpoints(step.parent, keep=10**6), int(step.name)
    meta = found.meta(number)
    try:
        config = ModelConfig.from_dict(meta["model"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{step}: its meta describes no model: {error!r:.200}") from error
    workdir = step.parent.parent
    companions = workdir / "tokenizer" if (workdir / "tokenizer").is_dir() else None
    adapter = meta.get("adapter")
    if adapter is None:

        def load(shardings, dtype, progress):
            del progress
            abstract = jax.tree.map(
                lambda s, x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shardings, param_shapes(config)
            )
            return found.restore_params(number, abstract, shardings, meta)

        return Weights(config, meta.get("fields"), companions, load)
    base = _base_of(workdir, meta, ignore, above)

    def restore_adapters(mesh: jax.sharding.Mesh):
        rows = lora.adapter_rows(config, adapter["targets"], adapter["rank"])
        shapes = jax.eval_shape(lambda: lora.init_adapters(jax.random.key(0), rows, config.num_layers, jnp.float32))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return found.restore_params(number, shapes, jax.tree.map(lambda x: whole, shapes), meta)

    def load_merged(shardings, dtype, progress):
        params = base.load(shardings, dtype, progress)
        adapters = restore_adapters(jax.tree.leaves(shardings)[0].mesh)
        base_dtype = adapter.get("base_dtype") or jnp.dtype(dtype).name  # the base as it was rounded in training

        def merged(p, a):
            whole = lora.merge(lora.join(store_as(p, config, base_dtype), a), config, adapter["scale"])
            return jax.tree.map(lambda x: x.astype(dtype), whole)

        return jax.jit(merged, out_shardings=shardings)(params, adapters)

    if adapter.get("base_dtype") in QUANTISED:  # what was trained stands on rounded weights, which no folder holds
        return Weights(config, meta.get("fields"), companions, load_merged)
    devices = np.asarray(jax.devices())
    stacked = _stacked(base, lambda: (restore_adapters(jax.sharding.Mesh(devices, ("data",))), adapter["scale"]))
    return Weights(config, meta.get("fields"), companions, load_merged, base.base, stacked)


def _base_of(workdir: pathlib.Path, meta: dict[str, Any], ignore: Collection[str], above: tuple[pathlib.Path, ...]) -> Weights:
    """What lies under a run's adapters: its SFT stage's result, or its model.init."""
    if (step := newest_step(workdir / "sft")) is not None:
        return _from_checkpoint(step, ignore, above)
    init = meta["config"]["model"]["init"]
    if not init:
        raise ConfigError(f"{workdir}: its adapters stand on random weights that no folder holds; there is nothing to load")
    return _open(init, ignore, "model.init", above)
