"""Load a recipe from YAML and overrides. All errors are reported at once, with their lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from folora_q.errors import UserError
from folora_q.recipe.dataset import DataSection
from folora_q.recipe.hints import FOREIGN_WORDS
from folora_q.recipe.paths import exists, listed, short, with_absolute_paths
from folora_q.recipe.schema import Recipe
from folora_q.recipe.strict_yaml import MAX_RECIPE_LENGTH, KeyPath, parse_yaml
from folora_q.storage.redaction import conceal, holds_secret

# The most that an error quotes of a value.
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 160
# Keys that name files of data and of text.
DATA_KEYS = ("train_dataset", "eval_dataset")
TEXT_KEYS = ("general_text", "general_prompts", "metric_function")
# Beginning of a location on the command line.
OVERRIDE = "override "
SECTIONS = {name: cast(type[BaseModel], field.annotation) for name, field in Recipe.model_fields.items()}


def load_recipe(path: Path, overrides: Sequence[str] = (), with_data: bool = True) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: a YAML file.
        overrides: `section.key=value`, or `key=value` where only one section has the key; the value in YAML; later ones
            win.
        with_data: look for the data and texts too, which must exist then.

    Returns:
        The recipe, with its input paths (data, templates, texts, a local model) made absolute.

    Raises:
        UserError: the file cannot be read, or anything in it is wrong; the message lists every finding.
    """
    values, places = _read(path, overrides)
    _refuse_secrets(values, places, path)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        order = {place: number for number, place in enumerate(dict.fromkeys(places.values()))}
        found = [(detail, _place(detail["loc"], places, path)) for detail in error.errors(include_url=False)]
        found.sort(key=lambda item: order.get(item[1], -1))
        findings = dict.fromkeys(_finding(detail, where) for detail, where in found)
        raise UserError(listed(findings), "docs/recipe.md explains every key, and so does `folora-q schema`") from None

    def folder_for(value: str, key: KeyPath) -> Path:
        """Return the folder for a relative path: the recipe's, or for an override the working directory."""
        given_here = _place(key, places, path).startswith(OVERRIDE)
        only_there = exists(path.parent / value) and not exists(Path(value))
        return Path.cwd() if given_here and not only_there else path.parent

    if with_data:
        return with_absolute_paths(recipe, folder_for, lambda key: _place(key, places, path))
    found = with_absolute_paths(_without_data(recipe), folder_for, lambda key: _place(key, places, path))
    data = found.data.model_copy(update={key: getattr(recipe.data, key) for key in DATA_KEYS})
    return found.model_copy(update={"data": data, "evaluation": recipe.evaluation})


def _without_data(recipe: Recipe) -> Recipe:
    """Return a copy of a recipe that names no file of data or text."""
    data = recipe.data.model_copy(update=dict.fromkeys(DATA_KEYS))
    evaluation = recipe.evaluation.model_copy(update=dict.fromkeys(TEXT_KEYS))
    return recipe.model_copy(update={"data": data, "evaluation": evaluation})


def places_in(path: Path, overrides: Sequence[str] = ()) -> Callable[[KeyPath], str]:
    """Return a function that locates the keys of a recipe which `load_recipe` accepts: file and line, or override."""
    _, places = _read(path, overrides)
    return lambda key: _place(key, places, path)


