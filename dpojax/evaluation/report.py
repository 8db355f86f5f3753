"""Metrics, findings and samples -> one self-contained report.html. Process 0 only."""

import json
from collections.abc import Sequence
from typing import Any

from dpojax.config.load import flat_settings, load_config_file, to_dict
from dpojax.config.schema import Config
from dpojax.evaluation.pages import page_template
from dpojax.evaluation.plots import filled, measured, plot_curves, plot_samples, png
from dpojax.runtime.log import duration
from dpojax.training.findings import Before, Card, Findings, Panel

SHOWN = 12  # samples that are printed side by side


def _cards(summary: dict[str, Any], findings: Findings) -> list[Card]:
    """The numbers at the top: of samples, what the stage found, and the speed."""
    cards = []
    if "win_rate" in summary:
        interval = f"{summary['win_rate_low']:.1%} to {summary['win_rate_high']:.1%} (Wilson, 95 %)"
        cards.append(Card(f"{summary['win_rate']:.1%}", "win rate over the reference", interval))
        controlled = f"{summary['win_rate_length_controlled']:.1%}"
        cards.append(Card(controlled, "length-controlled win rate", "at equal length"))
    cards += findings.cards
    if "kl" in summary:
        error = f"± {summary['kl_standard_error']:.2f} (standard error)"
        note = f"{error}, samples of {summary['num_samples']} prompts"
        cards.append(Card(f"{summary['kl']:.2f} nats", "KL(policy || reference)", note))
    if summary["pairs_per_second"]:
        speed = f"{summary['pairs_per_second']:.1f}"
        steps = f"{summary['num_steps']} steps"
        cards.append(Card(speed, f"{findings.unit} per second", steps))
    return cards


