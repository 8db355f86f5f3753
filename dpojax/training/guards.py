"""A step that is not finite or spikes: its rows are named, and a run that is lost ends."""

import math
from typing import Any

import numpy as np

from dpojax.config.load import to_dict
from dpojax.errors import NumericsError
from dpojax.runtime.context import Job
from dpojax.runtime.log import finite_json
from dpojax.training.stage import Dispatched, Stage

NON_FINITE_LIMIT = 3  # non-finite steps in a row that end the run


class Guard:
    """Looks at every finished step."""

    def __init__(self):
        """Starts with no bad step."""
        self.bad_in_a_row = 0

    def __call__(self, job: Job, stage: Stage, done: Dispatched) -> None:
        """Writes a bad step's rows to quarantine.jsonl and says so.

        Raises: NumericsError after NON_FINITE_LIMIT non-finite steps in a row.
        """
        metrics = done.metrics
        finite = bool(metrics.finite)
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        if finite and not bool(metrics.spike):
            return
        skipped = not finite or job.config.optim.skip_spikes
        rows, by_loss = _bad_rows(metrics, finite)
        loss = float(metrics.scalars["loss"])
        fault = _fault(loss, float(metrics.scalars["grad_norm"]), finite)
        note = {
            "stage": stage.name,
            "step": done.step,
            "reason": "spike" if finite else fault,
            "skipped": skipped,
            "loss": loss,
            "grad_norm": float(metrics.scalars["grad_norm"]),
            "rows": [stage.records.where(row) for row in rows],
            "row_ids": rows,
            # False: the gradient alone was bad, and all rows of the step are listed
            "named_by_loss": by_loss,
        }
        job.write_file("quarantine.jsonl", finite_json(note) + "\n", append=True)
        effect = "trained on it (optim.skip_spikes=True skips it)"
        if skipped:
            effect = "parameters unchanged"
        places = ", ".join(note["rows"][:4])
        job.say(
            f"{stage.name} {done.step}: {fault}, loss {loss:.4g}; {effect}; {places} ... in"
            " quarantine.jsonl"
        )
        if self.bad_in_a_row >= NON_FINITE_LIMIT:
            raise NumericsError(
                f"{stage.name}: {NON_FINITE_LIMIT} steps in a row up to step {done.step} were not"
                " finite; lower the learning rate, or look at the rows in"
                f" {_dump(job, stage, done)}; the last good state is in {stage.checkpoints.folder}"
            )


def _fault(loss: float, grad_norm: float, finite: bool) -> str:
    """What is wrong with a step, in words."""
    if finite:
        return "a loss spike"
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return "its update is not finite"
    return "not finite"


def _bad_rows(metrics: Any, finite: bool) -> tuple[list[int], bool]:
    """The rows that made a step bad, and whether their losses tell; else all rows of the step."""
    losses = np.asarray(metrics.losses)
    rows = np.asarray(metrics.row_id)
    if finite:
        named = losses >= 0.5 * losses[rows >= 0].max(initial=-np.inf)
    else:
        named = ~np.isfinite(losses)
    named &= rows >= 0
    by_loss = bool(named.any())
    if not by_loss:
        named = rows >= 0
    return sorted(set(rows[named].tolist())), by_loss


def _dump(job: Job, stage: Stage, done: Dispatched) -> Any:
    """What is known of the step that ended the run: every row with its loss, the scalars, and the
    settings. Returns the file.
    """
    name = f"dump-{stage.name.lower()}-{done.step}.json"
    ids = np.asarray(done.metrics.row_id).ravel()
    losses = np.asarray(done.metrics.losses).ravel()
    rows = [
        {"row": stage.records.where(int(row)), "loss": float(loss)}
        for row, loss in zip(ids, losses, strict=True)
        if row >= 0
    ]
    dump = {
        "stage": stage.name,
        "step": done.step,
        "scalars": {k: float(v) for k, v in done.metrics.scalars.items()},
        "rows": rows,
        "config": to_dict(job.config),
    }
    job.write_file(name, finite_json(dump, indent=1) + "\n")
    return job.workdir / name
