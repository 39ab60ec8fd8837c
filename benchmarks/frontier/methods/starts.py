"""Starts that move a part of W into the adapter: CorDA and SC-LoRA. What they leave of W cannot be held in 4 bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.frontier.methods.base import AdapterPair, Ground, Method

# CorDA adds 0.01 of the mean diagonal to C before it is inverted (iboing/CorDA).
DAMPING = 0.01


@dataclass
class MovedStart(Method, ABC):
    """B₀A₀ is taken out of W, so that the model is the base at step 0 but for rounding."""

    sixteen_bit: ClassVar[bool] = True

    def start(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        covariances = ground.covariances(model)
        for pair in pairs:
            layer = pair.module.get_base_layer()
            weight = layer.weight.double()
            penalty, utility = (covariance.to(weight.device) for covariance in covariances[pair.name])
            a, b = self.factors(weight, penalty, utility, len(pair.a))
            with torch.no_grad():
                pair.a.copy_(a)
                pair.b.copy_(b / pair.scale)
                layer.weight.copy_(weight - b @ a)

    @abstractmethod
    def factors(self, weight: Tensor, penalty: Tensor, utility: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A₀ (r, d) and B₀ (o, r) of a weight (o, d)."""


@dataclass
class CorDA(MovedStart):
    """CorDA, arXiv 2406.05223, knowledge-preserved mode: the adapter gets the r least components of W C.

    SVD(W C) = U S Vᵀ with C of the base's own text; B₀ = U₋ √S₋, A₀ = √S₋ (Vᵀ C⁻¹)₋. PEFT has it
    (`init_lora_weights="corda"`); the formula is written out so that it takes the covariances that all methods share,
    and a test holds it against PEFT's.
    """

    def factors(self, weight: Tensor, penalty: Tensor, utility: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        identity = torch.eye(len(penalty), dtype=penalty.dtype, device=penalty.device)
        c = penalty + DAMPING * penalty.diagonal().mean() * identity
        u, s, vt = torch.linalg.svd(weight @ c, full_matrices=False)
        root = s[-rank:].sqrt()
        a = root[:, None] * torch.linalg.solve(c, vt[-rank:].T, left=True).T
        return a, u[:, -rank:] * root


@dataclass
class SCLoRA(MovedStart):
    """SC-LoRA, arXiv 2505.23724: B₀ = Q, A₀ = QᵀW with Q the leading directions of a difference of output covariances.

    Q: the r leading eigenvectors of (1 - β) Cov₊ - β Cov₋ of the layer's outputs, Cov₊ on the task and Cov₋ on what is
    to be kept; β = 0.8 is its setting for preserving knowledge.
    """

    beta: float = 0.8

    def factors(self, weight: Tensor, penalty: Tensor, utility: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        contrast = weight @ ((1 - self.beta) * utility - self.beta * penalty) @ weight.T
        q = torch.linalg.eigh(contrast).eigenvectors[:, -rank:]
        return q.T @ weight, q


@dataclass
class FoLoRAStart(MovedStart):
    """FoLoRA's own start (arXiv 2606.00132, Appendix B.3): A₀ = U⊥ᵀ, B₀ = W U⊥, U⊥ the bottom of Σp."""

    def factors(self, weight: Tensor, penalty: Tensor, utility: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        u = torch.linalg.eigh(penalty).eigenvectors[:, :rank]
        return u.T, weight @ u
