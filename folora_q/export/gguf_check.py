"""Check that a GGUF file contains the model that it was made from.

Compared are the architecture, the names and shapes of all tensors, the vocabulary, the chat template and, for the
architectures listed here, numbers of every tensor: norms in full, and the first and last row of everything else. Where
llama.cpp reorders the rows of a head of queries or keys, it leaves the first and the last row in place.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from folora_q.errors import RunError, UserError
from folora_q.models.weight_files import Checkpoint, StoredTensor, open_checkpoint

# llama.cpp's architectures by model type, in which tensors keep their shapes and, apart from the order of rows, their
# numbers.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
# Architectures whose norms multiply by 1 + w in transformers, and by w in llama.cpp.
NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3")
# Tensors that llama.cpp computes from the configuration, and tensors of checkpoints that it omits.
GENERATED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
LEFT_OUT = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias", ".attn.masked_bias", ".attn.bias")
EMBEDDINGS, OUTPUT = "token_embd.weight", "output.weight"
SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class GgufFacts:
    """Content of a GGUF file that passed the check.

    Attributes:
        architecture: llama.cpp's name for it.
        tensors: the number of tensors.
        types: the number of tensors by type, such as {"F16": 15, "F32": 6}.
        vocabulary: the number of tokens.
        chat_template: whether there is one.
        compared: the number of tensors whose numbers were compared; 0 for an architecture that is not listed here.
        size: in bytes.
    """

    architecture: str
    tensors: int
    types: dict[str, int]
    vocabulary: int
    chat_template: bool
    compared: int
    size: int

    def to_dict(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        return asdict(self)


def check_gguf(path: Path, folder: Path, shown: Path | None = None) -> GgufFacts:
    """Check that a file is the model in a folder, by its header and some numbers of every tensor.

    Args:
        shown: what messages call the file, if it has a temporary name.

    Raises:
        UserError: the folder is not a model's.
        RunError: the file cannot be read, or is not that model; the message says what differs.
    """
    shown = shown or path
    checkpoint = open_checkpoint(folder)
    config = {**checkpoint.config, **(checkpoint.config.get("text_config") or {})}
    try:
        reader = gguf.GGUFReader(path)
        architecture = _string(reader, gguf.Keys.General.ARCHITECTURE)
        tokens = reader.get_field(gguf.Keys.Tokenizer.LIST)
        template = bool(_string(reader, gguf.Keys.Tokenizer.CHAT_TEMPLATE))
        template |= gguf.Keys.Tokenizer.CHAT_TEMPLATES in reader.fields  # named ones, with or without a default
    except (ValueError, LookupError, OSError, OverflowError) as error:
        raise RunError(f"{shown} cannot be read as a GGUF file: {error}") from None
    try:
        known = _check_architecture(architecture, config)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        sources = _sources(checkpoint, config, architecture, tensors)
        for name, stored in sources.items():
            _check_shape(tensors[name], stored, checkpoint, exact=known)
        vocabulary = 0 if tokens is None else len(tokens.data)
        if vocabulary != config.get("vocab_size"):
            raise _MismatchError(
                f"has a vocabulary of {vocabulary} tokens, and config.json says {config.get('vocab_size')}"
            )
        if template != _has_template(folder):
            has, lacks = ("the file", "the model") if template else ("the model", "the file")
            raise _MismatchError(f"differs in the chat template: {has} has one, {lacks} has none")
        compared = 0
        for name, stored in sources.items() if known else ():
            if len(stored) == 1:  # experts are stored together, and not compared
                plus_one = architecture in NORMS_PLUS_ONE and name.endswith("norm.weight")
                _check_numbers(tensors[name], stored[0], checkpoint, 1.0 if plus_one else 0.0)
                compared += 1
    except _MismatchError as error:
        verb = "cannot be compared with" if isinstance(error, _UnknownError) else "is not"
        raise RunError(f"{shown} {verb} the model in {folder}: it {error}") from None
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    return GgufFacts(
        architecture, len(tensors), dict(types.most_common()), vocabulary, template, compared, path.stat().st_size
    )


class _MismatchError(Exception):
    """How a file differs from the model; a sentence without its subject."""


class _UnknownError(_MismatchError):
    """Why a file cannot be compared."""


def _string(reader: gguf.GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else str(field.contents())


def _check_architecture(architecture: str, config: dict[str, Any]) -> bool:
    """Return whether this module knows how llama.cpp stores the architecture.

    Raises:
        _UnknownError: the gguf package does not know it.
        _MismatchError: it is not that of the model.
    """
    expected = ARCHITECTURES.get(config.get("model_type", ""))
    if architecture not in gguf.MODEL_ARCH_NAMES.values():
        raise _UnknownError(f"has the architecture {architecture!r}, which the gguf package does not know")
    if expected not in (None, architecture):
        raise _MismatchError(f"has the architecture {architecture!r}, which should be {expected!r}")
    return expected is not None


def _sources(
    checkpoint: Checkpoint, config: dict[str, Any], architecture: str, found: Iterable[str]
) -> dict[str, list[str]]:
    """Return the checkpoint's tensors for each of the file's that is not generated: one, or all experts of a layer.

    Raises:
        _MismatchError: the file lacks one, or has an extra one.
        _UnknownError: the gguf package has no name for one.
    """
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.get("num_hidden_layers") or config.get("n_layer") or 0)
    expected: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        if name.endswith(LEFT_OUT):
            continue
        together = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        merged = together.replace("model.layers.", "layers.").replace("block_sparse_moe", "feed_forward")
        new = names.get_name(together, SUFFIXES) or names.get_name(merged, SUFFIXES)
        if new is None:
            raise _UnknownError(
                f"has the architecture {architecture!r}, in which llama.cpp's name for {name} is not known"
            )
        expected.setdefault(new, []).append(name)
    found = set(found) - set(GENERATED)
    if OUTPUT in found:
        expected.setdefault(OUTPUT, expected.get(EMBEDDINGS, []))
    elif config.get("tie_word_embeddings"):
        expected.pop(OUTPUT, None)
    extra = sorted(found - expected.keys())
    counts = f"holds {len(found)} tensors where {len(expected)} were expected"
    if missing := [new for new in expected if new not in found]:
        raise _MismatchError(f"{counts}: {missing[0]} ({expected[missing[0]][0]}) is missing")
    if extra:
        raise _MismatchError(f"{counts}: {extra[0]} is not one of the model's")
    return expected


def _check_shape(tensor: gguf.ReaderTensor, sources: list[str], checkpoint: Checkpoint, exact: bool) -> None:
    """Check for the same shape, or without `exact` and for experts, for as many numbers as the sources have."""
    stored = [checkpoint.tensors[source] for source in sources]
    shape = tuple(int(n) for n in reversed(tensor.shape))
    right = shape == stored[0].shape if exact and len(stored) == 1 else prod(shape) == _numel(stored)
    if not right:
        held = stored[0].shape if len(stored) == 1 else f"of {len(stored)} tensors of {stored[0].shape}"
        raise _MismatchError(f"has {tensor.name} of shape {shape}, but in the model {sources[0]} is {held}")


def _numel(stored: Iterable[StoredTensor]) -> int:
    return sum(one.numel for one in stored)


def _check_numbers(tensor: gguf.ReaderTensor, source: str, checkpoint: Checkpoint, plus: float) -> None:
    """Compare a norm in full, and first and last row of another tensor, within its type's rounding."""
    whole = "norm" in tensor.name
    expected = _read(checkpoint, source, whole) + np.float32(plus)
    data = tensor.data if whole else np.concatenate([tensor.data[:1], tensor.data[-1:]])
    try:
        found = gguf.quants.dequantize(data, tensor.tensor_type)
        allowed = _rounding(expected, tensor.tensor_type)
    except NotImplementedError:
        raise _UnknownError(
            f"holds {tensor.name} as {tensor.tensor_type.name}, whose rounding is not known here"
        ) from None
    error = np.abs(found - expected)
    if not bool((error <= allowed).all()):
        raise _MismatchError(
            f"holds other numbers: {tensor.name} is up to {float(error.max()):.3g} from {source}, more than "
            f"{tensor.tensor_type.name} rounds"
        )


