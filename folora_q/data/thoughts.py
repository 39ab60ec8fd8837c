"""Split answers into thought and answer, by the syntax of the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix

from folora_q.data.rendering import SAID, THOUGHT_MARK, Renderer, RenderError
from folora_q.data.tokens import TEMPLATE_ERRORS, decoded
from folora_q.data.turns import THOUGHT, Message

# How models whose template has no place for thoughts write them all the same.
OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Said:
    """An answer, and the thought before it; "" where there is none."""

    answer: str
    thought: str = ""


class ThoughtSyntax:
    """How one chat template writes thoughts, learned from what it renders of a thought and an answer.

    Attributes:
        opening, closing: what stands before and behind a thought, without white space at its ends.
        headers: what may stand before an answer that is none of it, such as the name of its channel.
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
        # A call may stand behind a thought in place of an answer, with another header.
        calling = _said(renderer, question, {"role": "assistant", "content": "", THOUGHT: SAID, "tool_calls": [call]})
        shared = commonprefix([before_answer, calling.partition(SAID)[2]]) if calling else before_answer
        bare = _said(renderer, question, answer).partition(SAID)[0]
        self.opening = opening.strip()
        self.closing = shared.strip() or before_answer.strip()
        self.headers = [before_answer.strip().removeprefix(self.closing).strip(), bare.strip()]

    def split(self, ids: Sequence[int], asked: str) -> Said:
        """The parts of what was said after a prompt, given as tokens.

        Args:
            asked: the prompt's text; it may end in the beginning of a thought.
        """
        plain = decoded(self.tokenizer, ids, skip_special_tokens=True)
        whole = decoded(self.tokenizer, ids)
        thought, closed, answer = whole.partition(self.closing)
        if closed:
            return Said(self._bare(answer), self._bare(thought.lstrip().removeprefix(self.opening)).strip())
        if whole.lstrip().startswith(self.opening) if self.opening else self._opened(asked):
            return Said("", self._bare(whole.lstrip().removeprefix(self.opening)).strip())  # it never came to an end
        return Said(plain) if self.headers == [""] else Said(self._bare(whole))

    def _opened(self, asked: str) -> bool:
        return asked.rstrip().endswith(OPEN)

    def _bare(self, text: str) -> str:
        """A text without the header of an answer and without special tokens."""
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
