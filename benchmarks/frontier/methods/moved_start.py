"""The base class of methods that move a part of W into the adapter before training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.testbed import Testbed
from folora_q.models.adapters import AdapterPair


@dataclass
class MovedStart(Method, ABC):
    """B₀A₀ is subtracted from W, so that the model at step 0 is the base, up to rounding.

    The rest of W is a new matrix, which would have to be quantized again; so it is kept in 16 bits.
    """

    sixteen_bit: ClassVar[bool] = True

    def start(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        covariances = testbed.covariances(model)
        for pair in pairs:
            layer = cast(nn.Linear, pair.module.get_base_layer())
            weight = layer.weight.double()
            penalty, utility = (covariance.to(weight.device) for covariance in covariances[pair.name])
            a, b = self.factors(weight, penalty, utility, len(pair.a))
            with torch.no_grad():
                pair.a.copy_(a)
                pair.b.copy_(b / pair.scale)
                layer.weight.copy_(weight - b @ a)

    @abstractmethod
    def factors(self, weight: Tensor, penalty: Tensor, utility: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return A₀ (r, d) and B₀ (o, r), from a weight (o, d), Σp and Σt."""
