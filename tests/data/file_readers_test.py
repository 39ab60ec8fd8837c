"""Every ending, what its rows are and where they say they stand, and every way in which a file can be broken."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from folora_q.data.file_readers import READERS, read_file
from folora_q.data.files import DataFile
from folora_q.data.rows import ErrorPolicy, Row, RowError
from folora_q.data.sources import read_source
from folora_q.errors import UserError
from folora_q.recipe.dataset import Source
from folora_q.recipe.paths import DATA_ENDINGS
from tests.data.rows import assistant, user

Found = list[tuple[str, Any]]
CHAT = [user("hi"), assistant("yo")]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path) -> Found:
    """Every row's place in the file with its values, or with what is wrong."""
    return [
        (row.where.removeprefix(str(path)).strip(), row.values if isinstance(row, Row) else row.reason)
        for row in read_file(DataFile(path, str(path)))
    ]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(ErrorPolicy(skip=False).pass_on(read_source(Source(path=str(path)))))
    return caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("r.jsonl", '{"a": 1}\n{"a": "ü"}', [("line 1", {"a": 1}), ("line 2", {"a": "ü"})]),
        ("r.JSONL", '{"a": 1}\n', [("line 1", {"a": 1})]),
        ("r.json", '[{"a": 1},\n {"a": 2}]', [("row 1", {"a": 1}), ("row 2", {"a": 2})]),
        ("r.json", '{"version": 3, "data": [{"a": 1}, {"a": 2}]}', [("row 1", {"a": 1}), ("row 2", {"a": 2})]),
        ("r.json", '{\n "a": 1,\n "b": [1]\n}', [("row 1", {"a": 1, "b": [1]})]),
        ("r.json", json.dumps({"messages": CHAT}), [("row 1", {"messages": CHAT})]),
        ("r.json", json.dumps({"conversations": CHAT}), [("row 1", {"conversations": CHAT})]),
        ("r.json", '{"x": [{"a": 1}], "y": [{"a": 2}]}', [("row 1", {"x": [{"a": 1}], "y": [{"a": 2}]})]),
        ("r.json", '{"a": 1}\n\n{"a": 2}\n', [("line 1", {"a": 1}), ("line 3", {"a": 2})]),
        ("r.csv", "a,b\n1,two words\n,\n", [("line 2", {"a": "1", "b": "two words"}), ("line 3", {"a": "", "b": ""})]),
        ("r.csv", 'a\n"say ""hi"", he"\n', [("line 2", {"a": 'say "hi", he'})]),
        ("r.tsv", 'a\tb\n1,5\t"x\ty"\n', [("line 2", {"a": "1,5", "b": "x\ty"})]),
        ("r.txt", "one\n\ntwo\n", [("", {"text": "one\n\ntwo\n"})]),
        ("r.md", "# One\n", [("", {"text": "# One\n"})]),
    ],
)
def test_a_files_rows_and_their_places(tmp_path: Path, name: str, content: str, found: Found) -> None:
    assert read(write(tmp_path / name, content)) == found


def test_the_recipe_takes_the_endings_that_can_be_read() -> None:
    assert tuple(READERS) == DATA_ENDINGS


def test_parquet_keeps_nested_values_nulls_and_the_count_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    rows = [{"messages": CHAT, "input": None if number % 2 else str(number)} for number in range(2500)]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=700)
    assert read(path) == [(f"row {number}", row) for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("r.jsonl", '\ufeff\n{"a": 1}\r\n\r\n  \n{"a": 2}', [("line 2", {"a": 1}), ("line 5", {"a": 2})]),
        ("r.jsonl", '\ufeff{"a": 1}\n', [("line 1", {"a": 1})]),
        (
            "r.jsonl",
            '{"a": "\u2028\u0085\x7f"}\n{"a": 2}\n',
            [("line 1", {"a": "\u2028\u0085\x7f"}), ("line 2", {"a": 2})],
        ),
        ("r.json", '\ufeff[\r\n{"a": "\u2028"}]\r\n', [("row 1", {"a": "\u2028"})]),
        ("r.json", '\ufeff{"a": "\u2028"}\r\n{"a": 2}\r\n', [("line 1", {"a": "\u2028"}), ("line 2", {"a": 2})]),
        ("r.csv", "\ufeffa\r\n1\r\n\r\n3\r\n", [("line 2", {"a": "1"}), ("line 4", {"a": "3"})]),
        ("r.csv", "\n\na\n1\n", [("line 4", {"a": "1"})]),
        ("r.csv", "a\rx\ry\r", [("line 2", {"a": "x"}), ("line 3", {"a": "y"})]),
        (
            "r.csv",
            "a\nx\u2028\x0b\x0c\u0085\nw\n",
            [("line 2", {"a": "x\u2028\x0b\x0c\u0085"}), ("line 3", {"a": "w"})],
        ),
        ("r.txt", "\ufeffone\r\n\u2028", [("", {"text": "one\r\n\u2028"})]),
    ],
)
def test_marks_blank_lines_and_odd_line_ends_shift_nothing(
    tmp_path: Path, name: str, content: str, found: Found
) -> None:
    assert read(write(tmp_path / name, content)) == found


