"""Curves made comparable: what a method forgets at a given task loss.

A run that learned less forgets less, so no two runs are compared as they are. A method's curve goes through those
points along its runs that no other of its points beats in both task loss and forgetting. Between them task loss and KL
are interpolated in logarithms, everything else along the logarithm of the task loss. A method that did not learn as
much has no value; of one that learned more at each point, the point of least gain bounds what it forgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.frontier.results import Result

Value = Callable[[Result], float]
# The series that every other is compared with.
PLAIN = "LoRA"
# Where a logarithm is taken of a KL that may be zero.
LEAST = 1e-6


@dataclass(frozen=True)
class Curve:
    """The efficient points of a method with one seed, by task loss, ascending."""

    runs: tuple[Result, ...]

    @classmethod
    def of(cls, runs: Iterable[Result]) -> Curve:
        """Through the points along these runs that are efficient in task loss and KL."""
        runs = [point for run in runs for point in run.along()]
        runs = sorted((run for run in runs if math.isfinite(run.task_loss)), key=lambda run: (run.task_loss, run.kl))
        kept: list[Result] = []
        for run in runs:
            if not kept or run.kl < kept[-1].kl:
                kept.append(run)
        return cls(tuple(kept))

    def at_task_loss(self, loss: float, value: Value, log: bool = False) -> float:
        """A value where the curve has this task loss; NaN where it is not reached; beyond its end the last point's."""
        if self.ends_before(loss):
            loss = self.runs[-1].task_loss
        return _between([run.task_loss for run in self.runs], [value(run) for run in self.runs], loss, log)

    def ends_before(self, loss: float) -> bool:
        """Whether every point has learned more: values there are bounds."""
        return bool(self.runs) and self.runs[-1].task_loss < loss


def _between(x: Sequence[float], y: Sequence[float], at: float, log: bool) -> float:
    if not x or not x[0] <= at <= x[-1]:  # before logarithms, which may round an end to either side
        return math.nan
    x, y = np.log(x), np.array(y)
    y = np.log(np.maximum(y, LEAST)) if log else y
    found = np.interp(math.log(at), x, y)
    return float(np.exp(found) if log else found)


def wanted_loss(plain: Sequence[Result], share: float) -> float:
    """The task loss at which a share of the gain is made that plain LoRA makes at its best learning rate."""
    before = plain[0].base["loss"]["task"]
    return before - share * (before - min(run.task_loss for run in plain))


def gain(run: Result, plain: Sequence[Result]) -> float:
    """The fall of the task loss, as a share of plain LoRA's at its best learning rate."""
    before = plain[0].base["loss"]["task"]
    return (before - run.task_loss) / (before - min(each.task_loss for each in plain))


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, and their least and largest; NaN if any seed has no value."""

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
