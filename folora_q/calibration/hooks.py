"""Hooks that feed the inputs of adapted layers to sketches; layers that read the same tensor are found by identity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from folora_q.errors import RunError


class TokenSink(Protocol):
    """Receives tokens: a sketch, or a projection."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None: ...


@dataclass
class Counted:
    """Which tokens of a forward pass count, (b, t) or None for all, and how often each."""

    mask: Tensor | None = None
    weight: float = 1.0


def shared_inputs(model: nn.Module, modules: Mapping[str, nn.Module], input_ids: Tensor) -> list[list[str]]:
    """Group modules that receive the very same tensor in one forward pass (q, k and v; gate and up).

    Args:
        model: called with `input_ids` of a few tokens.
        modules: candidates by name; one that is not called (an idle expert) is a group of its own.

    Returns:
        Groups of names, in the order of `modules`.
    """
    held: list[Tensor] = []  # keeps every input alive, so that no address is reused
    given: dict[str, tuple] = {}

    def look(name: str, x: Tensor) -> None:
        held.append(x)
        place = x.untyped_storage().data_ptr(), x.storage_offset(), x.shape, x.stride(), x._version
        given[name] = (*place, x.dtype)

    with torch.no_grad(), _inputs_of(modules, look):
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    groups: dict[tuple | str, list[str]] = {}
    for name in modules:
        groups.setdefault(given.get(name, name), []).append(name)
    return list(groups.values())


@contextmanager
def collect_inputs(modules: Mapping[str, nn.Module], sinks: Mapping[str, TokenSink]) -> Iterator[Counted]:
    """Feed each module's input to its sink in every forward pass within this context.

    Yields:
        Which tokens count, to be set before each forward pass.

    Raises:
        RunError: an input is not finite; the module is named.
    """
    current = Counted()

    def feed(name: str, x: Tensor) -> None:
        try:
            x = x if current.weight == 1 else x.float() * current.weight**0.5
            sinks[name].update(x, _fitting(current.mask, x))
        except ValueError as error:
            raise RunError(f"{error}, at the input of {name}") from error

    with _inputs_of({name: modules[name] for name in sinks}, feed):
        yield current


@contextmanager
def collect_weighted_inputs(modules: Mapping[str, nn.Module], sinks: Mapping[str, TokenSink]) -> Iterator[Counted]:
    """Feed inputs as `collect_inputs`, in the backward pass and times ‖g‖, g being the gradient at the module's output.

    The sum over tokens of ‖g‖² x xᵀ is the loss's Fisher information about the directions that a module reads (K-FAC,
    arXiv 1503.05671, without assuming that x and g are independent).

    Args:
        sinks: by module; several modules may share one.
    """
    current = Counted()

    def feed(name: str, x: Tensor, gradient: Tensor) -> None:
        weights = torch.linalg.vector_norm(gradient, dim=-1, keepdim=True, dtype=torch.float32)
        try:
            sinks[name].update(x.float() * weights * current.weight**0.5, _fitting(current.mask, x))
        except ValueError as error:
            raise RunError(f"the gradient behind {name} holds a NaN or an infinity") from error

    def watch(name: str, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0].detach()
        # Checked here, since it affects every gradient: the backward pass would name the last layer.
        if not bool(torch.isfinite(torch.linalg.vector_norm(x, float("inf")))):
            raise RunError(f"the activations hold a NaN or an infinity, at the input of {name}")
        return _Watched.apply(output, x, lambda x, g: feed(name, x, g)) if output.requires_grad else output

    handles = [modules[name].register_forward_hook(partial(watch, name)) for name in sinks]
    try:
        yield current
    finally:
        for handle in handles:
            handle.remove()


def _fitting(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the mask if it fits; experts get tokens picked from the batch, where padding was dropped or is rare."""
    return mask.bool() if mask is not None and mask.shape == x.shape[:-1] else None


class _Watched(torch.autograd.Function):
    """Passes an output through unchanged, and its gradient with the input to `feed`; works with checkpointing."""

    @staticmethod
    def forward(ctx, output, x, feed):
        ctx.save_for_backward(x)
        ctx.feed = feed
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        ctx.feed(x, gradient)
        return gradient, None, None


@contextmanager
def _inputs_of(modules, look) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
