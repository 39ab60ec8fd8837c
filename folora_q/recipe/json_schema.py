"""The recipe's JSON schema, for completion, help and checks in editors."""

from __future__ import annotations

import json

from folora_q.recipe.schema import Recipe

# YAML language servers read this draft; what pydantic writes is valid in it.
DRAFT = "http://json-schema.org/draft-07/schema#"


def json_schema() -> str:
    """The schema as JSON text; what `folora-q schema` prints and recipes/recipe.schema.json holds."""
    return json.dumps({"$schema": DRAFT, **Recipe.model_json_schema()}, indent=2, ensure_ascii=False) + "\n"
