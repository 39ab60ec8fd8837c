"""What shape rows have, and the three things that we train on: a chat, a prompt with its completion, and plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from folora_q.data.rows import Row, RowError
from folora_q.recipe.dataset import Role, Shape, Source

Message = dict[str, str]

# Roles as other data call them.
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        where: its file and line.
        messages: `role` and `content` each.
        context: so many messages at the beginning are never trained on.
    """

    where: str
    messages: list[Message]
    context: int = 0

    @property
    def prompt(self) -> list[Message]:
        """All before the last thing that the assistant says."""
        return self.messages[: self._last]

    @property
    def reference(self) -> str:
        """The last thing that the assistant says, which an answer is compared with."""
        return self.messages[self._last]["content"]

    @property
    def _last(self) -> int:
        return max(index for index, message in enumerate(self.messages) if message["role"] == "assistant")


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, both plain text."""

    where: str
    prompt: str
    completion: str

    @property
    def reference(self) -> str:
        """The completion, which an answer is compared with."""
        return self.completion


@dataclass(frozen=True)
class Text:
    """A document, all of which is learned."""

    where: str
    text: str


Example = Chat | Completion | Text


def content_of(example: Example) -> str:
    """All of an example but its place: equal for two that teach the same."""
    parts = {name: value for name, value in vars(example).items() if name != "where"}
    return json.dumps([type(example).__name__, parts], ensure_ascii=False)


def shape_of(row: Row, source: Source) -> Shape:
    """The shape that the source names, or that the row's columns show.

    Raises:
        RowError: they show none.
    """
    if source.shape != "auto":
        return source.shape
    columns = {*row.values, *source.fields}
    fitting = [shape for shape, needed in COLUMNS.items() if needed <= columns]
    if fitting:  # one that the recipe maps a column for comes before all others
        return max(fitting, key=lambda shape: bool(FIELDS[shape] & source.fields.keys()))
    raise RowError(
        row.where,
        f"its columns ({_listed(row.values)}) are those of no known shape",
        "known are messages, conversations, instruction with output, prompt with completion, and text; other names go "
        "into `fields`, e.g. train_dataset: {path: ..., fields: {prompt: question, completion: answer}}",
    )


def to_example(row: Row, shape: Shape, source: Source) -> Example:
    """One row as a thing to train on.

    Raises:
        RowError: a column is missing, or holds what it must not; the field is named.
    """
    return PARSERS[shape](_Fields(row, source))


@dataclass(frozen=True)
class _Fields:
    """A row's columns under our names."""

    row: Row
    source: Source

    @property
    def where(self) -> str:
        return self.row.where

    def column(self, *names: str) -> str | None:
        """The row's column for the first of our names that has one; a column that `fields` gives away has no other."""
        fields = self.source.fields
        given_away = set(fields.values())
        for name in names:
            column = fields.get(name, name)
            if column in self.row.values and (name in fields or column not in given_away):
                return column
        return None

    def get(self, *names: str) -> Any:
        """The value of a column that must be there, under one of these names."""
        column = self.column(*names)
        if column is not None:
            return self.row.values[column]
        wanted = self.source.fields.get(names[0], names[0])
        raise RowError(self.where, f"the column `{wanted[:40]}` is missing; there are {_listed(self.row.values)}")

    def text(self, name: str, required: bool = True) -> str:
        """The text of a column; "" where it is not required and absent or null."""
        theirs = self.source.fields.get(name, name)
        column = self.column(name)
        value = None if column is None else self.row.values[column]
        if value is None and not required:
            return ""
        if column is None:
            self.get(name)
        if not isinstance(value, str):
            raise RowError(self.where, f"`{theirs}` must be text, not {_kind(value)}")
        if required and not value.strip():
            raise RowError(self.where, f"`{theirs}` is empty")
        return value


def _messages(fields: _Fields) -> Chat:
    column = fields.column("messages", "conversations") or "messages"
    messages = _turns(fields, fields.get("messages", "conversations"), column)
    _check_order(fields.where, messages, column)
    return Chat(fields.where, messages)


def _alpaca(fields: _Fields) -> Chat:
    system, more = fields.text("system", required=False), fields.text("input", required=False)
    asked = fields.text("instruction") + (f"\n\n{more}" if more.strip() else "")
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": fields.text("output")}]
    return Chat(fields.where, [{"role": "system", "content": system}, *messages] if system.strip() else messages)


