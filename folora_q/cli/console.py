"""Consoles and progress display: data goes to stdout, messages to stderr; without a terminal, plain lines."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segments
from rich.table import Table

from folora_q.storage.redaction import conceal

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

MAX_WIDTH = 1000
# Interval of progress lines without a terminal.
SECONDS_BETWEEN_LINES = 15.0


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
    """Shows a run's stages (`folora_q.progress.Progress`): bars with the time left, or plain lines."""

    def __init__(self, console: Console = err) -> None:
        self.console = console

    def note(self, text: str) -> None:
        self.console.print(f"  {escape(visible(text))}", style="dim", soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        began = time.perf_counter()
        with self._bar(title, total) if self.console.is_terminal else self._lines(title, total) as advance:
            yield advance
        self.console.print(
            f"[green]✓[/] {escape(title)} [dim]{duration(time.perf_counter() - began)}[/]", soft_wrap=True
        )

    @contextmanager
    def _bar(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left")]
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(escape(title), total=total)
            yield lambda count: bars.advance(task, count)

    @contextmanager
    def _lines(self, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
        last, finished = time.perf_counter(), 0
        first: tuple[float, int] | None = None

        def advance(count: int) -> None:
            nonlocal finished, first, last
            finished += count
            now = time.perf_counter()
            # The first call does not count: it includes setup, or in a resumed run many steps at once.
            first = first or (now, finished)
            if total and 0 < finished < total and now - last >= SECONDS_BETWEEN_LINES:
                last = now
                done = finished - first[1]
                left = f", about {duration((now - first[0]) / done * (total - finished))} left" if done else ""
                self.console.print(f"  {escape(title)}: {finished}/{total}{left}", soft_wrap=True)

        yield advance


def duration(seconds: float) -> str:
    """Format a wall time: 12s, 3:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


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
