"""Hooks that feed the inputs of adapted layers to sketches; layers that read the same tensor are found by identity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from folora_q.errors import RunError


class TokenSink(Protocol):
    """Receives tokens: a sketch, or a projection."""

    def update(self, x: Tensor, mask: Tensor | None = None, check: bool = True) -> None: ...


class Counted:
    """Which tokens of a forward pass count, and how often; and whether what was read is finite.

    Nothing here waits for the device except `count` and `require_finite`, once for a batch and not for each module.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.weight = 1.0
        self._rows: Tensor | None = None
        self._inputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def count(self, mask: Tensor | None = None, weight: float = 1.0) -> None:
        """Set which tokens of the next forward pass count, (b, t) or None for all, and how often each."""
        self.mask, self.weight = mask, weight
        self._rows = None if mask is None else mask.bool().flatten().nonzero()[:, 0]

    def rows_of(self, x: Tensor) -> Tensor:
        """Return the tokens that count, (n, d). Experts get tokens picked from the batch, and then all count."""
        rows = x.reshape(-1, x.shape[-1])
        if self._rows is None or self.mask is None or self.mask.shape != x.shape[:-1]:
            return rows
        return rows.index_select(0, self._rows)

    def saw_input(self, name: str, x: Tensor) -> None:
        self._inputs[name] = _sum(x)

    def saw_gradient(self, name: str, norms: Tensor) -> None:
        self._gradients[name] = _sum(norms)

    def require_finite(self) -> None:
        """Check everything that was read since the last call.

        Raises:
            RunError: an input or a gradient is not finite; the first module is named.
        """
        for seen, what in (
            (self._inputs, "the activations hold a NaN or an infinity, at the input of {}"),
            (self._gradients, "the gradient behind {} holds a NaN or an infinity"),
        ):
            sums = torch.stack(list(seen.values())).tolist() if seen else []
            wrong = [name for name, value in zip(seen, sums, strict=True) if not math.isfinite(value)]
            seen.clear()
            if wrong:
                raise RunError(what.format(wrong[0]))


def _sum(x: Tensor) -> Tensor:
    """Return the sum of x in float32, on x's device; not finite if any value is not."""
    return x.detach().sum(dtype=torch.float32)


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
        To be told which tokens count before each forward pass, and to be asked after it whether they were finite.
    """
    current = Counted()

    def feed(name: str, x: Tensor) -> None:
        rows = current.rows_of(x)
        current.saw_input(name, rows)
        sinks[name].update(rows if current.weight == 1 else rows.float() * current.weight**0.5, check=False)

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
        rows = current.rows_of(gradient)
        weights = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        weighted = current.rows_of(x).float() * (weights * current.weight**0.5)
        current.saw_gradient(name, weights)
        sinks[name].update(weighted, check=False)

    def watch(name: str, _: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0].detach()
        current.saw_input(name, x)  # it affects every gradient: the backward pass would name the last layer
        return _Watched.apply(output, x, lambda x, g: feed(name, x, g)) if output.requires_grad else output

    handles = [modules[name].register_forward_hook(partial(watch, name)) for name in sinks]
    try:
        yield current
    finally:
        for handle in handles:
            handle.remove()


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
