"""Whatever a recipe or an override holds, it becomes a Recipe or a UserError, never anything else."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from folora_q.errors import UserError
from folora_q.recipe import Recipe, load_recipe
from folora_q.recipe.dataset import Source
from folora_q.recipe.hints import FOREIGN_WORDS
from folora_q.recipe.resolve import PACKAGES
from folora_q.recipe.strict_yaml import dump_yaml, parse_yaml

SECTIONS = {name: field.annotation.model_fields for name, field in Recipe.model_fields.items()}
KEYS = sorted({key for fields in SECTIONS.values() for key in fields})
MINIMAL = {
    "model": {"model_name_or_path": "some/model"},
    "data": {"train_dataset": "train.jsonl"},
    "training": {"output_dir": "run"},
}

# Letters first: a word that looks like a number has a test of its own below. No marks of a pattern: / is not searched.
words = st.from_regex(r"[A-Za-zäλ][\w .:#'\"-]{0,8}", fullmatch=True).filter(lambda word: word == word.strip())
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\\"), max_size=10)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
paths = st.sampled_from(["train.jsonl", "rows", "rows/*.jsonl", "./rows/../train.jsonl", "org/name"])


def typed(annotation: Any, limits: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """Values that an annotation of the schema takes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        limits = [limit for item in more for limit in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return typed(inner, limits)
    if origin is Literal:
        return st.sampled_from([a for a in arguments if a not in PACKAGES or find_spec(PACKAGES[a]) is not None])
    if origin in (Union, UnionType):
        return st.one_of(*map(typed, arguments))
    if origin is list:
        return st.lists(typed(arguments[0]), max_size=2) if arguments[0] is not str else st.lists(words, max_size=2)
    if origin is dict:
        return st.dictionaries(*map(typed, arguments), max_size=2)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation in (int, float):
        least = max((getattr(limit, "ge", getattr(limit, "gt", None)) or 0 for limit in limits), default=None)
        most = min(
            (
                limit.le if isinstance(limit, annotated_types.Le) else limit.lt
                for limit in limits
                if isinstance(limit, (annotated_types.Le, annotated_types.Lt))
            ),
            default=None,
        )
        if annotation is int:
            return st.integers(least, most)
        open_ends = {type(limit) for limit in limits} & {annotated_types.Gt, annotated_types.Lt}
        return st.floats(
            least,
            most,
            allow_nan=False,
            allow_infinity=False,
            exclude_min=annotated_types.Gt in open_ends,
            exclude_max=annotated_types.Lt in open_ends,
        )
    return words


SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "model_name_or_path": st.sampled_from(["some/model", "model", "model.gguf", "demo/SmolLM2-135M-Instruct"]),
    "adapter": st.sampled_from([None, "first"]),
    "adapter_data": st.sampled_from([None, "prose.txt"]),
    "chat_template": st.sampled_from([None, "t.jinja", "chatml"]),
    "general_text": st.sampled_from([None, "prose.txt", ["prose.txt", "t.jinja"]]),
    "general_prompts": st.sampled_from([None, "prose.txt"]),
    "metric_function": st.sampled_from([None, "prose.txt", "score.py:score"]),
    "files": st.sampled_from([[], "prose.txt", ["prose.txt", "t.jinja"]]),
    "budget": st.sampled_from([None, {"kl": 0.02}, {"forgetting": 0.1}]),
    "report_to": st.sampled_from([None, "none", [], ["none"]]),
}


def value_of(name: str, field: FieldInfo) -> st.SearchStrategy[Any]:
    return SPECIAL[name] if name in SPECIAL else typed(field.annotation, field.metadata)


def section_of(fields: dict[str, FieldInfo]) -> st.SearchStrategy[dict[str, Any]]:
    strategies = {name: value_of(name, field) for name, field in fields.items()}
    needed = {name for name, field in fields.items() if field.is_required()}
    return st.fixed_dictionaries(
        {name: strategies[name] for name in strategies if name in needed},
        optional={name: strategies[name] for name in strategies if name not in needed},
    )


sources = st.fixed_dictionaries(
    {"path": paths}, optional={k: value_of(k, f) for k, f in Source.model_fields.items() if k != "path"}
)
SPECIAL["train_dataset"] = paths | sources | st.lists(paths | sources, min_size=1, max_size=3)
SPECIAL["eval_dataset"] = st.none() | SPECIAL["train_dataset"]

good_recipes = st.fixed_dictionaries(
    {name: section_of(SECTIONS[name]) for name in MINIMAL},
    optional={name: section_of(fields) for name, fields in SECTIONS.items() if name not in MINIMAL},
)


