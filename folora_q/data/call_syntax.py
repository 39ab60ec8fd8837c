"""How a chat template writes tool calls, inferred from a rendered call; and reading calls in generated text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from folora_q.data.rendering import Renderer, RenderError
from folora_q.data.thoughts import CLOSE, ThoughtSyntax
from folora_q.data.tokens import TEMPLATE_ERRORS
from folora_q.data.tools import Tool, tool_name
from folora_q.data.turns import Message

# Words that no template contains.
NAME, KEY, VALUE, OTHER_KEY, OTHER_VALUE = "qzname", "qzkey", "qzvalue", "qzother", "qzthing"
ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class FoundCall:
    """A call in generated text.

    Attributes:
        marked: whether it is in the template's syntax, with the mark that precedes calls.
    """

    name: str
    arguments: Mapping[str, Any]
    marked: bool


@dataclass(frozen=True)
class CallSyntax:
    """The syntax of a template's calls.

    Attributes:
        mark: text before a call, stripped: "<tool_call>", or "" if the call begins at once.
        named_inside: whether name and arguments are in one JSON object; otherwise the name precedes the arguments.
        pair: pattern of one argument, for templates that do not write arguments as JSON; None for JSON.
        between: text between the name and the first argument, if the name precedes them and they are not JSON.
    """

    mark: str
    named_inside: bool
    between: str = ""
    pair: re.Pattern[str] | None = None

    def calls(self, text: str) -> list[FoundCall]:
        """Return the calls in a generated text, which still has its special tokens."""
        if self.named_inside:
            return list(self._objects(text))
        found = list(self._named_before(text))
        return found or list(self._objects(text, marked=False))  # a JSON call where the template has another syntax

    def _objects(self, text: str, marked: bool | None = None) -> Iterator[FoundCall]:
        for start, value in _json_objects(text):
            value = value.get("function", value) if isinstance(value.get("function"), dict) else value
            arguments = next((value[key] for key in ARGUMENTS if isinstance(value.get(key), dict)), None)
            if isinstance(value.get("name"), str) and arguments is not None:
                # A list of calls has one mark, before its bracket.
                before = text[:start].rstrip().rstrip("[").rstrip()
                yield FoundCall(value["name"], arguments, self._is_marked(text, before) if marked is None else marked)

    def _is_marked(self, text: str, before: str) -> bool:
        """Return whether the mark precedes a call, or the call before it in a list."""
        return before.endswith(self.mark or before) if not before.endswith(",") else self.mark in before

    def _named_before(self, text: str) -> Iterator[FoundCall]:
        # Models write more between a name and JSON than templates do, e.g. gpt-oss its constraint.
        between = r"[^{]{0,80}" if self.pair is None else r"\s*" + re.escape(self.between)
        pattern = re.escape(self.mark) + r"\s*([\w.\-]+)" + between
        for found in re.finditer(pattern, text) if self.mark else ():
            rest = text[found.end() :]
            if self.pair is None:
                value = next(_json_objects(rest), None)
                if value is not None and not rest[: value[0]].strip():
                    yield FoundCall(found[1], value[1], True)
            else:
                following = re.search(pattern, rest)
                inside = rest if following is None else rest[: following.start()]
                pairs = (pair.groups() for pair in self.pair.finditer(inside))
                yield FoundCall(
                    found[1], {key: next(v for v in values if v is not None) for key, *values in pairs}, True
                )


def call_syntax(renderer: Renderer) -> CallSyntax | None:
    """Return how a template writes calls; None if it renders none."""
    said = _rendered(renderer, {KEY: VALUE, OTHER_KEY: OTHER_VALUE})
    if said is None or NAME not in said or KEY not in said:
        return None
    objects = list(_json_objects(said))
    closing = ThoughtSyntax(renderer).closing or CLOSE

    def mark_at(place: int) -> str:
        """Return the text before a call, without a thought and earlier mentions of the name."""
        return said[:place].rpartition(closing)[2].rpartition(NAME)[2].strip()

    whole = next((start for start, value in objects if NAME in json.dumps(value)), None)
    if whole is not None:
        return CallSyntax(mark_at(whole).removesuffix("[").strip(), named_inside=True)
    name_at = said.rindex(NAME, 0, said.index(KEY))
    mark, between = mark_at(name_at), said[name_at + len(NAME) : said.index(KEY)]
    if any(value.get(KEY) == VALUE for _, value in objects):
        return CallSyntax(mark, named_inside=False)
    if (pair := _pair(said)) is None:
        return None
    opening, pattern = pair
    return CallSyntax(mark, False, between.removesuffix(opening).strip(), pattern)


def offers_tools(renderer: Renderer, tools: list[Tool]) -> bool:
    """Return whether the template renders descriptions of tools in a prompt."""
    try:
        text = renderer.render([{"role": "user", "content": "a"}], tools, prompt=True)
    except TEMPLATE_ERRORS:
        return False
    return all(tool_name(tool) in text for tool in tools)


def fits(call: FoundCall, tools: Sequence[Tool]) -> bool:
    """Return whether a call names one of the tools, with its required arguments and no unknown ones."""
    for tool in tools:
        if tool_name(tool) == call.name:
            parameters = tool["function"].get("parameters") or {}
            known = parameters.get("properties") or {}
            return set(parameters.get("required") or []) <= set(call.arguments) <= set(known)
    return False


def _rendered(renderer: Renderer, arguments: Mapping[str, str]) -> str | None:
    """Return how the template renders a turn with a call; None if it fails."""
    properties = {key: {"type": "string", "description": "a text"} for key in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    tool: Tool = {"type": "function", "function": {"name": NAME, "description": "a tool", "parameters": parameters}}
    call = {"id": "qzabcdefg", "type": "function", "function": {"name": NAME, "arguments": dict(arguments)}}
    answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    for tools in ([tool], None):
        try:
            return renderer.unchecked([{"role": "user", "content": "a"}], answer, tools).said
        except (RenderError, *TEMPLATE_ERRORS):
            continue
    return None


def _pair(said: str) -> tuple[str, re.Pattern[str]] | None:
    """Return the text before a key and the pattern of an argument that is not JSON, from a call with two of them."""
    places = [said.find(word) for word in (KEY, VALUE, OTHER_KEY, OTHER_VALUE)]
    if -1 in places or places != sorted(places):
        return None
    equals, after = said[places[0] + len(KEY) : places[1]], said[places[1] + len(VALUE) : places[2]]
    # What follows a value also precedes the next key; the opening of a key is what the first one has as well.
    before, end = said[: places[0]], said[places[3] + len(OTHER_VALUE) :]
    opening = next((after[start:] for start in range(len(after) + 1) if before.endswith(after[start:])), "")
    closing = commonprefix([after.removesuffix(opening), end]).strip()
    key = re.escape(opening.strip()) + r"\s*([\w\-]+)"
    if closing and equals.endswith(closing):  # quotes, which only texts have
        plain = re.escape(equals.removesuffix(closing).strip())
        quote = re.escape(closing)
        return opening, re.compile(rf"([\w\-]+){plain}\s*(?:{quote}(.*?){quote}|([^,)}}\n]*))", re.DOTALL)
    return opening, re.compile(key + re.escape(equals.strip()) + rf"\s*(.*?)\s*{re.escape(closing) or '$'}", re.DOTALL)


def _json_objects(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the outermost JSON objects in a text, with their places."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        end = start + 1
        try:
            value, end = decoder.raw_decode(text, start)
            if isinstance(value, dict):
                yield start, value
        except (ValueError, RecursionError):
            pass
        start = text.find("{", end)