def test_lines_are_counted_through_quoted_newlines(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", 'a,b\n"one\ntwo\r\n\nfour",x\ny,z\n"p\nq",r,s\nu,v\n')
    assert read(path) == [
        ("line 2", {"a": "one\ntwo\r\n\nfour", "b": "x"}),
        ("line 6", {"a": "y", "b": "z"}),
        ("line 7", "it has 3 fields, but the header has 2; a stray quote or ','?"),
        ("line 9", {"a": "u", "b": "v"}),
    ]


@pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.tsv", "r.txt"])
def test_ten_megabytes_in_one_line_are_read(tmp_path: Path, name: str) -> None:
    long = "x" * 10_000_000
    content = {"r.jsonl": json.dumps({"text": long}), "r.json": json.dumps([{"text": long}]), "r.txt": long}
    path = write(tmp_path / name, content.get(name, f"text\n{long}\n"))
    [(_, values)] = read(path)
    assert values == {"text": long}


def test_a_long_quoted_field_is_read(tmp_path: Path) -> None:
    long = 'a "document",\n' * 20_000  # 280 kB; Python's own limit is 128 KiB
    path = write(tmp_path / "r.csv", 'text,n\n"' + long.replace('"', '""') + '",1\nshort,2\n')
    assert read(path) == [("line 2", {"text": long, "n": "1"}), ("line 20003", {"text": "short", "n": "2"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": }', "it is not JSON: Expecting value at column 7"),
        (b'{"a": "\xff\xfe"}', "it is not UTF-8 text: byte 7 is 0xff"),
        (b"[1]", 'it must be an object such as {"messages": [...]}, not a list'),
        (b"null", 'it must be an object such as {"messages": [...]}, not null'),
        (b"[" * 100_000, "it is not JSON that can be read"),
        (b'{"a":' * 100_000, "it is not JSON that can be read"),
        (b'{"a": ' + b"1" * 5000 + b"}", "it is not JSON that can be read"),
        (b'{"a": 1}{"a": 2}', "it is not JSON: Extra data at column 9"),
    ],
    ids=count(),
)
def test_a_broken_line_is_an_error_in_its_place_and_the_others_are_rows(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    lines = [b'{"a": %d}' % number for number in range(1, 5001)]
    lines[4710] = line
    found = read(write(tmp_path / "r.jsonl", b"\n".join(lines)))
    assert [place for place, _ in found] == [f"line {number}" for number in range(1, 5001)]
    assert [values for _, values in found if isinstance(values, dict)] == [
        {"a": number} for number in range(1, 5001) if number != 4711
    ]
    assert found[4710][1].startswith(reason)


def test_the_column_of_a_line_that_breaks_off_is_its_end(tmp_path: Path) -> None:
    reason = "it is not JSON: Expecting value at column 6; the line ends in the middle of an object"
    assert read(write(tmp_path / "r.jsonl", '{"a":\n')) == [("line 1", reason)]


def test_the_first_line_may_be_the_one_that_is_not_utf_8(tmp_path: Path) -> None:
    found = read(write(tmp_path / "r.jsonl", b'\xef\xbb\xbf{"a": "\xe9"}\n{"a": 2}\n'))
    assert found == [("line 1", "it is not UTF-8 text: byte 7 is 0xe9"), ("line 2", {"a": 2})]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        # A quote that never closes takes the rest of the file with it: the line where it opens is named.
        ('a,b\n1,2\n"open,3\n4,5\n6,7\n', [("line 2", 2), ("line 3", "a quote is not closed here")]),
        ('a,b\n1,2\n3,"open\n4,5', [("line 2", 2), ("line 3", "a quote is not closed here")]),
        ('a,b\n"two" words,3\n4,5\n', [("line 2", "a quote is not closed here"), ("line 3", 2)]),
        ('a,b\n1,"x"y"\n4,5\n', [("line 2", "a quote is not closed here"), ("line 3", 2)]),
        ("a,b\n1\n2,3\n", [("line 2", "it has 1 fields, but the header has 2"), ("line 3", 2)]),
        ("a,b\n1,2,3\n2,3\n", [("line 2", "it has 3 fields, but the header has 2"), ("line 3", 2)]),
        ('a,b\n"1","2\n3","4"\n5,6\n7,8\n', [("line 2", "it has 3 fields"), ("line 4", 2), ("line 5", 2)]),
    ],
    ids=count(),
)
def test_a_csv_row_that_does_not_fit_is_an_error_in_its_place(tmp_path: Path, content: str, found: Found) -> None:
    rows = read(write(tmp_path / "r.csv", content))
    assert [place for place, _ in rows] == [place for place, _ in found]
    for (_, values), (_, expected) in zip(rows, found, strict=True):
        assert len(values) == expected if isinstance(values, dict) else values.startswith(expected)


def test_a_stray_quote_on_line_4711_is_named_there(tmp_path: Path) -> None:
    lines = ["a,b", *(f'{number},"one, two"' for number in range(2, 6001))]
    lines[4710] = '4711,"one, "two"'
    found = read(write(tmp_path / "r.csv", "\n".join(lines)))
    assert [place for place, values in found if isinstance(values, str)] == ["line 4711"]
    assert len(found) == 5999


def test_the_row_after_a_broken_header_is_no_header(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", '"prompt"s,completion\nprompt,completion\nx,y\n')
    with pytest.raises(UserError, match="line 1"):
        list(ErrorPolicy(skip=True).pass_on(read_file(DataFile(path, str(path)))))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", b"", "{path} holds no rows"),
        ("r.jsonl", b"\n \n\n", "{path} holds no rows"),
        ("r.json", b"", "{path} line 1 is not JSON"),
        ("r.json", b"[]", "{path} holds no rows"),
        ("r.csv", b"", "{path} holds no rows"),
        ("r.csv", b"prompt,completion\n", "{path} holds no rows"),
        ("r.tsv", b"prompt\tcompletion\n\n", "{path} holds no rows"),
        ("r.parquet", b"", "{path} is not a parquet file that can be read"),
        ("r.txt", b" \n", "{path}: it is empty"),
        ("r.md", b"", "{path}: it is empty"),
        ("r.json", b"5", "{path} must hold a list of objects, not a number"),
        ("r.json", b'"text"', "{path} must hold a list of objects, not text"),
        ("r.json", b"[1, 2]", '{path} row 1: it must be an object such as {{"messages": [...]}}, not a number'),
        ("r.json", b'[{"a": 1}, [2]]', "{path} row 2: it must be an object"),
        ("r.json", b'[\n{"a": 1},\n{"a": }\n]', "{path} line 3 is not JSON: Expecting value at column 7"),
        ("r.json", b'[{"a": 1}] x', "{path} line 1 is not JSON: Extra data at column 12"),
        ("r.json", b'{"a": 1}\n{"a": \n{"a": 3}', "{path} line 2: it is not JSON"),
        ("r.json", b"[" * 100_000, "{path} is not JSON that can be read"),
        ("r.json", b'{"a":' * 100_000, "{path} is not JSON that can be read"),
        ("r.json", b'[{"a": ' + b"1" * 5000 + b"}]", "{path} is not JSON that can be read"),
        ("r.json", b'[\n{"a": "\xff"}]', "{path} line 2 is not UTF-8 text: byte 0xff"),
        ("r.csv", b"a\nb\n\xe9\n", "{path} line 3 is not UTF-8 text: byte 0xe9"),
        ("r.txt", b"a\n\xe9\n", "{path} line 2 is not UTF-8 text: byte 0xe9"),
        ("r.jsonl", '{"a": 1}\n'.encode("utf-16"), "{path} is UTF-16 text"),
        ("r.json", '[{"a": 1}]'.encode("utf-16"), "{path} is UTF-16 text"),
        ("r.csv", b"\xfe\xff" + "a\nb\n".encode("utf-16-be"), "{path} is UTF-16 text"),
        ("r.md", "a".encode("utf-16"), "{path} is UTF-16 text"),
        ("r.csv", b"a,b,a\n1,2,3\n", "{path} line 1: the column 'a' appears twice in the header"),
        ("r.csv", b"\na,b,a\n", "{path} line 2: the column 'a' appears twice in the header"),
        (
            "r.csv",
            b"prompt;completion\na, b;c\n",
            "{path} line 1: the header has no ',', but ';': fields seem to be separated by",
        ),
        ("r.csv", b"prompt\tcompletion\na\tb\n", "{path} line 1: the header has no ',', but '\\t'"),
        ("r.tsv", b"prompt,completion\na,b\n", "{path} line 1: the header has no '\\t', but ','"),
        ("r.parquet", b"PAR1 and no more", "{path} is not a parquet file that can be read"),
        ("r.parquet", b"PAR1" + b"\xff" * 40 + b"PAR1", "{path} is not a parquet file that can be read"),
        (
            "r.xlsx",
            b"PK",
            "cannot read {path}: its ending is not one of .jsonl, .json, .csv, .tsv, .parquet, .txt, .md",
        ),
        ("rows", b"{}", "cannot read {path}: its ending is not one of"),
    ],
    ids=count(),
)
def test_a_file_that_cannot_be_read_is_one_sentence_with_its_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    refused = refusal(path)
    assert refused.startswith(message.format(path=path))
    assert "\n" not in refused and len(refused) < 500


