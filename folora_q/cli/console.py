"""Consoles and progress display: data goes to stdout, messages to stderr; without a terminal, plain lines."""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.segment import Segments
from rich.table import Table

from folora_q.cli.stage_line import StageLine, StagePace
from folora_q.cli.training_lines import TrainingLine, measurement_lines, plan_line, status_line
from folora_q.cli.wording import amount, clock, duration, progress_of
from folora_q.progress import Measurement, TrainingEvent, TrainingPlan, TrainingStatus, Unit
from folora_q.storage.redaction import conceal

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

MAX_WIDTH = 1000
INDENT = "  "
# Interval of progress lines without a terminal.
SECONDS_BETWEEN_LINES = 30.0
REFRESHES_PER_SECOND = 5
# Number of training steps before the time left is printed once, if no line of metrics does so earlier.
STEPS_BEFORE_ESTIMATE = 3


@dataclass
class Output:
    """What the global options say about all output.

    Attributes:
        quiet: show errors, warnings and results only.
        plain: print as without a terminal.
    """

    quiet: bool = False
    plain: bool = False


output = Output()


def set_output(quiet: bool, plain: bool) -> None:
    """Apply the global options --quiet and --plain."""
    changed = plain != output.plain
    output.quiet, output.plain = quiet, plain
    if changed:
        terminal = False if plain else None
        # Other modules hold these objects, so they are changed in place, as in `rich.reconfigure`.
        vars(out).update(vars(Console(highlight=False, force_terminal=terminal)))
        vars(err).update(vars(Console(stderr=True, highlight=False, force_terminal=terminal)))


class Concealing:
    """A stream that redacts secrets, whoever writes to it: we, a library's log, or a traceback."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(conceal(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def concealing(stay: bool) -> Iterator[None]:
    """Redact secrets in stdout and stderr, in the block or, with `stay`, until this process ends."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Concealing, before)
    try:
        yield
    finally:
        if not stay:
            sys.stdout, sys.stderr = before


def print_table(table: Table) -> None:
    """Print a table, wider than a narrow terminal if necessary, since truncated numbers would be wrong."""
    least = out.measure(table, options=out.options.update(width=MAX_WIDTH)).minimum
    options = out.options.update(width=max(out.width, least))
    out.print(Segments(out.render(table, options)), crop=False, end="")


def print_error(message: str, hint: str | None = None) -> None:
    """Print an error and, after a blank line, its hint."""
    err.print(f"[bold red]error:[/] {escape(visible(message))}", soft_wrap=True)
    if hint:
        err.print(f"\n[cyan]hint:[/] {escape(visible(hint))}", soft_wrap=True)


def visible(text: str) -> str:
    """Escape control characters, so that text from data and recipes cannot control the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def quiet_libraries() -> None:
    """Silence messages of libraries that users cannot act on: progress bars, notices, deprecations.

    Call this before they are imported. `--debug` does not.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    # bitsandbytes warns once that it could not fetch CPU kernels from a hub; its own kernels are used.
    for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops", "trl", "accelerate", "peft", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_progress_bars() -> None:
    """Turn off the progress bars of imported libraries: ours shows every stage."""
    import datasets
    import transformers
    from transformers import modeling_gguf_pytorch_utils as gguf_reader

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    gguf_reader.tqdm = partial(gguf_reader.tqdm, disable=True)  # the one bar without a switch


class ConsoleProgress:
    """Shows what a run does (`folora_q.progress.Progress`): live on a terminal, otherwise in plain ASCII lines."""

    def __init__(self, console: Console = err) -> None:
        self.console = console
        self._line: TrainingLine | None = None  # while training is shown live
        self._seen, self._estimated = 0, False  # training steps, and whether the time left was printed

    @property
    def live(self) -> bool:
        """Whether lines can be drawn again on this console."""
        return self.console.is_terminal and self.console.is_interactive

    def note(self, text: str) -> None:
        if not output.quiet:
            self.console.print(f"{INDENT}{escape(visible(text))}", style="dim", soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(visible(text))}", soft_wrap=True)

    def show(self, event: TrainingEvent) -> None:
        if output.quiet:
            return
        if self._line is not None and not isinstance(event, TrainingPlan):
            self._line.update(event)
        match event:
            case TrainingPlan():
                self._print(plan_line(event, "×" if self.live else "x"))
            case Measurement():
                lines = measurement_lines(event, self.console.width - len(INDENT) if self.live else MAX_WIDTH)
                self._print("\n".join(map(visible, lines)))
            case TrainingStatus() if not self.live:
                self._print_status(event)

    def _print_status(self, status: TrainingStatus) -> None:
        if status.logged_loss is not None:
            self._print(status_line(status, status.logged_loss))
            self._estimated = self._estimated or status.remaining is not None
            return
        self._seen += 1
        if self._seen >= STEPS_BEFORE_ESTIMATE and status.remaining and not self._estimated:
            self._estimated = True
            self._print(f"about {clock(status.remaining)} left in training")

    @contextmanager
    def stage(self, title: str, total: int | None, unit: Unit = "units") -> Iterator[Callable[[int], None]]:
        if output.quiet:
            yield lambda count: None
            return
        title, began = visible(title), time.perf_counter()
        with (self._drawn if self.live else self._logged)(title, total, unit) as advance:
            yield advance
        took = duration(time.perf_counter() - began)
        if self.live:
            self.console.print(f"[green]✓[/] {escape(title)} [dim]{took}[/]", soft_wrap=True)
        else:
            self._print(f"[done] {title}, {took}", indent="")

    @contextmanager
    def _drawn(self, title: str, total: int | None, unit: Unit) -> Iterator[Callable[[int], None]]:
        pace = StagePace(total)
        if unit == "steps" and total is not None:
            self._line = line = TrainingLine(total)
        else:
            line = StageLine(title, pace, unit)
        try:
            with Live(line, console=self.console, transient=True, refresh_per_second=REFRESHES_PER_SECOND):
                yield pace.advance
        finally:
            self._line = None

    @contextmanager
    def _logged(self, title: str, total: int | None, unit: Unit) -> Iterator[Callable[[int], None]]:
        self._print(f"[start] {title}" + ("" if total is None else f" ({amount(total, unit)})"), indent="")
        self._seen, self._estimated = 0, False
        pace = StagePace(total)
        printed = pace.began

        def advance(count: int) -> None:
            nonlocal printed
            pace.advance(count)
            if unit == "steps" or not total or pace.done >= total or pace.last - printed < SECONDS_BETWEEN_LINES:
                return  # the lines of training have their own interval
            printed = pace.last
            left = "" if pace.left is None else f", about {clock(pace.left)} left"
            self._print(f"{title}: {progress_of(pace.done, total, unit)}{left}")

        yield advance

    def _print(self, text: str, indent: str = INDENT) -> None:
        self.console.print(textwrap.indent(text, indent), markup=False, soft_wrap=True)


@contextmanager
def starting(debug: bool, what: str = "PyTorch and Transformers") -> Iterator[ConsoleProgress]:
    """Run a command's slow imports in this block, with the libraries silenced unless `debug`.

    Yields:
        The progress display, for the rest of the command.
    """
    if not debug:
        quiet_libraries()
    progress = ConsoleProgress()
    with progress.stage(f"starting {what}", None):
        yield progress
    if not debug:
        quiet_progress_bars()
