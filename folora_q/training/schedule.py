"""Learning rate warm-up that wastes no step: the first step has a rate above zero."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

# So many times the warm-up is the least of a run.
TIMES_WARMUP = 3


def warmup_of(asked: float, steps: int) -> int:
    """Steps of warm-up in a run of so many steps: those that are asked for, below 1 as a share, but at most a third."""
    wanted = int(asked) if asked >= 1 else ceil(asked * steps)
    return min(wanted, steps // TIMES_WARMUP)


def rising_from_the_first_step(scheduler: LRScheduler, warmup: int) -> LRScheduler:
    """The schedule with a warm-up of equal steps, of which the first is not zero, as it is in transformers' own.

    There the first step of every run has rate 0, and a run of one step learns nothing at all.

    Args:
        scheduler: just made; a schedule without warm-up stays as it is.
    """
    if not isinstance(scheduler, LambdaLR) or not warmup:
        return scheduler

    def rising(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: (step + 1) / (warmup + 1) if step < warmup else rate(step)

    rates = [rate if rate(0) else rising(rate) for rate in scheduler.lr_lambdas]
    return LambdaLR(scheduler.optimizer, rates)
