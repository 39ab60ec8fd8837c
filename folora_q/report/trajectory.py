"""Task loss and forgetting during training, and the state of a run at a given loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from folora_q.storage.untrusted import finite


@dataclass(frozen=True)
class Point:
    """The measurements at one step of training.

    Attributes:
        step: None for the final evaluation.
        loss: on held-out rows of the task.
        kl, agreement: on held-out model-generated text.
    """

    step: int | None
    loss: float
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Reached:
    """The state of a run at a given task loss.

    Attributes:
        between: the points that it was interpolated from; one point if that has exactly this loss.
    """

    kl: float | None
    agreement: float | None
    between: tuple[Point, ...]

    @property
    def interpolated(self) -> bool:
        return len(self.between) > 1


def trajectory(metrics: Iterable[dict[str, Any]]) -> list[Point]:
    """Return the measurements of a run by step; of a step measured again after a resume, the last."""
    found: dict[int, Point] = {}
    for line in metrics:
        step, loss = line.get("step"), finite(line.get("eval_loss"))
        if isinstance(step, int) and loss is not None:
            found[step] = Point(step, loss, finite(line.get("eval_kl")), finite(line.get("eval_top1_agreement")))
    return [found[step] for step in sorted(found)]


def train_losses(metrics: Iterable[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, training loss) in order of steps."""
    found: dict[int, float] = {}
    for line in metrics:
        step, loss = line.get("step"), finite(line.get("loss"))
        if isinstance(step, int) and loss is not None:
            found[step] = loss
    return sorted(found.items())


def equal_loss(runs: Sequence[Sequence[Point]]) -> float | None:
    """Return the lowest loss that all runs reached; None if one has no points."""
    if not runs or not all(runs):
        return None
    return max(min(point.loss for point in points) for points in runs)


def at_loss(points: Sequence[Point], loss: float) -> Reached | None:
    """Return a run's state when it first reached a loss; None if its points do not include it.

    Between two points the agreement is interpolated linearly in the loss, and the KL geometrically, since it grows by
    factors while the loss falls by amounts; linearly if it starts at 0.
    """
    if points and points[0].loss == loss:
        return Reached(points[0].kl, points[0].agreement, (points[0],))
    for before, after in pairwise(points):
        if before.loss > loss > after.loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            return Reached(
                kl=_between(before.kl, after.kl, share, geometric=True),
                agreement=_between(before.agreement, after.agreement, share, geometric=False),
                between=(before, after),
            )
        if after.loss == loss:
            return Reached(after.kl, after.agreement, (after,))
    return None


def _between(first: float | None, last: float | None, share: float, geometric: bool) -> float | None:
    if first is None or last is None:
        return None
    if geometric and first > 0 and last > 0:
        return math.exp(math.log(first) * (1 - share) + math.log(last) * share)
    return first * (1 - share) + last * share
