"""What a check found, and how to fix it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """GOOD and NOTE ask for nothing, WARNING may, and with a FAILURE training cannot work."""

    GOOD = "good"
    NOTE = "note"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        fact: what is the case, without a full stop.
        fix: what to do, with a command to type where there is one; a WARNING or FAILURE always has it.
    """

    name: str
    state: State
    fact: str
    fix: str | None = None


@dataclass(frozen=True)
class Check:
    """Something to look at.

    Attributes:
        needed: training cannot work without it, so that a check that fails itself is a FAILURE.
    """

    name: str
    look: Callable[[], list[Finding]]
    needed: bool = True


def can_train(findings: Iterable[Finding]) -> bool:
    """Return whether no check failed."""
    return all(finding.state is not State.FAILURE for finding in findings)


def root_cause(error: BaseException) -> BaseException:
    """The error behind an error: lazy modules hide what is really missing behind a sentence of their own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
