"""Contrastive LoRA: A is frozen at the directions of the largest utility-penalty quotient γ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.frontier.methods.chosen_rows import ChosenRows
from folora_q.core.spectrum import generalized_eigenproblem


@dataclass
class ContrastiveLoRA(ChosenRows):
    """A's rows are the r directions of the largest γ = vᵀΣt v / vᵀ(Σp + τI) v, orthonormalized and frozen.

    Attributes:
        ridge: τ, for dense covariances with a mean eigenvalue of 1.
    """

    name: ClassVar[str] = "frozen top-γ A"
    paper: ClassVar[str] = "github.com/AK3847/OB-SAE, contrastive_lora"
    learning_rates: ClassVar[tuple[float, ...]] = (1e-4, 1e-3, 3e-3)
    ridge: float = 1e-4

    def rows(self, penalty: Tensor, utility: Tensor, rank: int) -> Tensor:
        metric = penalty + self.ridge * torch.eye(len(penalty), dtype=penalty.dtype)
        _, vectors = generalized_eigenproblem(utility, metric)
        return torch.linalg.qr(vectors[:, :rank]).Q.T
