"""Base models: loading in 4 bits, adapters, tokenizers, quantization, trust in remote code."""
