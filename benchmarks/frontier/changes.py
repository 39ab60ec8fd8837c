"""Ours with one thing changed: each run beside what plain LoRA, and ours unchanged, forget at its own task loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.frontier.comparing import Curve, Spread, kept_accuracy
from benchmarks.frontier.results import Result


@dataclass(frozen=True)
class Change:
    """The runs of one series at one learning rate, over the seeds that plain LoRA has too.

    Attributes:
        beside_plain, beside_ours: the KL as a share of the other's at the same task loss; NaN outside of its runs.
    """

    series: str
    learning_rate: float
    task_loss: Spread
    kl: Spread
    beside_plain: Spread
    beside_ours: Spread
    rise: Spread
    kept: Spread


def changes(runs: Sequence[Result], ours: Sequence[Result], plain: Sequence[Result]) -> list[Change]:
    """By their share of plain LoRA's KL.

    Args:
        runs: those with something changed.
        ours: the unchanged curve; its runs at learning rates of `runs` get a row too.
    """
    rates, seeds = {run.learning_rate for run in runs}, {run.seed for run in plain}
    unchanged = [run for run in ours if run.learning_rate in rates]
    groups: dict[tuple[str, float], list[Result]] = {}
    for run in [*unchanged, *runs]:
        if run.seed in seeds:
            groups.setdefault((run.series, run.learning_rate), []).append(run)
    found = [_change(name, rate, group, ours, plain) for (name, rate), group in groups.items()]
    return sorted(found, key=lambda change: (math.isnan(change.beside_plain.mean), change.beside_plain.mean))


def _change(name: str, rate: float, runs: Sequence[Result], ours: Sequence[Result], plain: Sequence[Result]) -> Change:
    def beside(others: Sequence[Result]) -> Spread:
        return Spread.of([_beside(run, Curve.of(other for other in others if other.seed == run.seed)) for run in runs])

    return Change(
        name,
        rate,
        Spread.of([run.task_loss for run in runs]),
        Spread.of([run.kl for run in runs]),
        beside(plain),
        beside(ours),
        Spread.of([run.mean_rise for run in runs]),
        Spread.of([kept_accuracy(run) for run in runs]),
    )


def _beside(run: Result, curve: Curve) -> float:
    if curve.ends_before(run.task_loss):
        return math.nan
    return run.kl / curve.at_task_loss(run.task_loss, lambda r: r.kl, log=True)


COLUMNS = {
    "changed": lambda row: row.series,
    "rate": lambda row: f"{row.learning_rate:g}",
    "seeds": lambda row: str(row.kl.seeds),
    "task loss": lambda row: f"{row.task_loss:.3f}",
    "KL": lambda row: f"{row.kl:.4f}",
    "/ LoRA's there": lambda row: f"{row.beside_plain:.3f}",
    "/ ours there": lambda row: f"{row.beside_ours:.2f}",
    "rise": lambda row: f"{row.rise:.3f}",
    "right kept": lambda row: f"{row.kept:.3f}",
}
