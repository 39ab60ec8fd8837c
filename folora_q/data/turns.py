"""Convert the turns of conversations from many formats to the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from folora_q.data.rows import RowError, kind_of
from folora_q.data.tools import parse_calls
from folora_q.recipe.dataset import Role, Source

# A turn as `apply_chat_template` takes it: role and content, perhaps reasoning_content, tool_calls, name, tool_call_id.
Message = dict[str, Any]
THOUGHT = "reasoning_content"

# Names of roles in other data.
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
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
# Roles whose content is a tool call, as JSON.
CALLING = ("function_call", "tool_call")
THOUGHTS = (THOUGHT, "thinking", "reasoning")
# Keys that say whether a turn is trained.
SWITCHES = ("weight", "train", "loss", "trainable", "loss_mask")
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("reasoning", "thinking", "reasoning_text", "think")
MEDIA = ("image", "audio", "video")
CHANNEL_MARK = "<|channel|>"
EMPTY = (None, "", [], {})
# Keys of a turn that are read, besides those of its role and content; a tool's turn has two more.
KEYS = {*THOUGHTS, *SWITCHES, "train_detail", "channel", "tool_calls", "function_call"}
TOOL_KEYS = {"name", "tool_call_id"}


@dataclass(frozen=True)
class Turn:
    """One turn, and whether it is trained if it is the assistant's."""

    message: Message
    learned: bool = True


def parse_turns(value: Any, source: Source, where: str, column: str) -> list[Turn]:
    """Parse turns with `role` and `content`, `from` and `value`, or the names that the source maps.

    Raises:
        RowError: there are none, or one of them cannot be used; the message says which.
    """
    if not isinstance(value, list) or not value:
        raise RowError(where, f"`{column}` must be a list of turns, not {kind_of(value)}")
    turns: list[Turn] = []
    thought: str | None = None  # from an analysis channel, which is a turn before the answer
    for index, raw in enumerate(value):
        reader = _Reader(raw, source, where, f"{column}[{index}]")
        if reader.channel == "analysis":
            thought = "\n\n".join(filter(None, (thought, reader.text())))
            continue
        if thought is not None and reader.role != "assistant":
            raise RowError(where, f"`{column}[{index - 1}]` is a thought that no assistant turn follows")
        turn = reader.turn(thought)
        thought = None
        before = turns[-1] if turns else None
        if reader.calls_alone and before and before.message["role"] == "assistant":
            turns[-1] = _joined(before, turn)
        else:
            turns.append(turn)
    if thought is not None:
        raise RowError(where, f"`{column}` ends in a thought that no assistant turn follows")
    return turns


def unused_keys(turns: list[Any], source: Source) -> set[str]:
    """Return the keys of a row's turns that hold something and are not read.

    Args:
        turns: turns that `parse_turns` accepts.
    """
    readers = [_Reader(raw, source, "", "") for raw in turns]
    return {
        key
        for reader in readers
        for key, value in reader.raw.items()
        if key not in reader.read_keys and value not in EMPTY
    }


