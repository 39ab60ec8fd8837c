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
# Without a terminal a stage says how far it is at least this often.
SECONDS_BETWEEN_LINES = 15.0


class Concealing:
    """A stream that shows no token or password, whoever writes to it: we, a library's log, or a traceback."""

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
    """Conceal what is written to stdout and stderr, in the block or, with `stay`, until this process ends."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Concealing, before)
    try:
        yield
    finally:
        if not stay:
            sys.stdout, sys.stderr = before


def print_table(table: Table) -> None:
    """A table, in a narrow terminal wider than that: numbers and names that are cut off would be others."""
    least = out.measure(table, options=out.options.update(width=MAX_WIDTH)).minimum
    options = out.options.update(width=max(out.width, least))
    out.print(Segments(out.render(table, options)), crop=False, end="")


def print_error(message: str, hint: str | None = None) -> None:
    """What is wrong, and after a blank line what to do."""
    err.print(f"[bold red]error:[/] {escape(visible(message))}", soft_wrap=True)
    if hint:
        err.print(f"\n[cyan]hint:[/] {escape(visible(hint))}", soft_wrap=True)


def visible(text: str) -> str:
    """Control characters as their codes: what stands in data and recipes must not steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def quiet_libraries() -> None:
    """Silence what the libraries say that no user can act on: progress bars, notices, deprecations among themselves.

    Must run before they are imported. `--debug` leaves them as they are.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    # bitsandbytes tells once that it could not fetch CPU kernels from a hub; its own kernels are used.
    for name in ("bitsandbytes", "bitsandbytes.backends.cpu.ops", "trl", "accelerate", "peft", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_progress_bars() -> None:
    """Turn off the libraries' own bars, once they are imported: ours shows every stage."""
    import datasets
    import transformers
    from transformers import modeling_gguf_pytorch_utils as gguf_reader

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    gguf_reader.tqdm = partial(gguf_reader.tqdm, disable=True)  # the one bar without a switch


class ConsoleProgress:
    """Shows a run's stages (`folora_q.workflows.train.Progress`): bars with their time left, or plain lines."""

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
            # The first step waits for what comes before it, and a resumed run begins with many at once: no speeds.
            first = first or (now, finished)
            if total and 0 < finished < total and now - last >= SECONDS_BETWEEN_LINES:
                last = now
                done = finished - first[1]
                left = f", about {duration((now - first[0]) / done * (total - finished))} left" if done else ""
                self.console.print(f"  {escape(title)}: {finished}/{total}{left}", soft_wrap=True)

        yield advance


def duration(seconds: float) -> str:
    """A wall time for people: 12s, 3:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


@contextmanager
def starting(debug: bool, what: str = "PyTorch and Transformers") -> Iterator[ConsoleProgress]:
    """The slow imports of a command stand in this block; the libraries are quieted around them, unless `debug`.

    Yields:
        The progress display, for what the command does afterwards.
    """
    if not debug:
        quiet_libraries()
    progress = ConsoleProgress()
    with progress.stage(f"starting {what}", None):
        yield progress
    if not debug:
        quiet_progress_bars()
