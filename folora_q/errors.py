"""Errors in the user's terms. The command line shows each as one line and a hint, and sets the exit code."""

from __future__ import annotations


class FoloraError(Exception):
    """An error with one sentence on what is wrong and where, and a hint on how to correct it.

    Args:
        message: one sentence without a full stop: what is wrong, and where.
        hint: what the user can do about it, or None.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(FoloraError):
    """The user's mistake: a recipe, a path, a file, an argument. Exit code 2."""

    exit_code = 2


class RunError(FoloraError):
    """The run itself failed: a non-finite number, a missing tool, a broken download. Exit code 1."""


class OtherProcessError(RunError):
    """Another process of the same run has ended, and says why itself."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as Ctrl-C asks by SIGINT."""


# Other libraries quote their input, at any length.
MAX_QUOTE_LENGTH = 400


def first_line(error: BaseException | str) -> str:
    """Return the first line of another library's error, shortened; the type's name if it has no message."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= MAX_QUOTE_LENGTH else f"{line[:MAX_QUOTE_LENGTH]}…"
