"""Writes docs/recipe.md from the schema: `.venv/bin/python docs/make_recipe_reference.py`. A test compares them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from folora_q.recipe import Recipe

TARGET = Path(__file__).with_name("recipe.md")
HEAD = """# The recipe, key by key

A recipe is a YAML file of the sections below; an unknown key is an error. Any value can be overridden on the command
line: `folora-q train recipe.yaml training.learning_rate=2e-4`. `--dry-run` prints the recipe with everything filled in.

Made from `folora_q/recipe/schema.py` by `docs/make_recipe_reference.py`; do not edit.
"""


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, section in Recipe.model_fields.items():
        model = section.annotation
        parts.append(f"\n## `{name}`\n\n{model.__doc__}\n\n| key | type | default | |\n|---|---|---|---|\n")
        parts += [_row(key, field) for key, field in model.model_fields.items()]
    return "".join(parts)


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
    cells = f"`{key}`", _type(field.annotation), default, " ".join(field.description.split())
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments if argument is not types.NoneType)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    return {int: "integer", float: "number", str: "text", bool: "true or false"}[annotation]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
