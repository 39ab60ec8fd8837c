"""Hypothesis strategies for nearly valid files: changed bytes, changed structures, and noise."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from folora_q.recipe.strict_yaml import parse_yaml
from tests.fuzz.trees import Pairs, Raw, copied, parse, parts_of_safetensors, places, safetensors, write

LONG = "a" * 100_000
# Replacements for values: other types, numbers at and beyond limits, paths to other places, deep nesting.
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 127, 2**16, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**18,
    10**400, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), "", " ", "a", "0", "nan", "1e999",
    "\ud800", "\udfff a", "\x00", "a\x00b", "\x1b[2J", "é", "\u2028", "{{ x }}", "%s", "*", "**", "[", ".*", "..", ".",
    "/", "~", "~nobody", "/dev/zero", "../../../../etc/passwd", "/etc/passwd", "model", "no/where", "F64", "I64",
    "bfloat16", "LORA", "LLAMA", "auto", "2026-13-45", LONG, [], [[]], [None], [0], ["a"], [float("nan")], Pairs(),
    Pairs([["a", 1]]), [1] * 1000, Raw("9" * 5000), Raw("1e99999"), Raw("-"), Raw("["), Raw("[" * 500 + "]" * 500),
    Raw("[" * 100_000 + "]" * 100_000), Raw('{"a": ' * 900 + "1" + "}" * 900), Raw('{"a": 1, "a": 2}'),
    Raw('"\\ud800"'), Raw("undefined"), Raw("NaN"), Raw("'a'"), Raw("01"), Raw("\x00"), Raw("\ufeff1"), Raw("//"),
]  # fmt: skip
# More of them for YAML.
YAML = [
    "!!python/object/apply:os.system [x]", "!!python/name:os.system", "!!binary x", "!!timestamp x", "!!set {a, b}",
    "!!int x", "!!float 1_0", "!!omap [a: 1]", "&a [*a]", "*a", "<<: {a: 1}", "? [a]", "|\n  a", ">-\n  a", "0x1F",
    "0o17", "1:30", ".inf", "-.inf", ".nan", "1e5", "---", "...", "%YAML 9.9", "\t", "@", "`", "- a", "a: b",
]  # fmt: skip
# Bytes to insert, by kind of file.
WORDS: dict[str, Sequence[bytes]] = {
    "json": [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\u", b"\\ud800", b"null", b"1e999", b"NaN", b"-", b"\xff"],
    "yaml": [b"\n", b"\n  ", b": ", b"- ", b"\t", b"&a ", b"*a", b"!!", b"|", b">", b"{", b"[", b"'", b'"', b"--- "],
    "csv": [b'"', b",", b"\t", b"\n", b"\r", b"\x00", b'""', b"prompt"],
    "text": [b"\n", b"\x00", b"\xff\xfe", b"{{", b"}}", b"{%", b"%}", b"messages", b"__class__"],
    "binary": [struct.pack("<q", n) for n in (0, 1, -1, 2**31, 2**62, 255)] + [struct.pack("<i", n) for n in (0, 9)],
}  # fmt: skip
EDITS_AS = {
    "jsonl": "json",
    "rows": "json",
    "adapter": "json",
    "safetensors": "json",
    "gguf": "binary",
    "parquet": "binary",
    "compressed": "binary",
    "torch": "binary",
}
BINARY = ("safetensors", "gguf", "parquet", "compressed", "torch")
ANY = [b"", b"\x00", b"\x00" * 64, b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"a" * 1000]

numbers = st.integers(0, 2**32 - 1)
odd = st.sampled_from(ODD) | st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=20)
odd_in_yaml = odd | st.sampled_from([Raw(text) for text in YAML])
EDITS = ["flip", "put", "insert", "cut", "double", "end"]
CHANGES = ["replace", "replace", "replace", "drop", "double", "rename", "wrap", "graft", "repeat"]
edits = st.lists(st.tuples(st.sampled_from(EDITS), numbers, st.integers(1, 40), numbers), min_size=1, max_size=4)


def changes(values: st.SearchStrategy[Any] = odd) -> st.SearchStrategy[list[tuple[str, int, int, Any]]]:
    """Return a strategy for changes to a tree, which insert `values`."""
    return st.lists(st.tuples(st.sampled_from(CHANGES), numbers, numbers, values), min_size=1, max_size=3)


def inputs(kind: str, seed: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for contents of a kind of file, most of them close to a valid one."""
    words = _words(kind)
    bytewise = edits.map(lambda some: edited(seed, some, words))
    noise = st.binary(max_size=200) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    shaped = _shaped(kind, seed)
    choices = [bytewise, bytewise, noise if kind not in BINARY else bytewise]
    return st.one_of(*choices, *[shaped] * 4) if shaped is not None else st.one_of(*choices)


