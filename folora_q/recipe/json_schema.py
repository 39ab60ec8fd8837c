"""The recipe's JSON schema, for completion, help and checks in editors."""

from __future__ import annotations

import json

from folora_q.recipe.schema import Recipe

# YAML language servers read this draft; pydantic's schema is valid in it.
DRAFT = "http://json-schema.org/draft-07/schema#"


def json_schema() -> str:
    """Return the schema as JSON text, as `folora-q schema` prints it and recipes/recipe.schema.json contains it."""
    return json.dumps({"$schema": DRAFT, **Recipe.model_json_schema()}, indent=2, ensure_ascii=False) + "\n"
