"""Where weights come from: a Hugging Face directory, PEFT adapters over one, a dpojax run, or a
llama2.c file.

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

from dpojax.config.model import QUANTISED
from dpojax.data.tokenizer_files import COMPANIONS
from dpojax.errors import CheckpointError, ConfigError, NumericsError
from dpojax.models import lora
from dpojax.models.config import ModelConfig
from dpojax.models.families.table import model_config, read_fields
from dpojax.models.params import param_shapes
from dpojax.models.quantise import store_as
from dpojax.training.checkpoint import Checkpoints
from dpojax.training.step_folders import newest_step
from dpojax.untrusted.plain_data import existing_path, read_json
from dpojax.weights import export, huggingface, llama2c, peft

Progress = Callable[[int], None]

# Of a workdir: where the checkpoints of a reward model lie, beside those of the policy.
REWARD_MODEL_FOLDER = "reward_model"

# Beside a reward model: mean and standard deviation of its rewards.
NORMALISATION = "reward_normalisation.json"

MAX_ADAPTERS = 16  # in a chain of adapters over adapters


class Weights(NamedTuple):
    """A model on disk, before any of its weights is read."""

    config: ModelConfig
    fields: dict[str, Any] | None  # of config.json, where it came from one
    companions: pathlib.Path | None  # the folder whose tokenizer files belong to it
    # (shardings, dtype, progress) -> the parameters, adapters merged; shardings shaped like the
    # parameters
    load: Callable[[Any, Any, Progress], Any]
    # The Hugging Face directory that these weights are, or of which they are `adapters` away; None:
    # no folder holds such a base.
    base: pathlib.Path | None = None
    # () -> (tree of A and B, their scale): what is merged into `base`
    adapters: Callable[[], tuple[Any, float]] | None = None


def ignored_fields(names: str) -> frozenset[str]:
    """Comma-separated names of fields, as model.ignore_fields and --ignore_fields give them."""
    return frozenset(n.strip() for n in names.split(",") if n.strip())


def read_shape(path: str, *, ignore: Collection[str] = ()) -> ModelConfig:
    """The model that a config.json, or the one in a folder, describes.

    Raises: ConfigError if there is none.
    """
    file = existing_path(path)
    if file is not None and file.is_dir():
        file = file / "config.json"
    if file is None or not file.is_file():
        raise ConfigError(f"model.shape={path!r:.300}: there is no config.json")
    return model_config(read_json(file), file, ignore)


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # ORGANISATION/NAME


def _not_there(path: str, setting: str) -> ConfigError:
    """The error for a model that does not exist; a name on the Hugging Face Hub must be fetched."""
    where = f"{setting}={path!r}: there is no such file or folder"
    if not _HUB_ID.fullmatch(path):
        return ConfigError(where)
    name = path.rpartition("/")[2]
    return ConfigError(
        f"{where}, and dpojax fetches nothing; if it is a name on the Hugging Face Hub: hf download"
        f" {path} --local-dir {name}, then {setting}={name} (pip install huggingface_hub has the"
        " command hf)"
    )


def open_weights(
    path: str,
    *,
    ignore: Collection[str] = (),
    setting: str = "model.init",
    scalar_head: bool | None = False,
) -> Weights:
    """The weights at `path`.

    Args:
      path: a directory (Hugging Face, PEFT adapter, dpojax workdir or checkpoint), or a llama2.c
        `.bin` file.
      ignore: fields of config.json that are known not to matter.
      setting: what names the path, for messages.
      scalar_head: whether a reward model is wanted, and no language model; None: either.
    Raises: ConfigError if there are none, or they cannot be read, or are of the other kind. Its
      `load` raises NumericsError for weights that are not finite.
    """
    weights = _open(_of_kind(path, scalar_head), ignore, setting, ())
    if scalar_head is not None and weights.config.scalar_head != scalar_head:
        there, wanted = "a language model", "a reward model"
        if weights.config.scalar_head:
            there, wanted = wanted, there
        raise ConfigError(f"{setting}={path!r:.300}: it is {there}; {wanted} is wanted here")

    def load(shardings, dtype, progress):
        params = weights.load(shardings, dtype, progress)
        name = huggingface.non_finite_tensor(params, weights.config)
        if name is not None:
            raise NumericsError(
                f"{path}: the tensor {name} holds NaN or Inf in {jnp.dtype(dtype).name}: the"
                " weights are damaged, or larger than that type holds"
            )
        return params

    return weights._replace(load=load)


def _of_kind(path: str, scalar_head: bool | None) -> str:
    """The reward model's folder of a workdir that has one, where a reward model is wanted."""
    place = existing_path(path)
    if scalar_head and place is not None and (place / REWARD_MODEL_FOLDER).is_dir():
        return str(place / REWARD_MODEL_FOLDER)
    return path


def _open(
    path: str, ignore: Collection[str], setting: str, above: tuple[pathlib.Path, ...]
) -> Weights:
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
        raise ConfigError(
            f"model.init={str(chain[0])!r}: its adapters stand on one another, without a model:"
            f" {names}"
        )
    if (place / peft.CONFIG).is_file():
        return _from_peft(place, ignore, chain)
    if (place / "config.json").is_file():
        return _from_directory(place, ignore)
    step = newest_step(place, besides=REWARD_MODEL_FOLDER)
    if step is not None:
        return _from_checkpoint(step, ignore, chain)
    raise ConfigError(
        f"{setting}={path!r:.300}: neither a Hugging Face directory nor a dpojax checkpoint"
    )


