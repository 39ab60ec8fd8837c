"""Checks that fail as libraries do. Named, so that the process that makes checks can import them."""

from __future__ import annotations

import os
import signal
import sys
import time

from folora_q.doctor import Check, Finding, State


def good() -> list[Finding]:
    print("libraries talk")
    return [Finding("good", State.GOOD, f"in process {os.getpid()}")]


def warns() -> list[Finding]:
    return [Finding("warns", State.WARNING, "odd", "mend it")]


def fails() -> list[Finding]:
    return [Finding("fails", State.FAILURE, "[bold]broken[/]\x1b[2J", 'pip install "x>=1"')]


def raises() -> list[Finding]:
    try:
        raise ValueError("the cause\nat length")
    except ValueError as error:
        raise RuntimeError("lazy modules say nothing") from error


def lacks_a_module() -> list[Finding]:
    import no_such_module  # noqa: F401

    return []


def crashes() -> list[Finding]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def exits() -> list[Finding]:
    sys.exit(3)


def hangs() -> list[Finding]:
    time.sleep(60)
    return []


def tells_a_token() -> list[Finding]:
    raise ValueError(f"Illegal header value b'Bearer {os.environ['HF_TOKEN']}'")


CHECKS = [Check(look.__name__, look) for look in (good, warns)]
