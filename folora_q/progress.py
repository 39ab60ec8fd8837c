"""Report what a run does, and measure the time and memory of each stage. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

# What a stage counts. A stage that counts optimizer steps receives a TrainingStatus after each.
Unit = Literal["texts", "tokens", "bytes", "answers", "rows", "models", "points", "runs", "steps", "units"]


class Memory(NamedTuple):
    """Memory in bytes: used, of what the machine has."""

    used: int
    total: int


@dataclass(frozen=True)
class TrainingPlan:
    """What training will do, known right before its first step.

    Attributes:
        sequences, tokens: in the training data, once.
        kind: what a sequence is: a row, a part of a split row, or several rows packed together.
        batch: sequences per optimizer step.
        trained, parameters: the number of parameters that are trained, and of all.
    """

    sequences: int
    tokens: int
    kind: Literal["row", "sequence", "packed sequence", "pair"]
    epochs: float
    batch: int
    steps: int
    trained: int
    parameters: int


@dataclass(frozen=True)
class TrainingStatus:
    """The state of training after a step. What is not known is None.

    Attributes:
        loss: mean over the last steps, weighted exponentially.
        logged_loss: mean since the previous line of metrics; only with a new line (logging.logging_steps).
        grad_norm: before clipping.
        elapsed, remaining: seconds, of this process.
    """

    step: int
    steps: int
    loss: float | None = None
    logged_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    memory: Memory | None = None
    elapsed: float = 0.0
    remaining: float | None = None


@dataclass(frozen=True)
class Measurement:
    """A measurement during training (evaluation.steps), in nats per token. What was not measured is None or empty.

    Attributes:
        loss: on the task's held-out rows.
        change: of that loss since the first measurement.
        kl: from the base, on model-generated text.
        rises: change of the loss on real text compared with the base, by the text's name.
    """

    step: int
    loss: float
    change: float | None = None
    kl: float | None = None
    rises: Mapping[str, float] = field(default_factory=dict)


TrainingEvent = TrainingPlan | TrainingStatus | Measurement


class Progress(Protocol):
    """Shows stages, notes, warnings and what happens in training; the command line has one."""

    def stage(
        self, title: str, total: int | None, unit: Unit = "units"
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Show a stage of `total` units; call the yielded function with the units done. A normal exit means success."""
        ...

    def note(self, text: str) -> None:
        """Show a fact in one line, such as a choice and its reason."""
        ...

    def warn(self, text: str) -> None:
        """Show a warning in one line, also where notes are not wanted."""
        ...

    def show(self, event: TrainingEvent) -> None:
        """Show what training will do, its state after a step, or a measurement during it."""
        ...


class Silence:
    """Shows nothing: the progress of a process that another one speaks for."""

    @contextmanager
    def stage(self, title: str, total: int | None, unit: Unit = "units") -> Iterator[Callable[[int], None]]:
        yield lambda done: None

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def show(self, event: TrainingEvent) -> None:
        pass


class Meter(Protocol):
    """Measures the memory that a stage takes at its peak; `folora_q.models.hardware` has one."""

    kind: str  # "host" or "device"

    def reset(self) -> None:
        """Start measuring a stage."""
        ...

    def peak(self) -> int | None:
        """Return the peak in bytes; None if the machine does not provide it."""
        ...


@dataclass
class Stage:
    """A stage with its wall time, and its peak memory in bytes."""

    title: str
    seconds: float
    peak_bytes: int | None = None
    memory: str | None = None


@dataclass
class StageTimer:
    """Time and memory by stage, in the order in which stages first end; a repeated stage is accumulated."""

    progress: Progress
    meter: Meter | None = None
    stages: dict[str, Stage] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str, total: int | None, unit: Unit = "units") -> Iterator[Callable[[int], None]]:
        began = time.perf_counter()
        if self.meter is not None:
            self.meter.reset()
        with self.progress.stage(title, total, unit) as advance:
            yield advance
        stage = self.stages.setdefault(title, Stage(title, 0.0))
        stage.seconds += time.perf_counter() - began
        if self.meter is not None and (peak := self.meter.peak()) is not None:
            stage.peak_bytes, stage.memory = max(peak, stage.peak_bytes or 0), self.meter.kind

    def note(self, text: str) -> None:
        """Show a fact in one line."""
        self.progress.note(text)

    def warn(self, text: str) -> None:
        """Show a warning in one line."""
        self.progress.warn(text)

    def show(self, event: TrainingEvent) -> None:
        """Show what happens in training."""
        self.progress.show(event)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the stages as in run.json."""
        return [asdict(stage) for stage in self.stages.values()]
