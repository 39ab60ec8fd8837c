"""Split answers into thought and answer, by the syntax of the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from folora_q.data.rendering import SAID, THOUGHT_MARK, Renderer, RenderError
from folora_q.data.tokens import TEMPLATE_ERRORS, decoded
from folora_q.data.turns import THOUGHT, Message

# How models write thoughts if their template does not render any.
OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Said:
    """An answer, and the thought before it ("" if there is none)."""

    answer: str
    thought: str = ""


class ThoughtSyntax:
    """How a chat template renders thoughts, inferred from a rendered thought and answer.

    Attributes:
        opening, closing: the text before and after a thought, stripped.
        headers: texts that may precede an answer without being part of it, such as the name of its channel.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.tokenizer = renderer.tokenizer
        self.opening, self.closing, self.headers = OPEN, CLOSE, [""]
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self._special = sorted(special | set(self.tokenizer.all_special_tokens), key=len, reverse=True)
        if not renderer.has_template or not renderer.thinks:
            return
        question: list[Message] = [{"role": "user", "content": "a"}]
        answer: Message = {"role": "assistant", "content": SAID}
        call = {"type": "function", "function": {"name": THOUGHT_MARK, "arguments": {}}}
        said = _said(renderer, question, {**answer, THOUGHT: THOUGHT_MARK})
        opening, _, rest = said.partition(THOUGHT_MARK)
        before_answer = rest.partition(SAID)[0]
        # A call may follow a thought instead of an answer, with another header.
        calling = _said(renderer, question, {"role": "assistant", "content": "", THOUGHT: SAID, "tool_calls": [call]})
        shared = commonprefix([before_answer, calling.partition(SAID)[2]]) if calling else before_answer
        bare = _said(renderer, question, answer).partition(SAID)[0]
        self.opening = opening.strip()
        self.closing = shared.strip() or before_answer.strip()
        self.headers = [before_answer.strip().removeprefix(self.closing).strip(), bare.strip()]

    def split(self, ids: Sequence[int], asked: str) -> Said:
        """Split generated tokens into thought and answer.

        Args:
            asked: the prompt's text; it may end with the opening of a thought.
        """
        plain = decoded(self.tokenizer, ids, skip_special_tokens=True)
        whole = decoded(self.tokenizer, ids)
        thought, closed, answer = whole.partition(self.closing)
        if closed:
            return Said(self._bare(answer), self._bare(thought.lstrip().removeprefix(self.opening)).strip())
        if whole.lstrip().startswith(self.opening) if self.opening else self._opened(asked):
            return Said("", self._bare(whole.lstrip().removeprefix(self.opening)).strip())  # the thought has no end
        return Said(plain) if self.headers == [""] else Said(self._bare(whole))

    def _opened(self, asked: str) -> bool:
        return asked.rstrip().endswith(OPEN)

    def _bare(self, text: str) -> str:
        """Remove an answer's header and special tokens from a text."""
        for header in self.headers:
            if header and text.lstrip().startswith(header):
                text = text.lstrip()[len(header) :]
        for token in self._special:
            text = text.replace(token, "")
        return text


def _said(renderer: Renderer, question: list[Message], answer: Message) -> str:
    try:
        return renderer.unchecked(question, answer).said
    except (RenderError, *TEMPLATE_ERRORS):
        return ""
