"""The section `keep`: its shorthand, what it refuses, and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from folora_q.errors import UserError
from folora_q.recipe import load_recipe
from folora_q.recipe.keep import KeepSection


def with_keep(path: Path, keep: object) -> Path:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"keep": keep}))
    return path


@pytest.mark.parametrize("given", ["tools", ["tools"], {"capabilities": "tools"}, {"capabilities": ["tools"]}])
def test_a_name_or_a_list_is_short_for_capabilities(recipe_file: Path, given: object) -> None:
    assert load_recipe(with_keep(recipe_file, given)).keep == KeepSection(capabilities=["tools"])


def test_overrides_reach_into_the_shorthand(recipe_file: Path) -> None:
    with_keep(recipe_file, ["tools", "code"])
    found = load_recipe(recipe_file, ["keep.share=0.5"]).keep
    assert (found.capabilities, found.share) == (["tools", "code"], 0.5)
    assert load_recipe(recipe_file, ["keep=arithmetic"]).keep.capabilities == ["arithmetic"]
    assert not load_recipe(recipe_file, ["keep=[]"]).keep.active


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (["tolls"], "did you mean tools"),
        ({"capabilities": ["tools"], "share": 1}, "`keep.share` must be below 1"),
        (["code", "tools", "code"], "keep: code is named twice"),
        ({"files": ["missing.jsonl"]}, "`keep.files`: no file at"),
        ({"names": ["tools"]}, "unknown key `keep.names`"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_line(recipe_file: Path, keep: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(with_keep(recipe_file, keep))
    assert f"{recipe_file} line" in caught.value.message


def test_files_are_relative_to_the_recipe(recipe_file: Path) -> None:
    (recipe_file.parent / "mine.jsonl").write_text("")
    found = load_recipe(with_keep(recipe_file, {"files": "mine.jsonl"})).keep
    assert found.files == [str(recipe_file.parent / "mine.jsonl")]


def test_lengths_of_answers_follow_the_capability_unless_they_are_set() -> None:
    section = KeepSection(capabilities=["thinking", "arithmetic"])
    assert section.answer_length("thinking") > section.answer_length("arithmetic")
    assert section.longest > section.answer_length("thinking") and KeepSection().longest == 0
    assert KeepSection(capabilities=["thinking"], max_new_tokens=7).answer_length("thinking") == 7


def test_two_sections_are_joined_without_repetition() -> None:
    joined = KeepSection(capabilities=["code"], share=0.1).joined(
        KeepSection(capabilities=["tools", "code"], files=["a"])
    )
    assert joined == KeepSection(capabilities=["code", "tools"], files=["a"], share=0.1)
