"""Prompts of the packaged capabilities: written ones from files, arithmetic and instructions by rules. No PyTorch.

All wording is original; nothing is copied from a benchmark.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from folora_q.data.tools import Tool
from folora_q.data.turns import Message
from folora_q.recipe.capabilities import CapabilityName

FOLDER = Path(__file__).with_name("capabilities")
# Number of generated prompts; the files have about as many.
GENERATED = 48


@dataclass(frozen=True)
class Ask:
    """A prompt before it is rendered.

    Attributes:
        messages: the conversation up to the answer.
        tools: descriptions of the tools that it offers.
        expected: what the capability's scorer compares with.
    """

    messages: Sequence[Message]
    tools: list[Tool] | None = None
    expected: dict[str, Any] = field(default_factory=dict)


def asked(text: str, /, **expected: Any) -> Ask:
    """Return a prompt of one user turn."""
    return Ask([{"role": "user", "content": text}], None, expected)


def prompts_of(name: CapabilityName) -> list[Ask]:
    """Return the prompts of a capability, in a fixed order; neighbours are of the same kind."""
    return list(GENERATORS[name]()) if name in GENERATORS else list(_from_file(name))


def _from_file(name: str) -> Iterator[Ask]:
    """Read prompts: one object per line with `prompt`, perhaps names of `tools`, and what the scorer compares with."""
    for line in (FOLDER / f"{name}.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        text, names = row.pop("prompt"), row.pop("tools", None)
        tools = None if names is None else [packaged_tools()[each] for each in names]
        yield Ask([{"role": "user", "content": text}], tools, row)


@cache
def packaged_tools() -> dict[str, Tool]:
    """Return the tools of tools.json in the form that chat templates take, by name."""
    content = json.loads((FOLDER / "tools.json").read_text("utf-8"))
    return {name: _tool(name, facts) for name, facts in content.items()}


def _tool(name: str, facts: dict[str, Any]) -> Tool:
    properties = {}
    for key, text in facts.items():
        if key not in ("description", "required"):
            kind, _, description = text.partition(": ")
            properties[key] = {"type": kind, "description": description}
    parameters = {"type": "object", "properties": properties, "required": facts["required"]}
    return {
        "type": "function",
        "function": {"name": name, "description": facts["description"], "parameters": parameters},
    }


def _arithmetic() -> Iterator[Ask]:
    chooser, texts = random.Random(20), set()
    while len(texts) < GENERATED:
        kind = len(texts) // 2 % 4
        low, high = ((10, 99), (100, 999), (2, 12), (2, 12))[kind]
        first, second = chooser.randint(low, high), chooser.randint(low, high)
        if kind == 0:
            text, result = f"{first} + {second}", first + second
        elif kind == 1:
            first, second = max(first, second), min(first, second)
            text, result = f"{first} - {second}", first - second
        elif kind == 2:
            text, result = f"{first} × {second}", first * second
        else:
            text, result = f"{first * second} ÷ {second}", first
        if text not in texts:
            texts.add(text)
            yield asked(f"What is {text}? Answer with the number only.", number=result)


TOPICS = (
    *("bees", "the moon", "bread", "bicycles", "winter", "rivers", "trains", "gardens", "cats", "coffee", "mountains"),
    *("music", "libraries", "the sea", "kites", "clocks", "apples", "bridges", "rain", "lighthouses", "chess", "wool"),
    *("maps", "owls"),
)
# What an answer must satisfy, in words, and for the scorer: {topic} is the prompt's.
CONSTRAINTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Write two sentences about {topic}, all in lower case.", {"check": "lower_case"}),
    ("Write two sentences about {topic}, all in capital letters.", {"check": "upper_case"}),
    (
        "Write a list of exactly three facts about {topic}, each on its own line that starts with '* '.",
        {"check": "bullets", "count": 3},
    ),
    ("Write exactly one sentence about {topic}.", {"check": "sentences", "count": 1}),
    ("Write two sentences about {topic} without any comma.", {"check": "without", "text": ","}),
    (
        "Write two sentences about {topic}. End with the exact words: That is all.",
        {"check": "ends", "text": "That is all."},
    ),
    (
        "Write two sentences about {topic}. Begin with the exact words: Let me see.",
        {"check": "begins", "text": "Let me see."},
    ),
    ("Describe {topic} in at most fifteen words.", {"check": "at_most_words", "count": 15}),
    (
        "Write a sentence about {topic} that contains the word 'surprising'.",
        {"check": "contains", "text": "surprising"},
    ),
    (
        'Answer with a JSON object with the keys "topic" and "fact", about {topic}, and nothing else.',
        {"check": "json", "keys": ["topic", "fact"]},
    ),
    ("Write a sentence about {topic} in double quotation marks, and nothing else.", {"check": "quoted"}),
    (
        "Write two short paragraphs about {topic}, with one empty line between them.",
        {"check": "paragraphs", "count": 2},
    ),
)


def _instructions() -> Iterator[Ask]:
    chooser = random.Random(21)
    topics = chooser.sample(TOPICS, len(TOPICS))
    topics += topics[3:] + topics[:3]  # with other constraints
    for number in range(GENERATED):
        text, expected = CONSTRAINTS[number // 2 % len(CONSTRAINTS)]
        yield asked(text.format(topic=topics[number]), **expected)


GENERATORS: dict[str, Callable[[], Iterator[Ask]]] = {"arithmetic": _arithmetic, "instructions": _instructions}
