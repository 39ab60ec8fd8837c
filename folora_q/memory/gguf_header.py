"""Read the header of a GGUF file as a config.json, without vocabulary and weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The gguf package makes an array of every token of a
vocabulary, which takes seconds.
"""

from __future__ import annotations

import struct
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from folora_q.errors import UserError

MAGIC, OLDEST_VERSION = b"GGUF", 2  # version 1 has other lengths
# Codes of value types: numbers with their `struct` formats, and the two others.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Limits of nested arrays and of dimensions; ggml itself supports four.
MAX_DEPTH, MAX_DIMENSIONS = 4, 8
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "starcoder2": "starcoder2",
}
KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
}
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads")


def gguf_config(path: Path) -> dict[str, Any]:
    """Return the config.json of the model in a GGUF file.

    Raises:
        UserError: it is not a GGUF file, is damaged, or has an architecture that is not supported.
    """
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            values, tensors = _Header(data).read()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the header of {path}: {error}") from None
    architecture = str(values.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path} has the architecture {architecture}, for which a GGUF file does not suffice",
            "name the model's folder or hub id, which has a config.json",
        )
    found = {ours: values.get(f"{architecture}.{theirs}") for theirs, ours in KEYS.items()}
    if lacking := [theirs for theirs, ours in KEYS.items() if ours in NEEDED and not isinstance(found[ours], int)]:
        raise UserError(f"the header of {path} has no number for {', '.join(lacking)}", "is it damaged?")
    vocabulary = [*tensors.get("token_embd.weight", ()), 0, 0][1]
    return {"model_type": ARCHITECTURES[architecture]} | {
        key: value for key, value in found.items() if isinstance(value, int)
    } | {"vocab_size": vocabulary, "tie_word_embeddings": "output.weight" not in tensors}  # fmt: skip


class _Header:
    def __init__(self, data: mmap) -> None:
        self.data, self.place = data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
        """Return values by key, without arrays, and dimensions by tensor."""
        magic, version = self._number("4s"), self._number("I")
        if magic != MAGIC or version < OLDEST_VERSION:
            raise ValueError("it is not a GGUF file of version 2 or newer")
        tensors, keys = self._number("Q"), self._number("Q")
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string()
            values[key] = self._value(self._number("I"))
        return values, dict(self._tensor() for _ in range(tensors))

    def _number(self, kind: str) -> Any:
        place = self.place
        self._pass(struct.calcsize(f"<{kind}"))
        return struct.unpack_from(f"<{kind}", self.data, place)[0]

    def _pass(self, size: int) -> None:
        """Skip bytes.

        Raises:
            ValueError: there are fewer.
        """
        self.place += size
        if self.place > len(self.data):
            raise ValueError("it ends within its header")

    def _string(self) -> str:
        length = self._number("Q")
        self._pass(length)
        return self.data[self.place - length : self.place].decode("utf-8")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self._string()
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind != ARRAY:
            raise ValueError(f"a value has an unknown type ({kind})")
        if depth > MAX_DEPTH:
            raise ValueError("its arrays are nested too deeply")
        inner, length = self._number("I"), self._number("Q")
        if inner in NUMBERS:
            self._pass(length * struct.calcsize(f"<{NUMBERS[inner]}"))
            return None
        for _ in range(length):
            if inner == STRING:
                self._pass(self._number("Q"))
            else:
                self._value(inner, depth + 1)
        return None

    def _tensor(self) -> tuple[str, tuple[int, ...]]:
        name, count = self._string(), self._number("I")
        if count > MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {count:,} dimensions")
        dimensions = tuple(self._number("Q") for _ in range(count))
        self._number("I"), self._number("Q")
        return name, dimensions