def _from_directory(folder: pathlib.Path, ignore: Collection[str]) -> Weights:
    fields = read_fields(folder)
    config = huggingface.read_config(folder, ignore)
    if (
        not config.tie_embeddings
        and model_config(fields, folder / "config.json", ignore).tie_embeddings
    ):
        note = (
            f"{folder}: config.json ties the head to the embedding, the weights hold another"
            " lm_head.weight, which is used"
        )
        print(note, file=sys.stderr, flush=True)  # the standard output may be a file of rows
        fields = {**fields, "tie_word_embeddings": False}

    def load(shardings, dtype, progress):
        return huggingface.load_params(folder, config, shardings, dtype, progress)

    return Weights(config, fields, folder, load, base=folder.resolve())


def _stacked(
    inner: Weights, adapters: Callable[[], tuple[Any, float]]
) -> Callable[[], tuple[Any, float]]:
    """The adapters together with those under them, as adapters of the first base: their ranks add
    up.
    """

    def stacked() -> tuple[Any, float]:
        tree, scale = adapters()
        if inner.adapters is None:
            return tree, scale
        under, under_scale = inner.adapters()
        return lora.stack(under, under_scale, tree, scale)

    return stacked


def _from_llama2c(path: pathlib.Path) -> Weights:
    config, tensors = llama2c.open_checkpoint(path)

    def load(shardings, dtype, progress):
        return huggingface.load_params(tensors, config, shardings, dtype, progress)

    return Weights(config, export.llama_fields(config, bos_id=1, eos_id=2), None, load)


def _from_peft(
    folder: pathlib.Path, ignore: Collection[str], above: tuple[pathlib.Path, ...]
) -> Weights:
    settings = peft.read_settings(folder)
    base = _open(str(peft.base_folder(folder, settings)), ignore, "base_model_name_or_path", above)

    def load(shardings, dtype, progress):
        params = base.load(shardings, dtype, progress)
        adapters, scale = peft.load_adapters(folder, settings, base.config)
        merged = jax.jit(
            lambda p, a: lora.merge(lora.join(p, a), base.config, scale), out_shardings=shardings
        )
        return merged(params, adapters)

    companions = base.companions
    if any((folder / name).is_file() for name in COMPANIONS):
        companions = folder
    adapters = _stacked(base, lambda: peft.load_adapters(folder, settings, base.config))
    return base._replace(load=load, companions=companions, adapters=adapters)


def _from_checkpoint(
    step: pathlib.Path, ignore: Collection[str], above: tuple[pathlib.Path, ...]
) -> Weights:
    if not step.name.isdigit():
        raise ConfigError(f"{step}: the folder of a checkpoint is named by its step, a number")
    checkpoints = Checkpoints(step.parent, keep=None)
    number = int(step.name)
    meta = checkpoints.meta(number)
    try:
        config = ModelConfig.from_dict(meta["model"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{step}: its meta describes no model: {error!r:.200}") from error
    workdir = step.parent.parent
    companions = None
    if (workdir / "tokenizer").is_dir():
        companions = workdir / "tokenizer"
    adapter = meta.get("adapter")
    if adapter is None:

        def load(shardings, dtype, progress):
            del progress
            abstract = jax.tree.map(
                lambda s, x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s),
                shardings,
                param_shapes(config),
            )
            return checkpoints.restore_params(number, abstract, shardings, meta)

        return Weights(config, meta.get("fields"), companions, load)
    base = _base_of(workdir, meta, ignore, above)

    def restore_adapters(mesh: jax.sharding.Mesh):
        rows = lora.adapter_rows(config, adapter["targets"], adapter["rank"])
        shapes = jax.eval_shape(
            lambda: lora.init_adapters(jax.random.key(0), rows, config.num_layers, jnp.float32)
        )
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        shardings = jax.tree.map(lambda x: replicated, shapes)
        return checkpoints.restore_params(number, shapes, shardings, meta)

    def load_merged(shardings, dtype, progress):
        params = base.load(shardings, dtype, progress)
        adapters = restore_adapters(jax.tree.leaves(shardings)[0].mesh)
        # Training rounded the base, and the adapters were fitted to what was left.
        base_dtype = adapter.get("base_dtype") or jnp.dtype(dtype).name

        def merged(p, a):
            joined = lora.join(store_as(p, config, base_dtype), a)
            params = lora.merge(joined, config, adapter["scale"])
            return jax.tree.map(lambda x: x.astype(dtype), params)

        return jax.jit(merged, out_shardings=shardings)(params, adapters)

    # The adapters stand on rounded weights, which no folder holds: PEFT could open no base.
    if adapter.get("base_dtype") in QUANTISED:
        return Weights(config, meta.get("fields"), companions, load_merged)
    devices = np.asarray(jax.devices())
    stacked = _stacked(
        base, lambda: (restore_adapters(jax.sharding.Mesh(devices, ("data",))), adapter["scale"])
    )
    return Weights(config, meta.get("fields"), companions, load_merged, base.base, stacked)


def _base_of(
    workdir: pathlib.Path,
    meta: dict[str, Any],
    ignore: Collection[str],
    above: tuple[pathlib.Path, ...],
) -> Weights:
    """What lies under a run's adapters: its SFT stage's result, or its model.init."""
    step = newest_step(workdir / "sft")
    if step is not None:
        return _from_checkpoint(step, ignore, above)
    init = meta["config"]["model"]["init"]
    if not init:
        raise ConfigError(
            f"{workdir}: its adapters stand on random weights that no folder holds; there is"
            " nothing to load"
        )
    return _open(init, ignore, "model.init", above)
