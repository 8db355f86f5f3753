"""Metrics, held-out pairs and samples -> one self-contained report.html. Process 0 only."""

import base64
import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")  # before pyplot: no display is needed
import matplotlib.pyplot as plt
import numpy as np

from dpojax.config import Config, resolved_mode, to_dict
from dpojax.evaluation.statistics import wilson
from dpojax.metrics import duration
from dpojax.train import PairResults

CHOSEN, REJECTED, TRAIN, EVAL, GREY = "#1b7837", "#b2182b", "#4575b4", "#f46d43", "#777777"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": 110,
}

PAGE = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>dpojax: {{ name }}</title>
<style>
 * { box-sizing: border-box; }
 body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1060px; margin: 2em auto; padding: 0 1em; }
 h1 { font-size: 1.5em; margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: .2em; }
 h3 { font-size: 1em; margin: 1.6em 0 .4em; }
 .sub { color: #777; margin-top: .2em; }
 .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 1.4em 0; }
 .card { border: 1px solid #ddd; border-radius: 8px; padding: 10px 16px; }
 .card b { display: block; font-size: 1.6em; } .card span { color: #777; font-size: .85em; }
 img { max-width: 100%; }
 .wide { overflow-x: auto; } .wide img { min-width: 640px; }
 table { border-collapse: collapse; width: 100%; margin: .8em 0; }
 td, th { text-align: left; padding: 6px 10px; border-bottom: 1px solid #eee; vertical-align: top; overflow-wrap: anywhere; }
 th { color: #777; font-weight: 600; overflow-wrap: normal; }
 .num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
 .facts td:first-child { color: #777; width: 9em; overflow-wrap: normal; }
 code span { display: inline-block; max-width: 100%; }
 code { font-size: .88em; background: #f7f7f7; padding: .1em .3em; }
 .sample { border: 1px solid #ddd; border-radius: 8px; margin: 1em 0; overflow: hidden; }
 .prompt { display: flex; flex-direction: column-reverse; max-height: 11em; overflow: auto; background: #fafafa; border-bottom: 1px solid #ddd; }
 .prompt div { white-space: pre-wrap; color: #555; font-size: .88em; padding: 8px 14px; overflow-wrap: anywhere; }
 .answers { display: grid; grid-template-columns: 1fr 1fr; } .answers > div { padding: 8px 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
 .answers > div + div { border-left: 1px solid #eee; }
 .answers b { display: block; color: #777; font-size: .85em; }
 .better { background: #eef7ee; } details { margin: .5em 0; } pre { background: #f7f7f7; padding: 1em; overflow: auto; font-size: .85em; }
 .note { color: #777; font-size: .9em; }
 @media (max-width: 600px) { .answers { grid-template-columns: 1fr; } .answers > div + div { border-left: 0; border-top: 1px solid #eee; }
   td, th { padding: 5px 6px; font-size: .92em; } }
</style></head><body>
<h1>{{ title }}</h1>
<p class="sub">{{ subtitle }}</p>
<div class="cards">{% for c in cards %}<div class="card"><b>{{ c.value }}</b>{{ c.label }}<br><span>{{ c.note }}</span></div>{% endfor %}</div>
<table class="facts">{% for r in facts %}<tr><td>{{ r[0] }}</td><td>{% if r[0] == "command" %}<code>{% for word in r[1].split(" ") %}<span>{{ word }}</span> {% endfor %}</code>{% else %}{{ r[1] }}{% endif %}</td></tr>
{% endfor %}</table>
<h2>Before and after</h2>
<table><tr><th>{{ before_title }}</th><th class="num">before</th><th class="num">after</th></tr>
{% for r in before_after %}<tr><td>{{ r[0] }}</td><td class="num">{{ r[1] }}</td><td class="num">{{ r[2] }}</td></tr>{% endfor %}</table>
<p class="note">{{ before_note }}</p>
<h2>Training</h2>
<div class="wide"><img alt="training curves" src="data:image/png;base64,{{ curves }}"></div>
<p class="note">{{ curves_note }}</p>
{% if splits %}
<h2>Held-out {{ unit }}</h2>
<div class="wide"><img alt="held-out rewards" src="data:image/png;base64,{{ heldout }}"></div>
<table><tr><th>held-out {{ unit }}</th><th class="num">{{ unit }}</th><th class="num">accuracy</th><th class="num">95 % interval</th></tr>
{% for r in splits %}<tr><td>{{ r.name }}</td><td class="num">{{ r.count }}</td><td class="num">{{ r.rate }}</td><td class="num">{{ r.interval }}</td></tr>{% endfor %}</table>
{% endif %}
{% if samples %}
<h2>Samples</h2>
{% if sample_plot %}<img alt="sample statistics" src="data:image/png;base64,{{ sample_plot }}">{% endif %}
<p class="note">{{ sample_note }}</p>
{% for s in samples %}<div class="sample"><div class="prompt" tabindex="0"><div>{{ s.prompt }}</div></div><div class="answers">
<div class="{{ 'better' if s.policy_better }}"><b>policy{% if s.policy_score is not none %}, reward {{ s.policy_score }}{% endif %}</b>{{ s.policy }}</div>
<div class="{{ 'better' if s.ref_better }}"><b>reference{% if s.ref_score is not none %}, reward {{ s.ref_score }}{% endif %}</b>{{ s.reference }}</div>
</div></div>
{% endfor %}
{% endif %}
<h2>Cost</h2>
<table><tr><th>of this process's steps, without the first</th><th class="num"></th></tr>
{% for r in cost_rows %}<tr><td>{{ r[0] }}</td><td class="num">{{ r[1] }}</td></tr>{% endfor %}</table>
<p class="note">Useful FLOPs: every distinct token once through the layers (a shared prompt once), attention between tokens that see
each other, the vocabulary at response tokens; no padding and nothing that is computed again.</p>
<h2>Data and programs</h2>
<table><tr><th>rows</th><th class="num">train</th><th class="num">held out</th></tr>
{% for r in data_rows %}<tr><td>{{ r[0] }}</td><td class="num">{{ r[1] }}</td><td class="num">{{ r[2] }}</td></tr>{% endfor %}</table>
<table><tr><th>program</th><th class="num">compiled</th><th class="num">loaded</th><th class="num">seconds</th></tr>
{% for r in program_rows %}<tr>{% for cell in r %}<td{% if not loop.first %} class="num"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<details><summary>All settings</summary><pre>{{ config }}</pre></details>
</body></html>
""")


def _png(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _series(rows: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    found = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
    return [x for x, _ in found], [y for _, y in found]


def plot_curves(rows: Sequence[dict[str, Any]]) -> Any:
    """Loss, accuracy, rewards, log-probs and diagnostics over the steps; SFT's loss beside them where there was one."""
    has_sft = any("sft_loss" in r for r in rows)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(3, 3, figsize=(12, 9.4), layout="constrained")
        panels = [
            ("loss", [("loss", "train", TRAIN), ("eval_loss", "held out", EVAL)]),
            (
                "accuracy of the objective",
                [("objective/accuracy", "train", TRAIN), ("eval_objective/accuracy", "held out", EVAL)],
            ),
            ("rewards, held out", [("eval_rewards/chosen", "chosen", CHOSEN), ("eval_rewards/rejected", "rejected", REJECTED)]),
            (
                "log-probs, held out (nats)",
                [("eval_logps/chosen", "chosen", CHOSEN), ("eval_logps/rejected", "rejected", REJECTED)],
            ),
            ("gradient norm", [("grad_norm", "train", TRAIN)]),
            ("SFT loss (nats per token)", [("sft_loss", "train", TRAIN)])
            if has_sft
            else ("learning rate", [("learning_rate", "train", TRAIN)]),
            ("on-policy KL(policy || reference), nats", [("eval_on_policy_kl", "held-out prompts", EVAL)]),
            (
                "displacement: share of chosen that fell",
                [("displacement", "train", TRAIN), ("eval_displacement", "held out", EVAL)],
            ),
            ("gradient weight (quantiles), train", [("gradient_weight/q50", "median", TRAIN)]),
        ]
        for axis, (title, lines) in zip(axes.flat, panels, strict=True):
            for key, label, color in lines:
                x, y = _series(rows, key)
                axis.plot(x, y, color=color, label=label, marker="o" if len(x) < 12 else None, markersize=4)
            axis.set_title(title, loc="left")
            axis.set_xlabel("step")
            if not any(line.get_xdata().size for line in axis.lines):
                axis.text(0.5, 0.5, "not measured in this run", transform=axis.transAxes, ha="center", color=GREY)
            elif len(lines) > 1:
                axis.legend(frameon=False)
        axes.flat[1].axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        _band(
            axes.flat[6],
            rows,
            lambda r: (
                r["eval_on_policy_kl"] - r["eval_on_policy_kl_standard_error"],
                r["eval_on_policy_kl"] + r["eval_on_policy_kl_standard_error"],
            ),
            EVAL,
        )
        _band(axes.flat[8], rows, lambda r: (r["gradient_weight/q10"], r["gradient_weight/q90"]), TRAIN)
        return figure


def _band(axis, rows: Sequence[dict[str, Any]], ends, color: str) -> None:
    """A shaded interval around a line; rows that lack a part of it are left out."""
    found = []
    for row in rows:
        try:
            low, high = ends(row)
        except (KeyError, TypeError):  # another kind of row, or a value that was not finite
            continue
        if low is not None and high is not None:
            found.append((row["step"], low, high))
    if found:
        steps, low, high = zip(*found, strict=True)
        axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def plot_heldout(results: PairResults, *, unpaired: bool) -> Any:
    """Histograms of the rewards and margins, and margin against length (difference)."""
    good = results.label > 0.5
    rewards = (results.chosen_rewards, results.rejected_rewards)
    margin, names = rewards[0] - rewards[1], ("chosen", "rejected")
    difference = results.chosen_lengths - results.rejected_lengths
    labels = (
        "reward of chosen − reward of rejected",
        "margin against length difference",
        "tokens of chosen − tokens of rejected",
    )
    if unpaired:
        rewards, margin, names = (rewards[0][good], rewards[0][~good]), results.margin, ("desirable", "undesirable")
        difference = results.chosen_lengths
        labels = ("log pi/ref on the labelled side of the reference point", "margin against length", "tokens of the response")
    rewards = [r[np.isfinite(r)] for r in rewards]  # what is not a number has no place on an axis
    margin = np.where(np.isfinite(margin), margin, np.nan)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
        both = np.concatenate(rewards) if any(map(len, rewards)) else np.zeros(1)
        low, high = np.percentile(both, [0.5, 99.5])
        bins = np.linspace(low - 1e-6, high + 1e-6, 41)
        axes[0].hist(rewards[0], bins, alpha=0.6, color=CHOSEN, label=names[0])
        axes[0].hist(rewards[1], bins, alpha=0.6, color=REJECTED, label=names[1])
        axes[0].set_title("implicit rewards", loc="left")
        axes[0].set_xlabel("beta log pi/ref")
        axes[0].legend(frameon=False)
        axes[1].hist(margin[np.isfinite(margin)], 41, color=TRAIN)
        axes[1].axvline(0, color="black", linewidth=0.8)
        axes[1].set_title("margins (right of 0: ranked as labelled)", loc="left")
        axes[1].set_xlabel(labels[0])
        axes[2].scatter(difference, margin, s=8, alpha=0.5, color=TRAIN, linewidths=0)
        axes[2].axhline(0, color="black", linewidth=0.8)
        axes[2].set_title(labels[1], loc="left")
        axes[2].set_xlabel(labels[2])
        return figure


def plot_samples(samples: dict[str, Any]) -> Any:
    """Lengths of the samples, and their rewards where there is one."""
    with plt.rc_context(STYLE):
        panels = 2 if "scores" in samples else 1
        figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 3.2), layout="constrained", squeeze=False)
        lengths = {name: [len(r) for r in samples["ids"][name]] for name in ("policy", "reference")}
        _two_histograms(axes[0, 0], lengths, "length of samples (tokens)")
        if panels == 2:
            _two_histograms(axes[0, 1], samples["scores"], "reward of samples")
        return figure


def _two_histograms(axis, values: dict[str, Sequence[float]], title: str) -> None:
    everything = np.concatenate([np.asarray(v, float) for v in values.values()])
    bins = np.linspace(everything.min() - 0.5, everything.max() + 0.5, 33)
    for name, color in (("policy", EVAL), ("reference", GREY)):
        axis.hist(values[name], bins, alpha=0.55, color=color, label=name)
    axis.set_title(title, loc="left")
    axis.legend(frameon=False)


def _splits(results: PairResults, *, unpaired: bool) -> list[dict[str, Any]]:
    """The objective's accuracy over all pairs and by which response is longer; of unpaired responses by their label."""
    margin = results.margin  # of what was trained: the rewards of whole responses may say the opposite
    right = (margin > 0) + 0.5 * (margin == 0)
    difference = results.chosen_lengths - results.rejected_lengths
    everything = np.ones(len(margin), bool)
    by_length = {"chosen is longer": difference > 0, "same length": difference == 0, "chosen is shorter": difference < 0}
    by_label = {"desirable": results.label > 0.5, "undesirable": results.label <= 0.5}
    rows = []
    for name, mask in {"all": everything, **(by_label if unpaired else by_length)}.items():
        rate = wilson(float(right[mask].sum()), int(mask.sum()))
        shown = (f"{rate.value:.1%}", f"{rate.low:.1%} to {rate.high:.1%}") if mask.any() else ("–", "–")
        rows.append({"name": name, "count": int(mask.sum()), "rate": shown[0], "interval": shown[1]})
    return rows


def _note(config: Config) -> str:
    """What a reader may take for a fault and is none."""
    loss = config.loss.make()
    rewards = (
        "Rewards are beta log pi/ref" if resolved_mode(config) != "none" else "Rewards are beta log pi: there is no reference"
    )
    if loss.main.objective.per_token:
        rewards = "Rewards are beta log pi of a token, as the objective takes it: there is no reference"
    if all(t.objective.f_divergence or t.name == "sft" for t in loss.terms):
        return f"{rewards}. Both log-probs may fall while the margin grows: the objective trains their difference."
    return f"{rewards}."


def _title(name: str) -> str:
    """What a reader calls the objective."""
    return "DPO" if name == "sigmoid" else f"Preference training ({name})"


def _cards(summary: dict[str, Any], splits: list[dict[str, Any]], unit: str) -> list[dict[str, str]]:
    cards = []
    if "win_rate" in summary:
        interval = f"{summary['win_rate_low']:.1%} to {summary['win_rate_high']:.1%} (Wilson, 95 %)"
        cards.append({"value": f"{summary['win_rate']:.1%}", "label": "win rate over the reference", "note": interval})
        controlled = f"{summary['win_rate_length_controlled']:.1%}"
        cards.append({"value": controlled, "label": "length-controlled win rate", "note": "at equal length"})
    if splits:
        interval = f"{splits[0]['interval']} on {splits[0]['count']} {unit}"
        cards.append({"value": splits[0]["rate"], "label": "held-out accuracy", "note": interval})
    if summary.get("sft_loss") is not None:
        cards.append(
            {
                "value": f"{summary['sft_loss']:.3f}",
                "label": "SFT loss (nats per token)",
                "note": f"{summary['sft_steps']} steps",
            }
        )
    if "kl" in summary:
        error = f"± {summary['kl_standard_error']:.2f} (standard error)"
        note = f"{error}, samples of {summary['num_samples']} prompts"
        cards.append({"value": f"{summary['kl']:.2f} nats", "label": "KL(policy || reference)", "note": note})
    if summary["pairs_per_second"]:
        speed = f"{summary['pairs_per_second']:.1f}"
        cards.append({"value": speed, "label": f"{unit} per second", "note": f"{summary['num_steps']} steps"})
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
            f"{config.data.train or ('embedded world' if config.embedded else 'nothing')}, {used(summary['train_rows']):,} rows",
        ),
        ("held out", f"{held_out}, {used(summary['eval_rows']):,} rows"),
        ("devices", run["devices"]),
        ("versions", versions),
        ("command", run["command"]),
        ("started", f"{run['started']}; this process took {duration(summary['seconds'])}{_load(run)}"),
    ]


def _load(run: dict[str, Any]) -> str:
    """What else the machine was doing, where the system says it: a time means little without."""
    if run.get("load") is None:
        return ""
    return f", the machine's load was {run['load']:.1f} on {run['cores']} cores"


def _before_after(summary: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Held-out metrics before the first step and after the last, and the samples of reference and policy."""
    evaluations = [r for r in rows if r.get("eval_loss") is not None]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    shown = [
        ("loss", "eval_loss", "{:.4f}"),
        ("accuracy of the objective", "eval_objective/accuracy", "{:.1%}"),
        ("accuracy of the implicit rewards", "eval_rewards/accuracies", "{:.1%}"),
        ("reward margin", "eval_rewards/margins", "{:+.3f}"),
        ("log-prob of chosen, nats", "eval_logps/chosen", "{:.1f}"),
        ("log-prob of rejected, nats", "eval_logps/rejected", "{:.1f}"),
    ]
    table = [
        (label, form.format(first[key]), form.format(last[key]))
        for label, key, form in shown
        if first.get(key) is not None and last.get(key) is not None
    ]
    sampled = [
        ("mean reward of samples", "mean_reward", "{:+.2f}"),
        ("mean length of samples, tokens", "mean_length", "{:.1f}"),
        ("distinct pairs of tokens in samples", "distinct_2", "{:.3f}"),
    ]
    for label, key, form in sampled:
        if summary.get(key) is not None:
            table.append((label, form.format(summary[f"reference_{key}"]), form.format(summary[key])))
    return table


def _before_note(config: Config, summary: dict[str, Any]) -> str:
    """What before and after are, and how the two KLs differ."""
    parts = ["Before: the policy before the first preference step, and the reference's samples. After: the trained policy."]
    if "kl" in summary:
        parts.append(
            f"The KL above is over one sample to each of {summary['num_samples']} prompts at the end; the curve below is the "
            f"same quantity over the first {min(config.sample.kl_prompts, summary['num_samples'])} of them at each evaluation."
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
        ("tokens of computed rows over those used (last logged step)", "padding/rounding", "{:.3f}"),
        ("compiling", "seconds_compiling", "{:.1f} s"),
        ("peak memory of a device", "peak_device_memory_gib", "{:.2f} GiB"),
        ("peak memory of the process", "peak_process_memory_gib", "{:.2f} GiB"),
    ]
    found = {**last, **summary}
    return [(label, form.format(found[key])) for label, key, form in shown if found.get(key) is not None]


def _program_rows(programs: dict[str, dict[str, Any]]) -> list[tuple[str, int, int, str]]:
    """Each program's name, how often it was compiled and loaded from the cache, and the seconds that this took."""
    called = {name: program for name, program in programs.items() if program["compiled"] or program["loaded"]}
    return [(name, p["compiled"], p["loaded"], f"{p['seconds']:.1f}") for name, p in called.items()]


def render_report(
    name: str,
    config: Config,
    summary: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    results: PairResults | None,
    samples: dict[str, Any] | None,
    *,
    shown: int = 12,
) -> str:
    """The page, with everything in the one file.

    Args:
      name: of the run.
      summary: what summary.json holds.
      rows: of metrics.jsonl.
      results: of the held-out pairs at the end; None where there are none.
      samples: prompts, texts and scores of policy and reference, or None.
      shown: how many samples are printed side by side.
    """
    unpaired = config.loss.make().unpaired
    unit = "responses" if unpaired else "pairs"
    splits = [] if results is None else _splits(results, unpaired=unpaired)
    given = {k: v for k, v in dataclasses.asdict(config.loss).items() if v not in (None, {}) and k != "name"}
    settings = [
        ", ".join([config.loss.name, *(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in given.items())])
    ]
    settings.append(f"{config.batch_size} {unit} a step")
    settings.append(f"{config.optim.name} at {config.optim.learning_rate:g}")
    data = config.data.train or config.data.eval or "embedded world"
    counts = (summary["train_rows"], summary["eval_rows"])
    names = sorted(set(counts[0]) | set(counts[1]))
    c = config.sample
    return PAGE.render(
        name=name,
        title=f"{_title(config.loss.name)} on {data if config.embedded else pathlib.Path(data).name}",
        subtitle=" · ".join([*settings, f"{summary['num_steps']} steps", f"seed {config.seed}"]),
        cards=_cards(summary, splits, unit),
        curves=_png(plot_curves(rows)),
        curves_note=_note(config),
        heldout="" if results is None else _png(plot_heldout(results, unpaired=unpaired)),
        unit=unit,
        splits=splits,
        samples=_sample_table(samples, shown) if samples else [],
        sample_plot=_png(plot_samples(samples)) if samples else "",
        facts=_facts(config, summary),
        before_title=f"held-out {unit} and prompts",
        before_after=_before_after(summary, rows),
        before_note=_before_note(config, summary),
        sample_note=f"One sample each: temperature {c.temperature:g}, top-k {c.top_k or 'off'}, top-p {c.top_p if c.top_p < 1 else 'off'}"
        + ("; the better one by the reward is tinted; ties count half." if "win_rate" in summary else "."),
        cost_rows=_cost_rows(summary, rows),
        data_rows=[(n.replace("/", ": ").replace("_", " "), counts[0].get(n, 0), counts[1].get(n, 0)) for n in names],
        program_rows=_program_rows(summary["programs"]),
        config=json.dumps(to_dict(config), indent=2),
    )
