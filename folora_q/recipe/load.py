"""Load a recipe from YAML and overrides. All errors are reported at once, with their lines."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from folora_q.errors import UserError
from folora_q.recipe.dataset import DataSection
from folora_q.recipe.findings import finding, hint_for, quoted, section_of
from folora_q.recipe.keep import from_shorthand
from folora_q.recipe.paths import exists, is_data_name, listed
from folora_q.recipe.resolve import RELATIVE, with_absolute_paths
from folora_q.recipe.schema import Recipe
from folora_q.recipe.shipped import is_shipped, recipe_file
from folora_q.recipe.strict_yaml import MAX_RECIPE_LENGTH, KeyPath, parse_yaml
from folora_q.recipe.yaml_causes import YamlError
from folora_q.storage.redaction import conceal, holds_secret

# Keys that name files of data and of text.
DATA_KEYS = ("train_dataset", "eval_dataset")
TEXT_KEYS = ("general_text", "general_prompts", "metric_function")
# Beginning of a location on the command line.
OVERRIDE = "override "
OWN_DATA = "a shipped recipe without data is for yours: add data.train_dataset=FILE"


def load_recipe(path: Path, overrides: Sequence[str] = (), with_data: bool = True) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe.
        overrides: `section.key=value`, or `key=value` where only one section has the key; the value in YAML; later ones
            win.
        with_data: look for the data and texts too, which must exist then.

    Returns:
        The recipe, with its input paths (data, templates, texts, a local model) made absolute.

    Raises:
        UserError: the file cannot be read, or anything in it is wrong; the message lists every finding.
    """
    path = recipe_file(path)
    values, places = _read(path, overrides)
    _refuse_secrets(values, places, path)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        order = {place: number for number, place in enumerate(dict.fromkeys(places.values()))}
        found = [(detail, _place(detail["loc"], places, path)) for detail in error.errors(include_url=False)]
        found.sort(key=lambda item: order.get(item[1], -1))
        findings = dict.fromkeys(finding(detail, where) for detail, where in found)
        raise UserError(listed(findings), hint_for([detail["loc"] for detail, _ in found])) from None

    def folder_for(value: str, key: KeyPath) -> Path:
        """Return the folder for a relative path: the recipe's, or for an override the working directory."""
        given_here = _place(key, places, path).startswith(OVERRIDE)
        there = exists(path.parent / value)
        if is_shipped(path) and not there:  # a recipe without data: the user's are not in the package
            return Path.cwd()
        return Path.cwd() if given_here and not (there and not exists(Path(value))) else path.parent

    relative = OWN_DATA if is_shipped(path) else RELATIVE
    if with_data:
        return with_absolute_paths(recipe, folder_for, lambda key: _place(key, places, path), relative)
    found = with_absolute_paths(_without_data(recipe), folder_for, lambda key: _place(key, places, path), relative)
    data = found.data.model_copy(update={key: getattr(recipe.data, key) for key in DATA_KEYS})
    return found.model_copy(update={"data": data, "evaluation": recipe.evaluation, "keep": recipe.keep})


def _without_data(recipe: Recipe) -> Recipe:
    """Return a copy of a recipe that names no file of data or text."""
    data = recipe.data.model_copy(update=dict.fromkeys(DATA_KEYS))
    evaluation = recipe.evaluation.model_copy(update=dict.fromkeys(TEXT_KEYS))
    keep = recipe.keep.model_copy(update={"files": []})
    return recipe.model_copy(update={"data": data, "evaluation": evaluation, "keep": keep})


def places_in(path: Path, overrides: Sequence[str] = ()) -> Callable[[KeyPath], str]:
    """Return a function that locates the keys of a recipe which `load_recipe` accepts: file and line, or override."""
    path = recipe_file(path)
    _, places = _read(path, overrides)
    return lambda key: _place(key, places, path)


