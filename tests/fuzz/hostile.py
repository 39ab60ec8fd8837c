"""A fixed list of malicious and broken files by kind, including those of safetensors' own tests."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

from tests.fuzz.trees import parts_of_safetensors, safetensors

Content = bytes | Callable[[], bytes]
HUGE = 100_000_000


def hostile(kind: str, seed: bytes) -> dict[str, Content]:
    """Return contents by name; large ones are functions that create them.

    Args:
        seed: a valid file of this kind.
    """
    return _any(seed) | KINDS.get(kind, lambda _: {})(seed)


def _any(seed: bytes) -> dict[str, Content]:
    return {
        "nothing": b"",
        "white space": b" \n\t\n",
        "one NUL": b"\0",
        "a NUL in the middle": seed[: len(seed) // 2] + b"\0" + seed[len(seed) // 2 :],
        "half of it": seed[: len(seed) // 2],
        "twice": seed * 2,
        "no UTF-8": b"\xff\xfe\xfd" * 9,
        "a pickle": pickle.dumps({"a": [1, 2]}),
        "a pickle that runs something": b"cos\nsystem\n(S'echo fuzz'\ntR.",
        "a zip": b"PK\x03\x04" + bytes(100),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
        "a page": b"<!DOCTYPE html><html><body>404</body></html>",
    }


def _text(seed: bytes) -> dict[str, Content]:
    text = seed.decode("utf-8")
    return {
        "a byte order mark": b"\xef\xbb\xbf" + seed,
        "two of them": b"\xef\xbb\xbf" * 2 + seed,
        "UTF-16": text.encode("utf-16"),
        "UTF-16 without a mark": text.encode("utf-16-be"),
        "UTF-32": text.encode("utf-32"),
        "Latin-1": "é".encode("latin-1") + seed,
        "half a surrogate pair": "\ud800".encode("utf-8", "surrogatepass") + seed,
        "other line ends": seed.replace(b"\n", b"\r"),
        "10 MB on a line": lambda: b"a" * 10_000_000,
        "10 MB of white space": lambda: b" " * 10_000_000 + seed,
        "100 MB": lambda: b"a" * HUGE,
    }


def _json(seed: bytes) -> dict[str, Content]:
    key = json.dumps(next(iter(json.loads(seed)), "a") if isinstance(json.loads(seed), dict) else "a").encode()
    return _text(seed) | {
        **{f"only {root}": root.encode() for root in ("null", "[]", "{}", "0", '""', "true", "NaN", "[{}]", "[1]")},
        "a number of 5,000 digits": b"9" * 5000,
        "a key with 5,000 digits": b"{" + key + b": " + b"9" * 5000 + b"}",
        "deep lists": b"[" * 100_000 + b"]" * 100_000,
        "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "a deep value": b"{" + key + b": " + b"[" * 50_000 + b"]" * 50_000 + b"}",
        "unclosed lists": b"[" * 1_000_000,
        "a key twice": b"{" + key + b": 1, " + seed.lstrip()[1:],
        "half a pair as an escape": b"{" + key + b': "\\ud800"}',
        "half a pair in a key": b'{"\\udfff": 1}',
        "a trailing comma": seed.rstrip()[:-1] + b",}",
        "a comment": b"// a comment\n" + seed,
        "100 MB in a string": lambda: b"{" + key + b': "' + b"a" * HUGE + b'"}',
        "100 MB of lists": lambda: b"[" + b"[]," * (HUGE // 3) + b"1]",
        "2 MB of lists": lambda: b"[" + b"[]," * (2_000_000 // 3) + b"1]",
        "a value as deep as Python reads": b"{" + key + b": " + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    }  # fmt: skip


def _rows(seed: bytes) -> dict[str, Content]:
    """Contents for JSON data, without lists of millions of invalid rows, each of which is an error."""
    return {name: content for name, content in _json(seed).items() if not name.endswith("of lists")}


def _patterns(seed: bytes) -> dict[str, Content]:
    """Contents for an adapter's configuration with bad regular expressions."""
    tree = json.loads(seed)
    values = {
        "nested": "(a+)+$",
        "endless": "(\\w|\\.|\\w)*!",
        "broken": "(",
        "groups": "(" * 200 + ")" * 200,
        "long": ".*" * 5000,
    }
    found = {}
    for name, pattern in values.items():
        for key in ("rank_pattern", "alpha_pattern"):
            found[f"{key}: {name}"] = json.dumps(tree | {key: {pattern: 2, "b": 1}}).encode()
        for key in ("target_modules", "exclude_modules", "layers_pattern"):
            found[f"{key}: {name}"] = json.dumps(tree | {key: pattern}).encode()
    return found


