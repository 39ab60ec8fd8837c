"""Check the base model, for `validate`, `estimate` and `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from folora_q.cli.console import starting
from folora_q.preflight.model import Examined, examine_model
from folora_q.recipe import Recipe, places_in
from folora_q.recipe.target_modules import Modules


def examined(recipe: Recipe, path: Path, overrides: Sequence[str], debug: bool, ask_the_hub: bool) -> Examined:
    """Check the recipe's model; transformers is imported only for architectures missing from our table.

    Raises:
        UserError: it cannot be trained according to the recipe.
    """

    def build(config: Mapping[str, Any]) -> Modules:
        with starting(debug):
            from folora_q.models.meta import modules_without_weights
        return modules_without_weights(config)

    return examine_model(recipe, places_in(path, overrides), build, ask_the_hub)
