"""TPU slices that are not here, as the TPU compiler describes them."""

import re
from typing import Any, NamedTuple

from dpojax.errors import ConfigError
from dpojax.runtime.devices import TPUS, Chip


class Topology(NamedTuple):
    """A slice, or several of them, that is not here."""

    name: str  # as --topology names it: v5e:16x16
    chip: Chip
    devices: list[Any]  # descriptions, which a mesh takes as it takes real devices
    num_slices: int


def open_topology(name: str, num_slices: int = 1) -> Topology:
    """The devices of `v5e:16x16` and the like.

    Raises: ConfigError without libtpu, or for a name that it does not know.
    """
    from jax.experimental import topologies

    generation = name.partition(":")[0]
    if generation not in TPUS or not re.fullmatch(r"\w+:\d+x\d+(x\d+)?", name):
        raise ConfigError(
            f"--topology={name!r}: it is one of {', '.join(TPUS)} with a shape, e.g. v5e:16x16 or"
            " v5p:4x4x4"
        )
    chip = TPUS[generation]
    options: dict[str, Any] = {}
    if chip.megacore:
        options["chip_config_name"] = "megacore"
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:  # jax raises RuntimeError, and XLA another class in each version
        raise _refusal(name, error) from error
    return Topology(name, chip, list(description.devices), num_slices)


def _refusal(name: str, error: Exception) -> ConfigError:
    """Why the TPU compiler gave no description of a topology."""
    text = str(error)
    is_absent = "libtpu" in text.lower() or "not found" in text.lower()
    if is_absent or isinstance(error, ImportError):
        return ConfigError(
            f"--topology={name}: the TPU compiler is not installed ({error}); pip install"
            " 'dpojax[tpu]'"
        )
    return ConfigError(
        f"--topology={name!r}: the TPU compiler does not know it: {text.splitlines()[0]:.200}"
    )