def _prompt_completion(fields: _Fields) -> Chat | Completion:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        context = _turns(fields, prompt, "prompt")
        messages = context + _turns(fields, completion, "completion")
        _check_order(fields.where, messages, "prompt + completion")
        if not any(message["role"] == "assistant" for message in messages[len(context) :]):
            raise RowError(fields.where, "the assistant says nothing in `completion`, so there is nothing to learn")
        return Chat(fields.where, messages, context=len(context))
    return Completion(fields.where, fields.text("prompt"), fields.text("completion"))


def _text(fields: _Fields) -> Text:
    return Text(fields.where, fields.text("text"))


def _turns(fields: _Fields, value: Any, column: str) -> list[Message]:
    """Turns with `role` and `content`, or `from` and `value`, or what the source calls them."""
    if not isinstance(value, list) or not value:
        raise RowError(fields.where, f"`{column}` must be a list of turns, not {_kind(value)}")
    return [_turn(fields, turn, f"{column}[{index}]") for index, turn in enumerate(value)]


def _turn(fields: _Fields, turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError(fields.where, f"`{place}` must have a role and a content, but is {_kind(turn)}")
    names = fields.source.fields
    if turn.get("tool_calls"):
        raise RowError(fields.where, f"`{place}` calls a tool, which is not supported")
    role = _first(turn, [names["role"]] if "role" in names else ["role", "from"], fields.where, place)
    content = _first(turn, [names["content"]] if "content" in names else ["content", "value"], fields.where, place)
    known = {**ROLES, **fields.source.roles}
    if not isinstance(role, str) or role not in known:
        raise RowError(
            fields.where,
            f"`{place}` has the role {str(role)[:40]!r}, which is unknown",
            f"known are {', '.join(known)}; others go into `roles`, as {{path: ..., roles: {{customer: user}}}}",
        )
    if isinstance(content, list):
        content = _joined(content, fields.where, place)
    if not isinstance(content, str):
        raise RowError(fields.where, f"the content of `{place}` must be text, not {_kind(content)}")
    if known[role] == "assistant" and not content.strip():
        raise RowError(fields.where, f"the content of `{place}`, which the assistant should learn to say, is empty")
    return {"role": known[role], "content": content}


def _first(turn: Mapping[str, Any], names: list[str], where: str, place: str) -> Any:
    for name in names:
        if name in turn and turn[name] is not None:
            return turn[name]
    present = next((name for name in names if name in turn), None)
    raise RowError(where, f"`{place}.{present}` is null" if present else f"`{place}` has no `{names[0]}`")


def _joined(parts: list[Any], where: str, place: str) -> str:
    """The OpenAI form of a content: parts of text."""
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise RowError(where, f"the content of `{place}` has parts that are no text, which are not supported")
    return "".join(part["text"] for part in parts)


def _check_order(where: str, messages: list[Message], column: str) -> None:
    """The order that chat templates take: perhaps a system turn; then user and assistant in turn, or tool's answers."""
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError(where, f"no turn of `{column}` is the assistant's, so there is nothing to learn")
    for index, role in enumerate(roles):
        before = roles[index - 1] if index else None
        if role == "system" and index:
            raise RowError(where, f"roles out of order: `{column}[{index}]` is a system turn, not at the beginning")
        if role == "assistant" and before in (None, "system"):
            raise RowError(where, f"roles out of order: `{column}[{index}]` is the assistant's, before any user's")
        if role in ("user", "assistant") and role == before:
            raise RowError(where, f"roles out of order: `{column}[{index}]` is a second {role} turn in a row")
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError(where, f"roles out of order: `{column}[{index}]` is a tool's, but nothing called it")


def _listed(columns: Mapping[str, Any]) -> str:
    """The names of a row's columns, or as much of them as a message can hold."""
    return ", ".join(sorted(str(name)[:40] for name in columns)[:8]) or "none"


def _kind(value: Any) -> str:
    names = {type(None): "null", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    return names.get(type(value), f"a {type(value).__name__}") if value != [] else "an empty list"


# In this order: many data sets carry a `prompt` beside their messages, or a rendered `text` beside their columns.
COLUMNS: dict[Shape, set[str]] = {
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "output"},
    "text": {"text"},
}
# What `fields` may map for each.
FIELDS: dict[Shape, set[str]] = {
    "messages": {"messages", "role", "content"},
    "sharegpt": {"role", "content"},
    "prompt_completion": {"prompt", "completion"},
    "alpaca": {"instruction", "input", "output", "system"},
    "text": {"text"},
}
PARSERS: dict[Shape, Callable[[_Fields], Example]] = {
    "messages": _messages,
    "sharegpt": _messages,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
