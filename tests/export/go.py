"""Readers of what is written for Ollama: the Modelfile, and the part of Go's template language that is in it."""

from __future__ import annotations

import re
from collections.abc import Sequence

COMMANDS = {"from", "license", "template", "system", "adapter", "parameter", "message", "requires"}


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """Return instructions and their values; a parameter's name is its instruction's second word."""
    found: list[tuple[str, str]] = []
    lines = text.split("\n")
    while lines:
        line = lines.pop(0).lstrip(" \t")
        if not line or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        assert name.lower() in COMMANDS, line
        if name.lower() == "parameter":
            name, _, value = value.partition(" ")
            assert re.fullmatch(r"\w+", name), line
        while _unquoted(value) is None:  # a value in quotes goes on in the next line
            assert lines, f"the quotes of {name} do not end"
            value += "\n" + lines.pop(0)
        content = _unquoted(value)
        assert content, line
        found.append((name, content))
    assert any(name == "FROM" for name, _ in found)
    return found


def _unquoted(value: str) -> str | None:
    value = value.strip()
    for quote in ('"""', '"'):
        if value.startswith(quote):
            closed = len(value) >= 2 * len(quote) and value.endswith(quote)
            return value[len(quote) : -len(quote)] if closed else None
    return value


def render_go(template: str, messages: Sequence[dict[str, str]]) -> str:
    """Render a Go template with `range .Messages`, `if`, `else if eq .Role`, and `.Content`, as Ollama does."""
    pieces = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    text, place = _block(pieces, 0, {"System": system, "Messages": messages})
    assert place == len(pieces), "an end without a beginning"
    return text


def _block(pieces: list[str], place: int, dot: dict) -> tuple[str, int]:
    """Render until the block's end or else; return the text, and where that is."""
    text = ""
    while place < len(pieces):
        piece = pieces[place]
        action = piece[2:-2].strip() if piece.startswith("{{") else None
        if action is None:
            text += piece
        elif action == "end" or action.startswith("else"):
            return text, place
        elif action == "range .Messages":
            inside, end = "", place
            for message in dot["Messages"]:
                part, end = _block(pieces, place + 1, {"Role": message["role"], "Content": message["content"]})
                inside += part
            text, place = text + inside, end
        elif action.startswith("if "):
            part, place = _if(pieces, place, dot)
            text += part
        else:
            text += dot[action.removeprefix(".")]
        place += 1
    return text, place


def _if(pieces: list[str], place: int, dot: dict) -> tuple[str, int]:
    chosen = ""
    decided = False
    while pieces[place] != "{{ end }}":
        condition = re.sub(r"^(else )?if ", "", pieces[place][2:-2].strip())
        part, place = _block(pieces, place + 1, dot)
        if not decided and _holds(condition, dot):
            chosen, decided = part, True
    return chosen, place


def _holds(condition: str, dot: dict) -> bool:
    if match := re.fullmatch(r'eq \.Role "(\w+)"', condition):
        return dot["Role"] == match[1]
    assert condition == "not .System", condition
    return not dot["System"]
