"""Read rows from files, one reader per file type; every error names the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from folora_q.data.file_signatures import refuse_mistaken
from folora_q.data.files import DataFile, ending_of
from folora_q.data.json_causes import cause, holds_a_list
from folora_q.data.rows import Row, RowError, kind_of
from folora_q.errors import UserError, first_line
from folora_q.recipe.paths import COMPRESSED_ENDINGS

Rows = Iterator[Row | RowError]

# A field of a CSV file may be a whole document; Python's own limit is 128 KiB.
MAX_FIELD_LENGTH = 2**31 - 1
SEPARATORS = (",", ";", "\t", "|")


def read_file(file: DataFile) -> Rows:
    """Yield the rows of one file, by its ending; a row that cannot be read comes as a RowError in its place.

    Raises:
        UserError: nothing in the file can be read, or its ending is unknown.
    """
    if (reason := unreadable(file.path.name)) is not None:
        raise UserError(f"cannot read {file.name}: {reason}")
    try:
        refuse_mistaken(file)
        yield from READERS[file.ending](file)
    except OSError as error:
        raise UserError(f"cannot read {file.name}: {error.strerror or error}") from None


def unreadable(name: str) -> str | None:
    """Return why a file of this name cannot be read, as the end of a sentence; None if it can."""
    ending, compression = ending_of(name)
    if compression is not None and ending in READERS and ending not in PACKABLE:
        return f"{ending} is already compressed internally: unpack it"
    if compression is not None and ending == ".tar":
        return "it is an archive: unpack it"
    if ending in READERS:
        return None
    if ending in ARCHIVES:
        return "it is an archive: unpack it"
    if ending == ".arrow":
        return "an .arrow file is read as a part of a folder that `save_to_disk` made"
    return UNKNOWN_ENDING


def _jsonl(file: DataFile) -> Rows:
    _refuse_list(file)
    with file.open() as content:
        for number, line in enumerate(content, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if number == 1:
                _refuse_utf_16(file, text)
            if text.strip():
                yield _parsed(f"{file.name} line {number}", text.rstrip(b"\r\n"))


def _refuse_list(file: DataFile) -> None:
    """Raise an error if a file of lines holds one JSON list, in which every line would be an error."""
    with file.open() as content:
        first = second = None
        for line in content:
            text = line.decode("utf-8-sig", "replace")
            if first is None and text.strip() and not text.lstrip().startswith("["):
                return
            if text.strip():
                first, second = (text, None) if first is None else (first, text)
            if second is not None:
                break
    if first is not None and holds_a_list(first, second):
        raise UserError(
            f"{file.name} holds one JSON list, but a .jsonl file has one object per line, without brackets and commas",
            "rename it to .json, or write each object on a line of its own",
        )


def _parsed(where: str, line: bytes) -> Row | RowError:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(where, f"it is not UTF-8 text: byte {error.start} is 0x{line[error.start]:02x}")
    except json.JSONDecodeError as error:
        return RowError(where, f"it is not JSON: {error.msg} at column {error.colno}{_because(error, True)}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; endless brackets
        return RowError(where, f"it is not JSON that can be read: {error}")
    return _object(where, values)


def _because(error: json.JSONDecodeError, one_a_line: bool) -> str:
    reason = cause(error, one_a_line)
    return "" if reason is None else f"; {reason}"


def _object(where: str, values: Any) -> Row | RowError:
    if isinstance(values, dict):
        return Row(where, values)
    return RowError(where, f'it must be an object such as {{"messages": [...]}}, not {kind_of(values)}')


def _json(file: DataFile) -> Rows:
    """Read a list of objects, an object with one such list, or JSON lines with the wrong ending."""
    text = _text_of(file)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _jsonl(file)
            return
        raise UserError(
            f"{file.name} line {error.lineno} is not JSON: {error.msg} at column {error.colno}{_because(error, False)}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file.name} is not JSON that can be read: {error}") from None
    if isinstance(values, dict):
        lists = [value for value in values.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        is_row = {"messages", "conversations", "prompt", "instruction", "text"} & values.keys()
        values = lists[0] if len(lists) == 1 and not is_row else [values]
    if not isinstance(values, list):
        raise UserError(f"{file.name} must hold a list of objects, not {kind_of(values)}")
    for number, value in enumerate(values, 1):
        yield _object(f"{file.name} row {number}", value)


def _csv(file: DataFile, delimiter: str = ",") -> Rows:
    csv.field_size_limit(MAX_FIELD_LENGTH)
    reader = csv.reader(io.StringIO(_text_of(file), newline=""), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        where = f"{file.name} line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None:
                raise UserError(f"{where}: the header cannot be read ({error})") from None
            yield RowError(where, f"a quote is not closed here, or is in the middle of a field ({error})")
            continue
        if not cells:
            continue
        if header is None:
            if repeated := [name for name, times in Counter(cells).items() if times > 1]:
                raise UserError(f"{where}: the column {min(repeated)[:40]!r} appears twice in the header")
            _refuse_other_separator(file, where, cells, delimiter)
            header = cells
        elif len(cells) != len(header):
            yield RowError(
                where, f"it has {len(cells)} fields, but the header has {len(header)}; a stray quote or {delimiter!r}?"
            )
        else:
            yield Row(where, dict(zip(header, cells, strict=True)))


def _refuse_other_separator(file: DataFile, where: str, header: list[str], delimiter: str) -> None:
    """Raise an error if a header of one name is several with another separator, as some spreadsheets write it."""
    other = next((mark for mark in SEPARATORS if mark != delimiter and len(header) == 1 and mark in header[0]), None)
    if other is not None:
        raise UserError(
            f"{where}: the header has no {delimiter!r}, but {other!r}: fields seem to be separated by that",
            f"rename the file to {'.csv' if other == ',' else '.tsv'}" if other in ",\t" else "save it with commas",
        )


def _tsv(file: DataFile) -> Rows:
    return _csv(file, delimiter="\t")


def _parquet(file: DataFile) -> Rows:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        table = parquet.ParquetFile(file.path)
        names = table.schema_arrow.names
        if repeated := [name for name, times in Counter(names).items() if times > 1]:
            raise UserError(f"{file.name}: the column {min(repeated)[:40]!r} appears twice")
        for batch in table.iter_batches(batch_size=1024):
            for index in range(len(batch)):
                number += 1
                yield _parquet_row(f"{file.name} row {number}", names, [column[index] for column in batch.columns])
    except UnicodeDecodeError:
        raise UserError(
            f"{file.name} is not a parquet file that can be read: a column's name is not UTF-8 text"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.name} is not a parquet file that can be read: {first_line(error)}") from None


def _parquet_row(where: str, names: list[str], cells: list[Any]) -> Row | RowError:
    values: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=True):
        try:
            values[name] = cell.as_py()
        except UnicodeDecodeError:
            return RowError(where, f"the column {name!r} is not UTF-8 text")
        except (OverflowError, ValueError):  # e.g. a date beyond Python's range, which is not trained on
            values[name] = None
    return Row(where, values)


def _text(file: DataFile) -> Rows:
    text = _text_of(file)
    yield Row(file.name, {"text": text}) if text.strip() else RowError(file.name, "it is empty")


def _text_of(file: DataFile) -> str:
    with file.open() as opened:
        content = opened.read()
    _refuse_utf_16(file, content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{file.name} line {line} is not UTF-8 text: byte 0x{content[error.start]:02x}", "save the file as UTF-8"
        ) from None


def _refuse_utf_16(file: DataFile, content: bytes) -> None:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file.name} is UTF-16 text", "save the file as UTF-8")


READERS: dict[str, Callable[[DataFile], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}
# All others are text, which may be compressed.
PACKABLE = tuple(ending for ending in READERS if ending != ".parquet")
UNKNOWN_ENDING = f"its ending is not one of {', '.join(READERS)} (text may also end in {', '.join(COMPRESSED_ENDINGS)})"
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
