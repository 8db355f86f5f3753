"""Accelerators and what they can do, from their makers' data sheets: the one table of peaks.

A device is what jax.devices() counts: half a chip on TPU7x, a whole one elsewhere.
"""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """What a TPU is beside its peak: figures that Google publishes, and the compiler's memory."""

    kind: str  # its row of PEAK_FLOPS
    hbm: float  # bytes that the compiler lets a program use
    bandwidth: float  # of HBM, bytes/s
    links: float  # of the interconnect, all links together, bytes/s each way
    megacore: bool = False  # whether the topology must be told that a device is two cores

    @property
    def peak(self) -> float:
        """Dense bf16 matrix products, FLOP/s."""
        return PEAK_FLOPS[self.kind]


# Dense bf16 matrix products of a device, FLOP/s, by how its `device_kind` starts.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
}

# The TPUs that a plan can be made for, by the name that the compiler's topologies give them.
TPUS = {
    "v4": Chip(kind="TPU v4", hbm=30.75 * GIB, bandwidth=1228e9, links=6 * 45e9, megacore=True),
    "v5e": Chip(kind="TPU v5 lite", hbm=15.75 * GIB, bandwidth=819e9, links=4 * 50e9),
    "v5p": Chip(kind="TPU v5", hbm=95.73 * GIB, bandwidth=2765e9, links=6 * 100e9),
    "v6e": Chip(kind="TPU v6 lite", hbm=31.24 * GIB, bandwidth=1638e9, links=4 * 100e9),
    "tpu7x": Chip(kind="TPU7x", hbm=94.74 * GIB, bandwidth=3690e9, links=600e9),
}

# Bytes/s between slices for each device: about 200 Gbit/s of a host with four of them. Gradients
# alone travel there.
BETWEEN_SLICES = 25e9 / 4


def peak_flops(device_kind: str) -> float | None:
    """What a device can do in a second, FLOP/s; None where the table does not have it (CPUs)."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    if not names:
        return None
    return PEAK_FLOPS[max(names, key=len)]  # "TPU v5 lite" starts as "TPU v5" does
