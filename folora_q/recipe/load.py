"""From a YAML file and overrides to a checked recipe. Every finding is reported at once, with its line."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from folora_q.errors import UserError
from folora_q.recipe.schema import Recipe

KeyPath = tuple[str | int, ...]


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's SafeLoader drops a repeated key without a word; this one refuses it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: a YAML file.
        overrides: `section.key=value`, the value in YAML; later ones win.

    Returns:
        The recipe, with its input paths (`data.*_file`, `evaluation.general_text`, a local model) made absolute.

    Raises:
        UserError: the file cannot be read, or anything in it is wrong; the message lists every finding.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}", "the shipped ones are in the folder recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        values = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `data:`, not a single value")

    lines = {key: f"{path} line {line}" for key, line in _lines(node)} if node is not None else {}
    for override in overrides:
        key = _apply_override(values, override)
        lines[key] = f"override {override!r}"
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        findings = [_finding(detail, lines, path) for detail in error.errors(include_url=False)]
        raise UserError("\n       ".join(findings), "every key is explained in README.md and docs/recipe.md") from None
    return _with_absolute_paths(recipe, path.parent, lines)


def _apply_override(values: dict[str, Any], override: str) -> KeyPath:
    key, equals, raw = override.partition("=")
    path = tuple(key.split("."))
    if not equals or len(path) != 2 or not all(path):
        raise UserError(
            f"cannot read the override {override!r}",
            "write section.key=value, e.g. training.learning_rate=2e-4",
        )
    try:
        value = yaml.load(raw, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise UserError(f"the value of the override {override!r} is not valid YAML: {_one_line(error)}") from None
    section = values.setdefault(path[0], {})
    if section is None:
        section = values[path[0]] = {}
    if not isinstance(section, dict):
        raise UserError(f"the section `{path[0]}` of the recipe is not a list of keys, so {override!r} cannot be set")
    section[path[1]] = value
    return path


def _finding(detail: Any, lines: dict[KeyPath, str], path: Path) -> str:
    location: KeyPath = detail["loc"]
    name = ".".join(str(part) for part in location)
    where = next((lines[location[:end]] for end in range(len(location), 0, -1) if location[:end] in lines), path)
    match detail["type"]:
        case "extra_forbidden":
            near = get_close_matches(str(location[-1]), _keys_of(Recipe, location[:-1]), n=1)
            suggestion = f"; did you mean `{near[0]}`?" if near else ""
            return f"unknown key `{name}`{suggestion} ({where})"
        case "missing":
            return f"`{name}` is required ({where})"
        case "value_error":
            return f"{detail['ctx']['error']} ({where})"
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            return f"`{name}`: {message}, got {detail['input']!r} ({where})"


def _keys_of(model: type[BaseModel], location: KeyPath) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if get_origin(annotation) in (Union, UnionType):
            annotation = next(a for a in get_args(annotation) if isinstance(a, type))
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _lines(node: yaml.Node, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*prefix, key.value), key.start_mark.line + 1
            yield from _lines(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1


def _with_absolute_paths(recipe: Recipe, folder: Path, lines: dict[KeyPath, str]) -> Recipe:
    """Inputs are looked for beside the recipe, so that it runs from any folder; a missing one is found here."""
    changes: dict[str, dict[str, str]] = {}
    for section, key in (("data", "train_file"), ("data", "eval_file"), ("evaluation", "general_text")):
        value = getattr(getattr(recipe, section), key)
        if value is None:
            continue
        absolute = (folder / Path(value).expanduser()).resolve()
        if not absolute.is_file():
            where = lines.get((section, key), folder)
            raise UserError(
                f"`{section}.{key}`: no file at {absolute} ({where})", "paths are relative to the recipe's folder"
            )
        changes.setdefault(section, {})[key] = str(absolute)
    local_model = (folder / Path(recipe.model.model_name_or_path).expanduser()).resolve()
    if local_model.exists():
        changes["model"] = {"model_name_or_path": str(local_model)}
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=update) for name, update in changes.items()}
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