def _read(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Read the values of a recipe with its overrides, and the location of each."""
    text = _text_of(path)
    try:
        values, lines = parse_yaml(text)
    except ValueError as error:
        _refuse_data(path)
        quoted_line, hint = (error.quoted, error.hint) if isinstance(error, YamlError) else (str(error), None)
        raise UserError(f"{path} is not valid YAML: {quoted_line}", hint) from None
    values = {} if values is None else values
    if not isinstance(values, dict) or not values.keys() & Recipe.model_fields.keys():
        _refuse_data(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `data:`, not a single value")

    places = {key: f"{path} line {line}" for key, line in lines.items()}
    for override in overrides:
        key = _apply_override(values, override)
        places = {known: place for known, place in places.items() if known[: len(key)] != key}
        places[key] = OVERRIDE + quoted(override)
    return values, _with_what_is_around(places)


def _text_of(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MAX_RECIPE_LENGTH + 1)  # it may not be a recipe, and never end
    except UnicodeDecodeError as error:
        _refuse_data(path)
        raise UserError(f"the recipe {path} is not UTF-8 text: byte {error.start}", "save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None


def _refuse_data(path: Path) -> None:
    """Raise an error for a data file in place of a recipe, by its name; JSON is valid YAML, and may be a recipe."""
    if is_data_name(path.name):
        raise UserError(
            f"{path} is a data file, and a recipe is a YAML file that names it",
            f"write a recipe for it: folora-q init --data {shlex.quote(str(path))}",
        )


def _refuse_secrets(values: dict[str, Any], places: Mapping[KeyPath, str], path: Path) -> None:
    """Raise an error if a recipe contains a secret: it is copied into the run folder, partly into cards and reports."""
    strings = list(_strings(values))
    if not holds_secret(
        "\n".join(value for _, value in strings)
    ):  # one check for all values, since it reads the environment
        return
    found = [
        f"`{'.'.join(str(part) for part in key)}` holds a token or a password ({conceal(_place(key, places, path))})"
        for key, value in strings
        if holds_secret(value)
    ]
    if found:
        raise UserError(
            listed(found),
            "a recipe is copied into the run folder: log in with `hf auth login`, or set HF_TOKEN or the variable of "
            "your tracker",
        )


def _strings(value: Any, key: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield key, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, below in inner:
        yield from _strings(below, (*key, part))


def _apply_override(values: dict[str, Any], override: str) -> KeyPath:
    key, equals, raw = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        raise UserError(
            f"cannot read the override {quoted(override)}",
            "write section.key=value, e.g. training.learning_rate=2e-4",
        )
    if len(path) == 1 and path[0] not in Recipe.model_fields:
        path = (section_of(path[0]), *path)
    try:
        value = raw if raw.startswith("*") else parse_yaml(raw)[0]  # a glob, which YAML would read as an alias
    except ValueError as error:
        raise UserError(f"the value of the override {quoted(override)} is not valid YAML: {error}") from None
    section: dict[str, Any] = values
    for part in path[:-1]:
        below = section.get(part)
        if below is None:
            below = {}
        elif isinstance(below, str) and part in DataSection.model_fields:
            below = {"path": below}  # a path is short for a mapping with `path`
        elif isinstance(below, str | list) and part == "keep":
            below = from_shorthand(below)
        elif not isinstance(below, dict):
            raise UserError(
                f"`{part}` in the recipe is not a mapping, so the override {quoted(override)} cannot be set"
            )
        section[part] = below
        section = below
    section[path[-1]] = value
    return path


def _with_what_is_around(places: Mapping[KeyPath, str]) -> dict[KeyPath, str]:
    """Add for every prefix of a key the first place that has it."""
    found: dict[KeyPath, str] = {}
    for key, place in places.items():
        for end in range(1, len(key) + 1):
            found.setdefault(key[:end], place)
    return found


def _place(location: Sequence[str | int], places: Mapping[KeyPath, str], path: Path) -> str:
    """Return the location of a key or the nearest one around it, skipping list positions that the file lacks."""
    for end in range(len(location), 0, -1):
        around = tuple(location[:end])
        for candidate in (around, tuple(part for part in around if not isinstance(part, int))):
            if candidate in places:
                return places[candidate]
    return str(path)
