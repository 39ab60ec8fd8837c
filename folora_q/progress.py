"""How a run tells whoever started it what it is doing, and how long each part took. Standard library only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Shows stages and notes; the command line has one."""

    def stage(self, title: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """A stage of `total` units; the value is called with units done. Only a normal exit is success."""
        ...

    def note(self, text: str) -> None:
        """One fact worth a line, such as a choice and its reason."""
        ...


@dataclass
class Clock:
    """Wall time by stage."""

    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        began = time.perf_counter()
        with self.progress.stage(title, total) as advance:
            yield advance
        self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - began

    def note(self, text: str) -> None:
        """One fact worth a line."""
        self.progress.note(text)
