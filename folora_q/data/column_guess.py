"""Guess which columns of a row are what, from their names and values. Reads nothing, and decides nothing by itself.

A guess is sure if the names say which column is asked and which is answered, e.g. `question` and `answer`, and no other
column could be meant. Otherwise it is a proposal that needs an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from folora_q.errors import UserError
from folora_q.recipe.dataset import FieldName, FormatName
from folora_q.recipe.strict_yaml import dump_yaml

Rows = Sequence[Mapping[str, Any]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Names of columns in lower case, with _ for everything that is not a letter or digit; the most telling come first.
QUESTIONS = _words(
    "question prompt instruction query user human user_message user_prompt user_input question_text ask problem "
    "request utterance input source src q"
)
ANSWERS = _words(
    "answer response completion output reply assistant bot gpt model assistant_message assistant_response bot_response "
    "model_response model_output answer_text solution chosen target tgt a"
)
CONTEXTS = _words("input context passage")
SYSTEMS = _words("system system_prompt system_message")
TEXTS = _words("text content document body article passage markdown raw_content code page_content")
TURNS = _words("messages conversations conversation dialog dialogue chat turns chosen")
# Columns that are never asked or answered.
LABELS = _words(
    "id idx index uid uuid url source title label category topic tags lang language split score date time name"
)
# With these columns, rows are pairs; the first is the better answer.
PAIR = ("chosen", "rejected")
# One of these says whether an answer is desirable.
LABEL_COLUMNS = ("label", "kto_tag")
# A column is of a kind if this share of its values is.
MIN_SHARE = 0.5


@dataclass(frozen=True)
class Guess:
    """A guess about the columns of a source.

    Attributes:
        format: the format that the rows have with these fields.
        fields: `fields` of the source, as {ours: theirs}.
        sure: whether the names leave no doubt.
    """

    format: FormatName
    fields: dict[FieldName, str]
    sure: bool

    @property
    def yaml(self) -> str:
        """The fields as they are written in a recipe."""
        return dump_yaml(dict(self.fields), flow=True)

    @property
    def words(self) -> str:
        """A description: which column is read as what."""
        if self.format == "text":
            return f"the text is `{self.fields['text']}`"
        if self.format == "messages":
            return f"the turns of a chat are `{self.fields['messages']}`"
        if self.format == "preference":
            chosen, rejected = (self.fields.get(name, name) for name in PAIR)
            asked = f", as answers to `{self.fields['instruction']}`" if "instruction" in self.fields else ""
            return f"`{chosen}` is preferred to `{rejected}`{asked}"
        if self.format == "labelled":
            answer = self.fields.get("output", self.fields.get("completion", "the last turn"))
            asked = f" to `{self.fields['instruction']}`" if "instruction" in self.fields else ""
            return f"a label says whether {answer if ' ' in answer else f'`{answer}`'}{asked} is desirable"
        if self.format == "prompt_completion":
            return f"the prompt is `{self.fields['prompt']}` and its completion `{self.fields['completion']}`"
        parts = [f"the question is `{self.fields['instruction']}`"]
        parts += [f"its context `{self.fields['input']}`"] if "input" in self.fields else []
        parts += [f"the system prompt `{self.fields['system']}`"] if "system" in self.fields else []
        return f"{', '.join(parts)} and the answer `{self.fields['output']}`"


def guess_fields(rows: Rows) -> Guess | None:
    """Guess the columns of rows that match no known format; None if nothing fits.

    Args:
        rows: the first rows of a source, by column.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    turns = [column for column in columns if _share(rows, column, _is_turns) >= MIN_SHARE]
    if turns:
        named = _named(turns, TURNS)
        return Guess("messages", {"messages": (named or turns)[0]}, len(turns) == 1)
    texts = [column for column in columns if _share(rows, column, _is_text) >= MIN_SHARE]
    asked, answered = _named(texts, QUESTIONS), _named(texts, ANSWERS)
    if answered and (asked := [column for column in asked if column != answered[0]]):
        return _pair(texts, asked, answered)
    if named := _named(texts, TEXTS):
        rest = [column for column in texts if column not in named and _plain(column) not in LABELS]
        return Guess("text", {"text": named[0]}, len(named) == 1 and not rest)
    unlabelled = [column for column in texts if _plain(column) not in LABELS]
    if len(unlabelled) == 1 and not _named(unlabelled, (*QUESTIONS, *ANSWERS)):
        return Guess("text", {"text": unlabelled[0]}, False)
    if len(unlabelled) == 2:
        return Guess("alpaca", {"instruction": unlabelled[0], "output": unlabelled[1]}, False)
    return None


