"""The environment -> the processes of a run, joined by JAX's multi-controller runtime.

Every process runs the same command. Who they are comes from JAX_COORDINATOR_ADDRESS,
JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from Slurm, Open MPI, Kubernetes or a TPU slice, which
jax.distributed.initialize() recognises itself.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import pkgutil
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

from dpojax.errors import ConfigError


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ.get(name, "0"))
    except ValueError:
        return 0


def launcher(environ: Mapping[str, str], *, tpu_host: bool = False) -> str:
    """What started several processes: "jax", "slurm", "open mpi", "kubernetes", "tpu"; "" for a
    process of its own.

    Args:
      environ: the environment's variables.
      tpu_host: whether this machine has TPUs, which may be part of a slice over several hosts.
    """
    if environ.get("JAX_COORDINATOR_ADDRESS"):
        return "jax"
    # srun's steps have all three. The script of a batch job is told of its tasks too, and is none
    # of them: it would wait for itself.
    if (
        all(f"SLURM_{n}" in environ for n in ("PROCID", "LOCALID", "STEP_NODELIST"))
        and _number(environ, "SLURM_NTASKS") > 1
    ):
        return "slurm"
    if _number(environ, "OMPI_COMM_WORLD_SIZE") > 1:
        return "open mpi"
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "")
    cpu_only = environ.get("JAX_PLATFORMS", "") == "cpu"
    if not cpu_only and (tpu_host or "," in hosts or environ.get("MEGASCALE_COORDINATOR_ADDRESS")):
        return "tpu"
    # Indexed jobs alone have an index: a pod or a notebook without one has nobody to join.
    if environ.get("KUBERNETES_SERVICE_HOST") and "JOB_COMPLETION_INDEX" in environ:
        return "kubernetes"
    return ""


# PCI ids
_GOOGLE = "0x1ae0"
_TPUS = ("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")


def tpu_host(pci: pathlib.Path = pathlib.Path("/sys/bus/pci/devices")) -> bool:
    """Whether this machine has TPU chips.

    PCI ids tell it: device files have other names from one generation to the next.
    """
    if importlib.util.find_spec("libtpu") is None:
        return False

    def read(file):
        if not file.exists():
            return ""
        return file.read_text().strip()

    return any(read(d / "vendor") == _GOOGLE and read(d / "device") in _TPUS for d in pci.glob("*"))


def _accelerator_files(devices: pathlib.Path = pathlib.Path("/dev")) -> bool:
    """Whether the kernel shows accelerators, TPUs perhaps: new TPUs may have other PCI ids."""
    return any(devices.glob("accel*")) or any(devices.glob("vfio/[0-9]*"))


def hide_absent_tpus(environ: MutableMapping[str, str] = os.environ) -> None:
    """Tells JAX to leave libtpu alone where it is installed, nobody asks for TPUs, and this machine
    has none: it would look for them, and print alarms.

    Where another accelerator's plugin is installed, JAX chooses by itself.
    """
    asked = any(
        environ.get(k)
        for k in ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID")
    )
    if asked or importlib.util.find_spec("libtpu") is None or tpu_host() or _accelerator_files():
        return
    others = [
        name for _, name, _ in pkgutil.iter_modules() if name.startswith(("jax_cuda", "jax_rocm"))
    ]
    if (
        others
        or importlib.metadata.entry_points(group="jax_plugins")
        or importlib.util.find_spec("jax_plugins")
    ):
        return
    environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # JAX has read the environment already
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def alone_on_its_machine(environ: Mapping[str, str]) -> bool:
    """Whether the launcher started one process a machine, which then has all of its GPUs."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        return environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    # 2(x3),1
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    return bool(tasks) and {re.sub(r"\(x\d+\)", "", part) for part in tasks.split(",")} == {"1"}


def join_processes(environ: Mapping[str, str] = os.environ) -> str:
    """Joins the other processes of the run, if there are any. Returns what started them.

    Raises: ConfigError if the environment says half of what it takes, or they cannot be joined.
    """
    import jax

    started_by = launcher(environ, tpu_host=tpu_host())
    if not started_by:
        return ""
    options: dict[str, Any] = {}
    if alone_on_its_machine(environ) and "JAX_LOCAL_DEVICE_IDS" not in environ:
        # JAX would leave it the first GPU; an empty list restricts nothing
        options["local_device_ids"] = []
    try:
        # 100 seconds are JAX's default.
        options["heartbeat_timeout_seconds"] = int(environ.get("DPOJAX_HEARTBEAT_SECONDS", "100"))
        if started_by == "jax":
            options["coordinator_address"] = environ["JAX_COORDINATOR_ADDRESS"]
            options |= {
                "num_processes": int(environ["JAX_NUM_PROCESSES"]),
                "process_id": int(environ["JAX_PROCESS_ID"]),
            }
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "JAX_COORDINATOR_ADDRESS needs JAX_NUM_PROCESSES and JAX_PROCESS_ID, numbers, and so is"
            " DPOJAX_HEARTBEAT_SECONDS"
        ) from error
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"the processes that {started_by} started cannot be joined: {error}"
        ) from error
    return started_by
