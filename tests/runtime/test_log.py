"""What a person reads while a run goes on: rates that say something, and what is left without what
compiling took.
"""

import concurrent.futures
import re
import types
from typing import Any

import pytest

from dpojax.runtime import log
from dpojax.runtime.log import Progress
from dpojax.training.stage import Dispatched, Stage


@pytest.mark.parametrize(
    ("done", "after", "line"),
    [
        (0, 20.0, "reading: 0 of 100 rows"),
        (5, 20.0, "reading: 5 of 100 rows, 0.25/s, ETA 6m20s"),
        (50, 20.0, "reading: 50 of 100 rows, 2.5/s, ETA 20.0s"),
        (90, 2.0, "reading: 90 of 100 rows, 45/s, ETA 0.2s"),
    ],
)
def test_a_progress_line_says_a_rate_only_where_there_is_one(
    done, after, line, capsys, monkeypatch
):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    progress = Progress("reading", 100, "rows", enabled=True, every_s=1.0)
    progress(0)
    now[0] += after
    progress(done)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == line and " 0/s" not in said and not said.endswith(", ")


def test_the_first_eta_has_no_compiling_in_it():
    """Step 1 takes 61 s, of which its program took 60 to compile: 9 more steps of a second are
    left.
    """
    said = []
    config = types.SimpleNamespace(log_every_steps=1)
    job: Any = types.SimpleNamespace(
        config=config, say=said.append, log=types.SimpleNamespace(write=lambda step, row: None)
    )
    program: Any = types.SimpleNamespace(seconds=0.0)
    unused: Any = None
    stage = Stage(
        name="DPO",
        prefix="",
        num_steps=10,
        steps_setting="num_steps",
        program=program,
        batches=unused,
        frozen={},
        schedule=lambda step: 0.1,
        rate_settings=unused,
        checkpoints=unused,
        meta={},
        records=unused,
        groups=4,
        epoch_groups=40,
        flops=lambda sizes: 1.0,
    )
    scalars = {"loss": 0.7, "grad_norm": 1.0}
    result: Any = types.SimpleNamespace(scalars=scalars, skipped=0)
    sizes: Any = types.SimpleNamespace(packing=1.0, rounding=1.0)
    program.seconds = 60.0
    end: Any = concurrent.futures.Future()
    end.set_result(161.0)
    stage.finish(job, Dispatched(1, result, 4, 100, sizes, end), 100.0)
    assert re.search(r"4\.0 pairs/s  ETA 9\.0s$", said[0]), said
