"""A shipped recipe is used by its name; a file of the user's of that name wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from folora_q.errors import UserError
from folora_q.recipe import load_recipe
from folora_q.recipe.load import OWN_DATA
from folora_q.recipe.shipped import recipe_file, recipes_folder, shipped_models, shipped_recipes


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(name: str) -> UserError:
    with pytest.raises(UserError) as caught:
        recipe_file(Path(name))
    return caught.value


@pytest.mark.parametrize("name", [recipe.name for recipe in shipped_recipes()])
def test_every_shipped_recipe_is_found_by_its_name(name: str) -> None:
    assert recipe_file(Path(name)) == recipe_file(Path(f"{name}.yaml")) == recipes_folder() / f"{name}.yaml"


def test_its_data_are_found_and_its_run_folder_is_relative_to_the_working_directory() -> None:
    recipe = load_recipe(Path("demo"), ["training.max_steps=3"])
    assert recipe.data.train_dataset[0].path == str(recipes_folder() / "demo" / "train.jsonl")
    assert (recipe.training.output_dir, recipe.training.max_steps) == ("runs/demo", 3)


def test_data_of_a_recipe_without_its_own_are_the_users(here: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(Path("qlora-baseline"))
    assert f"no file at {here / 'train.jsonl'}" in caught.value.message
    assert caught.value.hint == OWN_DATA
    (here / "train.jsonl").write_text("{}\n")
    assert load_recipe(Path("qlora-baseline")).data.train_dataset[0].path == str(here / "train.jsonl")


def test_a_file_of_the_users_wins(here: Path) -> None:
    copy = (recipes_folder() / "7b-12gb-code.yaml").read_text("utf-8")
    (here / "7b-12gb-code.yaml").write_text(copy)
    assert recipe_file(Path("7b-12gb-code")) == Path("7b-12gb-code.yaml")
    (here / "7b-12gb-code").write_text(copy)
    assert recipe_file(Path("7b-12gb-code")) == Path("7b-12gb-code")


def test_a_folder_of_a_recipes_name_does_not_hide_it(here: Path) -> None:
    (here / "demo").mkdir()
    assert recipe_file(Path("demo")).parent == recipes_folder()


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("7b-12gb-cod", "no recipe at 7b-12gb-cod; did you mean 7b-12gb-code?", "`folora-q recipes` lists"),
        ("mine.yml", "no recipe at mine.yml; did you mean mine.yaml?", "`folora-q recipes` lists"),
        ("recipes/demo.yaml", "no recipe at recipes/demo.yaml", "is `demo`, without a folder"),
        ("runs/mine", "runs/mine is a folder, not a recipe", "did you mean runs/mine/recipe.resolved.yaml?"),
        ("quux", "no recipe at quux", "`folora-q recipes` lists"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(here: Path, name: str, message: str, hint: str) -> None:
    (here / "mine.yaml").write_text("")
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "recipe.resolved.yaml").write_text("")
    error = refusal(name)
    assert error.message == message and error.hint is not None and hint in error.hint


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.jsonl.gz", "rows.json", "rows.parquet"])
def test_a_data_file_is_not_a_recipe(here: Path, name: str) -> None:
    content = b"\x1f\x8b\x08\xff" if name.endswith((".gz", ".parquet")) else b'{"text": "a"}\n{"text": "b"}\n'
    (here / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(Path(name))
    assert caught.value.message == f"{name} is a data file, and a recipe is a YAML file that names it"
    assert caught.value.hint == f"write a recipe for it: folora-q init --data {name}"


def test_a_recipe_may_be_json(here: Path) -> None:
    (here / "recipe.json").write_text(
        '{"model": {"model_name_or_path": "a/b"}, "data": {"train_dataset": "a/b"}, "training": {"output_dir": "x"}}'
    )
    assert load_recipe(Path("recipe.json")).training.output_dir == "x"


def test_models_of_shipped_recipes_are_known() -> None:
    assert {"Qwen/Qwen2.5-7B-Instruct", "demo/SmolLM2-135M-Instruct"} <= shipped_models()
