"""Several runs with other settings: each in a process of its own, as a person would start it from the command line."""

import json
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def train(
    workdir: pathlib.Path, config: str, overrides: Mapping[str, Any], *, sft_from: pathlib.Path | None = None
) -> dict[str, Any]:
    """One run to its end; a finished one is only read.

    Args:
      workdir: the run's folder.
      config: as --config=.
      overrides: dotted setting -> value, as --config.KEY=VALUE.
      sft_from: the workdir of a run with the same SFT stage, whose checkpoint is taken; resuming compares the fingerprints.
    Returns: what summary.json holds.
    Raises: subprocess.CalledProcessError if the run fails; its messages are on stderr.
    """
    if sft_from is not None and sft_from != workdir and not (workdir / "sft").exists():
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.copytree(sft_from / "sft", workdir / "sft")
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    argv = [sys.executable, "-m", "dpojax.main", f"--config={config}", f"--workdir={workdir}", *flags]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    return json.loads((workdir / "summary.json").read_text())
