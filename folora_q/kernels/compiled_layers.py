"""Decoder layers that are compiled by torch.compile for training steps, and run as they are everywhere else.

A 7B model's step launches about 10,000 kernels from Python, which on a fast card takes longer than their work. Every
layer runs the same code, so all layers share four graphs, for any length: with and without padding, and for the first
layer, whose input needs no gradient. Evaluations, which switch the adapter off, use none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from folora_q.errors import RunError, first_line


class CompilationError(RunError):
    """A layer could not be compiled."""


class CompiledLayers:
    """The compiled forward functions of a model's decoder layers; compilation happens when they first run.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
        self._compiled: dict[nn.Module, Any] = {}
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(fullgraph=True, dynamic=True, backend=backend)
                self._compiled[layer] = layer._compiled_call_impl
                layer._compiled_call_impl = None

    def __len__(self) -> int:
        return len(self._compiled)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the layers run compiled within this context.

        Raises:
            CompilationError: a layer could not be compiled.
        """
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # importing it takes a second

        for layer, function in self._compiled.items():
            layer._compiled_call_impl = function
        try:
            yield
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            cause = getattr(error, "inner_exception", error)  # a backend's own
            raise CompilationError(f"a decoder layer could not be compiled: {first_line(cause)}") from error
        finally:
            for layer in self._compiled:
                layer._compiled_call_impl = None
