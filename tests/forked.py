"""Run code in forks of this process: processes of their own, to be killed or signalled, that pay for no import."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pty
import sys
import termios
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import TypeVar

from folora_q.cli.app import main

# The exit code of a child in which an exception was not caught.
FAILED = 99
Returned = TypeVar("Returned")


@contextmanager
def forked(arguments: Sequence[object], output: Path) -> Iterator[ForkProcess]:
    """Run `folora-q` in a fork; it is killed at the end, if it still runs.

    Args:
        output: the file that its standard output and standard error go to.
    """

    def redirect() -> None:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)

    with _started(lambda: _run_program(arguments, redirect)) as process:
        yield process


@contextmanager
def in_a_terminal(arguments: Sequence[object], columns: int = 80) -> Iterator[tuple[ForkProcess, int]]:
    """Run `folora-q` in a pseudo-terminal; also yield the descriptor to type on and to read the screen from."""
    keyboard, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    with _started(lambda: _run_program(arguments, lambda: os.login_tty(terminal))) as process:
        os.close(terminal)
        yield process, keyboard
    os.close(keyboard)


def in_a_child(act: Callable[[], object], timeout: float = 100.0, kill: Callable[[], bool] = lambda: False) -> int:
    """Call a function in a fork, and return the exit code, which is negative if a signal ended it.

    Args:
        kill: asked every millisecond whether to kill it now.

    Raises:
        TimeoutError: it did not end in time.
    """
    deadline = time.monotonic() + timeout
    with _started(act) as process:
        while process.is_alive():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the child did not end within {timeout:.0f} s")
            if kill():
                process.kill()
            process.join(0.001)
    assert process.exitcode is not None
    return process.exitcode


def returned_by_a_child(function: Callable[..., Returned], *arguments: object) -> Returned:
    """Call a function in a fork, and return what it returns.

    Raises:
        RuntimeError: the function raised an exception, which the child has printed.
        ChildProcessError: a signal ended the child.
    """
    receiving, sending = multiprocessing.get_context("fork").Pipe(duplex=False)

    def act(pipe: Connection = sending) -> None:
        pipe.send(function(*arguments))

    with _started(act) as process:
        sending.close()
        with receiving, suppress(EOFError):
            value = receiving.recv()
            process.join()
            return value
        process.join()
    code = process.exitcode or 0
    if code < 0:
        raise ChildProcessError(f"signal {-code} ended the process")
    raise RuntimeError(f"{function.__name__} failed, and the process exited with {code}")


@contextmanager
def _started(act: Callable[[], object]) -> Iterator[ForkProcess]:
    """Start a fork that calls a function; it is killed at the end, if it still runs."""

    def guarded() -> None:
        gc.freeze()  # what was imported needs no collecting, which would take half a second each time
        try:
            act()
        except Exception:
            traceback.print_exc()
            sys.exit(FAILED)

    process = ForkProcess(target=guarded)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _run_program(arguments: Sequence[object], redirect: Callable[[], None]) -> None:
    redirect()
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
        setattr(sys, name, os.fdopen(number, mode, closefd=False))
    main([str(argument) for argument in arguments])


def wait_until(ready: Callable[[], bool], process: ForkProcess, output: Path, seconds: float = 120) -> None:
    """Wait for something that a process does; its output is the message if it ends before, or takes too long."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.is_alive() and time.monotonic() < deadline, output.read_text("utf-8")
        time.sleep(0.02)
