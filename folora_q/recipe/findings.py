"""Messages about invalid recipes: what is wrong with a key or a value, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from reprlib import Repr
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from folora_q.errors import UserError
from folora_q.recipe.explain import SECTIONS, describe_type
from folora_q.recipe.hints import FOREIGN_WORDS
from folora_q.recipe.paths import short
from folora_q.recipe.schema import Recipe
from folora_q.recipe.strict_yaml import KeyPath, dump_yaml

# The most that an error quotes of a value.
SHORT = Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 160
EVERY_KEY = "`folora-q explain` lists the sections and keys of a recipe"
# Keys that have a value in other tools and are sections here.
ALSO_SECTIONS = {
    "adapter": "folora-q always trains a LoRA adapter on a 4-bit base; here its rank is `adapter.r`",
    "model": "the model is set by `model.model_name_or_path`",
    "data": "the rows are set by `data.train_dataset`",
}
# Types of pydantic's errors, and the kind of value that is expected.
NUMBERS = {
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), "a number"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float", "int_parsing_size"), "an integer"),
}
KINDS = {"string_type": "text", "bool_parsing": "true or false", "bool_type": "true or false", "list_type": "a list"}
LIMITS = {"greater_than": "above", "greater_than_equal": "at least", "less_than": "below", "less_than_equal": "at most"}
# Why zero is refused where people mean "none" by it.
NOT_ZERO = {
    "data.eval_size": "some rows must be held out, or nothing can be measured: keep the default of 0.05, or name a "
    "data.eval_dataset",
    "training.save_steps": "leave it out for no checkpoints during training",
    "evaluation.steps": "leave it out for no evaluations during training",
    "training.max_steps": "leave it out to train for num_train_epochs",
}
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}([,_ ']\d{3})+")


def finding(detail: Any, where: str) -> str:
    """Describe one of pydantic's errors in a sentence, with its place and, if possible, what was meant."""
    location = _known_part(detail["loc"])
    name = short(".".join(str(part) for part in location if not isinstance(part, int)))
    given = quoted(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key `{name}`{suggestion(location, _keys_of(location[:-1]))} ({where})"
        case "missing":
            return f"`{name}` is required ({where})"
        case "value_error":
            return f"{detail['ctx']['error']} ({where})"
        case "model_type" | "dict_type":
            return (
                f"`{name}` must be a section with keys of its own, not {given}{_about_section(name, detail)} ({where})"
            )
        case _:
            return f"{_about_value(name, location, detail)} ({where})"


def _about_section(name: str, detail: Any) -> str:
    """Say what was meant by a value in place of a section."""
    if isinstance(detail["input"], str) and re.match(r"\w+:\S", detail["input"]):
        return "; put a space after the colon"
    hint = FOREIGN_WORDS.get(name) if name not in Recipe.model_fields else None
    hint = hint or ALSO_SECTIONS.get(name)
    return f"; {hint}" if hint else ""


def _about_value(name: str, location: KeyPath, detail: Any) -> str:
    """Describe what is wrong with the value of a known key, and what was probably meant."""
    given, kind = quoted(detail["input"]), detail["type"]
    if (kinds := _kinds_of(location)) is not None:
        return f"`{name}` must be {kinds}, not {given}"
    if kind == "literal_error":
        choices = [str(value) for value in _choices(location)]
        near = get_close_matches(str(detail["input"]).lower(), choices, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        return f"`{name.removesuffix('.[key]')}` cannot be {given}: it is one of {', '.join(choices)}{meant}"
    if kind in NUMBERS:
        number = _number_in(detail["input"], NUMBERS[kind] == "an integer")
        return f"`{name}` must be {NUMBERS[kind]}, not {given}" + (f"; did you mean {number}?" if number else "")
    if kind in LIMITS:
        reason = f": {NOT_ZERO[name]}" if detail["input"] == 0 and name in NOT_ZERO else ""
        return f"`{name}` must be {LIMITS[kind]} {next(iter(detail['ctx'].values())):g}, not {given}{reason}"
    if kind in KINDS:
        return f"`{name}` must be {KINDS[kind]}, not {given}"
    if kind in ("string_too_short", "too_short"):
        return f"`{name}` is empty"
    return f"`{name}`: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {given}"


def hint_for(locations: Sequence[KeyPath]) -> str:
    """Return the command that explains what the keys at these locations accept."""
    known = {location: _known_part(location) for location in locations}
    names = dict.fromkeys(".".join(str(part) for part in found[:2]) for found in known.values())
    one = next(iter(names), "")
    section, _, key = one.partition(".")
    if section not in SECTIONS or len({name.partition(".")[0] for name in names}) > 1:
        return EVERY_KEY
    if len(names) > 1 or key not in SECTIONS[section].model_fields:
        return f"`folora-q explain {section}` lists its keys"
    return f"`folora-q explain {one}` says what it accepts"


def section_of(key: str) -> str:
    """Return the only section that has this key; overrides may omit it.

    Raises:
        UserError: no section has it, or several do.
    """
    sections = _sections_with(key)
    if len(sections) == 1:
        return sections[0]
    if sections:
        choices = " or ".join(f"{section}.{key}" for section in sections)
        raise UserError(f"the override `{key}` could be {choices}", "add the section")
    everywhere = [name for section in SECTIONS.values() for name in section.model_fields]
    raise UserError(f"unknown key `{short(key)}` in an override{suggestion((key,), everywhere)}", EVERY_KEY)


def suggestion(location: KeyPath, siblings: Sequence[str]) -> str:
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


def setting_for(word: str) -> str | None:
    """Return the key that a command-line option of another tool stands for, e.g. --lr; None if there is none."""
    key = word.lstrip("-").replace("-", "_")
    if "." in key:
        section, _, inner = key.partition(".")
        return key if section in SECTIONS and inner in SECTIONS[section].model_fields else None
    sections = _sections_with(key)
    theirs = FOREIGN_WORDS.get(key.lower(), "")
    if len(sections) != 1 and all(part.isidentifier() for part in theirs.split(".")):
        return theirs or None
    return f"{sections[0]}.{key}" if len(sections) == 1 else None


def quoted(value: Any) -> str:
    """Quote a value, shortened; null, true and false as in YAML."""
    return dump_yaml(value, flow=True) if value is None or isinstance(value, bool) else SHORT.repr(value)


def _sections_with(key: str) -> list[str]:
    return [name for name, section in SECTIONS.items() if key in section.model_fields]


def _number_in(given: Any, integer: bool) -> str | None:
    """Return the number that a text probably means: with a decimal comma, a percent sign, or a letter too many."""
    if not isinstance(given, str):
        return None
    text = given.strip()
    decimal = re.sub(r"^([-+]?\d*),(\d)", r"\1.\2", text)
    text = re.sub(r"[,_ ']", "", text) if THOUSANDS.fullmatch(text) else decimal
    found = NUMBER.match(text)
    if found is None or len(text) - found.end() > 3:
        return None
    value = float(found[0])
    match text[found.end() :].strip().lower():
        case "%":
            value /= 100
        case "k":
            value *= 1000
        case "" | "." | "," | ";":
            pass
        case rest if not rest.isalpha() or rest in ("m", "b", "t"):
            return None
    if integer:
        return str(int(value)) if value.is_integer() else None
    return f"{value:g}"


def _known_part(location: KeyPath) -> KeyPath:
    """Return a location without the names that pydantic appends for the members of a union."""
    for end in range(2, len(location)):
        if isinstance(location[1], str) and _is_union(_annotation_at(location[:end])):
            return location[:end]
    return location


def _is_union(annotation: Any) -> bool:
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return get_origin(annotation) in (Union, UnionType) and len(kinds) > 1


def _kinds_of(location: KeyPath) -> str | None:
    """Describe what a key of several types accepts; None for other keys."""
    annotation = _annotation_at(location) if all(isinstance(part, str) for part in location) else None
    return describe_type(annotation) if _is_union(annotation) else None


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
