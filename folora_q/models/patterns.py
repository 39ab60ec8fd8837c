"""Check the regular expressions of adapter_config.json, which are matched against module names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from folora_q.errors import UserError
from folora_q.recipe.paths import short
from folora_q.recipe.patterns import pattern_fault

# Settings whose values are patterns, and settings whose keys are.
VALUES, KEYS = ("target_modules", "exclude_modules", "layers_pattern"), ("rank_pattern", "alpha_pattern")


def check_patterns(path: Path, config: Mapping[str, Any]) -> None:
    """Check the patterns.

    Args:
        path: the file, for messages.
        config: its content.

    Raises:
        UserError: one is not a regular expression, or matching it could take forever.
    """
    for key, pattern in _patterns(config):
        if fault := pattern_fault(pattern):
            raise UserError(
                f"{path}: {key} holds {short(pattern)}, which is {fault}",
                "replace it with the modules' names, or with a pattern that repeats no group",
            )


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in VALUES:
        if isinstance(found := config.get(key), str):
            yield key, found
    for key in KEYS:
        found = config.get(key) or {}
        yield from ((key, pattern) for pattern in (found if isinstance(found, Mapping) else ()))
