"""Check that a quantized GGUF file is the 16-bit file that it was made from, up to its types' rounding.

Every tensor is dequantized in full and compared. The rounding of a k-quant has no simple bound for a single number,
since the scales of its blocks are fitted; the root mean square over a tensor has.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from folora_q.errors import RunError
from folora_q.export.gguf_check import GgufFacts

# Largest error of a tensor, as root mean square relative to that of its numbers. Two to three times
# what llama-quantize makes of normally distributed numbers; of another tensor it would be 1.4.
MAX_RELATIVE_ERROR: dict[Type, float] = {
    Type.BF16: 0.005,
    Type.F16: 0.001,
    Type.Q8_0: 0.02,
    Type.Q6_K: 0.05,
    Type.Q5_K: 0.1,
    Type.Q5_1: 0.1,
    Type.Q5_0: 0.1,
    Type.Q4_K: 0.2,
    Type.Q4_1: 0.2,
    Type.Q4_0: 0.2,
    Type.IQ4_NL: 0.2,
    Type.Q3_K: 0.4,
    Type.Q2_K: 0.7,
}
# Metadata that quantization leaves as it is.
SAME = (
    gguf.Keys.General.ARCHITECTURE,
    gguf.Keys.Tokenizer.LIST,
    gguf.Keys.Tokenizer.MERGES,
    gguf.Keys.Tokenizer.CHAT_TEMPLATE,
)
# Numbers that are dequantized at a time.
CHUNK = 2**24


def check_quantized(path: Path, source: Path, facts: GgufFacts, shown: Path) -> GgufFacts:
    """Compare every tensor of a quantized file with the file that it was made from.

    Args:
        facts: content of the source, which was checked.
        shown: what messages call the file.

    Returns:
        The content of the quantized file.

    Raises:
        RunError: the file cannot be read, or is not the source; the message says what differs.
    """
    try:
        old, new = gguf.GGUFReader(source), gguf.GGUFReader(path)
    except (ValueError, LookupError, OSError, OverflowError) as error:
        raise RunError(f"{shown} cannot be read as a GGUF file: {error}") from None
    wanted, found = ({tensor.name: tensor for tensor in reader.tensors} for reader in (old, new))
    if odd := sorted(wanted.keys() ^ found.keys()):
        raise RunError(f"{shown} is not the model that was quantized: {odd[0]} is only in one of them")
    for key in SAME:
        if _raw(old, key) != _raw(new, key):
            raise RunError(f"{shown} is not the model that was quantized: {key} was changed")
    for name, tensor in wanted.items():
        if wrong := _difference(tensor, found[name]):
            raise RunError(f"{shown} is not the model that was quantized: {name} {wrong}")
    types = Counter(tensor.tensor_type.name for tensor in new.tensors)
    return replace(facts, types=dict(types.most_common()), compared=len(found), size=path.stat().st_size)


def _raw(reader: gguf.GGUFReader, key: str) -> bytes | None:
    field = reader.get_field(key)
    return None if field is None else b"".join(part.tobytes() for part in field.parts[2:])


def _difference(old: gguf.ReaderTensor, new: gguf.ReaderTensor) -> str | None:
    """Return how a tensor differs by more than rounding, or None."""
    if old.shape.tolist() != new.shape.tolist():
        return f"has the shape {new.shape.tolist()}, not {old.shape.tolist()}"
    if old.tensor_type == new.tensor_type:
        return None if np.array_equal(old.data, new.data) else "has other numbers, in the same type"
    allowed = MAX_RELATIVE_ERROR.get(new.tensor_type)
    if allowed is None:
        return f"is stored as {new.tensor_type.name}, which cannot be checked here"
    error = size = 0.0
    before, after = (tensor.data.reshape(-1, tensor.data.shape[-1]) for tensor in (old, new))
    rows = max(1, CHUNK // int(old.shape[0]))
    for start in range(0, len(before), rows):
        piece = slice(start, start + rows)
        expected = gguf.quants.dequantize(before[piece], old.tensor_type)
        actual = gguf.quants.dequantize(after[piece], new.tensor_type)
        error += float(np.square(actual - expected, dtype=np.float64).sum())
        size += float(np.square(expected, dtype=np.float64).sum())
    relative = float(np.sqrt(error / size)) if size else float(np.sqrt(error))
    if not relative <= allowed:  # also if it is not a number
        return f"is off by {relative:.1%} (root mean square), more than {new.tensor_type.name} rounds"
    return None
