"""LoRA-Null: A reads only directions that model-generated text hardly uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.frontier.methods.chosen_rows import ChosenRows


@dataclass
class LoRANull(ChosenRows):
    """LoRA-Null with A frozen (its v2), in the form that does not change W.

    A's rows are the r eigenvectors of Σp with the smallest eigenvalues, so that A x ≈ 0 on text that the base
    generated; B = 0 (mode `singular_aware_2` of the authors' code, HungerPWAY/LoRA-Null).
    """

    name: ClassVar[str] = "LoRA-Null, A frozen"
    paper: ClassVar[str] = "arXiv 2503.02659"
    learning_rates: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2)

    def rows(self, penalty: Tensor, utility: Tensor, rank: int) -> Tensor:
        return torch.linalg.eigh(penalty).eigenvectors[:, :rank].T
