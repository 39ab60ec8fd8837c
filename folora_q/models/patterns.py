"""The regular expressions of adapter_config.json, which the names of all modules are matched against."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from folora_q.errors import UserError
from folora_q.recipe.paths import short

# Settings that are one, or several; and those whose keys are.
VALUES, KEYS = ("target_modules", "exclude_modules", "layers_pattern"), ("rank_pattern", "alpha_pattern")
# A group that is repeated can take time exponential in the name's length, and PEFT would wait for it.
REPEATED_GROUP, REPEATS, MOST_REPEATS = re.compile(r"\)[*+{]"), re.compile(r"[*+{]"), 12


def check_patterns(path: Path, config: Mapping[str, Any]) -> None:
    """Look through the patterns.

    Args:
        path: of the file, for messages.
        config: what it holds.

    Raises:
        UserError: one is no regular expression, or one that matching could go on with for ever.
    """
    for key, pattern in _patterns(config):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{path}: {key} holds {short(pattern)}, which is no regular expression: {error}") from None
        if REPEATED_GROUP.search(pattern) or len(REPEATS.findall(pattern)) > MOST_REPEATS:
            raise UserError(
                f"{path}: {key} holds {short(pattern)}, a pattern that could be matched for ever",
                "write the modules' names there, or a pattern that repeats no group",
            )


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in VALUES:
        if isinstance(found := config.get(key), str):
            yield key, found
    for key in KEYS:
        found = config.get(key) or {}
        yield from ((key, pattern) for pattern in (found if isinstance(found, Mapping) else ()))
