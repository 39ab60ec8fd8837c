"""Explain sections and keys of the recipe from its schema: what a key means, its type, limits and default."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from folora_q.errors import UserError
from folora_q.recipe.dataset import DataSection, Source
from folora_q.recipe.hints import FOREIGN_WORDS
from folora_q.recipe.paths import short
from folora_q.recipe.schema import Recipe
from folora_q.recipe.section import Section
from folora_q.recipe.strict_yaml import dump_yaml

SECTIONS = {name: cast("type[BaseModel]", field.annotation) for name, field in Recipe.model_fields.items()}
# The section and the keys in it whose values are sources, which have keys of their own.
SOURCES = ("data", ("train_dataset", "eval_dataset"))
LIMITS = {Gt: ("above", "gt"), Ge: ("at least", "ge"), Lt: ("below", "lt"), Le: ("at most", "le")}


@dataclass(frozen=True)
class KeyFacts:
    """What the schema says about a key.

    Attributes:
        name: with its section.
        kind: the type of its values, with their limits.
        default: in YAML; None if the key is required.
        choices: the values, if there are only these.
        of_source: whether it is a key of a source in `data`.
    """

    name: str
    kind: str
    default: str | None
    text: str
    choices: tuple[str, ...] = ()
    of_source: bool = False


@dataclass(frozen=True)
class SectionFacts:
    """What the schema says about a section, with its keys in order."""

    name: str
    text: str
    keys: tuple[KeyFacts, ...]


def sections() -> list[SectionFacts]:
    """Return all sections in the schema's order."""
    return [_section(name) for name in SECTIONS]


def explain(name: str) -> SectionFacts | KeyFacts:
    """Explain a section, or a key that is given with or without its section.

    Raises:
        UserError: there is no such section or key, or several sections have the key.
    """
    if name in SECTIONS:
        return _section(name)
    section, dot, key = name.partition(".")
    known = [facts for found in sections() for facts in found.keys]
    if dot and section == SOURCES[0] and key.startswith(tuple(f"{source}." for source in SOURCES[1])):
        key = key.partition(".")[2]
    matching = [facts for facts in known if facts.name == (f"{section}.{key}" if dot else facts.name.split(".")[0])]
    if not dot:
        matching = [facts for facts in known if facts.name.partition(".")[2] == name]
    if len(matching) == 1:
        return matching[0]
    if matching:
        choices = " or ".join(facts.name for facts in matching)
        raise UserError(f"`{name}` could be {choices}", "add the section")
    raise UserError(f"there is no key `{short(name)}`{_suggestion(name)}", "`folora-q explain` lists the sections")


def _suggestion(name: str) -> str:
    """Suggest the key that an unknown name means: another tool's name, or the nearest of ours."""
    section, dot, key = name.rpartition(".")
    names = [facts.name for found in sections() for facts in found.keys]
    if same := [known for known in names if known.partition(".")[2] == key]:
        return f"; did you mean {' or '.join(f'`{known}`' for known in same)}?"
    if theirs := FOREIGN_WORDS.get(key.lower()):
        return f"; folora-q calls it `{theirs}`" if theirs in names else f"; {theirs}"
    everything = {known.partition(".")[2]: known for known in reversed(names)} | {known: known for known in SECTIONS}
    inside = {known: full for known, full in everything.items() if full.startswith(f"{section}.")} if dot else {}
    for choices in filter(None, (inside, everything)):
        if near := get_close_matches(key, choices, n=1, cutoff=0.7):
            return f"; did you mean `{choices[near[0]]}`?"
    return ""


def _section(name: str) -> SectionFacts:
    model = SECTIONS[name]
    keys = [_key(f"{name}.{key}", field) for key, field in model.model_fields.items()]
    for key, nested in mappings_in(model).items():
        keys += [_key(f"{name}.{key}.{inner}", field) for inner, field in nested.model_fields.items()]
    if model is DataSection:
        keys += [_key(f"{name}.{key}", field, of_source=True) for key, field in Source.model_fields.items()]
    return SectionFacts(name, " ".join((model.__doc__ or "").split()), tuple(keys))


def mappings_in(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the keys of a section whose value is a mapping with keys of its own, apart from sources of rows."""
    kinds = {
        key: [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        for key, field in model.model_fields.items()
    }
    return {
        key: kind for key, found in kinds.items() for kind in found if issubclass(kind, Section) and kind is not Source
    }


def _key(name: str, field: FieldInfo, of_source: bool = False) -> KeyFacts:
    kind = describe_type(field.annotation)
    if limits := " and ".join(dict.fromkeys(_limits(field))):
        kind = f"{kind} {limits}"
    text = " ".join((field.description or "").split())
    return KeyFacts(name, kind, default_of(field), text, tuple(_choices(field.annotation)), of_source)


def default_of(field: FieldInfo) -> str | None:
    """Return a key's default as YAML on one line; None if it is required."""
    return None if field.is_required() else dump_yaml(field.default, flow=True)


def describe_type(annotation: Any, code: Callable[[str], str] = str, source: str = "source") -> str:
    """Describe the type of a key's values.

    Args:
        code: formats a value that is written as it is.
        source: how a source of rows is called.
    """

    def described(inner: Any) -> str:
        return describe_type(inner, code, source)

    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return described(arguments[0])
    if origin is Literal:
        return ", ".join(code(str(value)) for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(described(argument) for argument in arguments if argument is not types.NoneType)
    if origin is list:
        return f"list of {described(arguments[0])}"
    if origin is dict:
        return f"mapping of {described(arguments[0])} to {described(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section) and annotation is not Source:
        return f"mapping with {', '.join(code(key) for key in annotation.model_fields)}"
    return {Source: source, int: "integer", float: "number", str: "text", bool: "true or false"}[annotation]


def _limits(field: FieldInfo) -> Iterator[str]:
    """Yield the limits of a key's numbers, also those inside of an optional type."""

    def inside(annotation: Any) -> Iterator[Any]:
        if get_origin(annotation) is Annotated:
            for item in annotation.__metadata__:
                yield from item.metadata if isinstance(item, FieldInfo) else (item,)
        for argument in get_args(annotation):
            yield from inside(argument)

    for item in (*field.metadata, *inside(field.annotation)):
        if type(item) in LIMITS:
            word, attribute = LIMITS[type(item)]
            limit = getattr(item, attribute)
            yield f"{word} {limit if isinstance(limit, int) else f'{limit:g}'}"


def _choices(annotation: Any) -> Iterator[str]:
    """Yield the values of a key that has no others."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from map(str, arguments)
    elif origin is Annotated:
        yield from _choices(arguments[0])
    elif origin in (Union, types.UnionType):
        parts = [list(_choices(argument)) for argument in arguments if argument is not types.NoneType]
        if all(parts):
            yield from (choice for part in parts for choice in part)