def _yaml(seed: bytes) -> dict[str, Content]:
    bomb = b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (n + 1, n + 1, n, n) for n in range(97, 121))
    return _text(seed) | {
        "Python's tags": seed + b"\nx: !!python/object/apply:os.system ['echo fuzz']\n",
        "a tag of ours": b"!folora {a: 1}\n",
        "aliases of aliases": bomb,
        "an alias of itself": b"a: &a [*a]\n",
        "a merge": b"a: &a {b: 1}\nc:\n  <<: *a\n",
        "deep flow lists": b"a: " + b"[" * 60_000,
        "deep flow mappings": b"{a: " * 15_000,
        "deep blocks": b"".join(b" " * n + b"a:\n" for n in range(300)),
        "deep dashes": b"- " * 30_000,
        "deep questions": b"? " * 30_000,
        "a number of 5,000 digits": seed + b"\nx: " + b"9" * 5000 + b"\n",
        "hexadecimal digits": b"training: {learning_rate: 0x" + b"f" * 5000 + b"}\n",
        "a million exponents": seed + b"\nx: 1e" + b"9" * 300 + b"\n",
        **{f"{count:,} keys": seed + b"".join(b"k%d: 1\n" % n for n in range(count)) for count in (6_000, 20_000)},
        "4,000 files": b"data:\n  train_dataset:\n" + b"".join(b"  - f%d.jsonl\n" % n for n in range(4_000)),
        "6,000 wrong values": b"gate:\n  places:\n" + b"".join(b"  - p%d\n" % n for n in range(6_000)),
        "6,000 sections that are none": b"".join(b"- a: {}\n" for n in range(6_000)),
        "60 kB on a line": b"a: " + b"b " * 30_000,
        "60 kB in a key": b"a" * 60_000 + b": 1\n",
        "60 kB of quotes": b'a: "' + b"\\n" * 30_000 + b'"\n',
        "60 kB of line ends": b"\n" * 60_000 + b"a: 1\n",
        "60 kB of commas": b"[" + b"a," * 30_000 + b"]",
        "many documents": b"--- 1\n" * 10_000,
        "a directive": b"%YAML 3.0\n--- a\n",
        "tabs": b"a:\n\tb: 1\n",
        "a key that is a list": b"? [a, b]\n: 1\n",
        "a key twice": seed + seed,
        "a pattern that never ends": seed + b"\nevaluation: {metric: regex, metric_pattern: '" + b"(" * 5000 + b"'}\n",
    }


