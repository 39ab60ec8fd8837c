"""Check that a chat template renders everything that a row contains.

A part that occurs in the rendered text was rendered. If it does not occur, since templates trim and quote, or if it is
so short that it may occur by chance, it is replaced by a marker, which must then be rendered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from folora_q.data.tokens import TEMPLATE_ERRORS
from folora_q.data.tools import Call, Tool, texts_of, tool_name
from folora_q.data.turns import THOUGHT, Message

if TYPE_CHECKING:
    from folora_q.data.rendering import RenderedTurn, Renderer

# A private-use character that no data and no template contains, and that no template trims.
SHOWN = "\ue0a4"
# A text of fewer characters may occur elsewhere by chance.
TELLING = 16
THOUGHTS_HINT = (
    "set data.chat_template to one that renders thoughts (qwen3, gptoss, deepseek_r1, ...), or remove them from the "
    "data; data.on_error: skip leaves such rows out"
)
TOOLS_HINT = "set data.chat_template to one that renders tools (qwen2_5, llama3_1, ...), or data.on_error to skip"
OTHER_HINT = "set data.chat_template to one that does, or data.on_error to skip"


def lost_part(
    renderer: Renderer, messages: Sequence[Message], learned: int, tools: list[Tool] | None, turn: RenderedTurn
) -> tuple[str, str] | None:
    """Describe what the template leaves out of a conversation, with a hint; None if it renders everything.

    Args:
        messages: all messages that are rendered together.
        learned: the index of the assistant turn that is trained.
        turn: the rendering of that turn and of everything before it.
    """
    for index, raw in enumerate(messages):
        if raw["role"] == "assistant" and index != learned:
            continue  # templates shorten earlier turns on purpose
        message, where = renderer.parted(raw), turn.said if index == learned else turn.asked
        probe = _Probe(renderer, messages, index, tools)
        place = f"turn {index + 1} ({message['role']})"
        thought, said = message.get(THOUGHT, "").strip(), message["content"].strip()
        if thought and not (renderer.thinks and thought in where) and not probe.shows({THOUGHT: SHOWN}):
            return f"the thought of {place}", THOUGHTS_HINT
        by_chance = message["role"] in ("system", "tool") and len(said) < TELLING
        if said and (by_chance or said not in where):
            if "</think>" in said and said not in where:
                return f"the thought in {place}", THOUGHTS_HINT
            if not probe.shows({"content": SHOWN}):
                return f"the content of {place}", OTHER_HINT
        if call := _lost_call(message.get("tool_calls", []), where, probe):
            return f"the call of {tool_name(call)[:40]} in {place}", TOOLS_HINT
    for name in map(tool_name, tools or []):
        if name not in turn.asked and json.dumps(name, ensure_ascii=False)[1:-1] not in turn.asked:
            return f"the tool {name[:40]}", TOOLS_HINT
    return None


def _lost_call(calls: Sequence[Call], where: str, probe: _Probe) -> Call | None:
    """Return the first of a turn's calls that the template leaves out, in part or in full.

    Args:
        where: the rendered text that should contain them.
    """
    for number, call in enumerate(calls):
        texts = [text.strip() for text in texts_of(call["function"]["arguments"])]
        if len(calls) == 1 and tool_name(call) in where and all(text in where for text in texts):
            continue
        others = [[*calls[:number], shown, *calls[number + 1 :]] for shown in _shown(call)]
        if not all(probe.shows({"tool_calls": other}) for other in others):
            return call
    return None


class _Probe:
    """A conversation in which a part of one turn is replaced by a marker, to see whether it is rendered."""

    def __init__(self, renderer: Renderer, messages: Sequence[Message], index: int, tools: list[Tool] | None) -> None:
        self.renderer, self.messages, self.index, self.tools = renderer, messages, index, tools

    def shows(self, part: dict[str, Any]) -> bool:
        changed = [*self.messages]
        changed[self.index] = {**changed[self.index], **part}
        try:
            return SHOWN in self.renderer.render(changed, self.tools)
        except TEMPLATE_ERRORS:
            return False


def _shown(call: Call) -> list[Call]:
    """Return the call with the marker as its name, and with the marker as an argument."""
    function = call["function"]
    return [
        {**call, "function": {**function, "name": SHOWN}},
        {**call, "function": {**function, "arguments": {"a": SHOWN}}},
    ]