@st.composite
def odd_recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Good for the most part: some values are random, some keys misspelt, misplaced or another tool's."""
    recipe = draw(good_recipes)
    for _ in range(draw(st.integers(1, 4))):
        section = draw(st.sampled_from(list(SECTIONS)))
        fields = recipe.setdefault(section, {})
        strange = st.sampled_from([*KEYS, *FOREIGN_WORDS]) | texts
        match draw(st.sampled_from(["value", "value", "spelling", "key", "section", "top", "source"])):
            case "value" if isinstance(fields, dict):
                fields[draw(st.sampled_from(list(SECTIONS[section])))] = draw(values)
            case "spelling" if isinstance(fields, dict) and fields:
                key = draw(st.sampled_from(list(fields)))
                place = draw(st.integers(0, len(key)))
                fields[key[:place] + draw(texts) + key[place + 1 :]] = fields.pop(key)
            case "key" if isinstance(fields, dict):
                fields[draw(strange)] = draw(values)
            case "section":
                recipe[section] = draw(values)
            case "top":
                recipe[draw(strange)] = draw(values)
            case _ if isinstance(recipe["data"], dict):
                source = draw(sources)
                source[draw(st.sampled_from(list(Source.model_fields)) | texts)] = draw(values)
                recipe["data"][draw(st.sampled_from(["train_dataset", "eval_dataset"]))] = source
    return recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    for name in (
        "train.jsonl",
        "rows/a.jsonl",
        "t.jinja",
        "prose.txt",
        "score.py",
        "model/config.json",
        "model.gguf",
        "again/x",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}\n")
    (folder / "first").mkdir()
    (folder / "first" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    return folder


def load(path: Path, recipe: Any, overrides: Sequence[str] = ()) -> Recipe | UserError:
    """What loading comes to; anything else that it raises fails the test."""
    text = recipe if isinstance(recipe, str) else dump_yaml(recipe)
    path.write_text(text, encoding="utf-8")
    try:
        return load_recipe(path, overrides)
    except UserError as error:
        assert error.message and "Traceback" not in error.message and "pydantic" not in error.message
        assert len(error.message) <= 20_000
        assert overrides or str(path) in error.message
        return error


marks = st.text("[]{}:,-?!&*#|>'\"%@`~ \n\tabc019.\\xe_<=", max_size=40)
pieces = st.lists(
    st.sampled_from(
        "a: b c |- > &x *x !!int !!float !!bool !!null !!map !!seq !!set !!omap !!pairs !!binary !!timestamp !!str !t "
        "--- ... %YAML %TAG 1e5 0x1F 010 .inf .nan ~ << = ? : - , [ ] { } ' \" # 1:30 2001-01-01 true no".split()
        + ["\n", "\n  ", "\t", "\r\n", "\u2028", "\ufeff", "\x85", "\\"]
    )
    | texts,
    max_size=12,
).map(" ".join)


LINE_ENDS = "\n\r\x85\u2028\u2029"


def resolves(value: Any, path: Sequence[str | int]) -> bool:
    for part in path:
        value = value[part]
    return True


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | marks | pieces)
def test_random_text_is_a_value_or_a_value_error(text: str) -> None:
    try:
        value, lines = parse_yaml(text)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    if "!" not in text:
        assert all(resolves(value, path) for path in lines)
        last = 1 + sum(text.count(end) for end in LINE_ENDS)
        assert all(1 <= line <= last for line in lines.values())


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
        max_leaves=15,
    )
)
def test_json_is_yaml(value: Any) -> None:
    assert parse_yaml(json.dumps(value, ensure_ascii=False))[0] == value
    assert parse_yaml(json.dumps(value, ensure_ascii=False, indent=1))[0] == value


@settings(max_examples=200, deadline=None)
@given(
    values=st.one_of(odd_recipes(), odd_recipes(), odd_recipes(), st.dictionaries(texts, values, max_size=3), values)
)
def test_random_recipes_are_a_recipe_or_a_user_error(folder: Path, values: Any) -> None:
    event(type(load(folder / "odd.yaml", values)).__name__)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | marks | pieces)
def test_random_text_is_a_user_error_and_no_recipe(folder: Path, text: str) -> None:
    assert isinstance(load(folder / "text.yaml", text), UserError)


every_key = [(section, name) for section, fields in SECTIONS.items() for name in fields]
good_overrides = st.sampled_from(every_key).flatmap(
    lambda key: value_of(key[1], SECTIONS[key[0]][key[1]]).map(lambda value: f"{key[0]}.{key[1]}={json.dumps(value)}")
)
odd_keys = [*KEYS, *FOREIGN_WORDS, *SECTIONS, "data.train_dataset.weight", "data.train_dataset.fields.text", "gate.x.y"]
odd_overrides = texts | st.tuples(
    st.sampled_from([*odd_keys, *map(".".join, every_key)]) | texts,
    texts | values.map(json.dumps) | marks.filter(lambda text: "*" not in text),
).map("=".join)


