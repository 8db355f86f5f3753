"""A run in a process of its own, as a person would start it: what experiments measure."""

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from dpojax.untrusted.plain_data import read_json


def run_in_process(
    workdir: pathlib.Path,
    config: str,
    overrides: Mapping[str, Any],
    *,
    sft_from: pathlib.Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """One run to its end in a process of its own, as a person would start it; a finished one is
    only read.

    Args:
      workdir: the run's folder.
      config: as --config=.
      overrides: dotted setting -> value, as --config.KEY=VALUE.
      sft_from: the workdir of a run with the same SFT stage, whose checkpoint is taken; resuming
        compares the fingerprints.
      environment: variables besides those of this process.
    Returns: what summary.json holds.
    Raises: subprocess.CalledProcessError if the run fails; its messages are on stderr.

    >>> settings = {"num_steps": 1, "sft.num_steps": 0, "sample.num_prompts": 0}
    >>> dpojax.run_in_process(workdir / "apart", "base", settings)["num_steps"]
    1
    """
    if sft_from is not None and sft_from != workdir and not (workdir / "sft").exists():
        workdir.mkdir(parents=True, exist_ok=True)
        shutil.copytree(sft_from / "sft", workdir / "sft")
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]
    argv = [
        sys.executable,
        "-m",
        "dpojax.main",
        f"--config={config}",
        f"--workdir={workdir}",
        *flags,
    ]
    subprocess.run(
        argv, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})}
    )
    return read_json(workdir / "summary.json")
