"""Parse rows with two answers, of which the first is preferred."""

from __future__ import annotations

from folora_q.data.examples import Completion, Preference
from folora_q.data.fields import Fields, chat_of
from folora_q.data.rows import RowError
from folora_q.data.turns import Turn, check_order, parse_turns

# The columns of a preference, the better answer first.
PAIR = ("chosen", "rejected")


def parse_preference(fields: Fields) -> Preference:
    """Parse a pair; what both begin with is the prompt, whether a `prompt` gives it or not."""
    answers = [fields.get(name) for name in PAIR]
    prompt = None if (column := fields.column("prompt")) is None else fields.row.values[column]
    if not any(isinstance(part, list) for part in (prompt, *answers)):
        return _preferred_text(fields)
    before: list[Turn] = []
    if isinstance(prompt, list):
        before = parse_turns(prompt, fields.source, fields.where, "prompt")
    elif (asked := fields.text("prompt", required=False)).strip():
        before = [Turn({"role": "user", "content": asked})]
    sides = [_turns_of_answer(fields, name, before) for name in PAIR]
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


def _turns_of_answer(fields: Fields, name: str, before: list[Turn]) -> list[Turn]:
    """Return a complete conversation that ends in one of the two answers.

    Args:
        before: the row's prompt; an answer may repeat it.
    """
    value = fields.get(name)
    if isinstance(value, list):
        turns = parse_turns(value, fields.source, fields.where, fields.source.column(name))
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
    prompt = fields.text("prompt", required=False)
    if not prompt:  # up to the word in which they differ
        same = next((i for i, (x, y) in enumerate(zip(chosen, rejected, strict=False)) if x != y), None)
        same = min(len(chosen), len(rejected)) if same is None else same
        same -= chosen[:same].endswith(" ")
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        if not (chosen and rejected):
            raise RowError(fields.where, "of `chosen` and `rejected`, one is the beginning of the other: give `prompt`")
    sides = (Completion(fields.where, prompt, answer) for answer in (chosen, rejected))
    return Preference(fields.where, *sides)
