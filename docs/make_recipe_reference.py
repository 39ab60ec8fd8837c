"""Write docs/recipe.md from the schema: `.venv/bin/python docs/make_recipe_reference.py`. A test compares them."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from folora_q.recipe import Recipe
from folora_q.recipe.dataset import DataSection, Source
from folora_q.recipe.strict_yaml import dump_yaml

TARGET = Path(__file__).with_name("recipe.md")
HEAD = """# The recipe, key by key

A recipe is a YAML file of the sections below; an unknown key is an error. Any value can be overridden on the command
line: `folora-q train recipe.yaml training.learning_rate=2e-4`, or `learning_rate=2e-4` where only one section has the
key, or `--set learning_rate=2e-4`. `--dry-run` prints the complete recipe with all defaults, `folora-q schema` the
JSON schema for completion in editors. YAML is read as version 1.2: `2e-5` is a number, `on` and `no` are words, and a
repeated key is an error.

[data.md](data.md) shows the data formats; [coming-from.md](coming-from.md) has the names that other tools use.

Generated from `folora_q/recipe/schema.py` by `docs/make_recipe_reference.py`; do not edit.
"""


def reference() -> str:
    """Return the page."""
    parts = [HEAD]
    for name, section in Recipe.model_fields.items():
        model = section.annotation
        parts.append(f"\n## `{name}`\n\n{model.__doc__}\n\n| key | type | default | |\n|---|---|---|---|\n")
        parts += [_row(key, field) for key, field in model.model_fields.items()]
        if model is DataSection:
            parts.append(f"\n### A source\n\n{Source.__doc__}\n\n| key | type | default | |\n|---|---|---|---|\n")
            parts += [_row(key, field) for key, field in Source.model_fields.items()]
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
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    return {Source: "[source](#a-source)", int: "integer", float: "number", str: "text", bool: "true or false"}[
        annotation
    ]


def _yaml(value: Any) -> str:
    return dump_yaml(value, flow=True)


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