def test_broken_json_on_line_4711_of_a_list_is_named_there(tmp_path: Path) -> None:
    lines = ["[", *(f'{{"a": {number}}},' for number in range(2, 5000)), '{"a": 0}]']
    lines[4710] = '{"a": "4711},'
    path = write(tmp_path / "r.json", "\n".join(lines))
    assert refusal(path).startswith(f"{path} line 4711 is not JSON: ")


def test_a_file_that_is_gone_or_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for name, reason in (("gone.jsonl", "No such file or directory"), ("folder.jsonl", "Is a directory")):
        with pytest.raises(UserError) as caught:
            list(read_file(DataFile(tmp_path / name, str(tmp_path / name))))
        assert caught.value.message == f"cannot read {tmp_path / name}: {reason}"


def long_parquet(path: Path) -> bytes:
    table = pa.table({"text": [f"{number} " * 50 for number in range(2000)]})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_parquet_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "r.parquet"
    content = long_parquet(path)
    write(path, content[: int(len(content) * share)])
    assert refusal(path).startswith(f"{path} is not a parquet file that can be read: ")


def test_a_parquet_file_with_a_hole_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    content = long_parquet(path)
    write(path, content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
    refused = refusal(path)
    assert str(path) in refused and "None" not in refused


def test_parquet_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    content = long_parquet(path)
    write(path, content.replace(b"1234 1234", b"1234\xff1234", 1))
    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    "made",
    [
        pa.array([2**31 - 1], pa.int32()).cast(pa.date32()),
        pa.array([2**62]).cast(pa.timestamp("us")),
        pa.array([2**62]).cast(pa.duration("s")),
    ],
    ids=lambda made: str(made.type),
)
def test_a_date_that_python_does_not_have_costs_no_traceback(tmp_path: Path, made: pa.Array) -> None:
    path = tmp_path / "r.parquet"
    parquet.write_table(pa.table({"text": ["hi"], "made": made}), path)
    [row] = ErrorPolicy(skip=False).pass_on(read_source(Source(path=str(path))))
    assert row.values["text"] == "hi"


def test_a_column_that_stands_twice_in_a_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert "'text'" in refusal(path)


def test_a_row_error_names_its_place_and_says_how_to_skip(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", "{}\n{\n")
    [row, error] = read_file(DataFile(path, str(path)))
    assert row == Row(f"{path} line 1", {})
    assert isinstance(error, RowError) and error.message == f"{path} line 2: {error.reason}"
    assert error.hint is not None and "data.on_error: skip" in error.hint
