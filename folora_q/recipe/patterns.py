"""Check regular expressions from files, which are matched against module names."""

from __future__ import annotations

import re

# A group that is repeated can take time exponential in the name's length, and PEFT would wait for it.
REPEATED_GROUP, REPEATS, MAX_REPEATS = re.compile(r"\)[*+{]"), re.compile(r"[*+{]"), 12


def pattern_fault(pattern: str) -> str | None:
    """What is wrong with a pattern, as what it is; None if it can be used."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"no regular expression: {error}"
    if REPEATED_GROUP.search(pattern) or len(REPEATS.findall(pattern)) > MAX_REPEATS:
        return "a pattern that could be matched for ever"
    return None
