"""Read untrusted files with a size limit and one kind of error.

Standard library only. A damaged or malicious file leads to an error of one sentence, whereas Python's own readers raise
a RecursionError for deep nesting, and fill the memory for a large file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MIB = 2**20
# A parsed value takes up to twenty times the memory of its text.
MAX_JSON_BYTES = 2 * MIB
# Python's parser allows about a thousand levels, more than a recursive function can follow.
MAX_DEPTH = 100


def read_text(path: Path, most: int, errors: str = "strict") -> str:
    """Read a text file.

    Args:
        most: maximum size in bytes.
        errors: how bytes that are not UTF-8 are handled, as in `bytes.decode`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or not UTF-8; the message is the end of a sentence.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most / MIB:g} MiB")
    try:
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}") from None


def read_lines(path: Path, longest: int = MAX_JSON_BYTES) -> Iterator[str]:
    """Yield the lines of a text file that are not blank.

    Args:
        longest: maximum size of a line in bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is longer, or not UTF-8; the message is the end of a sentence.
    """
    with path.open("rb") as file:
        number = 0
        while content := file.readline(longest + 1):
            number += 1
            if len(content) > longest:
                raise ValueError(f"line {number} has more than {longest / MIB:g} MiB")
            try:
                line = content.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line {number} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}"
                ) from None
            if line.strip():
                yield line


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the text is not JSON, or exceeds a limit; the message is the end of a sentence.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise ValueError(f"it is not JSON: {what} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError:  # the only other one: Python rejects integers of more than 4,300 digits
        raise ValueError("it holds a number of thousands of digits") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError("it is nested too deeply")
    return value


def _is_deep(value: Any) -> bool:
    """Whether a value is nested too deeply for recursive functions."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return False
    return True


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        OSError, ValueError: as `read_text` and `parse_json`.
    """
    return parse_json(read_text(path, most))


def read_object(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON file that contains an object.

    Raises:
        OSError, ValueError: as `read_json`, or it contains something else.
    """
    value = read_json(path, most)
    if not isinstance(value, dict):
        raise ValueError(f"it holds no JSON object but {_KINDS.get(type(value), 'a number')}")
    return value


def finite(value: object) -> float | None:
    """Return a JSON value as a finite float; None if it is not a number, or not representable."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


_KINDS = {list: "a list", str: "a text", type(None): "null", bool: "true or false"}
