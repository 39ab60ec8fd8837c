"""Hold the decoded weights of a 4-bit model on a CPU, which would otherwise decode each of them in every pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import bitsandbytes as bnb
import psutil
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from torch.nn.functional import linear

# The largest share of the free memory that decoded weights may take.
MAX_SHARE = 0.25


def hold_decoded(model: nn.Module) -> int:
    """Let every 4-bit layer on a CPU compute with weights that are decoded once: the same function, bit for bit.

    The 4-bit weights stay, for merging. Nothing is done where memory is short.

    Returns:
        The bytes of the decoded weights; 0 if none are held.
    """
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    size = sum(layer.in_features * layer.out_features * _dtype(layer).itemsize for layer in layers)
    if size > MAX_SHARE * psutil.virtual_memory().available:
        return 0
    for layer in layers:
        packed: Any = layer.weight  # bitsandbytes declares a plain tensor
        weight = dequantize_4bit(packed.data, packed.quant_state).to(_dtype(layer))
        layer.forward = partial(_forward, layer, weight)
    return size


def _dtype(layer: bnb.nn.Linear4bit) -> torch.dtype:
    assert layer.compute_dtype is not None  # transformers sets it from the configuration
    return layer.compute_dtype


def _forward(layer: bnb.nn.Linear4bit, weight: Tensor, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    return linear(x.to(weight.dtype), weight, bias).to(x.dtype)
