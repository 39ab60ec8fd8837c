"""Run checks in a process of their own: a broken native library can end or hang a process."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import traceback
from multiprocessing.connection import Connection

from folora_q.doctor.findings import Check, Finding, State, root_cause
from folora_q.doctor.pip import install_missing
from folora_q.doctor.redaction import without_secrets
from folora_q.errors import first_line

# Libraries on a cold network disk take minutes to load.
SECONDS = 300.0


class Examiner:
    """Makes checks one after the other, in one process while that lives: libraries are loaded once.

    Args:
        verbose: let through what the libraries say, and tracebacks, on stderr.
        seconds: how long one check may take.
    """

    def __init__(self, verbose: bool = False, seconds: float = SECONDS) -> None:
        self.verbose = verbose
        self.seconds = seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Examiner:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def make(self, check: Check) -> list[Finding]:
        """What a check finds; what goes wrong in it is a finding too."""
        if self._process is None:
            self._begin()
        try:
            self._pipe.send(check)
            if self._pipe.poll(self.seconds):
                return self._pipe.recv()
            fact = f"no end within {self.seconds:g} s"
            fix = "try again; if it is the GPU that does not answer, restart the machine"
        except (EOFError, OSError):
            self._process.join(self.seconds)
            fact = f"the check ended its process, by {_ending(self._process.exitcode)}"
            fix = "install torch and bitsandbytes again; folora-q --debug doctor shows the last words"
        self._end()
        return [Finding(check.name, State.FAILURE if check.needed else State.WARNING, fact, fix)]

    def _begin(self) -> None:
        spawning = multiprocessing.get_context("spawn")  # nothing of ours is carried over
        self._pipe, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_serve, args=(theirs, self.verbose), daemon=True)
        self._process.start()
        theirs.close()  # or its end would not be seen

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = self._pipe = None


def attempt(check: Check, verbose: bool = False) -> list[Finding]:
    """Make a check here, in this process."""
    try:
        findings = check.look()
    except Exception as error:
        if verbose:
            traceback.print_exc()
        cause = root_cause(error)
        if isinstance(cause, ImportError):
            fact, fix = f"not tested: {first_line(cause)}", install_missing(cause) or "mend the packages first"
        else:
            fact, fix = f"{type(cause).__name__}: {first_line(cause)}", "folora-q --debug doctor shows where"
        findings = [Finding(check.name, State.FAILURE if check.needed else State.WARNING, fact, fix)]
    return [without_secrets(finding) for finding in findings]


def _serve(pipe: Connection, verbose: bool) -> None:
    """The other process: answer until it is ended. Its stdout is nobody's, for ours holds data alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends this
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
