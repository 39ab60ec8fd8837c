"""Parse rows with two answers, of which the first is preferred."""

from __future__ import annotations

from typing import Any

from folora_q.data.column_guess import PAIR, question_in
from folora_q.data.examples import Completion, Preference
from folora_q.data.fields import Fields, chat_of
from folora_q.data.rows import RowError
from folora_q.data.turns import Turn, check_order, parse_turns


def parse_preference(fields: Fields) -> Preference:
    """Parse a pair; what both begin with is the prompt, whether a column gives it or not."""
    in_turns = any(isinstance(fields.get(name), list | dict) for name in PAIR)
    before = _turns_before(fields, in_turns)
    if not in_turns and before is None:
        return _preferred_text(fields)
    sides = [_turns_of_answer(fields, name, before or []) for name in PAIR]
    shared = next(
        (number for number, (one, other) in enumerate(zip(*sides, strict=False)) if one.message != other.message),
        min(map(len, sides)),
    )
    for name, turns in zip(PAIR, sides, strict=True):
        check_order(fields.where, [turn.message for turn in turns], name)
        if shared == len(turns) or turns[shared].message["role"] != "assistant":
            raise RowError(fields.where, f"`chosen` and `rejected` do not differ in an assistant's turn: see `{name}`")
    chosen, rejected = (chat_of(fields, turns, shared) for turns in sides)
    return Preference(fields.where, chosen, rejected)


def _turns_before(fields: Fields, in_turns: bool) -> list[Turn] | None:
    """Return the turns that a row's prompt holds; None if it is plain text, or there is none.

    Args:
        in_turns: the answers are turns, so that the prompt is one too.
    """

    def value(*names: str) -> tuple[str, Any]:
        column = fields.column(*names)
        return column or names[0], None if column is None else fields.row.values[column]

    column, prompt = value("prompt")
    if isinstance(prompt, list):
        return parse_turns(prompt, fields.source, fields.where, column)
    if fields.text("prompt", required=False).strip():
        return [_user(fields.text("prompt"))] if in_turns else None
    if (asked := fields.instruction(required=False)).strip():
        return [_user(asked)]
    column, turns = value("messages", "conversations")
    return parse_turns(turns, fields.source, fields.where, column) if turns else None


def _user(text: str) -> Turn:
    return Turn({"role": "user", "content": text})


def _turns_of_answer(fields: Fields, name: str, before: list[Turn]) -> list[Turn]:
    """Return a complete conversation that ends in one of the two answers.

    Args:
        before: the row's prompt; an answer may repeat it.
    """
    value = fields.get(name)
    if isinstance(value, list | dict):
        turns = parse_turns(
            value if isinstance(value, list) else [value], fields.source, fields.where, fields.source.column(name)
        )
    else:
        turns = [Turn({"role": "assistant", "content": fields.text(name)})]
    if turns[0].message["role"] == "assistant":
        turns = [*before, *turns]
    system = fields.text("system", "system_prompt", required=False)
    if system.strip() and turns[0].message["role"] != "system":
        turns.insert(0, Turn({"role": "system", "content": system}))
    return turns


def _preferred_text(fields: Fields) -> Preference:
    chosen, rejected = (fields.text(name) for name in PAIR)
    if chosen == rejected:
        raise RowError(fields.where, "`chosen` and `rejected` are the same, so there is nothing to prefer")
    if fields.tools():
        raise RowError(fields.where, "it has `tools`, which only a chat template can render: give lists of turns")
    asked = fields.column("prompt") or question_in(fields.row.values)
    as_chats = f"set fields: {{instruction: {asked}}}, which makes chats of text" if asked else "give lists of turns"
    if fields.text("system", "system_prompt", required=False).strip():
        raise RowError(fields.where, "it has a system prompt, which only a chat template can render", as_chats)
    prompt = fields.text("prompt", required=False)
    if not prompt and asked and asked != fields.column("prompt"):
        plain = f"for plain text without a chat template, {{prompt: {asked}}}"
        raise RowError(fields.where, f"`{asked}` seems to be the prompt, and is not mapped", f"{as_chats}; {plain}")
    if not prompt:  # up to the word in which they differ
        same = next((i for i, (x, y) in enumerate(zip(chosen, rejected, strict=False)) if x != y), None)
        same = min(len(chosen), len(rejected)) if same is None else same
        same -= chosen[:same].endswith(" ")
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not (chosen and rejected):
            raise RowError(fields.where, "of `chosen` and `rejected`, one is the beginning of the other: give `prompt`")
    sides = (Completion(fields.where, prompt, answer) for answer in (chosen, rejected))
    return Preference(fields.where, *sides)
