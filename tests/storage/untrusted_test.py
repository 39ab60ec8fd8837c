"""One reader for other people's JSON and text, and one kind of error."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from folora_q.storage.untrusted import (
    MAX_DEPTH,
    MAX_JSON_BYTES,
    finite,
    parse_json,
    read_json,
    read_lines,
    read_object,
    read_text,
)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "a.json"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON: Expecting value at line 1, column 1"),
        (b'{"a": 1,\n}', "it is not JSON: .* at line [12], column .*"),
        (b'"a\nb"', "it is not JSON: Invalid control character at line 1, column 3"),
        (b"\xff", "it is not UTF-8 text: byte 0 is 0xff"),
        ("{}".encode("utf-16"), "it is not UTF-8 text: byte 0 is 0xff"),
        (b"9" * 5000, "it holds a number of thousands of digits"),
        (b"[" * 100_000 + b"]" * 100_000, "it is nested too deeply"),
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "it is nested too deeply"),
        (b" " * (MAX_JSON_BYTES + 1), "it has more than 2 MiB"),
        (b"[]", "it holds no JSON object but a list"),
        (b"null", "it holds no JSON object but null"),
        (b"1e5", "it holds no JSON object but a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_is_wrong_is_the_end_of_a_sentence(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        read_object(written(tmp_path, content))


@pytest.mark.parametrize("content", [b'{"a": [1, 2]}', b'\xef\xbb\xbf{"a": [1, 2]}', b' {"a":\n[1, 2]} '])
def test_an_object_is_read_with_a_byte_order_mark_too(content: bytes, tmp_path: Path) -> None:
    assert read_object(written(tmp_path, content)) == {"a": [1, 2]}


def test_what_is_as_deep_or_as_large_as_may_be_is_read(tmp_path: Path) -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert read_json(written(tmp_path, b"[1]" + b" " * (MAX_JSON_BYTES - 3))) == [1]
    assert parse_json('{"a": "' + "[" * 1000 + '"}') == {"a": "[" * 1000}, "in a text brackets nest nothing"


def test_a_file_without_an_end_is_not_read_to_it() -> None:
    with pytest.raises(ValueError, match="more than 1 MiB"):
        read_text(Path("/dev/zero"), 2**20)
    with pytest.raises(ValueError, match="line 1 has more than 1 MiB"):
        list(read_lines(Path("/dev/zero"), 2**20))


def test_lines_end_where_json_ends_them_and_empty_ones_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeffa\u2028b\n\n \t\nc\rd\ne".encode())
    assert [line.rstrip("\n") for line in read_lines(path)] == ["a\u2028b", "c\rd", "e"]
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match="line 2 is not UTF-8 text: byte 0 is 0xff"):
        list(read_lines(path))


@pytest.mark.parametrize("value", [None, True, "1", [], math.nan, math.inf, 10**400, -(10**400)])
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert finite(value) is None


@pytest.mark.parametrize("value", [0, -1, 2.5, 10**300])
def test_a_finite_number_is_a_float(value: float) -> None:
    assert finite(value) == float(value)
