"""Every objective in one printed table: python tests/support/objective_table.py [--only=NAME,...]
[--no-devices].

value, gradient: relative error against TRL 1.16's own losses, from token log-probs on
  (tests/oracles/trl_objectives.py froze them).
optimum: distance of the minimiser of the population loss from the exact optimum, in units of the
  reward.
devices, cuts: the step's loss and gradient on 8 simulated devices, and in a micro-batch per row,
  against one device and one
micro-batch; relative, the larger of both. Exit code 1 if anything is out of its bound.
"""

import argparse
import os
import sys

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import objective_cases as cases

from dpojax.objectives.loss import make_loss

# 1e-5 in float32 is what all of dpojax promises of another topology; forward_kl amplifies rounding
# most.
BOUNDS = {"value": 1e-6, "gradient": 1e-6, "optimum": 2e-3, "devices": 1e-5, "cuts": 1e-5}
ALPHA_BOUND = 1e-5  # TRL computes the alpha divergence in float32


def measure(label: str, *, devices: bool) -> dict[str, float | str]:
    """One row: column -> number, or why there is none."""
    case = cases.CASES[label]
    trl, distance = cases.trl_error(label), cases.optimum_distance(case)
    row: dict[str, float | str] = {}
    row["value"], row["gradient"] = trl if trl else ("not in TRL", "")
    row["optimum"] = str(case.optimum) if distance is None else distance
    if devices:
        row["devices"], row["cuts"] = cases.split_differences(make_loss(case.name, **case.settings))
    return row


def bound(label: str, column: str) -> float:
    """The largest number that may stand in a column."""
    return (
        ALPHA_BOUND
        if label.endswith("alpha") and column in ("value", "gradient")
        else BOUNDS[column]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="labels, separated by semicolons")
    parser.add_argument("--no-devices", action="store_true", help="leave out the two slow columns")
    args = parser.parse_args()
    labels = [x.strip() for x in args.only.split(";")] if args.only else list(cases.CASES)
    columns = [c for c in BOUNDS if not (args.no_devices and c in ("devices", "cuts"))]
    print(
        "| objective | settings | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns),
        flush=True,
    )
    out = []
    for label in labels:
        row = measure(label, devices=not args.no_devices)
        shown = []
        for column in columns:
            value = row[column]
            wrong = isinstance(value, float) and not value <= bound(label, column)
            out += (
                [f"{label}: {column} {value:.1e}, over {bound(label, column):.0e}"] if wrong else []
            )
            shown.append(
                value
                if isinstance(value, str)
                else f"{'**' if wrong else ''}{value:.0e}{'**' if wrong else ''}"
            )
        case = cases.CASES[label]
        settings = ", ".join(
            f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in case.settings.items()
        )
        print(f"| {label} | {settings} | " + " | ".join(shown) + " |", flush=True)
    print(
        "\n"
        + (
            "all within " + ", ".join(f"{k} {v:.0e}" for k, v in BOUNDS.items())
            if not out
            else "\n".join(out)
        )
    )
    return 1 if out else 0


if __name__ == "__main__":
    sys.exit(main())
