"""Hold the decoded weights of a 4-bit model on a CPU, which would otherwise decode each of them in every pass."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import psutil
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn
from torch.nn.functional import linear

# The largest share of the free memory that decoded weights may take.
MAX_SHARE = 0.25


class DecodedLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit layer that computes with weights which were decoded once.

    Attributes:
        decoded: (o, d), in the dtype that the layer computes in.
    """

    decoded: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weight = self.decoded
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return linear(x.to(weight.dtype), weight, bias).to(x.dtype)


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
        layer.decoded = decoded_weight(layer)
        layer.__class__ = DecodedLinear4bit
    return size


def decoded_weight(layer: bnb.nn.Linear4bit) -> Tensor:
    """Return the weights (o, d) of a 4-bit layer in the dtype that it computes in: held, or decoded now.

    With those of an earlier adapter that the layer carries (`folora_q.models.earlier_adapter`).
    """
    weight = _own_weight(layer)
    a, b = getattr(layer, "carried_a", None), getattr(layer, "carried_b", None)
    return weight if a is None or b is None else torch.addmm(weight, b.to(weight.dtype), a.to(weight.dtype))


def _own_weight(layer: bnb.nn.Linear4bit) -> Tensor:
    if isinstance(layer, DecodedLinear4bit):
        return layer.decoded
    packed: Any = layer.weight  # bitsandbytes declares a plain tensor
    state = getattr(packed, "quant_state", None) or layer.quant_state  # of a weight that FSDP has gathered
    return dequantize_4bit(packed.data, state).to(_dtype(layer))


def _dtype(layer: bnb.nn.Linear4bit) -> torch.dtype:
    assert layer.compute_dtype is not None  # transformers sets it from the configuration
    return layer.compute_dtype
