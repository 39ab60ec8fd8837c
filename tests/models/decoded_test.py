"""Decoded weights compute what bitsandbytes computes, forward and backward."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import psutil
import pytest
import torch

from folora_q.models.decoded import DecodedLinear4bit, hold_decoded
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.recipe.schema import ModelSection


def quantized(dtype: torch.dtype) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=dtype, quant_type="nf4", compress_statistics=True).to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_it_is_the_same_function_bit_for_bit(dtype: torch.dtype, given: torch.dtype) -> None:
    results = []
    layer = quantized(dtype)
    for decoded in (False, True):
        assert hold_decoded(layer) == 64 * 32 * dtype.itemsize if decoded else True
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(given).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.dtype == given
        results.append((y.detach(), x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_model_on_a_cpu_holds_them_where_memory_is_not_short(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, cpu = ModelSection(model_name_or_path=str(tiny_folder)), Hardware(torch.device("cpu"), torch.float32, "")
    for free, held in ((2**40, True), (2**10, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: type("Memory", (), {"available": free}))
        model = load_model(section, cpu).model
        layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
        assert all(isinstance(layer, DecodedLinear4bit) == held for layer in layers) and layers
