"""Lines about training: what it will do, its state after a step, and measurements, for terminals and for logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from folora_q.cli.wording import clock, counted, gigabytes, learning_rate, parameters
from folora_q.progress import Measurement, TrainingPlan, TrainingStatus

GAP = "  "


class Field(NamedTuple):
    """A part of the live line; on a narrow terminal those with the lowest rank are left out first."""

    text: str
    rank: int


def plan_line(plan: TrainingPlan, times: str = "x") -> str:
    """Describe what training will do.

    Args:
        times: the multiplication sign.
    """
    batch = f"batch of {plan.batch:,}"
    return (
        f"{counted(plan.sequences, plan.kind)} ({counted(plan.tokens, 'token')}) {times} "
        f"{counted(plan.epochs, 'epoch')} / {batch} = {counted(plan.steps, 'step')}; "
        f"{parameters(plan.trained, plan.parameters)}"
    )


def fitting(fields: Sequence[Field], width: int) -> str:
    """Join as many fields as fit into a width, in their order; cut the last one that is left if it must be."""
    left = list(fields)
    while len(left) > 1 and len(GAP.join(field.text for field in left)) > width:
        left.remove(min(left, key=lambda field: field.rank))
    return GAP.join(field.text for field in left)[:width]


class TrainingLine:
    """The line that shows the state of training on a terminal: it never wraps."""

    def __init__(self, steps: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.status, self.measurement = TrainingStatus(0, steps), None
        self.shown_at = now()

    def update(self, event: TrainingStatus | Measurement) -> None:
        """Take over a new state or measurement."""
        if isinstance(event, Measurement):
            self.measurement = event
            return
        self.status, self.shown_at = event, self.now()

    def fields(self) -> Iterator[Field]:
        """Yield what is known, from left to right."""
        status, measured = self.status, self.measurement
        yield Field(f"step {status.step}/{status.steps}", 9)
        if status.loss is not None:
            yield Field(f"loss {status.loss:.3g}", 8)
        if measured is not None:
            yield Field(f"held-out {measured.loss:.3g}", 6)
            if measured.kl is not None:
                yield Field(f"KL {measured.kl:.2g}", 5)
        if status.learning_rate is not None:
            yield Field(f"lr {learning_rate(status.learning_rate)}", 2)
        if status.grad_norm is not None:
            yield Field(f"|g| {status.grad_norm:.2g}", 1)
        if status.tokens_per_second is not None:
            yield Field(f"{status.tokens_per_second:,.0f} tok/s", 4)
        if status.memory is not None:
            yield Field(gigabytes(status.memory), 3)
        since = self.now() - self.shown_at  # the line is drawn more often than there are steps
        left = "" if status.remaining is None else f" < {clock(max(status.remaining - since, 0.0))}"
        yield Field(clock(status.elapsed + since) + left, 7)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(fitting(list(self.fields()), options.max_width), no_wrap=True, overflow="crop")


def status_line(status: TrainingStatus, loss: float) -> str:
    """Return the line of metrics for a log.

    Args:
        loss: mean since the previous line.
    """
    parts = [f"step {status.step}/{status.steps}", f"loss {loss:.4f}"]
    if status.learning_rate is not None:
        parts.append(f"lr {learning_rate(status.learning_rate)}")
    if status.grad_norm is not None:
        parts.append(f"grad norm {status.grad_norm:.3g}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:.0f} tok/s")
    if status.memory is not None:
        parts.append(f"memory {gigabytes(status.memory)}")
    parts.append(f"elapsed {clock(status.elapsed)}")
    if status.remaining is not None:
        parts.append(f"left {clock(status.remaining)}")
    return GAP.join(parts)


def measurement_parts(found: Measurement) -> list[str]:
    """Return the parts of the line about a measurement."""
    change = "" if found.change is None else f" ({found.change:+.4f})"
    parts = [f"held-out loss {found.loss:.4f}{change}"]
    if found.kl is not None:
        parts.append(f"KL {found.kl:.4f}")
    rises = [f"{name} {rise:+.4f}" for name, rise in found.rises.items()]
    return parts + [f"real text: {rises[0]}", *rises[1:]] if rises else parts


def measurement_lines(found: Measurement, width: int) -> list[str]:
    """Return the line about a measurement, continued below itself where a part does not fit into the width."""
    start = f"step {found.step}"
    lines = [start]
    for part in measurement_parts(found):
        if len(lines[-1]) > len(start) and len(lines[-1] + GAP + part) > width:
            lines.append(" " * len(start))
        lines[-1] += GAP + part
    return lines
