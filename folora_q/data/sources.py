"""Where rows come from: JSONL files, with an error that names the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from folora_q.errors import UserError

Row = dict[str, Any]


def read_jsonl(path: Path, max_rows: int | None = None) -> list[Row]:
    """The objects of a JSONL file, in order; blank lines are skipped.

    Raises:
        UserError: the file is missing, not UTF-8, empty, or a line is not a JSON object; the line's number is named.
    """
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if max_rows is not None and len(rows) >= max_rows:
                    break
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}") from None
                if not isinstance(row, dict):
                    raise UserError(
                        f"{path} line {number} must be an object such as "
                        f'{{"messages": [...]}}, not a {type(row).__name__}'
                    )
                rows.append(row)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start}", "save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows
