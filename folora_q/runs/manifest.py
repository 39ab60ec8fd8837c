"""The provenance of a run's results: versions, seeds, checksums."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from folora_q import __version__
from folora_q.errors import UserError
from folora_q.recipe.schema import Recipe
from folora_q.storage.files import sha256

PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")


def new_manifest(recipe: Recipe, data: Mapping[str, Path]) -> dict[str, Any]:
    """Return the content of run.json when a run starts: status, time, seeds, versions and SHA-256 of its data.

    Args:
        data: the recipe's data files, by name.

    Raises:
        UserError: a file that the recipe names cannot be read.
    """
    evaluation = recipe.evaluation
    named = [*(evaluation.general_text or []), evaluation.general_prompts]
    if evaluation.metric == "function":
        assert evaluation.metric_function is not None
        named.append(evaluation.metric_function.rpartition(":")[0])
    files = {**data, **{name: Path(name) for name in named if name is not None}}
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seeds": {"training": recipe.training.seed, "proxy": recipe.proxy.seed},
        # Our own version from the package: a checkout that is not installed has no metadata.
        "versions": {"python": platform.python_version(), "folora-q": __version__}
        | {name: version(name) for name in PACKAGES},
        "data_sha256": {name: _checksum(name, path) for name, path in files.items()},
    }


def _checksum(name: str, path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