def _pair(texts: Sequence[str], asked: Sequence[str], answered: Sequence[str]) -> Guess:
    """Return the guess for columns of which some are named like questions and some like answers."""
    fields: dict[FieldName, str] = {"instruction": asked[0], "output": answered[0]}
    context = [column for column in _named(texts, CONTEXTS) if column not in fields.values()]
    if context:
        fields["input"] = context[0]
    if system := _named(texts, SYSTEMS):
        fields["system"] = system[0]
    doubtful = [column for column in (*asked, *answered) if column not in fields.values()]
    others = [column for column in doubtful if _plain(column) not in LABELS]
    return Guess("alpaca", fields, not others and not _named(texts, PAIR[1:]))


def guess_pairs(rows: Rows) -> Guess | None:
    """Guess the columns of pairs of answers; None if the rows are none. A prompt and answers of text become chats."""
    columns = {column for row in rows for column in row}
    if not columns.issuperset(PAIR):
        return None
    in_text = _share(rows, PAIR[0], _is_text) >= MIN_SHARE
    asked = question_in(rows[0]) if in_text else None
    return Guess("preference", {"instruction": asked} if asked and asked != "instruction" else {}, True)


def guess_labelled(rows: Rows) -> Guess | None:
    """Guess the columns of answers with a label, whose values are true and false; None if the rows have none.

    A prompt and a completion of text become chats.
    """
    if max(_share(rows, name, _is_truth) for name in LABEL_COLUMNS) < MIN_SHARE:
        return None
    columns = {column for row in rows for column in row}
    if {"prompt", "completion"} <= columns and _share(rows, "completion", _is_text) >= MIN_SHARE:
        return Guess("labelled", {"instruction": "prompt", "output": "completion"}, True)
    known = ({"prompt", "completion"}, {"instruction", "output"}, {"messages"}, {"conversations"})
    return Guess("labelled", {}, True) if any(each <= columns for each in known) else None


def question_in(row: Mapping[str, Any]) -> str | None:
    """Return the column of a row that is named like a question and holds text of several words, if any."""
    named = [column for column in _named(row, QUESTIONS) if _plain(column) not in LABELS]
    return next((column for column in named if _is_text(row[column]) and len(row[column].split()) > 1), None)


def fields_given(fields: dict[FieldName, str]) -> Guess:
    """Return the guess that a user made: fields of a source, whose format follows from them.

    Raises:
        UserError: they make no row; the message says which fields do.
    """
    known: dict[frozenset[FieldName], FormatName] = {
        frozenset({"chosen", "rejected"}): "preference",
        frozenset({"label"}): "labelled",
        frozenset({"messages"}): "messages",
        frozenset({"prompt", "completion"}): "prompt_completion",
        frozenset({"instruction", "output"}): "alpaca",
        frozenset({"text"}): "text",
    }
    for needed, name in known.items():
        if needed <= fields.keys():
            return Guess(name, dict(fields), True)
    raise UserError(
        f"the fields {', '.join(fields)} make no row",
        "give instruction and output, prompt and completion, messages, text, chosen and rejected, or label",
    )


def _named(columns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the columns that have one of these names, in the order of the names."""
    found = {_plain(column): column for column in columns}
    return [found[name] for name in names if name in found]


def _plain(column: str) -> str:
    """Return a column's name in lower case, with _ between its words: `User Input` and `userInput` are user_input."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", str(column))
    return re.sub(r"[^a-z0-9]+", "_", parted.lower()).strip("_")


def _share(rows: Rows, column: str, is_kind: Any) -> float:
    """Return the share of the rows that have the column whose value is of a kind."""
    values = [row[column] for row in rows if row.get(column) is not None]
    return sum(map(is_kind, values)) / len(values) if values else 0.0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool)


def _is_turns(value: Any) -> bool:
    keys = {"role", "from", "content", "value"}
    turns = value if isinstance(value, list) else []
    return bool(turns) and all(isinstance(turn, Mapping) and len({*turn} & keys) >= 2 for turn in turns)
