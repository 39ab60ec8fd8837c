"""CorDA: the adapter starts with the part of W that matters least for model-generated text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.frontier.methods.moved_start import MovedStart

# CorDA adds 0.01 of the mean diagonal to C before inverting it (iboing/CorDA).
DAMPING = 0.01


@dataclass
class CorDA(MovedStart):
    """CorDA in its knowledge-preserved mode: the adapter gets the r smallest components of W C.

    SVD(W C) = U S Vᵀ, with C of text that the base generated; B₀ = U₋ √S₋, A₀ = √S₋ (Vᵀ C⁻¹)₋. PEFT has an
    implementation (`init_lora_weights="corda"`). This one takes the covariances that all methods share, and a test
    compares it with PEFT's.
    """

    name: ClassVar[str] = "CorDA"
    paper: ClassVar[str] = "arXiv 2406.05223"

    def factors(self, weight: Tensor, penalty: Tensor, utility: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        identity = torch.eye(len(penalty), dtype=penalty.dtype, device=penalty.device)
        c = penalty + DAMPING * penalty.diagonal().mean() * identity
        u, s, vt = torch.linalg.svd(weight @ c, full_matrices=False)
        root = s[-rank:].sqrt()
        a = root[:, None] * torch.linalg.solve(c, vt[-rank:].T, left=True).T
        return a, u[:, -rank:] * root
