"""The base class of methods that choose the directions of A's rows before training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.testbed import Testbed
from folora_q.models.adapters import AdapterPair, freeze_lora_a

# The norm that PEFT's initialization gives A's rows, so that learning rates are comparable.
ROW_NORM = 3**-0.5


@dataclass
class ChosenRows(Method, ABC):
    """A starts with rows that depend on the covariances of the layer's input, B with zeros.

    Attributes:
        freeze_a: train B alone.
    """

    freeze_a: bool = True

    def start(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        covariances = testbed.covariances(model)
        last: tuple[Tensor, Tensor] | None = None
        rows = torch.empty(0)
        for pair in pairs:
            if (both := covariances[pair.name]) is not last:
                last, rows = both, ROW_NORM * self.rows(*both, len(pair.a))
            with torch.no_grad():
                pair.a.copy_(rows)
        if self.freeze_a:
            freeze_lora_a(pairs)

    @abstractmethod
    def rows(self, penalty: Tensor, utility: Tensor, rank: int) -> Tensor:
        """Return orthonormal rows (r, d), from Σp and Σt."""
