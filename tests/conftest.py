"""Eight simulated CPU devices, and where the shared real data lies (tests skip without it)."""

import atexit
import collections
import os
import pathlib
import shutil
import tempfile

import runs  # imports no jax

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 "
    + runs.QUICK_COMPILING
)
# Tests of accelerators take their device and compare with the CPU of the same process.
PLATFORM = os.environ.get("DPOJAX_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu" if PLATFORM == "cpu" else f"{PLATFORM},cpu"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and the runs that they start compile a program once between them; .ci/run names one
    # folder for all its steps.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dpojax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import jaxtyping
import pytest

# The shapes that these modules annotate are checked at every call (not in the subprocesses that run
# the command line).
SHAPED = (
    *("objectives.pairs", "objectives.preference", "objectives.table", "objectives.loss"),
    *("training.state", "training.logps", "training.micro_batches", "training.scores"),
    *("training.pairs", "training.metrics", "training.gradients", "training.update"),
    *("generation.sampler", "models", "data.packing"),
)
jaxtyping.install_import_hook([f"dpojax.{m}" for m in SHAPED], "beartype.beartype")

import messages
from shared_data import DATA

from dpojax import errors

jax.config.update("jax_threefry_partitionable", True)


def _checked(self, *args):
    """Every error that a test raises lists something where it lists."""
    Exception.__init__(self, *args)
    found = messages.faults(str(self))
    assert not found, (found, str(self))


errors.DpojaxError.__init__ = _checked


def pytest_collection_modifyitems(items):
    """Files with the most slow tests come first: a long one that starts last would leave the other
    worker idle.
    """
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: a file's own order stays


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data, tokenizers and tiny models."""
    if not DATA.is_dir():
        pytest.skip(f"real data is not at {DATA}; set DPOJAX_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A small Hugging Face directory, to read or to copy: its
    weights are those of `tiny.params`.
    """
    import tiny

    from dpojax.weights import export

    folder = tmp_path_factory.mktemp("exported") / "hf"
    fields = export.llama_fields(tiny.CONFIG, bos_id=1, eos_id=2)
    params = tiny.params(tiny.model())
    export.export_params(
        params, tiny.CONFIG, folder, fields=fields, dtype="float32", companions=None
    )
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Preferences as JSONL, and a tokenizer, from a small world."""
    return runs.small_world(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def plain(files, tmp_path_factory):
    """An uninterrupted run on one device."""
    workdir = tmp_path_factory.mktemp("plain")
    output = runs.run(files, workdir)
    return workdir, output


@pytest.fixture(scope="session")
def plain_two(files, tmp_path_factory):
    """The same run in two processes of one device each."""
    workdir = tmp_path_factory.mktemp("plain_two")
    started = runs.start_two(files, workdir)
    outputs = [p.communicate(timeout=300)[0] for p in started]
    assert [p.returncode for p in started] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    return workdir
