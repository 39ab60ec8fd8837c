"""The kinds of examples: a chat, a prompt with its completion, plain text, a pair of answers, and a labelled answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from folora_q.data.tools import Tool
from folora_q.data.turns import Message


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        where: file and line.
        messages: in the form of `apply_chat_template`.
        context: the number of messages at the beginning that are never trained on.
        tools: tools that the assistant may call.
        unlearned: indices of assistant turns that the row excludes from training.
    """

    where: str
    messages: list[Message]
    context: int = 0
    tools: list[Tool] | None = None
    unlearned: tuple[int, ...] = ()

    @property
    def learned(self) -> list[int]:
        """The indices of the trained turns."""
        return [index for index in self._said if index >= self.context and index not in self.unlearned]

    @property
    def answer(self) -> int:
        """The index of the turn that evaluation asks for: the last trained one, else the last of the assistant's."""
        return (self.learned or self._said)[-1]

    @property
    def prompt(self) -> list[Message]:
        """The messages before that turn."""
        return self.messages[: self.answer]

    @property
    def reference(self) -> str:
        """The content of that turn."""
        return self.messages[self.answer]["content"]

    @property
    def _said(self) -> list[int]:
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True)
class Completion:
    """A prompt and its continuation, both plain text."""

    where: str
    prompt: str
    completion: str

    @property
    def reference(self) -> str:
        """The completion, with which answers are compared."""
        return self.completion


@dataclass(frozen=True)
class Text:
    """A document that is trained in full."""

    where: str
    text: str


@dataclass(frozen=True)
class Preference:
    """A prompt with two answers, the first of which is preferred; both examples begin with the prompt."""

    where: str
    chosen: Chat | Completion
    rejected: Chat | Completion


@dataclass(frozen=True)
class Labelled:
    """A prompt with one answer, and whether such an answer is desirable."""

    where: str
    answer: Chat | Completion
    desirable: bool


Example = Chat | Completion | Text | Preference | Labelled


def with_answers(examples: Iterable[Example]) -> list[Chat | Completion]:
    """Return the examples whose answer is to be learned: of a pair the chosen one, with a label the desirable ones."""
    found = []
    for example in examples:
        match example:
            case Preference():
                found.append(example.chosen)
            case Labelled():
                found += [example.answer] if example.desirable else []
            case Chat() | Completion():
                found.append(example)
    return found


def has_chats(examples: Iterable[Example]) -> bool:
    """Return whether any example, or an answer of one, is a chat."""
    for example in examples:
        parts = (example.chosen, example.rejected) if isinstance(example, Preference) else (example,)
        if any(isinstance(part.answer if isinstance(part, Labelled) else part, Chat) for part in parts):
            return True
    return False


def content_of(example: Example) -> str:
    """Serialize an example without its location: equal for two examples of the same content."""
    if isinstance(example, Labelled):
        return json.dumps(["Labelled", content_of(example.answer), example.desirable], ensure_ascii=False)
    if isinstance(example, Preference):
        return json.dumps(["Preference", content_of(example.chosen), content_of(example.rejected)], ensure_ascii=False)
    parts = {name: value for name, value in vars(example).items() if name != "where"}
    return json.dumps([type(example).__name__, parts], ensure_ascii=False)
