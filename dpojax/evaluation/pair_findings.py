"""What preference training says of itself: held-out pairs, how they split, and what changed."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dpojax.config.schema import Config, resolved_mode
from dpojax.evaluation.on_policy import on_policy_panels
from dpojax.evaluation.plots import plot_heldout
from dpojax.evaluation.statistics import wilson
from dpojax.training.findings import (
    CHOSEN_COLOR,
    EVAL_COLOR,
    REJECTED_COLOR,
    Before,
    Card,
    Findings,
    Line,
    Panel,
    Section,
)
from dpojax.training.pairs import PairResults

PANELS = (
    Panel("loss", (Line("loss", "train"), Line("eval_loss", "held out", EVAL_COLOR))),
    Panel(
        "accuracy of the objective",
        (
            Line("objective/accuracy", "train"),
            Line("eval_objective/accuracy", "held out", EVAL_COLOR),
        ),
        level=0.5,
    ),
    Panel(
        "rewards, held out",
        (
            Line("eval_rewards/chosen", "chosen", CHOSEN_COLOR),
            Line("eval_rewards/rejected", "rejected", REJECTED_COLOR),
        ),
    ),
    Panel(
        "log-probs, held out (nats)",
        (
            Line("eval_logps/chosen", "chosen", CHOSEN_COLOR),
            Line("eval_logps/rejected", "rejected", REJECTED_COLOR),
        ),
    ),
    Panel("gradient norm", (Line("grad_norm", "train"),)),
    *on_policy_panels(""),
    Panel(
        "displacement: share of chosen that fell",
        (Line("displacement", "train"), Line("eval_displacement", "held out", EVAL_COLOR)),
    ),
    Panel(
        "gradient weight (quantiles), train",
        (Line("gradient_weight/q50", "median"),),
        band=("gradient_weight/q10", "gradient_weight/q90"),
    ),
)

BEFORE = (
    Before("loss", "eval_loss", "{:.4f}"),
    Before("accuracy of the objective", "eval_objective/accuracy", "{:.1%}"),
    Before("accuracy of the implicit rewards", "eval_rewards/accuracies", "{:.1%}"),
    Before("reward margin", "eval_rewards/margins", "{:+.3f}"),
    Before("log-prob of chosen, nats", "eval_logps/chosen", "{:.1f}"),
    Before("log-prob of rejected, nats", "eval_logps/rejected", "{:.1f}"),
)


def pair_findings(
    config: Config,
    results: PairResults | None,
    *,
    scalars: dict[str, Any],
    samples: dict[str, Any] | None,
    policy_params: Callable[[], Any],
) -> Findings:
    """The findings of a preference stage.

    Args:
      results: of the held-out pairs after the last step; None: there are none.
      scalars: of them, for summary.json.
      samples: of policy and reference, or None.
      policy_params: () -> the whole policy's parameters.
    """
    unit = "responses" if config.loss.objective.unpaired else "pairs"
    cards: tuple[Card, ...] = ()
    sections: tuple[Section, ...] = ()
    if results is not None:
        rows = split_rows(results, unpaired=config.loss.objective.unpaired)
        _, count, rate, interval = rows[0]
        cards = (Card(rate, "held-out accuracy", f"{interval} on {count} {unit}"),)
        figure = plot_heldout(results, unpaired=config.loss.objective.unpaired)
        head = (f"held-out {unit}", unit, "accuracy", "95 % interval")
        sections = (Section(f"Held-out {unit}", figure, head, rows),)
    return Findings(
        title=_title(config),
        settings=(
            _objective_text(config),
            f"{config.batch_size} {unit} a step",
            f"{config.optim.name} at {config.optim.learning_rate:g}",
        ),
        unit=unit,
        scalars=scalars,
        note=_note(config),
        cards=cards,
        before=BEFORE,
        sections=sections,
        samples=samples,
        policy_params=policy_params,
    )


def split_rows(results: PairResults, *, unpaired: bool) -> tuple[tuple[str, ...], ...]:
    """The objective's accuracy over all pairs and by which response is longer; of unpaired
    responses by their label: (name, count, rate, interval) as text.
    """
    # Of what was trained: the rewards of whole responses may say the opposite.
    margin = np.asarray(results.margin)
    if not unpaired:
        return accuracy_rows(margin, np.asarray(results.chosen_lengths - results.rejected_lengths))
    label = np.asarray(results.label)
    labels = {"desirable": label > 0.5, "undesirable": label <= 0.5}
    return _split_rows(margin, {"all": np.ones(len(margin), bool), **labels})


def accuracy_rows(margin: np.ndarray, difference: np.ndarray) -> tuple[tuple[str, ...], ...]:
    """The share of pairs with a positive margin (ties half), of all and by which response is
    longer: (name, count, rate, interval) as text.

    Args:
      margin: of each pair.
      difference: tokens by which the chosen response is longer.
    """
    splits = {
        "all": np.ones(len(margin), bool),
        "chosen is longer": difference > 0,
        "same length": difference == 0,
        "chosen is shorter": difference < 0,
    }
    return _split_rows(margin, splits)


def _split_rows(margin: np.ndarray, splits: dict[str, np.ndarray]) -> tuple[tuple[str, ...], ...]:
    right = (margin > 0) + 0.5 * (margin == 0)
    rows = []
    for name, mask in splits.items():
        count = int(mask.sum())
        if not count:
            rows.append((name, "0", "–", "–"))
            continue
        rate = wilson(float(right[mask].sum()), count)
        interval = f"{rate.low:.1%} to {rate.high:.1%}"
        rows.append((name, str(count), f"{rate.value:.1%}", interval))
    return tuple(rows)


def _title(config: Config) -> str:
    """What a reader calls the run."""
    name = config.loss.name
    objective = "DPO" if name in ("sigmoid", "dpo") else f"Preference training ({name})"
    data = "embedded world"
    if not config.embedded:
        data = pathlib.Path(config.data.train or config.data.eval).name
    return f"{objective} on {data}"


def _objective_text(config: Config) -> str:
    """The objective with the settings that it was given."""
    parts = [config.loss.name]
    for key, value in dataclasses.asdict(config.loss).items():
        if key == "name" or value in (None, {}):
            continue
        parts.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(parts)


def _note(config: Config) -> str:
    """What a reader may take for a fault and is none."""
    loss = config.loss.objective
    rewards = "Rewards are beta log pi/ref"
    if loss.main.objective.per_token:
        rewards = (
            "Rewards are beta log pi of a token, as the objective takes it: there is no reference"
        )
    elif resolved_mode(config) == "none":
        rewards = "Rewards are beta log pi: there is no reference"
    if all(t.objective.f_divergence or t.name == "sft" for t in loss.terms):
        return (
            f"{rewards}. Both log-probs may fall while the margin grows: the objective trains their"
            " difference."
        )
    return f"{rewards}."
