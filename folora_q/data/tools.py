"""Convert tools and tool calls of OpenAI, ShareGPT and others to the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from folora_q.data.rows import RowError, kind_of

Tool = dict[str, Any]
Call = dict[str, Any]


def parse_tools(value: Any, where: str, column: str) -> list[Tool] | None:
    """Parse a row's tools: JSON text or a list of function descriptions, plain or wrapped as OpenAI does.

    Raises:
        RowError: it is not a list of tools.
    """
    value = _from_json(value, where, column)
    if not value:
        return None
    tools = [_from_json(tool, where, f"{column}[{index}]") for index, tool in enumerate(_as_list(value))]
    return [_tool(tool, where, f"{column}[{index}]") for index, tool in enumerate(tools)]


def parse_calls(value: Any, where: str, place: str) -> list[Call]:
    """Parse the tool calls of a turn; `arguments` become an object, which templates write in their own syntax.

    Raises:
        RowError: it is not a list of calls, one has no name, or its arguments are not an object.
    """
    calls = _as_list(_from_json(value, where, place))
    return [_call(_from_json(call, where, place), where, f"{place}[{index}]") for index, call in enumerate(calls)]


def tool_name(tool: Tool) -> str:
    """Return the name of a tool or of a call."""
    return tool["function"]["name"]


def texts_of(value: Any) -> Iterator[str]:
    """Yield all strings in nested JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def _tool(tool: Any, where: str, place: str) -> Tool:
    if not isinstance(tool, dict):
        raise RowError(where, f"`{place}` must be a tool with a name, not {kind_of(tool)}")
    wrapped = tool.get("function")
    function = wrapped if isinstance(wrapped, dict) else tool
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(where, f"`{place}` is a tool without a `name`")
    return {"type": "function", "function": without_nulls(function)}


def _call(call: Any, where: str, place: str) -> Call:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(where, f"`{place}` must be a call with a `name` and `arguments`")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        arguments = _from_json(arguments, where, f"{place}.arguments")
    arguments = arguments or {}
    if not isinstance(arguments, dict):
        raise RowError(where, f"`{place}.arguments` must be an object, not {kind_of(arguments)}")
    parsed: Call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **parsed} if call.get("id") else parsed


def without_nulls(value: Any) -> Any:
    """Remove the nulls that tables fill in for keys which only other rows have.

    A `default` and the values of an `enum` may be null on purpose.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None or key == "default"}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _from_json(value: Any, where: str, place: str) -> Any:
    """Parse JSON text; return anything else as it is."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(where, f"`{place}` must be JSON: {error}") from None
