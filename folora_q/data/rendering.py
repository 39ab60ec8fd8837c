"""Render conversations with a chat template: the prompt, and the answer that is trained.

A template may rewrite earlier turns, open a thought in its prompt, or leave out a part of a row. So nothing is assumed
about it: each turn is rendered as the last of its conversation, as when the model is asked for it, and compared with
the prompt and with the content of the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.data.completeness import lost_part
from folora_q.data.tokens import TEMPLATE_ERRORS, added_vocabulary
from folora_q.data.tools import Tool
from folora_q.data.turns import THOUGHT, Message

# Private-use characters that no data and no template contains, and that no template trims.
ASKED, SAID, THOUGHT_MARK, CALLED = "\ue0a0", "\ue0a1", "\ue0a2", "\ue0a3"
# Variables that tell templates whether to think.
SWITCHES = ("enable_thinking", "thinking")
INLINE_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
QUOTED = 40  # characters of a rendered text that a message quotes


class RenderError(Exception):
    """The template renders a conversation in a way that cannot be trained.

    Args:
        reason: what the template does; follows its name in messages; no full stop.
    """

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


@dataclass(frozen=True)
class RenderedTurn:
    """An assistant turn, rendered as the last of its conversation.

    Attributes:
        asked: the prompt, with the generation prompt.
        said: the answer, with the end of the turn.
        opening: the number of characters at the start of `said` that are the empty thought of a row without one.
        given: whether there are any, or the prompt asks for no thought.
    """

    asked: str
    said: str
    opening: int = 0
    given: bool = False

    @property
    def text(self) -> str:
        """The prompt and the answer."""
        return self.asked + self.said


class Renderer:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: has the chat template to use.
        without_thought: `data.without_thought`.
    """

    def __init__(self, tokenizer: Tokenizer, without_thought: str = "given") -> None:
        self.tokenizer = tokenizer
        self.without_thought = without_thought
        added = added_vocabulary(tokenizer)
        self.added, self._ends = frozenset(added.values()), tuple(added)

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def template(self, tools: list[Tool] | None = None) -> str:
        """Return the template's text; a tokenizer may have another one for conversations with tools."""
        return self.tokenizer.get_chat_template(None, tools)

    def render(
        self, messages: Sequence[Message], tools: list[Tool] | None = None, prompt: bool = False, **variables: Any
    ) -> str:
        """Render a conversation, with the generation prompt if `prompt`."""
        return self._apply([self.adapted(message) for message in messages], tools, prompt, **variables)

    def prompt(self, messages: Sequence[Message], tools: list[Tool] | None = None, think: bool = True) -> str:
        """Render the prompt for an answer to a conversation.

        Args:
            think: if False, the prompt includes the template's empty thought, if it renders thoughts.

        Raises:
            RenderError: `think` is False, and no prompt is a prefix of what the template renders.
        """
        if think or not self.thinks:
            return self.render(messages, tools, prompt=True)
        return self.unchecked(messages, {"role": "assistant", "content": SAID}, tools).text.partition(SAID)[0]

    def ids(self, text: str) -> list[int]:
        """Tokenize a rendered text, which already contains all special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def turn(self, messages: Sequence[Message], index: int, tools: list[Tool] | None = None) -> RenderedTurn:
        """Render the assistant's turn at `index`.

        Raises:
            RenderError: no prompt of the template is a prefix of what it renders, it leaves out a part of the
                conversation, it ends the turn without a special token, or the turn has no thought and
                `without_thought` is raise.
        """
        before, message = messages[:index], messages[index]
        found = self.unchecked(before, message, tools)
        self._check_end(found.said, index)
        if lost := lost_part(self, messages[: index + 1], index, tools, found):
            what, hint = lost
            raise RenderError(f"does not render {what}, which would be lost", hint)
        if self.thinks and not self.thought_of(message):
            if self.without_thought == "raise":
                raise RenderError(
                    f"renders thoughts, but turn {index + 1} has none (data.without_thought: raise)",
                    "add a `reasoning_content`, or set data.without_thought to given or learn",
                )
            if self.without_thought == "given":
                opening = self._opening(before, tools, found)
                return replace(found, opening=opening, given=found.given or opening > 0)
        return found

    def thought_of(self, message: Message) -> str:
        """Return the thought of a turn, also one in <think> at the beginning of its content."""
        return self.parted(message).get(THOUGHT, "").strip()

    @cached_property
    def thinks(self) -> bool:
        """Whether the template renders thoughts in answers."""
        message = {"role": "assistant", "content": self._content(SAID), THOUGHT: THOUGHT_MARK}
        return THOUGHT_MARK in self._tried([self._user, message])

    @cached_property
    def _user(self) -> Message:
        return {"role": "user", "content": self._content(ASKED)}

    @cached_property
    def _in_parts(self) -> bool:
        """Whether the template accepts contents only in typed parts, as those of vision models do."""
        whole, parts = (
            self._tried([{"role": "user", "content": wrap(ASKED)}, {"role": "assistant", "content": wrap(SAID)}])
            for wrap in (str, _parts)
        )
        return not {ASKED, SAID} <= set(whole) and {ASKED, SAID} <= set(parts)

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether the template accepts the arguments of calls only as JSON text."""
        text, thing = (
            self._tried([self._user, {"role": "assistant", "content": "", "tool_calls": [_call(arguments)]}])
            for arguments in (json.dumps({"a": CALLED}, ensure_ascii=False), {"a": CALLED})
        )
        return CALLED in text and CALLED not in thing

    def _content(self, text: str) -> Any:
        return _parts(text) if self._in_parts else text

    def parted(self, message: Message) -> Message:
        """Move a thought in <think> at the beginning of a content to its own key, if the template renders thoughts."""
        if message["role"] != "assistant" or "<think>" not in message["content"] or not self.thinks:
            return message
        found = INLINE_THOUGHT.match(message["content"])
        if found is None or THOUGHT in message:
            return message
        thought = {THOUGHT: found[1].strip("\n")} if found[1].strip() else {}
        return {**message, "content": message["content"][found.end() :]} | thought

    def adapted(self, message: Message) -> Message:
        """Return a turn in the form that this template accepts."""
        message = dict(self.parted(message))
        if message.get("tool_calls") and self._arguments_as_text:
            message["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
        message["content"] = self._content(message["content"])
        return message

    def _apply(self, messages: list[Message], tools: list[Tool] | None, prompt: bool, **variables: Any) -> str:
        tools_of_any_kind = cast("list[Any] | None", tools)
        text = self.tokenizer.apply_chat_template(
            messages, tools=tools_of_any_kind, tokenize=False, add_generation_prompt=prompt, **variables
        )
        return cast(str, text)

    def _tried(self, messages: list[Message], tools: list[Tool] | None = None) -> str:
        """Render turns as they are, or return "" if the template fails on them."""
        try:
            return self._apply(messages, tools, prompt=False)
        except TEMPLATE_ERRORS:
            return ""

    def unchecked(self, before: Sequence[Message], message: Message, tools: list[Tool] | None = None) -> RenderedTurn:
        """Render a turn and the prompt that is its prefix: the default one, or one that is told whether to think.

        Raises:
            RenderError: no prompt is a prefix.
        """
        whole = self.render([*before, message], tools)
        variables = [name for name in SWITCHES if name in self.template(tools)]
        thinks = bool(self.thought_of(message))
        default = ""
        for settings in ({}, *({name: thinks} for name in variables)):
            asked = self.render(before, tools, prompt=True, **settings)
            default = default or asked
            if len(asked) < len(whole) and whole.startswith(asked):
                return RenderedTurn(asked, whole[len(asked) :], given=bool(settings) and not thinks)
        said = self._said_behind_other_turns(before, message, tools, default, whole)
        if said:
            return RenderedTurn(default, said)
        same = common_length(default, whole)
        begun, there = (text[max(0, same - QUOTED // 2) :][:QUOTED] for text in (default, whole))
        raise RenderError(
            "cannot mark what the assistant says: its generation prompt is not the beginning of the turn; the prompt "
            f"has {begun!r} where the turn has {there!r}",
            f"set data.chat_template to {'deepseek_r1' if default.rstrip().endswith('<think>') else 'one that can'} "
            "or to a .jinja file whose generation prompt begins the assistant's turns, or set "
            "training.assistant_only_loss: false",
        )

    def _said_behind_other_turns(
        self, before: Sequence[Message], message: Message, tools: list[Tool] | None, asked: str, whole: str
    ) -> str | None:
        """Return the rendered last turn if it makes the template render earlier turns differently; None if not found.

        gpt-oss drops the thoughts before a call as soon as there is an answer. The turn begins after the last
        generation prompt that precedes everything specific to the turn.
        """
        other = {"role": "assistant", "content": SAID}
        if self.thought_of(message):
            other[THOUGHT] = THOUGHT_MARK
        start = self.render(before, tools)
        opening = asked[len(start) :] if asked.startswith(start) else ""
        shared = whole[: common_length(whole, self.render([*before, other], tools))]
        place = shared.rfind(opening) if opening.strip() else -1
        last = before[-1]["content"].strip()
        in_an_earlier_turn = bool(last) and place < shared.rfind(last)
        return None if place < 0 or in_an_earlier_turn else whole[place + len(opening) :]

    def _opening(self, before: Sequence[Message], tools: list[Tool] | None, turn: RenderedTurn) -> int:
        """Return how many characters the template puts before any answer without a thought."""
        other: Message = {"role": "assistant", "content": SAID}
        try:
            whole = self.render([*before, other], tools)
            if whole.startswith(turn.asked):
                said: str | None = whole[len(turn.asked) :]
            else:
                said = self._said_behind_other_turns(before, other, tools, turn.asked, whole)
        except TEMPLATE_ERRORS:
            return 0
        opening = (said or "").partition(SAID)[0]
        return len(opening) if turn.said.startswith(opening) else 0

    def _check_end(self, said: str, index: int) -> None:
        if not said.rstrip().endswith(self._ends):
            raise RenderError(
                f"ends the assistant's turn with no token of its own, so it would not be learned (turn {index + 1}: "
                f"{said[-QUOTED:]!r})",
                END_HINT,
            )


END_HINT = (
    "the template's end of a turn, such as <|im_end|>, must be in the tokenizer, and inside the {% generation %} marks "
    "where there are any; or set data.chat_template"
)


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "probe", "arguments": arguments}}


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def common_length(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    return next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), min(len(one), len(other)))
