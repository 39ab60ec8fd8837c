"""Columns are guessed from their names and values; what could be meant in several ways is not sure."""

from __future__ import annotations

from typing import Any

import pytest

from folora_q.data.column_guess import fields_given, guess_fields
from folora_q.data.formats import detect_format, to_example
from folora_q.data.rows import Row
from folora_q.errors import UserError
from folora_q.recipe.dataset import Source

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


def pair(instruction: str, output: str, **more: str) -> dict[str, str]:
    return {"instruction": instruction, "output": output, **more}


# Columns, the fields that are guessed, and whether the guess is sure.
CASES: list[tuple[str, dict[str, str], bool]] = [
    ("question answer", pair("question", "answer"), True),
    ("answer question", pair("question", "answer"), True),
    ("input response", pair("input", "response"), True),
    ("input output", pair("input", "output"), True),
    ("query reply", pair("query", "reply"), True),
    ("prompt response", pair("prompt", "response"), True),
    ("prompt output", pair("prompt", "output"), True),
    ("prompt chosen", pair("prompt", "chosen"), True),
    ("source target", pair("source", "target"), True),
    ("user assistant", pair("user", "assistant"), True),
    ("system user assistant", pair("user", "assistant", system="system"), True),
    ("instruction context response category", pair("instruction", "response", input="context"), True),
    ("instruction input response", pair("instruction", "response", input="input"), True),
    ("id question answer source", pair("question", "answer"), True),
    ("Question Answer", pair("Question", "Answer"), True),
    ("UserInput BotResponse", pair("UserInput", "BotResponse"), True),
    ("user-input model-output", pair("user-input", "model-output"), True),
    ("prompt chosen rejected", pair("prompt", "chosen"), False),
    ("question answer solution", pair("question", "answer"), False),
    ("question query answer", pair("question", "answer"), False),
    ("left right", pair("left", "right"), False),
    ("content", {"text": "content"}, True),
    ("title content url", {"text": "content"}, True),
    ("body summary", {"text": "body"}, False),
    ("content body", {"text": "content"}, False),
    ("notes", {"text": "notes"}, False),
]


@pytest.mark.parametrize(("columns", "fields", "sure"), CASES, ids=[case[0] for case in CASES])
def test_columns_of_text(columns: str, fields: dict[str, str], sure: bool) -> None:
    row: dict[str, Any] = dict.fromkeys(columns.split(), "some text")
    guess = guess_fields([row])
    assert guess is not None
    assert (guess.fields, guess.sure) == (fields, sure)
    source = Source(path="rows.jsonl", fields=guess.fields)
    assert detect_format(Row("line 1", row), source) == guess.format
    to_example(Row("line 1", row), guess.format, source)
    assert all(f"`{column}`" in guess.words for column in fields.values())


@pytest.mark.parametrize(
    ("row", "column", "sure"),
    [
        ({"dialog": TURNS}, "dialog", True),
        ({"id": "1", "thread": SHAREGPT}, "thread", True),
        ({"chosen": TURNS, "rejected": TURNS}, "chosen", False),
        ({"question": "x", "answer": "y", "chat": TURNS}, "chat", True),
    ],
)
def test_columns_of_turns_come_first(row: dict[str, Any], column: str, sure: bool) -> None:
    guess = guess_fields([row])
    assert guess is not None
    assert (guess.format, guess.fields, guess.sure) == ("messages", {"messages": column}, sure)


@pytest.mark.parametrize("row", [{}, {"a": 1, "b": 2}, {"x": "1", "y": "2", "z": "3"}, {"url": "x"}, {"prompt": "x"}])
def test_nothing_is_guessed_where_nothing_fits(row: dict[str, Any]) -> None:
    assert guess_fields([row]) is None


def test_a_column_counts_if_most_of_its_values_are_text() -> None:
    rows: list[dict[str, Any]] = [{"question": "a", "answer": "b"}] * 3 + [{"question": "a", "answer": None}]
    guess = guess_fields(rows)
    assert guess is not None and guess.sure
    numbers = guess_fields([{"question": "a", "answer": 1}] * 3)
    assert numbers is None or not numbers.sure


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"messages": "a", "role": "b"}, "messages"),
        ({"text": "a"}, "text"),
    ],
)
def test_fields_of_the_user_imply_a_format(fields: dict[str, str], name: str) -> None:
    assert fields_given(fields).format == name


def test_fields_that_make_no_row_are_refused() -> None:
    with pytest.raises(UserError, match="the fields instruction make no row"):
        fields_given({"instruction": "a"})