def _facts(config: Config, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What was run, on what, with what and when."""
    run = summary["run"]
    held_out = config.data.eval or ("embedded world" if config.embedded else "none")
    if config.data.eval_share:
        held_out = f"{config.data.eval_share:.1%} of the prompts"

    def used(counts: dict[str, int]) -> int:
        return counts.get("used", counts.get("rows", 0))

    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return [
        ("model", run["model"]),
        (
            "trained on",
            (
                f"{config.data.train or ('embedded world' if config.embedded else 'nothing')},"
                f" {used(summary['train_rows']):,} rows"
            ),
        ),
        ("held out", f"{held_out}, {used(summary['eval_rows']):,} rows"),
        ("devices", run["devices"]),
        ("versions", versions),
        ("command", run["command"]),
        (
            "started",
            f"{run['started']}; this process took {duration(summary['seconds'])}{_load(run)}",
        ),
    ]


def _load(run: dict[str, Any]) -> str:
    """What else the machine was doing, where the system says it: a time means little without."""
    if run.get("load") is None:
        return ""
    return f", the machine's load was {run['load']:.1f} on {run['cores']} cores"


def _before_after(
    summary: dict[str, Any], rows: Sequence[dict[str, Any]], before: Sequence[Before]
) -> list[tuple[str, str, str]]:
    """Held-out metrics before the first step and after the last, and the samples of reference and
    policy.
    """
    table = []
    for line in before:
        values = [row[line.key] for row in rows if row.get(line.key) is not None]
        if values:
            table.append((line.label, line.form.format(values[0]), line.form.format(values[-1])))
    sampled = (
        Before("mean reward of samples", "mean_reward", "{:+.2f}"),
        Before("mean length of samples, tokens", "mean_length", "{:.1f}"),
        Before("distinct pairs of tokens in samples", "distinct_2", "{:.3f}"),
    )
    for line in sampled:
        if summary.get(line.key) is not None:
            first = line.form.format(summary[f"reference_{line.key}"])
            table.append((line.label, first, line.form.format(summary[line.key])))
    return table


def _before_note(config: Config, summary: dict[str, Any]) -> str:
    """What before and after are, and how the two KLs differ."""
    parts = [
        "Before: the policy before the first step of the last stage, and the reference's samples."
        " After: the trained policy."
    ]
    if "kl" in summary:
        parts.append(
            f"The KL above is over one sample to each of {summary['num_samples']} prompts at the"
            " end; the curve below is the same quantity over the first"
            f" {min(config.sample.kl_prompts, summary['num_samples'])} of them at each evaluation."
        )
    return " ".join(parts)


def _sample_table(samples: dict[str, Any], shown: int) -> list[dict[str, Any]]:
    rows = []
    scores = samples.get("scores")
    for i in range(min(shown, len(samples["prompts"]))):
        a, b = (scores["policy"][i], scores["reference"][i]) if scores else (None, None)
        rows.append(
            {
                "prompt": samples["prompts"][i].strip(),
                "policy": samples["texts"]["policy"][i].strip() or "(empty)",
                "reference": samples["texts"]["reference"][i].strip() or "(empty)",
                "policy_score": None if a is None else f"{a:+.2f}",
                "ref_score": None if b is None else f"{b:+.2f}",
                "policy_better": a is not None and a > b,
                "ref_better": a is not None and b > a,
            }
        )
    return rows


def _cost_rows(summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """What the steps cost: times, rates, padding, memory."""
    last = next((r for r in reversed(rows) if "padding/packing" in r), {})
    shown = [
        ("step time, median", "step_time_p50_s", "{:.3f} s"),
        ("step time, 99th percentile", "step_time_p99_s", "{:.3f} s"),
        ("pairs per second", "pairs_per_second", "{:.1f}"),
        ("tokens per second and device", "tokens_per_second_per_device", "{:,.0f}"),
        ("useful TFLOP/s", "useful_tflops", "{:.3g}"),
        ("useful FLOPs over the devices' peak (MFU)", "useful_mfu", "{:.1%}"),
        ("tokens of used rows over the ideal (last logged step)", "padding/packing", "{:.3f}"),
        (
            "tokens of computed rows over those used (last logged step)",
            "padding/rounding",
            "{:.3f}",
        ),
        ("compiling", "seconds_compiling", "{:.1f} s"),
        ("peak memory of a device", "peak_device_memory_gib", "{:.2f} GiB"),
        ("peak memory of the process", "peak_process_memory_gib", "{:.2f} GiB"),
    ]
    found = {**last, **summary}
    return [
        (label, form.format(found[key])) for label, key, form in shown if found.get(key) is not None
    ]


def _program_rows(programs: dict[str, dict[str, Any]]) -> list[tuple[str, int, int, str]]:
    """Each program's name, how often it was compiled and loaded from the cache, and the seconds
    that this took.
    """
    called = {
        name: program
        for name, program in programs.items()
        if program["compiled"] or program["loaded"]
    }
    return [(name, p["compiled"], p["loaded"], f"{p['seconds']:.1f}") for name, p in called.items()]


def _sample_note(config: Config, summary: dict[str, Any]) -> str:
    """How the samples were drawn."""
    c = config.sample
    top_p = f"{c.top_p}" if c.top_p < 1 else "off"
    note = (
        f"One sample each: temperature {c.temperature:g}, top-k {c.top_k or 'off'}, top-p {top_p}"
    )
    if "win_rate" in summary:
        return f"{note}; the better one by the reward is tinted; ties count half."
    return f"{note}."


def _data_rows(summary: dict[str, Any]) -> list[tuple[str, int, int]]:
    """How many rows were read, used and left out: (what, training, held out)."""
    train = summary["train_rows"]
    heldout = summary["eval_rows"]
    return [
        (name.replace("/", ": ").replace("_", " "), train.get(name, 0), heldout.get(name, 0))
        for name in sorted(set(train) | set(heldout))
    ]


def _changed(config: Config) -> list[tuple[str, str, str]]:
    """The settings that are not the defaults of configs/base.py: (name, value, default)."""
    defaults = flat_settings(load_config_file("base").to_dict())
    return [
        (key, _told(value), _told(defaults.get(key)))
        for key, value in flat_settings(to_dict(config)).items()
        if value != defaults.get(key)
    ]


def _told(value: Any) -> str:
    return "unset" if value in (None, "") else str(value)


def render_report(
    name: str,
    config: Config,
    summary: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    findings: Findings,
    panels: Sequence[Panel],
    prefix: str = "",
) -> str:
    """The page, with everything in the one file.

    Args:
      name: of the run.
      summary: what summary.json holds.
      rows: of metrics.jsonl.
      findings: of the last stage.
      panels: of all stages that were trained.
      prefix: of the last stage's keys.
    """
    samples = findings.samples
    steps = f"{summary['num_steps'] or summary.get('sft_steps', 0)} steps"
    sections = [
        section._asdict() | {"figure": png(section.figure)} for section in findings.sections
    ]
    return page_template("report.html.jinja").render(
        name=name,
        title=findings.title,
        subtitle=" · ".join([*findings.settings, steps, f"seed {config.seed}"]),
        cards=_cards(summary, findings),
        curves=png(plot_curves(rows, filled(measured(panels, rows), prefix))),
        curves_note=findings.note,
        sections=sections,
        samples=_sample_table(samples, SHOWN) if samples else [],
        sample_plot=png(plot_samples(samples)) if samples else "",
        sample_note=_sample_note(config, summary),
        facts=_facts(config, summary),
        before_title=f"held-out {findings.unit} and prompts",
        before_after=_before_after(summary, rows, findings.before),
        before_note=_before_note(config, summary),
        cost_rows=_cost_rows(summary, rows),
        data_rows=_data_rows(summary),
        program_rows=_program_rows(summary["programs"]),
        changed=_changed(config),
        config=json.dumps(to_dict(config), indent=2),
    )
