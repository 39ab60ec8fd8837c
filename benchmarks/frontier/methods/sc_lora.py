"""SC-LoRA: the adapter starts in output directions that the task uses and model-generated text does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.frontier.methods.moved_start import MovedStart


@dataclass
class SCLoRA(MovedStart):
    """B₀ = Q, A₀ = QᵀW, with Q the r leading eigenvectors of (1 - β) Cov₊ - β Cov₋ of the layer's outputs.

    Cov₊ is of the task, Cov₋ of text to be preserved.

    Attributes:
        beta: β; 0.8 is the paper's setting for preserving knowledge.
    """

    name: ClassVar[str] = "SC-LoRA"
    paper: ClassVar[str] = "arXiv 2505.23724"
    beta: float = 0.8

    def factors(self, weight: Tensor, penalty: Tensor, utility: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        contrast = weight @ ((1 - self.beta) * utility - self.beta * penalty) @ weight.T
        q = torch.linalg.eigh(contrast).eigenvectors[:, -rank:]
        return q.T @ weight, q