def check_order(where: str, messages: list[Message], column: str) -> None:
    """Check the order of turns: an optional system turn; then user and assistant alternately, or results of tools.

    Raises:
        RowError: the order is different, or there is no assistant turn.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError(where, f"`{column}` has no assistant turn, so there is nothing to train")
    for index, role in enumerate(roles):
        before = roles[index - 1] if index else None
        if role == "system" and index:
            raise RowError(where, f"roles out of order: `{column}[{index}]` is a system turn, not at the beginning")
        if role == "assistant" and before in (None, "system"):
            raise RowError(where, f"roles out of order: `{column}[{index}]` is an assistant turn before any user turn")
        if role in ("user", "assistant") and role == before:
            raise RowError(where, f"roles out of order: `{column}[{index}]` is a second {role} turn in a row")
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError(where, f"roles out of order: `{column}[{index}]` is a tool turn, but nothing called it")


def _joined(before: Turn, calling: Turn) -> Turn:
    """Merge an assistant turn with the next one, which only calls tools."""
    calls = [*before.message.get("tool_calls", []), *calling.message["tool_calls"]]
    return Turn({**before.message, "tool_calls": calls}, before.learned and calling.learned)


class _Reader:
    """Reads one turn of a row, key by key."""

    def __init__(self, raw: Any, source: Source, where: str, place: str) -> None:
        if not isinstance(raw, Mapping):
            raise RowError(where, f"`{place}` must have a role and a content, but is {kind_of(raw)}")
        self.raw, self.where, self.place = raw, where, place
        names = source.fields
        self.content_names = [names["content"]] if "content" in names else ["content", "value"]
        known = {**ROLES, **source.roles}
        role_names = [names["role"]] if "role" in names else ["role", "from"]
        role = self._first(role_names)
        if not isinstance(role, str) or role not in known:
            raise RowError(
                where,
                f"`{place}` has the role {str(role)[:40]!r}, which is unknown",
                f"known are {', '.join(known)}; map others with `roles`, e.g. {{path: ..., roles: {{customer: user}}}}",
            )
        self.role = known[role]
        self.calls_alone = role in CALLING and role not in source.roles
        channel = raw.get("channel") if self.role == "assistant" else None
        if channel not in (None, "analysis", "final", "commentary"):
            raise RowError(where, f"`{place}.channel` is {str(channel)[:40]!r}; known are analysis, commentary, final")
        self.channel = channel
        self.read_keys = KEYS.union(role_names, self.content_names, TOOL_KEYS if self.role == "tool" else ())

    def turn(self, thought: str | None) -> Turn:
        """Return the turn, with a thought that came before it in a channel of its own."""
        if self.calls_alone:
            calls = parse_calls(self._first(self.content_names), self.where, self.place)
            content, thoughts = "", []
        else:
            calls = self._calls()
            content, thoughts = self._content(optional=bool(calls))
        thoughts = [*filter(None, [thought]), *self._thoughts(), *thoughts]
        if self.role != "assistant":
            for what, found in (("a thought", thoughts), ("tool calls", calls)):
                if found:
                    raise RowError(self.where, f"`{self.place}` has {what}, but is not an assistant turn")
        elif not content.strip() and not calls:
            raise RowError(self.where, f"the content of the assistant turn `{self.place}` is empty")
        message: Message = {"role": self.role, "content": content}
        if thoughts:
            message[THOUGHT] = "\n\n".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        if self.role == "tool":
            message |= {key: self.raw[key] for key in sorted(TOOL_KEYS) if isinstance(self.raw.get(key), str)}
        if self.channel == "commentary" and not calls:
            raise RowError(self.where, f"`{self.place}` is in the channel commentary, but calls no tool")
        return Turn(message, self._learned())

    def text(self) -> str:
        """Return the content of a turn that is all thought."""
        content, thoughts = self._content(optional=False)
        return "\n\n".join([*thoughts, content])

    def _first(self, names: list[str]) -> Any:
        for name in names:
            if name in self.raw and self.raw[name] is not None:
                return self.raw[name]
        present = next((name for name in names if name in self.raw), None)
        raise RowError(
            self.where, f"`{self.place}.{present}` is null" if present else f"`{self.place}` has no `{names[0]}`"
        )

    def _calls(self) -> list[dict[str, Any]]:
        for key in ("tool_calls", "function_call"):  # OpenAI's form, and its older one
            if self.raw.get(key):
                return parse_calls(self.raw[key], self.where, f"{self.place}.{key}")
        return []

    def _content(self, optional: bool) -> tuple[str, list[str]]:
        """Return the text, and the thoughts between its parts."""
        if optional and all(self.raw.get(name) is None for name in self.content_names):
            return "", []
        content = self._first(self.content_names)
        if self.role == "tool" and not isinstance(content, str) and not _are_parts(content):
            return json.dumps(content, ensure_ascii=False), []  # what a tool returned, as the data has it
        if isinstance(content, list):
            return self._parts(content)
        if not isinstance(content, str):
            raise RowError(self.where, f"the content of `{self.place}` must be text, not {kind_of(content)}")
        if self.role == "assistant" and CHANNEL_MARK in content:
            raise RowError(
                self.where,
                f"the content of `{self.place}` has gpt-oss' {CHANNEL_MARK} in it: the chat template writes channels",
                "give the thought as `reasoning_content` and the answer alone as `content`",
            )
        return content, []

    def _parts(self, parts: list[Any]) -> tuple[str, list[str]]:
        """Read a content in OpenAI's typed parts: their text, and their thoughts."""
        texts: list[str] = []
        thoughts: list[str] = []
        for part in parts:
            kind = part.get("type", "text") if isinstance(part, Mapping) else None
            if kind in TEXT_PARTS and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif kind in THOUGHT_PARTS:
                thoughts.append(self._thought_of(part))
            elif isinstance(kind, str) and (name := next((name for name in MEDIA if name in kind), None)):
                raise RowError(self.where, f"the content of `{self.place}` has {name} in it; only text can be trained")
            else:
                raise RowError(
                    self.where,
                    f"the content of `{self.place}` has parts other than text, which are not supported"
                    + (f" ({kind[:40]})" if isinstance(kind, str) else ""),
                )
        return "".join(texts), [thought for thought in thoughts if thought.strip()]

    def _thought_of(self, part: Mapping[str, Any]) -> str:
        for key in ("text", "thinking", "reasoning", "content"):
            value = part.get(key)
            if isinstance(value, str):
                return value
            if isinstance(value, list) and _are_parts(value):
                return "".join(item["text"] for item in value)
        raise RowError(self.where, f"the content of `{self.place}` has a thought without a text")

    def _thoughts(self) -> list[str]:
        """Collect the values of the keys for thoughts; the same text under two of them counts once."""
        found: list[str] = []
        for key in THOUGHTS:
            value = self.raw.get(key)
            if value is not None and not isinstance(value, str):
                raise RowError(self.where, f"`{self.place}.{key}` must be text, not {kind_of(value)}")
            if value and value.strip() and value not in found:
                found.append(value)
        return found

    def _learned(self) -> bool:
        learned = True
        for key in SWITCHES:
            value = self.raw.get(key)
            if value is None:
                continue
            if value not in (0, 1):  # true and false are
                raise RowError(
                    self.where, f"`{self.place}.{key}` must be 0 or 1, false or true, not {str(value)[:40]!r}"
                )
            learned = learned and bool(value)
            if value and key == "train" and self.role != "assistant":
                raise RowError(self.where, f"`{self.place}.train` is true, but only assistant turns are trained")
        if self.raw.get("train_detail"):
            raise RowError(
                self.where, f"`{self.place}.train_detail` is not supported: a turn is trained in full or not at all"
            )
        return learned


def _are_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    )
