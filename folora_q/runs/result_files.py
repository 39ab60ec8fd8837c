"""Read and write results: evaluation.json, gates.json, answers.jsonl and metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from folora_q.errors import UserError, first_line
from folora_q.runs.results import (
    GENERATED_TEXT,
    GENERATED_TEXT_CUT,
    AnswerResult,
    Checked,
    Evaluation,
    GateResult,
    TextKind,
)
from folora_q.storage.untrusted import MIB, parse_json, read_lines, read_text

# Limit of evaluation.json and gates.json; a hundred layers with hundreds of directions each take 1 MiB.
MAX_RESULTS_BYTES = 16 * MIB
AGAIN = "run it again, or `folora-q eval`"
# Names of texts as evaluation.json had them in 0.1.0.
FORMER_NAMES = {"own text": GENERATED_TEXT, "own text, cut": GENERATED_TEXT_CUT}


def to_json(value: Evaluation | list[GateResult]) -> str:
    """Serialize as in evaluation.json and gates.json."""
    content = [asdict(item) for item in value] if isinstance(value, list) else asdict(value)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_evaluation(path: Path) -> Evaluation | None:
    """Read evaluation.json; None if it does not exist.

    Raises:
        UserError: it is damaged.
    """
    found = _read(path, Evaluation)
    if found is None:
        return None
    texts = [
        replace(text, name=FORMER_NAMES.get(text.name, text.name)) if text.kind is TextKind.GENERATED else text
        for text in found.texts
    ]
    return replace(found, texts=texts)


def read_gate_results(path: Path) -> list[GateResult]:
    """Read gates.json; empty if it does not exist.

    Raises:
        UserError: it is damaged.
    """
    return _read(path, GateResult, several=True) or []


def read_answers(path: Path) -> list[AnswerResult]:
    """Read answers.jsonl; empty if it does not exist.

    Raises:
        UserError: a line is damaged.
    """
    return [_parsed(path, AnswerResult, line) for line in _lines(path)]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the objects of metrics.jsonl, up to a line that a crash cut off.

    Raises:
        UserError: it cannot be read, or is not text.
    """
    found: list[dict[str, Any]] = []
    for line in _lines(path):
        try:
            value = parse_json(line)
        except ValueError:
            break
        if isinstance(value, dict):
            found.append(value)
    return found


def answer_lines(answers: Iterable[AnswerResult]) -> Iterator[dict[str, Any]]:
    """Yield the objects of answers.jsonl."""
    return (asdict(answer) for answer in answers)


def _lines(path: Path) -> Iterator[str]:
    try:
        yield from read_lines(path)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}", AGAIN) from None


def _read(path: Path, kind: Any, several: bool = False) -> Any:
    try:
        text = read_text(path, MAX_RESULTS_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}", AGAIN) from None
    return _parsed(path, kind, text, several)


def _parsed(path: Path, kind: Any, text: str, several: bool = False) -> Any:
    try:
        return _adapter(kind, several).validate_json(_whole(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its beginning"
        raise UserError(f"{path} is damaged: {where}: {first['msg']}", AGAIN) from None


@cache
def _adapter(kind: Any, several: bool) -> TypeAdapter[Any]:
    return TypeAdapter(Checked[kind] if several else kind)  # pyright: ignore[reportInvalidTypeForm]  (made at runtime)


def _whole(text: str) -> str:
    """Replace lone surrogates, which JSON can contain as escapes but UTF-8 cannot, by question marks."""
    if "\\ud" not in text.lower():
        return text
    try:
        return json.dumps(parse_json(text), ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")
    except ValueError:
        return text
