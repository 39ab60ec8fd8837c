"""Check regular expressions from files, which are matched against module names."""

from __future__ import annotations

import re

# Matching a repeated group can take time exponential in the name's length, and PEFT sets no limit.
REPEATED_GROUP, REPEATS, MAX_REPEATS = re.compile(r"\)[*+{]"), re.compile(r"[*+{]"), 12


def pattern_fault(pattern: str) -> str | None:
    """Return what is wrong with a pattern, to follow "is"; None if it can be used."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"not a regular expression: {error}"
    if REPEATED_GROUP.search(pattern) or len(REPEATS.findall(pattern)) > MAX_REPEATS:
        return "a pattern that could take forever to match"
    return None
