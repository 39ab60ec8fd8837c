"""Write docs/recipe.md from the schema: `.venv/bin/python docs/make_recipe_reference.py`. A test compares them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from folora_q.recipe import Recipe
from folora_q.recipe.dataset import DataSection, Source
from folora_q.recipe.explain import default_of, describe_type, mappings_in

TARGET = Path(__file__).with_name("recipe.md")
HEAD = """# The recipe, key by key

A recipe is a YAML file of the sections below; an unknown key is an error. Any value can be overridden on the command
line: `folora-q train recipe.yaml training.learning_rate=2e-4`, or `learning_rate=2e-4` where only one section has the
key, or `--set learning_rate=2e-4`. `--dry-run` prints the complete recipe with all defaults, `folora-q schema` the
JSON schema for completion in editors. YAML is read as version 1.2: `2e-5` is a number, `on` and `no` are words, and a
repeated key is an error.

[data.md](data.md) shows the data formats, [keep.md](keep.md) the section `keep`; [coming-from.md](coming-from.md) has
the names that other tools use.

Generated from `folora_q/recipe/schema.py` by `docs/make_recipe_reference.py`; do not edit.
"""


def reference() -> str:
    """Return the page."""
    parts = [HEAD]
    for name, section in Recipe.model_fields.items():
        model = section.annotation
        parts += _table(f"## `{name}`", model)
        for key, nested in mappings_in(model).items():
            parts += _table(f"### `{name}.{key}`", nested)
        if model is DataSection:
            parts += _table("### A source", Source)
    return "".join(parts)


def _table(title: str, model: type[BaseModel]) -> list[str]:
    head = f"\n{title}\n\n{model.__doc__}\n\n| key | type | default | |\n|---|---|---|---|\n"
    return [head, *(_row(key, field) for key, field in model.model_fields.items())]


def _row(key: str, field: FieldInfo) -> str:
    default = default_of(field)
    kind = describe_type(field.annotation, "`{}`".format, "[source](#a-source)")
    cells = f"`{key}`", kind, "required" if default is None else f"`{default}`", " ".join(field.description.split())
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
