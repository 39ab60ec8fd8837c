"""JSON as trees that can hold what no library would write: duplicate keys, and text that is not JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Place = tuple[list[Any], int]


class Pairs(list):
    """A JSON object as a list of [key, value]; a key may occur twice."""


@dataclass(frozen=True)
class Raw:
    """Text that is written unchanged."""

    text: str


def parse(text: str | bytes) -> Any:
    """Parse a JSON text, with objects as Pairs."""
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(list(pair) for pair in pairs))


def write(node: Any) -> str:
    """Return a tree as text, which is JSON unless the tree has Raw parts."""
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
    """Return a deep copy of a tree."""
    return type(node)(map(copied, node)) if isinstance(node, list) else node


def places(node: Any) -> Iterator[Place]:
    """Yield every value below a tree's root, as the list that contains it and its index there; keys do not count."""
    if isinstance(node, Pairs):
        for pair in node:
            yield pair, 1
            yield from places(pair[1])
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield node, index
            yield from places(value)


def safetensors(header: str | bytes, data: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file; `length` replaces the true length of the header."""
    header = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def parts_of_safetensors(content: bytes) -> tuple[bytes, bytes]:
    """Return the header and the data of a safetensors file."""
    end = 8 + struct.unpack_from("<Q", content)[0]
    return content[8:end], content[end:]
