"""Adapted 4-bit layers with a frozen A, computed together where they read the same input.

PEFT computes y = W x + s B (A x) by automatic differentiation, layer by layer: with copies, casts and additions of the
output's size, and one gradient of x for each of q, k and v. With A frozen one function does it for all of them: A x is
computed once, additions are made in place, and there is one gradient of x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn

from folora_q.models.adapters import ADAPTER, AdapterPair, adapter_pairs
from folora_q.models.decoded import decoded_weight


class FusedAdapters:
    """The layers of a model that can be computed this way; they are, in training steps.

    Args:
        shared: names of layers that read the same tensor, such as q, k and v; others are computed alone.
    """

    def __init__(self, model: PeftModel, shared: Sequence[Sequence[str]] = ()) -> None:
        pairs = {pair.name: pair for pair in adapter_pairs(model) if _fits(pair)}
        groups = [[pairs[name] for name in names if name in pairs] for names in shared]
        alone = pairs.keys() - {name for names in shared for name in names}
        self.groups = [_Group(part) for group in groups for part in _with_equal_a(group)]
        self.groups += [_Group([pair]) for name, pair in pairs.items() if name in alone]

    def __len__(self) -> int:
        return sum(len(group.pairs) for group in self.groups)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute the layers this way within this context."""
        for group in self.groups:
            group.attach()
        try:
            yield
        finally:
            for group in self.groups:
                group.detach()


def _fits(pair: AdapterPair) -> bool:
    """Return whether a layer's adapter is y = W x + s B A x with a frozen A and a 4-bit W, and nothing else."""
    module = pair.module
    return (
        type(module) is Linear4bit
        and isinstance(module.base_layer, bnb.nn.Linear4bit)
        and module.active_adapters == [ADAPTER]
        and not module.lora_variant
        and not pair.a.requires_grad
        and isinstance(module.lora_dropout[ADAPTER], nn.Identity)
        and cast(Any, module.lora_A[ADAPTER]).bias is cast(Any, module.lora_B[ADAPTER]).bias is None
        and not module.merged
    )


def _with_equal_a(group: Sequence[AdapterPair]) -> list[list[AdapterPair]]:
    """Split a group into layers whose A and scale are equal."""
    parts: list[list[AdapterPair]] = []
    for pair in group:
        found = (part for part in parts if part[0].scale == pair.scale and torch.equal(part[0].a, pair.a))
        if (part := next(found, None)) is None:
            parts.append([pair])
        else:
            part.append(pair)
    return parts


class _Fused(Linear4bit):
    """An adapted layer that is computed with its group."""

    group: _Group
    number: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.group.output(self.number, x)


class _Group:
    """Layers with one A. The first that is called with a tensor computes all; the others then take their outputs."""

    def __init__(self, pairs: Sequence[AdapterPair]) -> None:
        self.pairs = pairs
        self.bases = [cast(bnb.nn.Linear4bit, pair.module.base_layer) for pair in pairs]
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}
        self._a = (pairs[0].a.detach() * pairs[0].scale).to(self.bases[0].compute_dtype)  # A is frozen
        self._modules: list[Any] = [pair.module for pair in pairs]
        for number, module in enumerate(self._modules):
            module.group, module.number = self, number

    def attach(self) -> None:
        for module in self._modules:
            module.__class__ = _Fused

    def detach(self) -> None:
        for module in self._modules:
            module.__class__ = Linear4bit
        self._forget()

    def _forget(self) -> None:
        self._input, self._outputs = None, {}

    def output(self, number: int, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which finds equal products itself, and lets no state change in checkpoints
            (output,) = _Adapted.apply(x, self._a, self.bases[number : number + 1], self.pairs[number].b)
            return output
        if x is not self._input or number not in self._outputs:
            self._input = x
            factors = [pair.b for pair in self.pairs]
            self._outputs = dict(enumerate(_Adapted.apply(x, self._a, self.bases, *factors)))
        output = self._outputs.pop(number)
        if not self._outputs:
            self._forget()
        return output


class _Adapted(torch.autograd.Function):
    """y_i = W_i x + B_i (s A) x for layers i with one A: x (..., d), s A (r, d), B_i (o_i, r) -> y_i (..., o_i)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, bases: Sequence[bnb.nn.Linear4bit], *factors: Tensor):
        inner = x.reshape(-1, x.shape[-1]).to(a.dtype) @ a.T
        outputs = []
        for base, b in zip(bases, factors, strict=True):
            output = base(x)  # a new tensor, so it can be added to
            rows, b = output.view(-1, output.shape[-1]), b.to(a.dtype)
            if output.dtype == a.dtype:
                rows.addmm_(inner, b.T)
            else:
                rows += inner @ b.T
            outputs.append(output)
        ctx.save_for_backward(inner, a, *factors)
        ctx.bases, ctx.shape, ctx.dtype = bases, x.shape, x.dtype
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        inner, a, *factors = ctx.saved_tensors
        of_x: Tensor | None = None
        of_inner: Tensor | None = None
        of_factors: list[Tensor | None] = []
        for base, b, wanted, gradient in zip(ctx.bases, factors, ctx.needs_input_grad[3:], gradients, strict=True):
            if gradient is None:
                of_factors.append(None)
                continue
            rows = gradient.reshape(-1, gradient.shape[-1]).to(a.dtype)
            of_factors.append((rows.T @ inner).to(b.dtype) if wanted else None)
            if ctx.needs_input_grad[0]:
                of_x = _plus_product(of_x, rows, decoded_weight(base))
                of_inner = _plus_product(of_inner, rows, b.to(a.dtype))
        if of_x is None or of_inner is None:
            return None, None, None, *of_factors
        return of_x.addmm_(of_inner, a).view(ctx.shape).to(ctx.dtype), None, None, *of_factors


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left @ right if total is None else total.addmm_(left, right)
