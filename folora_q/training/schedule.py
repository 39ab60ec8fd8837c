"""Learning rate warm-up that wastes no step: the first step has a rate above zero."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

# A run has at least this many times its warm-up steps.
TIMES_WARMUP = 3


def warmup_of(asked: float, steps: int) -> int:
    """Return the number of warm-up steps: the number asked for, or a share if below 1, at most a third of `steps`."""
    wanted = int(asked) if asked >= 1 else ceil(asked * steps)
    return min(wanted, steps // TIMES_WARMUP)


def rising_from_the_first_step(scheduler: LRScheduler, warmup: int) -> LRScheduler:
    """Return the schedule with a linear warm-up whose first rate is above zero.

    In transformers' schedules the first step has rate 0, so a run of one step learns nothing.

    Args:
        scheduler: newly created; a schedule without warm-up is returned as it is.
    """
    if not isinstance(scheduler, LambdaLR) or not warmup:
        return scheduler

    def rising(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: (step + 1) / (warmup + 1) if step < warmup else rate(step)

    rates = [rate if rate(0) else rising(rate) for rate in scheduler.lr_lambdas]
    return LambdaLR(scheduler.optimizer, rates)
