"""The schema that editors read: committed as it is made, and in agreement with what loading a recipe says."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from folora_q.recipe.json_schema import json_schema
from folora_q.recipe.strict_yaml import parse_yaml

RECIPES = Path(__file__).parents[2] / "recipes"
SCHEMA = json.loads(json_schema())
DEMO, _ = parse_yaml((RECIPES / "demo.yaml").read_text("utf-8"))


def errors(recipe: dict) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(recipe)]


def changed(section: str, key: str, value: object) -> dict:
    return {**DEMO, section: {**DEMO[section], key: value}}


def test_the_committed_file_is_what_the_command_prints() -> None:
    assert (RECIPES / "recipe.schema.json").read_text("utf-8") == json_schema(), (
        "run: .venv/bin/folora-q schema > recipes/recipe.schema.json"
    )


def test_it_is_a_valid_schema_of_the_draft_that_it_names() -> None:
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_recipes_satisfy_it(path: Path) -> None:
    assert errors(parse_yaml(path.read_text("utf-8"))[0]) == []


@pytest.mark.parametrize(
    "recipe",
    [
        changed("training", "learning_rat", 1),
        changed("training", "max_length", "many"),
        changed("training", "optim", "adamv"),
        changed("data", "train_dataset", {"path": "a.jsonl", "fields": {"promt": "q"}}),
        changed("data", "train_dataset", []),
        {**DEMO, "gates": {}},
        {key: value for key, value in DEMO.items() if key != "model"},
    ],
)
def test_it_finds_what_loading_finds(recipe: dict) -> None:
    assert errors(recipe)


@pytest.mark.parametrize("data", ["a.jsonl", {"path": "a.jsonl", "weight": 2}, ["a.jsonl", {"path": "b.csv"}]])
def test_data_may_be_named_in_each_way(data: object) -> None:
    assert errors(changed("data", "train_dataset", data)) == []


def test_every_key_is_explained() -> None:
    for name, model in SCHEMA["$defs"].items():
        for key, field in model.get("properties", {}).items():
            assert field.get("description"), f"{name}.{key}"
