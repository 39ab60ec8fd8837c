"""What a check found, and how to fix it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """GOOD and NOTE require no action, WARNING may, and with a FAILURE training cannot work."""

    GOOD = "good"
    NOTE = "note"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was checked.
        fact: what was found, without a full stop.
        fix: what to do, with a command if there is one; always set for a WARNING or FAILURE.
    """

    name: str
    state: State
    fact: str
    fix: str | None = None


@dataclass(frozen=True)
class Check:
    """A check with its name.

    Attributes:
        needed: whether training requires it, so that an error in the check itself is a FAILURE.
    """

    name: str
    look: Callable[[], list[Finding]]
    needed: bool = True


def can_train(findings: Iterable[Finding]) -> bool:
    """Return whether no check failed."""
    return all(finding.state is not State.FAILURE for finding in findings)


def root_cause(error: BaseException) -> BaseException:
    """Return the innermost cause of an error: lazy modules hide what is really missing behind their own messages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
