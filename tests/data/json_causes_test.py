"""What is not JSON says why, in words that lead to the mistake: commas, lists, quotes, and what Python prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from folora_q.data.file_readers import read_file
from folora_q.data.files import DataFile
from folora_q.data.rows import Row, RowError
from folora_q.errors import UserError

GOOD = '{"messages": [{"role": "user", "content": "hi"}]}'


def rows(path: Path, content: str) -> list[Row | RowError]:
    path.write_text(content, encoding="utf-8")
    return list(read_file(DataFile(path, path.name)))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (GOOD + ",", "Extra data at column 50; the line ends with a comma, and in a .jsonl file objects have none"),
        (GOOD + " , ", "; the line ends with a comma"),
        (GOOD + "]", "; the line closes a list, but a .jsonl file has one object per line"),
        (GOOD + GOOD, "; several objects are on this line"),
        (f"{GOOD}, {GOOD}", "; several objects are on this line"),
        ("{", "; the object continues on the next line"),
        ('{"a": "x', "; the line ends"),
        ('{"a": [1', "; the line ends"),
        ('{"a": 1,}', "; a comma before `}` must be removed"),
        ('{"a": [1, 2,]}', "; a comma before `]` must be removed"),
        ("{'a': 1}", "; text is in single quotes, as Python prints it"),
        ("{“a”: 1}", "; text is in typographic quotes (“)"),
        ('{"a": ”x”}', "; text is in typographic quotes (”)"),
        ('{"a": None}', "; None is not JSON, which says null"),
        ('{"a": [True]}', "; True is not JSON, which says true"),
        ("// a comment", "; JSON has no comments"),
        ('{"a": 1, # one\n', "; JSON has no comments"),
        ('{"a": "x\ty"}', "; a line end or tab inside a text is written as \\n or \\t"),
        ('{"a": "C:\\users"}', "; a backslash inside a text is written as \\\\"),
        ('{"a": "he said "hi" to me"}', '; a quote inside a text is written as \\"'),
        ("\x00\x00\x00", "; it contains zero bytes"),
    ],
)
def test_a_line_that_is_not_json_names_the_cause(tmp_path: Path, line: str, told: str) -> None:
    found = rows(tmp_path / "r.jsonl", f"{GOOD}\n{line.rstrip(chr(10))}\n{GOOD}\n")
    assert [type(row) for row in found] == [Row, RowError, Row]
    assert isinstance(found[1], RowError) and found[1].where == "r.jsonl line 2"
    assert found[1].reason.startswith("it is not JSON: ") and told in found[1].reason


@pytest.mark.parametrize("line", ["{x}", '{"a" 1}', "prompt,completion", '{"a": 1 "b": 2}', GOOD + " x"])
def test_no_cause_is_made_up(tmp_path: Path, line: str) -> None:
    [error] = rows(tmp_path / "r.jsonl", line)
    assert isinstance(error, RowError) and ";" not in error.reason


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_a_comma_after_every_line_is_named_at_the_first(tmp_path: Path, ending: str) -> None:
    """A .json file of lines is read as lines, so the cause is the same there."""
    [first, *_] = rows(tmp_path / f"r{ending}", "".join(f"{GOOD},\n" for _ in range(9)))
    assert isinstance(first, RowError) and first.where.endswith("line 1") and "ends with a comma" in first.reason


OBJECTS = [{"text": "a"}, {"text": "b"}, {"text": "c"}]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(OBJECTS),
        "\ufeff" + json.dumps(OBJECTS),
        json.dumps(OBJECTS[:1]),
        "[]",
        json.dumps(OBJECTS, indent=2),
        "\n\n[\n" + ",\n".join(map(json.dumps, OBJECTS)) + "\n]\n",
        "[" + ",\n".join(map(json.dumps, OBJECTS)) + "]\n",
        "[\n" + json.dumps(OBJECTS[0]) + "\n]",
        '[{"text": "a"}, {"text": "cut sh',
    ],
)
def test_a_list_in_a_jsonl_file_is_named_as_a_whole_and_renaming_mends_it(tmp_path: Path, content: str) -> None:
    with pytest.raises(UserError) as caught:
        rows(tmp_path / "r.jsonl", content)
    assert caught.value.message.startswith("r.jsonl holds one JSON list, but a .jsonl file has one object per line")
    assert caught.value.hint is not None and "rename it to .json" in caught.value.hint
    if content.rstrip().endswith("]"):
        assert all(isinstance(row, Row) for row in rows(tmp_path / "r.json", content))


@pytest.mark.parametrize("first", ["[1]", '[{"text": "a"}]', "[", "[broken"])
def test_a_first_line_that_is_a_list_costs_no_more_than_itself(tmp_path: Path, first: str) -> None:
    content = f"{first}\n{GOOD}\n{GOOD}\n"
    if first == "[":
        with pytest.raises(UserError, match="one JSON list"):
            rows(tmp_path / "r.jsonl", content)
    else:
        assert [type(row) for row in rows(tmp_path / "r.jsonl", content)] == [RowError, Row, Row]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('[{"a": 1},]', "line 1 is not JSON: Expecting value at column 11; a comma before `]` must be removed"),
        ('[\n{"a": 1,}\n]', "line 2 is not JSON: .*; a comma before `}` must be removed"),
        ("[{'a': 1}]", "; text is in single quotes"),
        ('[{"a": 1}', "; the file ends too early"),
    ],
)
def test_a_json_file_names_the_cause_too(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        rows(tmp_path / "r.json", content)