@settings(max_examples=300, deadline=None)
@given(overrides=st.lists(good_overrides, min_size=1, max_size=3) | st.lists(odd_overrides, min_size=1, max_size=2))
def test_random_overrides_are_a_recipe_or_a_user_error(folder: Path, overrides: list[str]) -> None:
    event(type(load(folder / "overridden.yaml", MINIMAL, overrides)).__name__)


@settings(max_examples=200, deadline=None)
@given(values=good_recipes)
def test_a_recipe_survives_being_written_and_read_again(folder: Path, values: dict[str, Any]) -> None:
    recipe = load(folder / "good.yaml", values)
    if isinstance(recipe, UserError):
        known = (
            "rule spectral",
            "rule frozen",
            "rule step",
            "needs measurements",
            "can only be kept",
            "needs metric_function",
            "regular expression",
            "names no layer",
            "take forever to match",
            "activation_offloading requires",
            "is named twice",
            "which is not set",
            "shards the base",
            "could be stacked",
            "with gate.start: random",
            "budget needs a gate",
            "gate.budget shrinks adapters",
            "gate.budget.forgetting is measured on",
            "would stop a run that spends",
            "steer the budget",
            "objective dpo",
            "objective kto",
            "with dpo",
            "with kto",
        )
        assert any(reason in recipe.message for reason in known), recipe.message
        reject()
    again = load(folder / "again" / "resolved.yaml", recipe.model_dump(mode="json"))
    assert again == recipe


@settings(max_examples=100, deadline=None)
@given(data=st.data(), values=good_recipes)
def test_a_value_in_an_override_is_the_value_in_the_file(
    folder: Path, data: st.DataObject, values: dict[str, Any]
) -> None:
    section, name = data.draw(st.sampled_from([(s, k) for s, fields in values.items() for k in fields]))
    expected = load(folder / "whole.yaml", values)
    value = values[section].pop(name)
    with contextlib.chdir(folder):  # where an override's paths are looked for
        found = load(folder / "whole.yaml", values, [f"{section}.{name}={json.dumps(value, ensure_ascii=False)}"])
    assert type(found) is type(expected)
    assert isinstance(expected, UserError) or found == expected


@pytest.mark.parametrize("name", ["2e-4", "1e5", "08", "0o17"])
def test_a_name_that_looks_like_a_number_survives_too(folder: Path, name: str) -> None:
    recipe = load(folder / "number.yaml", json.dumps({**MINIMAL, "logging": {"run_name": name}}))
    assert isinstance(recipe, Recipe) and recipe.logging.run_name == name
    assert load(folder / "again.yaml", recipe.model_dump(mode="json")) == recipe


def test_an_escape_beyond_unicode_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        parse_yaml(r'"\UFFFFFFFF"')


def test_a_hexadecimal_number_of_thousands_of_digits_is_a_user_error(folder: Path) -> None:
    assert isinstance(load(folder / "hex.yaml", MINIMAL, ["training.learning_rate=0x" + "f" * 4000]), UserError)


@pytest.mark.parametrize("pattern", ["x**.jsonl", "a" * 300 + "/*.jsonl"])
def test_a_pattern_that_cannot_be_searched_for_is_a_user_error(folder: Path, pattern: str) -> None:
    assert isinstance(load(folder / "glob.yaml", {**MINIMAL, "data": {"train_dataset": pattern}}), UserError)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ({**MINIMAL, "k" * 30_000: 1}, []),
        ({**MINIMAL, "data": {"train_dataset": "x" * 30_000 + ".jsonl"}}, []),
        (MINIMAL, ["k" * 30_000 + "=1"]),
    ],
    ids=["key", "path", "override"],
)
def test_a_long_word_is_not_quoted_whole(folder: Path, recipe: dict[str, Any], overrides: list[str]) -> None:
    assert isinstance(load(folder / "long.yaml", recipe, overrides), UserError)


def test_numbers_that_are_not_finite_are_refused_wherever_a_number_is_taken(folder: Path) -> None:
    for section, fields in SECTIONS.items():
        for name, field in fields.items():
            if field.annotation in (int, float):
                for number in (math.nan, math.inf, -math.inf):
                    recipe = {**MINIMAL, section: {**MINIMAL.get(section, {}), name: number}}
                    assert isinstance(load(folder / "number.yaml", recipe), UserError), name
