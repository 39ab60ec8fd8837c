"""The shipped recipes: list them, find one by its name, and copy one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import folora_q
from folora_q.errors import UserError, first_line
from folora_q.recipe.paths import short
from folora_q.storage.files import atomic_write

SCHEMA_FILE = "recipe.schema.json"
ENDINGS = (".yaml", ".yml")
LISTED = "`folora-q recipes` lists the shipped ones"
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

    @property
    def cards(self) -> tuple[int, float] | None:
        """The number and the memory of its GPUs, if they are several."""
        found = re.search(r"-(\d+)x(\d+)gb-", self.name)
        return None if found is None else (int(found[1]), float(found[2]))


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: in the wheel, or next to the package in a checkout."""
    package = Path(folora_q.__file__).parent
    packed = package / "_recipes"
    return packed if packed.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[ShippedRecipe]:
    """Return all shipped recipes, sorted by name."""
    return [ShippedRecipe(path.stem, path, _title(path)) for path in sorted(recipes_folder().glob("*.yaml"))]


def recipe_file(path: Path) -> Path:
    """Return the file of a recipe: the path itself or, for the name of a shipped recipe, that recipe.

    A file of the user's wins, also one to which the name's ending is to be added.

    Raises:
        UserError: there is neither; the message names what is similar.
    """
    try:
        if path.is_file():
            return path
        here = [file for ending in ENDINGS if (file := path.with_name(path.name + ending)).is_file()]
    except (OSError, ValueError) as error:  # no name, a name that is too long, or a loop of links
        raise UserError(f"no recipe at {short(path)}: {first_line(error)}", LISTED) from None
    if here:
        return here[0]
    known = {recipe.name: recipe.path for recipe in shipped_recipes()}
    stem = path.name.removesuffix(path.suffix) if path.suffix in ENDINGS else path.name
    if path.parent == Path() and stem in known:
        return known[stem]
    if path.is_dir():
        inside = next((name for name in ("recipe.resolved.yaml", "recipe.yaml") if (path / name).is_file()), None)
        raise UserError(f"{path} is a folder, not a recipe", f"did you mean {path / inside}?" if inside else LISTED)
    if path.exists():  # a pipe, such as /dev/stdin
        return path
    if stem in known:
        raise UserError(f"no recipe at {path}", f"the shipped recipe of that name is `{stem}`, without a folder")
    raise UserError(f"no recipe at {short(path)}{_near(path, stem, list(known))}", LISTED)


def shipped_models() -> set[str]:
    """Return the models that shipped recipes name."""
    lines = (line for recipe in shipped_recipes() for line in recipe.path.read_text(encoding="utf-8").splitlines())
    return {match[1] for line in lines if (match := re.match(r"  model_name_or_path: (\S+)", line))}


def is_shipped(path: Path) -> bool:
    """Return whether a file is one of the shipped recipes."""
    return path.parent.resolve() == recipes_folder().resolve()


def _near(path: Path, stem: str, known: list[str]) -> str:
    """Name the recipe that a misspelt path or name means: a file next to it, or a shipped one."""
    try:
        files = {file.stem: file for file in sorted(path.parent.iterdir()) if file.suffix in ENDINGS}
    except OSError:
        files = {}
    near = [str(files[name]) for name in get_close_matches(stem, files, n=1)]
    near += get_close_matches(stem, known, n=1) if path.parent == Path() else []
    return f"; did you mean {near[0]}?" if near else ""


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
    if target.suffix not in ENDINGS:
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
