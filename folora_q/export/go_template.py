"""Derive Ollama's TEMPLATE, a Go template, from a model's chat template, and check that both render the same text.

Only templates are derived that put fixed text before and after each message, by its role, as ChatML and Llama 3 do. The
pieces are found by rendering conversations of known words; then other conversations must come out the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.tokens import TEMPLATE_ERRORS

TOOLS, THINKING = "tools", "the switch for thinking"
Messages = Sequence[dict[str, str]]
Render = Callable[[Messages, bool], str]  # with or without the generation prompt


class UnsupportedTemplateError(Exception):
    """Why a chat template has no equivalent Go template here; a sentence without its subject."""


def _turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


PROBE = _turns("Question one", "Answer one", "Question two")
SYSTEM_PROBE = _turns("Question one", "Answer one", "Question two", system="System text")
# Conversations that both templates must render to the same text. Each ends with the user, and asks for an answer.
BATTERY = (
    _turns("What is 2 + 2?"),
    _turns("A question", "An answer", "Another one"),
    _turns("one", "two", "three", "four", "five"),
    _turns("What is 2 + 2?", system="Answer in one word."),
    _turns("one", "two", "three", "four", "five", system="Be brief.\n\nBe kind."),
    _turns("Grüße, 世界 🙂\n\n- a list\n- {{ .Content }} and {% raw %}", 'x = {"a": [1, 2]}  # <b>&amp;</b>', "}}"),
)
SPACED = _turns("  spaces around \n", " too ", "\nend ")


@dataclass(frozen=True)
class TurnFormat:
    """A chat format: fixed text before and after each message, by role.

    Attributes:
        default: at the beginning of a conversation without a system message.
        generation: at the end, before the model's answer.
    """

    default: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str

    def render(self, messages: Messages) -> str:
        """Return what the Go template renders."""
        head = "" if any(message["role"] == "system" for message in messages) else self.default
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        turns = (around[message["role"]][0] + message["content"] + around[message["role"]][1] for message in messages)
        return head + "".join(turns) + self.generation

    def to_go(self) -> str:
        """Return the Go template.

        Raises:
            UnsupportedTemplateError: its text cannot be written in a Modelfile.
        """
        fixed = (self.default, *self.system, *self.user, *self.assistant, self.generation)
        for text in fixed:
            if re.search(r'\{\{|\}\}|"""', text) or not text.replace("\n", "").replace("\t", "").isprintable():
                raise UnsupportedTemplateError(f"has text that a Modelfile cannot hold: {text!r}")
        branches = [
            f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for word, role, (before, after) in (
                ("if", "system", self.system),
                ("else if", "user", self.user),
                ("else if", "assistant", self.assistant),
            )
        ]
        head = f"{{{{ if not .System }}}}{self.default}{{{{ end }}}}" if self.default else ""
        return f"{head}{{{{ range .Messages }}}}{''.join(branches)}{{{{ end }}}}{{{{ end }}}}{self.generation}"


@dataclass(frozen=True)
class GoTemplate:
    """A Go template that renders the same text as the model's chat template, and the abilities that it leaves out."""

    text: str
    limits: list[str]


def derive_go_template(tokenizer: Tokenizer, adds_bos: bool | None) -> GoTemplate:
    """Derive the Go template of a tokenizer's chat template.

    Args:
        adds_bos: whether the program that uses the GGUF file puts the start token before the text; None if unknown.

    Raises:
        UnsupportedTemplateError: there is no chat template, or it is not of the form that is derived here.
    """
    source = str(tokenizer.chat_template or "")
    if not source:
        raise UnsupportedTemplateError("is missing")
    if "strftime_now" in source:
        raise UnsupportedTemplateError("contains today's date")
    uses_bos = "bos_token" in source and bool(tokenizer.bos_token)
    if uses_bos and adds_bos is None:
        raise UnsupportedTemplateError("writes the start token, which llama.cpp may add too")
    start = str(tokenizer.bos_token) if uses_bos and adds_bos else ""

    def render(messages: Messages, generate: bool) -> str:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
        return str(text).removeprefix(start)

    try:
        turns = _pieces(render)
        for messages in BATTERY:
            if turns.render(messages) != render(messages, True):
                raise UnsupportedTemplateError("does more than put fixed text around each message")
        trims = turns.render(SPACED) != render(SPACED, True)
    except TEMPLATE_ERRORS as error:
        raise UnsupportedTemplateError(f"refuses a conversation: {error}") from None
    parts = {"removing spaces around messages": trims, TOOLS: "tools" in source, THINKING: "enable_thinking" in source}
    return GoTemplate(turns.to_go(), [part for part, left_out in parts.items() if left_out])


def _pieces(render: Render) -> TurnFormat:
    """Split renderings of known words into the text around them; where two pieces meet, only their sum matters."""
    first, to_answer, to_user, end = _between(render(PROBE, True), PROBE)
    system, after_system, *_ = _between(render(SYSTEM_PROBE, True), SYSTEM_PROBE)
    # Where a turn ends is seen without a generation prompt, unless the template then ends the text differently.
    user_end = _between(render(PROBE[:1], False), PROBE[:1])[-1]
    if not (to_answer.startswith(user_end) and end.startswith(user_end)):
        user_end = os.path.commonprefix([to_answer, end])
    answer_end = _between(render(PROBE[:2], False), PROBE[:2])[-1]
    user_start = to_user.removeprefix(answer_end)
    if not (first.endswith(user_start) and after_system.endswith(user_start)):
        user_start = os.path.commonprefix([text[::-1] for text in (first, to_user, after_system)])[::-1]
    return TurnFormat(
        default=first.removesuffix(user_start),
        system=(system, after_system.removesuffix(user_start)),
        user=(user_start, user_end),
        assistant=(to_answer.removeprefix(user_end), to_user.removesuffix(user_start)),
        generation=end.removeprefix(user_end),
    )


def _between(text: str, messages: Messages) -> list[str]:
    pieces = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found:
            raise UnsupportedTemplateError(f"does not render every message of the role {message['role']}")
        pieces.append(before)
    return [*pieces, text]
