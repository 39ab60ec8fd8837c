"""Check the regular expressions of adapter_config.json, which are matched against module names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from folora_q.errors import UserError
from folora_q.recipe.paths import short
from folora_q.recipe.patterns import pattern_fault

# Settings that are one, or several; and those whose keys are.
VALUES, KEYS = ("target_modules", "exclude_modules", "layers_pattern"), ("rank_pattern", "alpha_pattern")


def check_patterns(path: Path, config: Mapping[str, Any]) -> None:
    """Look through the patterns.

    Args:
        path: of the file, for messages.
        config: what it holds.

    Raises:
        UserError: one is no regular expression, or one that matching could go on with for ever.
    """
    for key, pattern in _patterns(config):
        if fault := pattern_fault(pattern):
            raise UserError(
                f"{path}: {key} holds {short(pattern)}, which is {fault}",
                "write the modules' names there, or a pattern that repeats no group",
            )


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in VALUES:
        if isinstance(found := config.get(key), str):
            yield key, found
    for key in KEYS:
        found = config.get(key) or {}
        yield from ((key, pattern) for pattern in (found if isinstance(found, Mapping) else ()))
