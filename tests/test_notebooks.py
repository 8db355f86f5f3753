"""The notebooks run from top to bottom, their assertions hold, and
they are stored without outputs.
"""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: pip install .[test]")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install .[test]")


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_notebook_runs_and_is_stored_without_outputs(path, monkeypatch):
    from jupyter_client.manager import KernelManager

    notebook = nbformat.read(path, as_version=4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert code and all(not c.outputs and c.execution_count is None for c in code)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")
    kernel = KernelManager(kernel_name="python3")
    # this environment, whatever "python3" is registered as
    kernel.kernel_spec.argv[0] = sys.executable
    client = nbclient.NotebookClient(
        notebook, km=kernel, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    )
    try:
        client.execute(cleanup_kc=True)
    finally:
        if kernel.has_kernel:  # nbclient leaves a kernel that it was given
            kernel.shutdown_kernel(now=True)
        kernel.cleanup_resources()
