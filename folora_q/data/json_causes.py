"""Find the likely reason why a line or a file is not valid JSON."""

from __future__ import annotations

import json
import re
from typing import Any

# Words that are a value in another language, and what JSON calls it.
FOREIGN_VALUES = {
    "None": "null",
    "True": "true",
    "False": "false",
    "undefined": "null",
    "nan": "NaN",
    "inf": "Infinity",
}
TYPOGRAPHIC = "“”„‟‘’"
COMMENTS = ("//", "#", "/*")
WORD = re.compile(r"[A-Za-z_]\w*")


def cause(error: json.JSONDecodeError, one_a_line: bool) -> str | None:
    """Return the likely cause of an error, as the end of a sentence; None if Python's message says all that is known.

    Args:
        one_a_line: the text is a line of a .jsonl file, not a complete .json file.
    """
    text, at = error.doc, error.pos
    rest = text[at:].lstrip()
    before = text[:at].rstrip()
    if error.msg == "Extra data":
        return _after_the_value(rest, one_a_line)
    if "\x00" in text[: at + 1]:
        return "it contains zero bytes, as a file that was not written completely"
    if error.msg.startswith("Unterminated string") or not rest:
        if one_a_line and not error.msg.startswith("Unterminated string") and text.strip() in ("{", "["):
            return "the object continues on the next line, and a .jsonl file has one object per line"
        return "the line ends in the middle of an object" if one_a_line else "the file ends too early"
    if known := _cause_at(rest, before):
        return known
    if error.msg.startswith("Invalid control character"):
        return "a line end or tab inside a text is written as \\n or \\t"
    if error.msg.startswith("Invalid \\"):
        return "a backslash inside a text is written as \\\\"
    if error.msg.startswith("Expecting ','") and before.endswith('"') and WORD.match(rest):
        return 'a quote inside a text is written as \\"'
    return None


def _cause_at(rest: str, before: str) -> str | None:
    """Explain an error by the text around it, if that shows the cause."""
    if rest[0] in "}]" and before.endswith(","):
        return f"a comma before `{rest[0]}` must be removed"
    if rest[0] == "'":
        return "text is in single quotes, as Python prints it: write lines with json.dumps"
    if rest[0] in TYPOGRAPHIC:
        return f'text is in typographic quotes ({rest[0]}), not in "'
    if (word := WORD.match(rest)) and word.group() in FOREIGN_VALUES:
        return f"{word.group()} is not JSON, which says {FOREIGN_VALUES[word.group()]}"
    if rest.startswith(COMMENTS):
        return "JSON has no comments"
    return None


def _after_the_value(rest: str, one_a_line: bool) -> str | None:
    """Explain what follows a complete value."""
    if not one_a_line:
        return None
    if rest[0] == "," and not rest[1:].strip():
        return "the line ends with a comma, and in a .jsonl file objects have none between them"
    if rest[0] == "]":
        return "the line closes a list, but a .jsonl file has one object per line, without brackets and commas"
    if rest[0] in "{,":
        return "several objects are on this line, but a .jsonl file has one per line"
    return None


def holds_a_list(first: str, second: str | None) -> bool:
    """Return whether a .jsonl file holds one JSON list, by its first two lines that are not empty."""
    first = first.strip()
    if not first.startswith("["):
        return False
    if first == "[":
        return True
    opened = _value(first)
    if second is None:
        return opened is None or isinstance(opened, list)
    return opened is None and not isinstance(_value(second), dict)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
