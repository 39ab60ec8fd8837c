"""JSON as trees that can be changed into what no writer would write: keys that come twice, text that is no JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Place = tuple[list[Any], int]


class Pairs(list):
    """An object: [key, value] each, in order; a key may come twice."""


@dataclass(frozen=True)
class Raw:
    """Text that is written as it is."""

    text: str


def parse(text: str | bytes) -> Any:
    """A JSON text whose objects are Pairs."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(list(pair) for pair in pairs))


def write(node: Any) -> str:
    """JSON, as far as the tree is that."""
    match node:
        case Raw():
            return node.text
        case Pairs():
            return "{" + ", ".join(f"{write(key)}: {write(value)}" for key, value in node) + "}"
        case list():
            return "[" + ", ".join(map(write, node)) + "]"
        case _:
            return json.dumps(node)


def copied(node: Any) -> Any:
    """The same tree, none of whose lists is the other's."""
    return type(node)(map(copied, node)) if isinstance(node, list) else node


def places(node: Any) -> Iterator[Place]:
    """Every value below a tree's root, as the list that holds it and its index there; keys are none."""
    if isinstance(node, Pairs):
        for pair in node:
            yield pair, 1
            yield from places(pair[1])
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield node, index
            yield from places(value)


def safetensors(header: str | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; `length` is what it says of its header's, where that is not true."""
    header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def parts_of_safetensors(content: bytes) -> tuple[bytes, bytes]:
    """Its header and its data."""
    end = 8 + struct.unpack_from("<Q", content)[0]
    return content[8:end], content[end:]
