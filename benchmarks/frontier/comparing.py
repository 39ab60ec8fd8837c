"""Compare methods by what they forget at equal task loss.

A run that learned less forgets less, so runs are not compared directly. A method's curve connects the Pareto-optimal
points of all its runs: no other point of the method has both a lower task loss and less forgetting. Between points,
task loss and KL are interpolated in logarithms, other values along the logarithm of the task loss. A method that did
not learn enough has no value. For a method that learned more at every point, the point of least gain gives a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.frontier.results import Result

Value = Callable[[Result], float]
# The series with which all others are compared.
PLAIN = "LoRA"
# The smallest KL of which a logarithm is taken; a KL may be zero.
MIN_KL = 1e-6


@dataclass(frozen=True)
class Curve:
    """The Pareto-optimal points of a method with one seed, by ascending task loss."""

    runs: tuple[Result, ...]

    @classmethod
    def of(cls, runs: Iterable[Result]) -> Curve:
        """Return the curve through the points of these runs that are Pareto-optimal in task loss and KL."""
        runs = [point for run in runs for point in run.along()]
        runs = sorted((run for run in runs if math.isfinite(run.task_loss)), key=lambda run: (run.task_loss, run.kl))
        kept: list[Result] = []
        for run in runs:
            if not kept or run.kl < kept[-1].kl:
                kept.append(run)
        return cls(tuple(kept))

    def at_task_loss(self, loss: float, value: Value, log: bool = False) -> float:
        """Return a value at a task loss: NaN if the curve does not reach it, the last point's if it ends before."""
        if self.ends_before(loss):
            loss = self.runs[-1].task_loss
        return _between([run.task_loss for run in self.runs], [value(run) for run in self.runs], loss, log)

    def ends_before(self, loss: float) -> bool:
        """Return whether every point learned more than this, so that a value is only a bound."""
        return bool(self.runs) and self.runs[-1].task_loss < loss


def _between(x: Sequence[float], y: Sequence[float], at: float, log: bool) -> float:
    if not x or not x[0] <= at <= x[-1]:  # before logarithms, which may round an end to either side
        return math.nan
    values = np.log(np.maximum(y, MIN_KL)) if log else np.asarray(y)
    found = np.interp(math.log(at), np.log(x), values)
    return float(np.exp(found) if log else found)


def wanted_loss(plain: Sequence[Result], share: float) -> float:
    """Return the task loss at a share of the gain of plain LoRA at its best learning rate."""
    before = plain[0].base["loss"]["task"]
    return before - share * (before - min(run.task_loss for run in plain))


def gain(run: Result, plain: Sequence[Result]) -> float:
    """Return the decrease of the task loss, as a share of plain LoRA's at its best learning rate."""
    before = plain[0].base["loss"]["task"]
    return (before - run.task_loss) / (before - min(each.task_loss for each in plain))


@dataclass(frozen=True)
class Spread:
    """The mean, minimum and maximum over seeds; NaN if any seed has no value."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if not values:
            return cls(math.nan, math.nan, math.nan, 0)
        return cls(float(np.mean(values)), float(np.min(values)), float(np.max(values)), len(values))

    def __format__(self, spec: str) -> str:
        if math.isnan(self.mean):
            return "–"
        text = format(self.mean, spec)
        return text if self.seeds < 2 else f"{text} ({format(self.low, spec)}–{format(self.high, spec)})"