def _read(checkpoint: Checkpoint, name: str, whole: bool) -> NDArray[np.float32]:
    """Read a tensor, or its first and last row, in float32."""
    path = checkpoint.folder / checkpoint.tensors[name].shard
    try:
        with safe_open(path, "pt") as file:
            piece = file.get_slice(name)
            rows = checkpoint.tensors[name].shape[0]
            parts = [piece[:]] if whole else [piece[0:1], piece[rows - 1 : rows]]
            return np.concatenate([part.float().numpy() for part in parts])
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {name} in {path}: {error}") from None


def _rounding(values: NDArray[np.float32], kind: Type) -> NDArray[np.floating]:
    """Return by how much a type may change numbers, in their shape.

    Raises:
        NotImplementedError: the type is not one of CONVERTED.
    """
    size = np.abs(values)
    if kind == Type.F32:
        return size * 2.0**-23
    if kind == Type.F16:
        return size * 2.0**-11 + 2.0**-25
    if kind == Type.BF16:
        return size * 2.0**-8 + 2.0**-126
    if kind == Type.Q8_0:  # q d, where d is the block's largest number / 127, in float16
        steps = size.reshape(-1, 32).max(1, keepdims=True) / 127
        return np.broadcast_to(steps * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-25, (steps.size, 32)).reshape(size.shape)
    raise NotImplementedError(kind.name)


def _has_template(folder: Path) -> bool:
    """Return whether the model's tokenizer has a chat template, in any of the possible files."""
    for name in ("chat_template.jinja", "tokenizer_config.json", "chat_template.json"):
        try:
            text = (folder / name).read_text(encoding="utf-8")
            if text if name.endswith(".jinja") else json.loads(text).get("chat_template"):
                return True
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{folder / name} cannot be read: {error}") from None
    return False