def _safetensors(seed: bytes) -> dict[str, Content]:
    header, data = parts_of_safetensors(seed)
    tree: dict[str, Any] = json.loads(header)
    names = [name for name in tree if name != "__metadata__"]
    first = tree[names[0]]

    def with_first(**values: Any) -> bytes:
        return safetensors(json.dumps(tree | {names[0]: {**first, **values}}), data)

    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    huge = json.dumps({"__metadata__": {"a": "a" * 10_000_000}, "x": one})
    return {
        "only a length": struct.pack("<Q", 1),
        "a length beyond the file": safetensors(header, data, 2**40),
        "the largest length": safetensors(header, data, 2**64 - 1),
        "a negative length": safetensors(header, data, 2**63),
        "a short length": safetensors(header, data, len(header) - 1),
        "no length": safetensors(header, data, 0),
        "a header of 100 MB": lambda: safetensors(b" " * HUGE, b""),
        "a header of 10 MB": lambda: safetensors(huge, bytes(4)),
        "a header that is no UTF-8": safetensors(b"\xff" * 100, data),
        "a header that is no JSON": safetensors(b"{" * 100, data),
        "a header that is a list": safetensors(b"[]", data),
        "a deep header": safetensors(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", data),
        "an empty header": safetensors(b"{}", b""),
        "no tensors, but data": safetensors(b"{}", data),
        "metadata alone": safetensors(json.dumps({"__metadata__": tree.get("__metadata__", {})}), b""),
        "metadata that is no text": safetensors(json.dumps({**tree, "__metadata__": {"gates": [1]}}), data),
        "overlapping": safetensors(json.dumps({"x": one, "y": one}), bytes(4)),
        "a hole": safetensors(json.dumps({"x": one, "y": {**one, "data_offsets": [8, 12]}}), bytes(12)),
        "offsets backwards": with_first(data_offsets=first["data_offsets"][::-1]),
        "negative offsets": with_first(data_offsets=[-4, 0]),
        "offsets beyond the file": with_first(data_offsets=[0, 2**50]),
        "a shape that overflows": with_first(shape=[2**32, 2**32, 2**32]),
        "a negative shape": with_first(shape=[-1, -8]),
        "a shape of thousands": with_first(shape=[1] * 5000 + first["shape"]),
        "an endless shape of nothing": safetensors(
            json.dumps({name: {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]} for name in names}), b""
        ),
        "scalars": safetensors(json.dumps({n: {"dtype": "F32", "shape": [], "data_offsets": [4 * i, 4 * i + 4]}
                                           for i, n in enumerate(names)}), bytes(4 * len(names))),
        "another dtype": with_first(dtype="F64"),
        "no dtype": with_first(dtype="X9"),
        "numbers in bytes": with_first(dtype="U8", shape=[4 * first["shape"][0], *first["shape"][1:]]),
        "a tensor twice": safetensors(header.rstrip()[:-1] + b", " + json.dumps({names[0]: first}).encode()[1:], data),
        "a tensor less": safetensors(json.dumps({n: v for n, v in tree.items() if n != names[-1]}), data),
        "names with NUL and slashes": safetensors(json.dumps({"../\0/x": one}), bytes(4)),
        "data cut": seed[:-1],
        "data over": seed + b"\0",
        "not a number": safetensors(header, struct.pack("<f", float("nan")) * (len(data) // 4)),
        "infinite": safetensors(header, struct.pack("<f", float("inf")) * (len(data) // 4)),
        "the largest numbers": safetensors(header, struct.pack("<f", 3e38) * (len(data) // 4)),
        "zeros": safetensors(header, bytes(len(data))),
    }  # fmt: skip


def _jsonl(seed: bytes) -> dict[str, Content]:
    line = seed.splitlines()[0]
    return _text(seed) | {
        **{f"a line: {text}": seed + text.encode() + b"\n" for text in ("null", "[]", "0", '""', "NaN", "{")},
        **{f"{key}: {value[:9]}": f"{{{json.dumps(key)}: {value}}}\n".encode() + seed for key in json.loads(line)
           for value in ("1e999", "9" * 5000, '"\\ud800"', "null", "[]", "{}", "-1")},
        "a number of 5,000 digits": seed + b"9" * 5000,
        "deep lists": seed + b"[" * 100_000 + b"]" * 100_000,
        "a key twice": b'{"a": 1, "a": 2}\n' + seed,
        "100,000 lines of nothing": b"\n" * 100_000 + seed,
        "10,000 empty objects": b"{}\n" * 10_000,
        "no last line end": seed.rstrip(b"\n"),
        "10 MB in a string": lambda: b'{"text": "' + b"a" * 10_000_000 + b'"}',
    }  # fmt: skip


def _csv(seed: bytes) -> dict[str, Content]:
    return _text(seed) | {
        "an unclosed quote": seed + b'"a' + b"\n" * 1000,
        "quotes": b'"' * 100_001,
        "100,000 columns": b"a," * 100_000 + b"\n1\n",
        "100,000 fields": seed + b"a," * 100_000,
        "10,000 short lines": seed + b"a\n" * 10_000,
        "names alike": b"prompt,prompt\n1,2\n",
        "names of nothing": b",,,\n1,2,3,4\n",
    }


def _gguf(seed: bytes) -> dict[str, Content]:
    def head(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
        return struct.pack("<4sIQQ", b"GGUF", version, tensors, keys) + rest

    def text(words: bytes) -> bytes:
        return struct.pack("<Q", len(words)) + words

    llama = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
    array = text(b"a") + struct.pack("<I", 9)
    return {
        "no head": b"GGUF",
        "the other byte order": b"GGUF" + seed[7:3:-1] + seed[8:],
        "version 0": head(0, 0, version=0),
        "version 4 billion": head(0, 0, version=2**32 - 1),
        "endless tensors": head(2**64 - 1, 0),
        "endless keys": head(0, 2**64 - 1),
        "endless keys of nothing": head(0, 2**63, bytes(100_000)),
        "a key beyond the file": head(0, 1, struct.pack("<Q", 2**63)),
        "the largest key": head(0, 2, struct.pack("<Q", 2**64 - 1)),
        "an endless array": head(0, 2, array + struct.pack("<IQ", 10, 2**61)),
        "an endless array of words": head(0, 2, array + struct.pack("<IQ", 8, 2**62) + bytes(1_000_000)),
        "an endless array of arrays": head(0, 2, array + struct.pack("<IQ", 9, 2**62) + bytes(1_000_000)),
        "arrays in arrays": head(0, 1, array + struct.pack("<IQ", 9, 1) * 100_000),
        "an unknown type": head(0, 1, text(b"a") + struct.pack("<I", 99)),
        "4 billion dimensions": head(1, 1, llama + text(b"t") + struct.pack("<I", 2**32 - 1) + bytes(1_000_000)),
        "a vector for the vocabulary": head(
            1, 1, llama + text(b"token_embd.weight") + struct.pack("<IQIQ", 1, 8, 0, 0)
        ),
        "a name that is no text": head(0, 1, text(b"\xff")),
        "a word that is no text": head(0, 1, text(b"general.architecture") + struct.pack("<I", 8) + text(b"\xff\xfe")),
        "an endless model": head(0, 2, llama + text(b"llama.block_count") + struct.pack("<IQ", 10, 2**64 - 1)),
        "only the architecture": head(0, 1, llama),
    }  # fmt: skip


def _torch(seed: bytes) -> dict[str, Content]:
    import torch

    def saved(value: Any) -> bytes:
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    endless = torch.zeros(1).expand(2**40)
    values = [None, 1, [], {}, {"state": 1}, {"state": {}, "param_groups": []}, {"a": torch.zeros(3)}, torch.zeros(3)]
    return {f"holds {value!r}"[:60]: saved(value) for value in values} | {
        "an endless tensor": saved({"state": endless})
    }


def _parquet(seed: bytes) -> dict[str, Content]:
    return {
        "no end": seed[:-4],
        "only its marks": b"PAR1PAR1",
        "an endless footer": b"PAR1" + struct.pack("<I", 2**31) + b"PAR1",
        "a footer of zeros": b"PAR1" + bytes(100) + struct.pack("<I", 100) + b"PAR1",
        "encrypted": seed[:-4] + b"PARE",
    }


KINDS: dict[str, Callable[[bytes], dict[str, Content]]] = {
    "json": _json,
    "rows": _rows,
    "adapter": lambda seed: _json(seed) | _patterns(seed),
    "yaml": _yaml,
    "jsonl": _jsonl,
    "csv": _csv,
    "text": _text,
    "safetensors": _safetensors,
    "gguf": _gguf,
    "torch": _torch,
    "parquet": _parquet,
}
