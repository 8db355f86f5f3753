"""How fast a stage goes: pairs, tokens and useful FLOPs per second, of this process's steps."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from dpojax.runtime.devices import peak_flops


class Amounts(NamedTuple):
    """What some steps took, and what they did in it."""

    steps: int = 0
    pairs: int = 0
    tokens: int = 0
    flops: float = 0.0  # useful ones
    seconds: float = 0.0

    def plus(self, amounts: "Amounts") -> "Amounts":
        """Both together."""
        return Amounts(
            steps=self.steps + amounts.steps,
            pairs=self.pairs + amounts.pairs,
            tokens=self.tokens + amounts.tokens,
            flops=self.flops + amounts.flops,
            seconds=self.seconds + amounts.seconds,
        )


NOTHING = Amounts()


@dataclasses.dataclass
class Meter:
    """Counts steps. Speeds leave out each process's first step, which fills the pipeline."""

    num_tokens: int = 0  # trained on since step 0, over all processes that resumed
    pairs: int = 0  # since step 0, without the first step of each process
    seconds: float = 0.0  # that these pairs took
    finished: int = 0  # steps of this process
    since_log: Amounts = NOTHING
    timed: Amounts = NOTHING  # of this process's steps but the first
    step_times: list[float] = dataclasses.field(default_factory=list)  # of these, s

    def add(self, step: Amounts) -> None:
        """Counts one step."""
        self.num_tokens += step.tokens
        self.finished += 1
        self.since_log = self.since_log.plus(step)
        if self.finished == 1:
            return
        self.pairs += step.pairs
        self.seconds += step.seconds
        self.timed = self.timed.plus(step)
        self.step_times.append(step.seconds)

    def take(self) -> Amounts:
        """What was done since the last call."""
        amounts = self.since_log
        self.since_log = NOTHING
        return amounts

    def totals(self) -> dict[str, float]:
        """What a checkpoint keeps of the counts."""
        return {"num_tokens": self.num_tokens, "pairs": self.pairs, "seconds": self.seconds}

    def restore(self, totals: dict[str, float]) -> None:
        """Goes on from what a checkpoint kept."""
        self.num_tokens = int(totals["num_tokens"])
        self.pairs = int(totals["pairs"])
        self.seconds = totals["seconds"]

    @property
    def pairs_per_second(self) -> float | None:
        """Over all processes that resumed; None before a second step."""
        return self.pairs / self.seconds if self.seconds else None

    def share(self, runs: int) -> "Meter":
        """A run's part, where so many were trained together: its useful FLOPs are a share."""
        timed = self.timed._replace(flops=self.timed.flops / runs)
        return dataclasses.replace(self, timed=timed)

    def speed(self) -> dict[str, float]:
        """What the steps of this process took, without the first."""
        if not self.step_times:
            return {}
        return {
            "step_time_p50_s": float(np.quantile(self.step_times, 0.5)),
            "step_time_p99_s": float(np.quantile(self.step_times, 0.99)),
            "tokens_per_second_per_device": self.timed.tokens
            / self.timed.seconds
            / jax.device_count(),
            **useful(self.timed.flops / self.timed.seconds),
        }


def useful(rate: float) -> dict[str, float]:
    """Useful TFLOP/s of all devices, and the share of what they could do, where that is known.

    Args:
      rate: FLOP/s.
    """
    peak = peak_flops(jax.devices()[0].device_kind)
    scalars = {"useful_tflops": rate / 1e12}
    if peak is not None:
        scalars["useful_mfu"] = rate / (peak * jax.device_count())
    return scalars