def edited(content: bytes, some: Sequence[tuple[str, int, int, int]], words: Sequence[bytes]) -> bytes:
    """Flip, overwrite, insert, remove or repeat bytes, or cut off the end."""
    data = bytearray(content)
    for what, where, length, choice in some:
        at, word = where % (len(data) + 1), words[choice % len(words)]
        match what:
            case "flip" if data:
                data[at % len(data)] ^= 1 << choice % 8
            case "put":
                data[at : at + len(word)] = word
            case "insert":
                data[at:at] = word
            case "cut":
                del data[at : at + length]
            case "double":
                data[at:at] = data[at : at + 8 * length]
            case "end":
                del data[at:]
    return bytes(data)


def changed(tree: Any, some: Sequence[tuple[str, int, int, Any]]) -> Any:
    """Return a tree with values replaced, keys removed, repeated or renamed, parts wrapped, copied or repeated."""
    root = [copied(tree)]
    for what, where, other, value in some:
        known = [(root, 0), *places(root[0])]
        holder, index = known[where % len(known)]
        pairs = [pair for held, place in known if isinstance(held[place], Pairs) for pair in held[place]]
        match what:
            case "drop" if pairs and holder is not root:
                pair = pairs[other % len(pairs)]
                next(held[place] for held, place in known if _holds(held[place], pair)).remove(pair)
            case "double" if pairs:
                pair = pairs[other % len(pairs)]
                next(held[place] for held, place in known if _holds(held[place], pair)).append([pair[0], copied(value)])
            case "rename" if pairs:
                pairs[other % len(pairs)][0] = value if isinstance(value, str) else str(pairs[where % len(pairs)][0])
            case "wrap":
                holder[index] = [holder[index]] if other % 2 else Pairs([["a", holder[index]]])
            case "graft":
                held, place = known[other % len(known)]
                holder[index] = copied(held[place])
            case "repeat" if isinstance(holder[index], list):
                holder[index] = type(holder[index])(copied(holder[index]) * (other % 30))
            case _:
                holder[index] = copied(value)
    return root[0]


def _holds(node: Any, pair: list[Any]) -> bool:
    return isinstance(node, Pairs) and any(one is pair for one in node)


def _words(kind: str) -> list[bytes]:
    return [*WORDS[EDITS_AS.get(kind, kind)], *ANY, *(WORDS["binary"] if kind == "safetensors" else [])]


def _shaped(kind: str, seed: bytes) -> st.SearchStrategy[bytes] | None:
    """Return a strategy that changes the structure of a file; None for kinds without a known structure."""
    match kind:
        case "json" | "rows" | "adapter":
            tree = parse(seed)
            return changes().map(lambda some: _bytes(write(changed(tree, some))))
        case "yaml":
            tree = parse(json.dumps(parse_yaml(seed.decode("utf-8"))[0]))
            return changes(odd_in_yaml).map(lambda some: _bytes(write(changed(tree, some))))
        case "jsonl":
            lines = [parse(line) for line in seed.splitlines() if line.strip()]
            return changes().map(lambda some: _bytes("\n".join(map(write, _list(changed(lines, some))))))
        case "safetensors":
            header, data = parts_of_safetensors(seed)
            tree = parse(header)
            outside = changes().map(lambda some: safetensors(_bytes(write(changed(tree, some))), data))
            return st.one_of(outside, *(_in_metadata(tree, pair, data) for pair in _metadata(tree)))
    return None


def _metadata(tree: Pairs) -> list[list[Any]]:
    """Return the entries of a header's metadata whose text is JSON."""
    entries = [pair for name, found in tree if name == "__metadata__" for pair in found]
    return [pair for pair in entries if pair[1][:1] in ("[", "{")]


def _in_metadata(tree: Pairs, pair: list[Any], data: bytes) -> st.SearchStrategy[bytes]:
    inner = parse(pair[1])

    def put(some: list[tuple[str, int, int, Any]]) -> bytes:
        text = write(changed(inner, some)).encode("utf-8", "replace").decode("utf-8")
        entry = Pairs([[pair[0], text]])
        return safetensors(_bytes(write(Pairs([["__metadata__", entry], *tree[1:]]))), data)

    return changes().map(put)


def _list(tree: Any) -> list[Any]:
    return tree if isinstance(tree, list) and not isinstance(tree, Pairs) else [tree]


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
