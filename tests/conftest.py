"""Eight simulated CPU devices, and where the shared real data lies (tests skip without it)."""

import os
import pathlib

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_threefry_partitionable", True)

DATA = pathlib.Path(os.environ.get("DPOJAX_TEST_DATA", pathlib.Path(__file__).parents[1] / ".." / "shared" / "data")).resolve()


@pytest.fixture
def shared_data() -> pathlib.Path:
    """The folder of real data, tokenizers and tiny models."""
    if not DATA.is_dir():
        pytest.skip(f"real data is not at {DATA}; set DPOJAX_TEST_DATA")
    return DATA
