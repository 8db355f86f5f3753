"""Findings -> summary.json, report.html, and what is said at the end of a run."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

import dpojax
from dpojax.data.open import Data
from dpojax.evaluation import report
from dpojax.evaluation.samples import judge_samples, sample_rows
from dpojax.models.config import ModelConfig
from dpojax.models.params import num_params
from dpojax.runtime import compiled
from dpojax.runtime.context import Job
from dpojax.runtime.log import duration, finite_json, peak_memory, say
from dpojax.training.findings import Findings, Panel
from dpojax.training.meter import Meter

# mean rewards below it: at beta 0.1 a response is within 0.05 nats of the reference
HARDLY_MOVED = 5e-3


class Finished(NamedTuple):
    """A run after its last step."""

    meter: Meter  # of the last stage
    findings: Findings  # of the last stage
    panels: Sequence[Panel]  # of all stages that were trained
    num_steps: int  # that the last stage has trained
    began: float  # when the run did, of time.monotonic()


def finish_run(job: Job, data: Data, model: ModelConfig, finished: Finished) -> dict[str, Any]:
    """Writes summary.json and report.html, and says what came out; returns the summary."""
    findings = finished.findings
    meter = finished.meter
    judged = judge_samples(job, findings.samples) if findings.samples else {}
    summary = {
        "num_steps": finished.num_steps,
        "pairs_per_second": meter.pairs_per_second,
        **meter.speed(),
        **peak_memory(),
        "seconds_compiling": sum(p.seconds for p in job.programs.values()),
        "self_check": None,
        **findings.scalars,
        **judged,
        "seconds": time.monotonic() - finished.began,
        "run": describe_run(job, model, finished.began),
        "programs": _programs(job),
        "train_rows": data.train_index.counts,
        "eval_rows": {} if data.eval_index is None else data.eval_index.counts,
    }
    if job.main_process:
        job.write_file("summary.json", finite_json(summary, indent=2) + "\n")
        if findings.samples:
            lines = [finite_json(row) + "\n" for row in sample_rows(findings.samples)]
            job.write_file("samples.jsonl", "".join(lines))
        rows = job.log.rows()
        page = report.render_report(
            job.workdir.name, job.config, summary, rows, findings, finished.panels
        )
        job.write_file("report.html", page)
        say_results(job, summary)
    job.log.close()
    return summary


def _programs(job: Job) -> dict[str, dict[str, Any]]:
    """What was compiled or loaded, by program, for summary.json and the report."""
    return {
        p.name: {"compiled": p.compiled, "loaded": p.loaded, "seconds": p.seconds}
        for p in job.programs.values()
    }


def describe_run(job: Job, model: ModelConfig, began: float) -> dict[str, Any]:
    """What was run, on what, with what and when: as data for summary.json and the report.

    Args:
      began: when the run did, of time.monotonic().
    """
    c = job.config
    size = num_params(model) / 1e6
    source = c.model.init or c.model.shape or "random weights"
    started = datetime.datetime.now().astimezone() - datetime.timedelta(
        seconds=time.monotonic() - began
    )
    libraries = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")
    }
    devices = (
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, {jax.process_count()} process(es)"
    )
    return {
        "model": (
            f"{source}, {model.family}, {size:,.2f}M parameters, {c.model.dtype} compute,"
            f" {c.model.param_dtype} stored"
        ),
        "devices": f"{devices}, {platform.platform()}",
        "versions": {
            "dpojax": dpojax.__version__,
            "Python": platform.python_version(),
            **libraries,
        },
        "command": shlex.join(sys.orig_argv),
        "started": started.isoformat(timespec="seconds"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cores": os.cpu_count(),
    }


def say_results(job: Job, summary: dict[str, Any]) -> None:
    """The results of a run in a few lines."""
    job.say(compiled.totals(job.programs))
    if "win_rate" in summary:
        say(
            f"win rate over the reference {summary['win_rate']:.1%} [{summary['win_rate_low']:.1%},"
            f" {summary['win_rate_high']:.1%}], length-controlled"
            f" {summary['win_rate_length_controlled']:.1%}"
        )
    if "kl" in summary:
        say(
            f"KL(policy || reference) {summary['kl']:.2f} ± {summary['kl_standard_error']:.2f} nats"
            f" over {summary['num_samples']} prompts; mean length {summary['mean_length']:.1f} vs"
            f" {summary['reference_mean_length']:.1f} tokens"
        )
    if "step_time_p50_s" in summary:
        mfu = f", {summary['useful_mfu']:.1%} of the peak" if "useful_mfu" in summary else ""
        rate = f"{summary['pairs_per_second']:.1f} pairs/s, " if summary["pairs_per_second"] else ""
        say(
            f"step {summary['step_time_p50_s']:.3f} s (median), {summary['step_time_p99_s']:.3f} s"
            f" (99th percentile); {rate}{summary['useful_tflops']:.3g} useful TFLOP/s{mfu};"
            f" compiling and loading {duration(summary['seconds_compiling'])}; "
            + ", ".join(
                f"{k.removeprefix('peak_').removesuffix('_gib').replace('_', ' ')} {v:.2f} GiB"
                for k, v in summary.items()
                if k.startswith("peak_")
            )
        )
    rewards = [
        abs(summary[key])
        for key in ("eval_rewards/chosen", "eval_rewards/rejected")
        if summary.get(key) is not None
    ]
    if summary["num_steps"] and rewards and max(rewards) < HARDLY_MOVED:
        say(
            f"note: the policy hardly moved: rewards of held-out responses are {max(rewards):.1e}"
            " at most; more steps move it, or a higher optim.learning_rate than"
            f" {job.config.optim.learning_rate:g} (small models take 1e-5 to 1e-4)"
        )
    say(f"done in {duration(summary['seconds'])}: {job.workdir / 'report.html'}")
