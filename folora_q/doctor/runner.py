"""Run checks in a separate process: a broken native library can crash or hang it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import traceback
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import cast

from folora_q.doctor.findings import Check, Finding, State, root_cause
from folora_q.doctor.pip import install_missing
from folora_q.doctor.redaction import without_secrets
from folora_q.errors import first_line

# Libraries on a cold network disk take minutes to load.
SECONDS = 300.0


class Examiner:
    """Runs checks one after the other in one process, restarted if it ends: libraries are loaded once.

    Args:
        verbose: show the libraries' output and tracebacks on stderr.
        seconds: timeout of one check.
    """

    def __init__(self, verbose: bool = False, seconds: float = SECONDS) -> None:
        self.verbose = verbose
        self.seconds = seconds
        self._running: tuple[BaseProcess, Connection] | None = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def make(self, check: Check) -> list[Finding]:
        """Run a check and return its findings; an error in it is a finding too."""
        process, pipe = self._running = self._running or self._begin()
        try:
            pipe.send(check)
            if pipe.poll(self.seconds):
                return pipe.recv()
            fact = f"not finished within {self.seconds:g} s"
            fix = "try again; if the GPU does not respond, restart the machine"
        except (EOFError, OSError):
            process.join(self.seconds)
            fact = f"the check ended its process, by {_ending(process.exitcode)}"
            fix = "reinstall torch and bitsandbytes; folora-q --debug doctor shows the last output"
        self._end()
        return [Finding(check.name, State.FAILURE if check.needed else State.WARNING, fact, fix)]

    def _begin(self) -> tuple[BaseProcess, Connection]:
        spawning = multiprocessing.get_context("spawn")  # inherits no state of this process
        ours, theirs = spawning.Pipe()
        process = spawning.Process(target=_serve, args=(theirs, self.verbose), daemon=True)
        process.start()
        theirs.close()  # otherwise its end would not be detected
        return process, cast(Connection, ours)  # on Windows a PipeConnection, with the same methods

    def _end(self) -> None:
        if self._running is not None:
            process, pipe = self._running
            process.kill()
            process.join()
            pipe.close()
            self._running = None


def attempt(check: Check, verbose: bool = False) -> list[Finding]:
    """Run a check in this process."""
    try:
        findings = check.look()
    except Exception as error:
        if verbose:
            traceback.print_exc()
        cause = root_cause(error)
        if isinstance(cause, ImportError):
            fact, fix = f"not tested: {first_line(cause)}", install_missing(cause) or "fix the packages first"
        else:
            fact, fix = f"{type(cause).__name__}: {first_line(cause)}", "folora-q --debug doctor shows where"
        findings = [Finding(check.name, State.FAILURE if check.needed else State.WARNING, fact, fix)]
    return [without_secrets(finding) for finding in findings]


def _serve(pipe: Connection, verbose: bool) -> None:
    """Answer requests in the other process until it is killed. Its stdout is closed, as ours is for data only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this process
    if verbose:
        os.dup2(2, 1)
        faulthandler.enable()
    else:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    while True:
        pipe.send(attempt(pipe.recv(), verbose))


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    meaning = {
        "SIGKILL": "the system may have run out of memory",
        "SIGILL": "it was built for another kind of CPU",
    }
    return f"the signal {name}" + (f": {meaning[name]}" if name in meaning else "")
