"""The line of a stage on a terminal, and the time that a stage has left."""

from __future__ import annotations

import time

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from folora_q.cli.wording import clock, progress_of
from folora_q.progress import Unit

# In columns; with less room there is no bar.
MIN_BAR, MAX_BAR = 10, 40
# The first units of a stage include its setup: alone they give an estimate only if they are this share of it.
LARGE_START = 0.05


class StagePace:
    """How much of a stage is done, and the time left at the speed since its first units."""

    def __init__(self, total: int | None) -> None:
        self.total, self.done = total, 0
        self.began = time.perf_counter()
        self.first: tuple[float, int] | None = None
        self.last = self.began

    def advance(self, count: int) -> None:
        """Record that units were done."""
        self.done += count
        self.last = time.perf_counter()
        self.first = self.first or (self.last, self.done)

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return time.perf_counter() - self.began

    @property
    def left(self) -> float | None:
        """Seconds left when units were last done; None if unknown."""
        if self.first is None or not self.total or self.done > self.total:
            return None
        began, before = self.first
        if self.done == before:
            if self.done < LARGE_START * self.total:
                return None
            began, before = self.began, 0
        return (self.last - began) / (self.done - before) * (self.total - self.done) if self.done > before else None


class StageLine:
    """A spinner, the title, a bar, what is done and the time left: as much of it as fits into one line."""

    def __init__(self, title: str, pace: StagePace, unit: Unit) -> None:
        self.title, self.pace = title, pace
        self.unit: Unit = unit
        self.spinner = Spinner("dots")

    def _facts(self) -> tuple[str, str]:
        """Return what is done, and the time."""
        pace, left = self.pace, self.pace.left
        since = time.perf_counter() - pace.last
        time_left = "" if left is None else f" < {clock(max(left - since, 0.0))}"
        done = "" if pace.total is None else progress_of(pace.done, pace.total, self.unit)
        return done, clock(pace.elapsed) + time_left

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        done, taken = self._facts()
        width, spinner = options.max_width, self.spinner.render(console.get_time())
        free = width - 2 - len(self.title)  # after the spinner and the title
        facts = f"{done}  {taken}" if done and free >= len(done) + len(taken) + 4 else taken
        room = free - len(facts) - 4
        if self.pace.total and room >= MIN_BAR:
            bar = ProgressBar(self.pace.total, min(self.pace.done, self.pace.total), width=min(room, MAX_BAR))
            grid = Table.grid(padding=(0, 1))
            grid.add_row(spinner, Text(self.title), bar, Text(facts))
            yield grid
            return
        title = Text(self.title)
        title.truncate(max(width - 4 - len(facts), 1), overflow="ellipsis")
        line = Text.assemble(spinner if isinstance(spinner, Text) else "", " ", title, "  ", facts)
        line.truncate(width)
        yield line
