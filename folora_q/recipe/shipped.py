"""List the shipped recipes, and copy one."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import folora_q
from folora_q.errors import UserError
from folora_q.storage.files import atomic_write

SCHEMA_FILE = "recipe.schema.json"
# Data files of recipes with their own data, which is in a folder of the recipe's name.
DATA = ("*.jsonl", "*.txt")


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe in the package.

    Attributes:
        title: the first line of its comment.
    """

    name: str
    path: Path
    title: str


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: in the wheel, or next to the package in a checkout."""
    package = Path(folora_q.__file__).parent
    packed = package / "_recipes"
    return packed if packed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[ShippedRecipe]:
    """Return all shipped recipes, sorted by name."""
    return [ShippedRecipe(path.stem, path, _title(path)) for path in sorted(recipes_folder().glob("*.yaml"))]


def copy_recipe(name: str, target: Path, overwrite: bool = False) -> list[Path]:
    """Copy a recipe, its data if it has any, and the schema for completion in editors.

    Args:
        target: a .yaml file, or a folder.

    Returns:
        The files written, the recipe first.

    Raises:
        UserError: there is no such recipe, or a file already exists and not `overwrite`.
    """
    known = {recipe.name: recipe for recipe in shipped_recipes()}
    recipe = known.get(name.removesuffix(".yaml"))
    if recipe is None:
        near = get_close_matches(name, known, n=1)
        raise UserError(
            f"there is no recipe named {name}" + (f"; did you mean {near[0]}?" if near else ""),
            "`folora-q recipes` lists them",
        )
    if target.suffix not in (".yaml", ".yml"):
        target = target / recipe.path.name
    copies = {target: recipe.path}
    for pattern in DATA:
        for file in sorted((recipe.path.parent / recipe.name).glob(pattern)):
            copies[target.parent / recipe.name / file.name] = file
    for copy in copies:
        if copy.exists() and not overwrite:
            raise UserError(f"{copy} already exists", "add --overwrite, or name another file")
    schema = target.parent / SCHEMA_FILE
    copies[schema] = recipe.path.parent / SCHEMA_FILE
    try:
        for copy, file in copies.items():
            atomic_write(copy, file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    return list(copies)


def _title(path: Path) -> str:
    comments = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
    return next((line[2:] for line in comments if not line.startswith("# yaml-language-server")), "")
