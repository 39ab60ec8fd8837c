"""`folora-q` in a fork of this process: a process of its own, to be signalled, that pays for no import."""

from __future__ import annotations

import gc
import os
import pty
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import ForkProcess
from pathlib import Path

from folora_q.cli.app import main


@contextmanager
def forked(arguments: Sequence[object], output: Path) -> Iterator[ForkProcess]:
    """A running `folora-q`; it is killed at the end, if it still runs.

    Args:
        output: the file that its standard output and standard error go to.
    """

    def redirect() -> None:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)

    with _running(arguments, redirect) as process:
        yield process


@contextmanager
def in_a_terminal(arguments: Sequence[object]) -> Iterator[tuple[ForkProcess, int]]:
    """The same in a pseudo-terminal of its own, and the descriptor to type on and to read the screen from."""
    keyboard, terminal = pty.openpty()
    with _running(arguments, lambda: os.login_tty(terminal)) as process:
        os.close(terminal)
        yield process, keyboard
    os.close(keyboard)


@contextmanager
def _running(arguments: Sequence[object], redirect: Callable[[], None]) -> Iterator[ForkProcess]:
    def act() -> None:
        gc.freeze()  # what was imported needs no collecting
        redirect()
        for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
        main([str(argument) for argument in arguments])

    process = ForkProcess(target=act)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def wait_until(ready: Callable[[], bool], process: ForkProcess, output: Path, seconds: float = 120) -> None:
    """Wait for something that a process does; what it said is the message where it ends or takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.is_alive() and time.monotonic() < deadline, output.read_text("utf-8")
        time.sleep(0.02)
