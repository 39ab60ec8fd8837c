"""Rows out of files, one reader for each ending; every error names the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from folora_q.data.rows import Row, RowError
from folora_q.errors import UserError, first_line

Rows = Iterator[Row | RowError]

# A field of a CSV file may be a whole document; Python's own limit is 128 KiB.
LONGEST_FIELD = 2**31 - 1


def read_file(path: Path) -> Rows:
    """The rows of one file, by its ending; a row that cannot be read comes as a RowError in its place.

    Raises:
        UserError: nothing of the file can be read, or its ending is unknown.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"cannot read {path}: its ending is none of {', '.join(READERS)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _jsonl(path: Path) -> Rows:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if number == 1:
                _refuse_utf_16(path, text)
            if text.strip():
                yield _parsed(f"{path} line {number}", text.rstrip(b"\r\n"))


def _parsed(where: str, line: bytes) -> Row | RowError:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(where, f"it is not UTF-8 text: byte {error.start} is 0x{line[error.start]:02x}")
    except json.JSONDecodeError as error:
        return RowError(where, f"it is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; endless brackets
        return RowError(where, f"it is not JSON that can be read: {error}")
    return _object(where, values)


def _object(where: str, values: Any) -> Row | RowError:
    if isinstance(values, dict):
        return Row(where, values)
    return RowError(where, f'it must be an object such as {{"messages": [...]}}, not a {type(values).__name__}')


def _json(path: Path) -> Rows:
    """A list of objects, an object that holds one such list, or lines of JSON under another ending."""
    text = _text_of(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(path)
            return
        raise UserError(f"{path} line {error.lineno} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON that can be read: {error}") from None
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        is_row = {"messages", "conversations", "prompt", "instruction", "text"} & values.keys()
        values = lists[0] if len(lists) == 1 and not is_row else [values]
    if not isinstance(values, list):
        raise UserError(f"{path} must hold a list of objects, not a {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield _object(f"{path} row {number}", value)


def _csv(path: Path, delimiter: str = ",") -> Rows:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(_text_of(path), newline=""), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        where = f"{path} line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise UserError(f"{where}: the header cannot be read ({error})") from None
            yield RowError(where, f"a quote does not close here, or stands in the middle of a field ({error})")
            continue
        if not cells:
            continue
        if header is None:
            if repeated := [name for name, times in Counter(cells).items() if times > 1]:
                raise UserError(f"{where}: the column {min(repeated)[:40]!r} stands in the header twice")
            header = cells
        elif len(cells) != len(header):
            yield RowError(
                where, f"it has {len(cells)} fields, but the header has {len(header)}; a stray quote or {delimiter!r}?"
            )
        else:
            yield Row(where, dict(zip(header, cells, strict=True)))


def _tsv(path: Path) -> Rows:
    return _csv(path, delimiter="\t")


def _parquet(path: Path) -> Rows:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if repeated := [name for name, times in Counter(names).items() if times > 1]:
            raise UserError(f"{path}: the column {min(repeated)[:40]!r} stands in it twice")
        for batch in file.iter_batches(batch_size=1024):
            for index in range(len(batch)):
                number += 1
                yield _parquet_row(f"{path} row {number}", names, [column[index] for column in batch.columns])
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a parquet file that can be read: a column's name is not UTF-8 text") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file that can be read: {first_line(error)}") from None


def _parquet_row(where: str, names: list[str], cells: list[Any]) -> Row | RowError:
    values: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            values[name] = cell.as_py()
        except UnicodeDecodeError:
            return RowError(where, f"the column {name!r} is not UTF-8 text")
        except (OverflowError, ValueError):  # a date beyond Python's, say: nothing to train on, but no obstacle either
            values[name] = None
    return Row(where, values)


def _text(path: Path) -> Rows:
    text = _text_of(path)
    yield Row(str(path), {"text": text}) if text.strip() else RowError(str(path), "it is empty")


def _text_of(path: Path) -> str:
    content = path.read_bytes()
    _refuse_utf_16(path, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path} line {line} is not UTF-8 text: byte 0x{content[error.start]:02x}", "save the file as UTF-8"
        ) from None


def _refuse_utf_16(path: Path, content: bytes) -> None:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path} is UTF-16 text", "save the file as UTF-8")


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}
