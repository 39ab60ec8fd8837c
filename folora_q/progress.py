"""Report what a run does, and measure the time and memory of each stage. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


class Progress(Protocol):
    """Shows stages and notes; the command line has one."""

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Show a stage of `total` units; call the yielded function with the units done. A normal exit means success."""
        ...

    def note(self, text: str) -> None:
        """Show a fact in one line, such as a choice and its reason."""
        ...


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
    def stage(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        began = time.perf_counter()
        if self.meter is not None:
            self.meter.reset()
        with self.progress.stage(title, total) as advance:
            yield advance
        stage = self.stages.setdefault(title, Stage(title, 0.0))
        stage.seconds += time.perf_counter() - began
        if self.meter is not None and (peak := self.meter.peak()) is not None:
            stage.peak_bytes, stage.memory = max(peak, stage.peak_bytes or 0), self.meter.kind

    def note(self, text: str) -> None:
        """Show a fact in one line."""
        self.progress.note(text)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the stages as in run.json."""
        return [asdict(stage) for stage in self.stages.values()]
