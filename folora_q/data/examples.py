"""The kinds of examples: a chat, a prompt with its completion, plain text, and a pair of answers."""

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


Example = Chat | Completion | Text | Preference


def with_answers(examples: Iterable[Example]) -> list[Chat | Completion]:
    """Return the examples that have an answer, of a pair the one with the chosen answer."""
    chosen = (example.chosen if isinstance(example, Preference) else example for example in examples)
    return [example for example in chosen if not isinstance(example, Text)]


def content_of(example: Example) -> str:
    """Serialize an example without its location: equal for two examples of the same content."""
    if isinstance(example, Preference):
        return json.dumps(["Preference", content_of(example.chosen), content_of(example.rejected)], ensure_ascii=False)
    parts = {name: value for name, value in vars(example).items() if name != "where"}
    return json.dumps([type(example).__name__, parts], ensure_ascii=False)
