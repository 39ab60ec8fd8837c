"""Types of GGUF files, and about the bytes per number of each. No PyTorch."""

from __future__ import annotations

# Those that llama.cpp's converter writes; `auto` is the 16-bit type nearest to the checkpoint's.
CONVERTED: dict[str, float] = {"f16": 2, "bf16": 2, "q8_0": 34 / 32, "f32": 4, "auto": 2}
# Those that llama-quantize makes, as llama.cpp states their size.
K_QUANTS: dict[str, float] = {
    "q3_k_m": 0.50,
    "q4_k_s": 0.58,
    "q4_k_m": 0.61,
    "q5_k_s": 0.70,
    "q5_k_m": 0.72,
    "q6_k": 0.83,
}
GGUF_TYPES = (*CONVERTED, *K_QUANTS)
