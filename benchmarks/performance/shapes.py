"""Models of known shapes with random weights, created layer by layer in 4 bits, and random gates for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from folora_q.core import SpectralGate
from folora_q.models.adapters import AdapterPair
from folora_q.models.load import guard_cpu_kernels

# Layers that read the same input share a gate.
READERS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}
SHAPES = {
    "llama-2-7b": LlamaConfig(vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32,
                              num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=16_384),
    "llama-3-8b": LlamaConfig(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                              num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=16_384,
                              rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}),
    "tiny": LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16_384),
}  # fmt: skip


def random_4bit(config: LlamaConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """Create a model with NF4 weights and double quantization; at most one layer is in memory in 16 bits at a time."""
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _random_linear(module, device, dtype))
        else:
            for key, parameter in module.named_parameters(recurse=False):
                weight = torch.randn(parameter.shape, device=device, dtype=dtype) * config.initializer_range
                weight = torch.ones_like(weight) if parameter.dim() == 1 else weight
                setattr(module, key, nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    cast(nn.Module, model).to(device)  # the buffers
    cast(Any, model).is_loaded_in_4bit = True  # PEFT looks for this
    guard_cpu_kernels(model)
    return model.requires_grad_(False).eval()


def _random_linear(module: nn.Linear, device: torch.device, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    weight = torch.randn(module.out_features, module.in_features, device=device, dtype=dtype) * 0.02
    parameter = cast(Any, bnb.nn.Params4bit)  # made by `__new__`, whose parameters pyright does not find
    layer.weight = parameter(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
    return layer


def random_gates(
    pairs: Sequence[AdapterPair], rank: int, device: torch.device, dtype: torch.dtype
) -> dict[str, SpectralGate]:
    """Return a random gate for every layer; layers that read the same input (q, k and v; gate and up) share one."""
    gates: dict[str, SpectralGate] = {}
    shared: dict[tuple[str, str], SpectralGate] = {}
    for pair in pairs:
        parent, _, child = pair.name.rpartition(".")
        place = READERS.get(child, child)
        key = parent, place
        if key not in shared:
            shared[key] = _random_gate(cast(int, pair.module.in_features), rank, device, dtype)
        gates[pair.name] = shared[key]
    return gates


def _random_gate(dim: int, rank: int, device: torch.device, dtype: torch.dtype) -> SpectralGate:
    columns = min(dim, 2 * rank)
    basis = torch.linalg.qr(torch.randn(dim, columns, device=device)).Q
    spectrum = torch.logspace(2, -2, columns, dtype=torch.float64)
    gate = SpectralGate(
        basis,
        torch.diag(spectrum),
        torch.diag(spectrum[torch.randperm(columns)]),
        0.5,
        0.5,
        ridge=0.01,
        utility_ridge=0.01,
        gate_lambda=64.0,
        floor=0.0,
        sharpness=1.0,
    )
    return gate.to(device, dtype)
