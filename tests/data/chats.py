"""Tokenizers made on the fly, with the special tokens of any chat template, and conversations of every structure."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers import PreTrainedTokenizerFast

from folora_q.data.encode import Encoder
from folora_q.data.pieces import Encoded
from folora_q.data.tokens import IGNORED
from tests.data.rows import assistant, user

FOLDER = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
# All templates that TRL ships, but for its training variants of them.
TEMPLATES = {
    path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja")) if not path.stem.endswith("_training")
}
# What is one token in the tokenizers of such templates.
SPECIAL = re.compile(
    r"<[|｜][^<>'\"{}\n ]{1,40}[|｜]>|<(?:start|end)_of_(?:turn|utterance)>"
    r"|<\|(?:turn|tool_call|tool_response|channel)>|<(?:turn|tool_call|tool_response|channel)\|>"
)
SYSTEM = {"role": "system", "content": "be curt"}
CALL = {
    **assistant(""),
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}],
}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "3"}
INTEGER = {"type": "integer", "description": "a number"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "adds",
            "parameters": {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "required": ["a", "b"]},
        },
    }
]


def thinking(turn: dict[str, Any], thought: str) -> dict[str, Any]:
    return {**turn, "reasoning_content": thought}


Messages = list[dict[str, Any]]
# Every structure of a row, with the tools that it offers.
ROWS: dict[str, tuple[Messages, list[dict[str, Any]] | None]] = {
    "one turn": ([user("hi"), assistant("hello")], None),
    "two turns": ([user("hi"), assistant("hello"), user("more"), assistant("bye")], None),
    "system": ([SYSTEM, user("hi"), assistant("hello")], None),
    "thought": ([user("hi"), thinking(assistant("hello"), "carry")], None),
    "two thoughts": (
        [user("hi"), thinking(assistant("hello"), "carry"), user("more"), thinking(assistant("bye"), "again")],
        None,
    ),
    "thought, then none": ([user("hi"), thinking(assistant("hello"), "carry"), user("more"), assistant("bye")], None),
    "inline thought": ([user("hi"), assistant("<think>\ncarry\n</think>\n\nhello")], None),
    "call": ([user("hi"), CALL, RESULT, assistant("three")], TOOLS),
    "thoughts and call": (
        [user("hi"), thinking(CALL, "carry"), RESULT, thinking(assistant("three"), "done")],
        TOOLS,
    ),
}


def tokenizer_for(template: str, merges: bool = False) -> Tokenizer:
    """Bytes and the template's special tokens; with `merges` line ends and words are tokens that reach far."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("Ċ", "Ċ"), ("h", "e"), ("l", "l"), ("Ġ", "t"), ("Ċ", "h")] if merges else []
    vocabulary = ["<s>", "</s>", *letters, *(first + second for first, second in pairs)]
    backend = Backend(models.BPE({token: index for index, token in enumerate(vocabulary)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.add_tokens(sorted(set(SPECIAL.findall(template))), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def encoder_for(template: str, merges: bool = False, **settings: Any) -> Encoder:
    encoder = Encoder(tokenizer_for(template, merges), **settings)
    encoder.prepare_chats()
    return encoder


def stretches(encoded: Encoded) -> list[tuple[int, int]]:
    """Where tokens are learned, from and to."""
    found: list[tuple[int, int]] = []
    for position, label in enumerate(encoded.labels):
        if label == IGNORED:
            continue
        assert label == encoded.input_ids[position]
        if found and found[-1][1] == position:
            found[-1] = (found[-1][0], position + 1)
        else:
            found.append((position, position + 1))
    return found


def learned(tokenizer: Tokenizer, sequences: list[Encoded]) -> list[str]:
    """The learned texts, in order, without white space at their ends."""
    return [
        tokenizer.decode(encoded.input_ids[start:end]).rstrip()
        for encoded in sequences
        for start, end in stretches(encoded)
    ]
