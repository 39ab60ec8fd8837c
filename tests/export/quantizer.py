"""A stand-in for llama-quantize with its command line, which really quantizes: 2-D tensors become Q5_0.

llama-quantize itself stores rows of which 256 is not a divisor in such a type, for q4_k_m as Q5_0; all tensors of the
tiny models are of that kind.
"""

from __future__ import annotations

import sys
from pathlib import Path

PROGRAM = r"""
import os, sys
from pathlib import Path
import gguf, numpy as np

sabotage = os.environ.get("SABOTAGE_QUANTIZER", "")
source, target, kind = sys.argv[1:]
assert kind in ("Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"), kind
print("main: quantizing", flush=True)
if sabotage == "exit 1":
    print("llama_model_quantize: failed to quantize: bad tensor\nmain: failed to quantize model", file=sys.stderr)
    sys.exit(1)
if sabotage == "no output":
    sys.exit(0)
if sabotage == "garbage":
    Path(target).write_bytes(b"<html>" * 100)
    sys.exit(0)
reader = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(target, "qwen2" if sabotage == "architecture" else "llama")
for name, field in reader.fields.items():
    if name.startswith("GGUF.") or name == "general.architecture":
        continue
    value = field.contents()
    if sabotage == "vocabulary" and name == "tokenizer.ggml.tokens":
        value[7] = "other"
    if sabotage == "template" and name == "tokenizer.chat_template":
        value += " "
    writer.add_key_value(name, value, field.types[0], field.types[1] if len(field.types) > 1 else None)
Q = gguf.GGMLQuantizationType
for tensor in reader.tensors:
    value, kind = gguf.quants.dequantize(tensor.data, tensor.tensor_type), tensor.tensor_type
    if value.ndim == 2:
        kind = Q.Q5_0
    elif sabotage == "norm":
        value = value + 1e-3
    if sabotage == "missing" and tensor.name == "blk.1.ffn_up.weight":
        continue
    if sabotage == "other numbers" and tensor.name == "blk.1.ffn_up.weight":
        value = value[::-1]
    if sabotage == "shape" and tensor.name == "blk.1.ffn_up.weight":
        value = value.T
    if sabotage == "unknown type" and tensor.name == "blk.1.ffn_up.weight":
        kind = Q.MXFP4
    writer.add_tensor(tensor.name, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def save_quantizer(folder: Path) -> Path:
    """The stand-in as an executable called llama-quantize."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "llama-quantize"
    path.write_text(f"#!{sys.executable}\n{PROGRAM}", encoding="utf-8")
    path.chmod(0o755)
    return path