def _read(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    """Read the values of a recipe with its overrides, and the location of each."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_RECIPE_LENGTH + 1)  # it may not be a recipe, and never end
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}", "`folora-q recipes` lists the shipped ones") from None
    except UnicodeDecodeError as error:
        raise UserError(f"the recipe {path} is not UTF-8 text: byte {error.start}", "save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from None
    try:
        values, lines = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as `model:` and `data:`, not a single value")

    places = {key: f"{path} line {line}" for key, line in lines.items()}
    for override in overrides:
        key = _apply_override(values, override)
        places = {known: place for known, place in places.items() if known[: len(key)] != key}
        places[key] = OVERRIDE + _short(override)
    return values, _with_what_is_around(places)


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
            f"cannot read the override {_short(override)}",
            "write section.key=value, e.g. training.learning_rate=2e-4",
        )
    if len(path) == 1 and path[0] not in Recipe.model_fields:
        path = (_section_of(path[0]), *path)
    try:
        value = raw if raw.startswith("*") else parse_yaml(raw)[0]  # a glob, which YAML would read as an alias
    except ValueError as error:
        raise UserError(f"the value of the override {_short(override)} is not valid YAML: {error}") from None
    section: dict[str, Any] = values
    for part in path[:-1]:
        below = section.get(part)
        if below is None:
            below = {}
        elif isinstance(below, str) and part in DataSection.model_fields:
            below = {"path": below}  # a path is short for a mapping with `path`
        elif not isinstance(below, dict):
            raise UserError(
                f"`{part}` in the recipe is not a mapping, so the override {_short(override)} cannot be set"
            )
        section[part] = below
        section = below
    section[path[-1]] = value
    return path


def _section_of(key: str) -> str:
    """Return the only section that has this key; overrides may omit it."""
    sections = _sections_with(key)
    if len(sections) == 1:
        return sections[0]
    if sections:
        choices = " or ".join(f"{section}.{key}" for section in sections)
        raise UserError(f"the override `{key}` could be {choices}", "add the section")
    everywhere = [name for section in SECTIONS.values() for name in section.model_fields]
    raise UserError(
        f"unknown key `{short(key)}` in an override{_suggestion((key,), everywhere)}",
        "docs/recipe.md explains every key, and so does `folora-q schema`",
    )


def _sections_with(key: str) -> list[str]:
    return [name for name, section in SECTIONS.items() if key in section.model_fields]


def _finding(detail: Any, where: str) -> str:
    location: KeyPath = detail["loc"]
    name = short(".".join(str(part) for part in location if not isinstance(part, int)))
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key `{name}`{_suggestion(location, _keys_of(location[:-1]))} ({where})"
        case "missing":
            return f"`{name}` is required ({where})"
        case "value_error":
            return f"{detail['ctx']['error']} ({where})"
        case "model_type" | "dict_type":
            hint = FOREIGN_WORDS.get(name) if name not in Recipe.model_fields else None
            hint = hint or ALSO_SECTIONS.get(name)
            reason = f"; {hint}" if hint else ""
            return f"`{name}` must be a section with keys of its own, not {_short(detail['input'])}{reason} ({where})"
        case "literal_error":
            choices = [str(value) for value in _choices(location)]
            near = get_close_matches(str(detail["input"]).lower(), choices, n=1)
            suggestion = f"; did you mean {near[0]}?" if near else ""
            name = name.removesuffix(".[key]")
            return (
                f"`{name}` cannot be {_short(detail['input'])}: it is one of {', '.join(choices)}{suggestion} ({where})"
            )
        case _:
            message = detail["msg"][0].lower() + detail["msg"][1:]
            return f"`{name}`: {message}, got {_short(detail['input'])} ({where})"


# Keys that have a value in other tools and are sections here.
ALSO_SECTIONS = {
    "adapter": "folora-q always trains a LoRA adapter on a 4-bit base; here its rank is `adapter.r`",
    "model": "the model is set by `model.model_name_or_path`",
    "data": "the rows are set by `data.train_dataset`",
}


def _suggestion(location: KeyPath, siblings: Sequence[str]) -> str:
    """Suggest what an unknown key means: a misspelt sibling, a key of another section, or another tool's name."""
    key = str(location[-1])
    theirs = FOREIGN_WORDS.get(key.lower(), "")
    elsewhere = _sections_with(key)
    if elsewhere and not theirs.startswith(f"{location[0]}."):
        return f"; it belongs in the section `{elsewhere[0]}`"
    if theirs:
        is_key = all(part.isidentifier() for part in theirs.split("."))
        return f"; folora-q calls it `{theirs}`" if is_key else f"; {theirs}"
    if near := get_close_matches(key, siblings, n=1):
        return f"; did you mean `{near[0]}`?"
    return ""


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


def _keys_of(location: KeyPath) -> list[str]:
    model = _annotation_at(location)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _choices(location: KeyPath) -> Iterator[Any]:
    """Yield the values that a Literal anywhere in the annotation at `location` allows."""

    def literals(annotation: Any) -> Iterator[Any]:
        if get_origin(annotation) is Literal:
            yield from get_args(annotation)
        elif get_origin(annotation) is dict:
            yield from literals(get_args(annotation)[0 if location[-1] == "[key]" else 1])
        else:
            for argument in get_args(annotation):
                yield from literals(argument)

    named = [part for part in location if part != "[key]"]
    yield from dict.fromkeys(literals(_annotation_at(tuple(named))))


def _annotation_at(location: KeyPath) -> Any:
    annotation: Any = Recipe
    for part in location:
        annotation = _innermost(annotation)
        if isinstance(part, int) or not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            continue
        if part not in annotation.model_fields:
            return None
        annotation = annotation.model_fields[str(part)].annotation
    return _innermost(annotation) if isinstance(_innermost(annotation), type) else annotation


def _innermost(annotation: Any) -> Any:
    """Return the type inside Annotated, optional and list annotations."""
    while get_origin(annotation) in (Union, UnionType, Annotated, list):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    return annotation


def _short(value: Any) -> str:
    return SHORT.repr(value)
