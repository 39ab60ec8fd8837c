"""`validate` finds rows that are too long from the tokenizer's file, without rendering them."""

from __future__ import annotations

from pathlib import Path

import pytest

from folora_q.errors import UserError
from folora_q.preflight.lengths import examine_lengths
from folora_q.recipe import Recipe, load_recipe
from tests.conftest import tiny_tokenizer
from tests.data.rows import assistant, user, write_jsonl


@pytest.fixture
def recipe(tmp_path: Path):
    """A recipe for rows of these numbers of letters, which are tokens of the tiny tokenizer."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def recipe(letters: list[int], *overrides: str) -> Recipe:
        rows = [{"messages": [user("x" * count), assistant("yes")]} for count in letters]
        write_jsonl(tmp_path / "rows.jsonl", rows)
        path = tmp_path / "recipe.yaml"
        path.write_text(
            "model: {model_name_or_path: model}\ndata: {train_dataset: rows.jsonl}\n"
            "training: {output_dir: run, max_length: 32}\n"
        )
        return load_recipe(path, overrides)

    return recipe


def test_rows_that_fit_are_not_mentioned(recipe) -> None:
    assert examine_lengths(recipe([10, 20, 28]), None) == []


def test_a_few_long_rows_are_left_to_preview(recipe) -> None:
    assert examine_lengths(recipe([10] * 40 + [99]), None) == []


def test_many_long_rows_are_a_warning_with_what_happens_to_them(recipe) -> None:
    [warning] = examine_lengths(recipe([10, 99, 50]), None)
    assert warning == (
        "training.max_length is 32, and 2 of 3 rows have more tokens (the longest at least 103): they are left out "
        "(data.overlong)"
    )
    [warning] = examine_lengths(recipe([40, 99], "data.overlong=truncate"), None)
    assert "2 of 2 rows" in warning and "they are cut" in warning


def test_no_row_that_fits_is_an_error(recipe) -> None:
    with pytest.raises(UserError) as caught:
        examine_lengths(recipe([40, 99]), None)
    assert "every one of 2 rows has more tokens: the shortest at least 44, the longest at least 103" in (
        caught.value.message
    )
    assert caught.value.hint == "raise training.max_length to 103 or more, or set data.overlong: truncate"


def test_one_long_row_is_an_error_if_the_recipe_says_so(recipe) -> None:
    with pytest.raises(UserError, match="1 of 41 rows have more tokens"):
        examine_lengths(recipe([10] * 40 + [99], "data.overlong=raise"), None)


def test_without_a_tokenizer_nothing_is_said(recipe, tmp_path: Path) -> None:
    given = recipe([99, 99])
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    assert examine_lengths(given, None) == []
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert examine_lengths(given, None) == []
