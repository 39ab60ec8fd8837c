"""Methods whose A starts in directions chosen before training: LoRA-Null, frozen top-γ rows, and EVA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.frontier.methods.base import AdapterPair, Ground, Method
from folora_q.core.spectrum import generalized_eigenproblem
from folora_q.models.adapters import freeze_lora_a

# A's rows get the norm that PEFT's own start gives them, so that a learning rate means the same everywhere.
ROW_NORM = 3**-0.5


@dataclass
class LoRANull(Method):
    """LoRA-Null, arXiv 2503.02659, with A frozen (its v2), in the form that leaves W as it is.

    A's rows are the r eigenvectors of Σp with the least eigenvalues, so that A x ≈ 0 on the base's own text; B = 0 (the
    mode `singular_aware_2` of the authors' code, HungerPWAY/LoRA-Null).
    """

    freeze_a: bool = True

    def start(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        covariances, last = ground.covariances(model), None
        for pair in pairs:
            if (both := covariances[pair.name]) is not last:
                last, rows = both, self.rows(*both, len(pair.a))
            with torch.no_grad():
                pair.a.copy_(ROW_NORM * rows)
        if self.freeze_a:
            freeze_lora_a(pairs)

    def rows(self, penalty: Tensor, utility: Tensor, rank: int) -> Tensor:
        """Orthonormal rows (r, d)."""
        return torch.linalg.eigh(penalty).eigenvectors[:, :rank].T


@dataclass
class ContrastiveLoRA(LoRANull):
    """A frozen at the r directions of largest γ = vᵀΣt v / vᵀ(Σp + τI) v, made orthonormal (AK3847/OB-SAE).

    Its ridge is 1e-4 of the mean eigenvalue, on dense covariances.
    """

    ridge: float = 1e-4

    def rows(self, penalty: Tensor, utility: Tensor, rank: int) -> Tensor:
        metric = penalty + self.ridge * torch.eye(len(penalty), dtype=penalty.dtype)
        _, vectors = generalized_eigenproblem(utility, metric)
        return torch.linalg.qr(vectors[:, :rank]).Q.T


@dataclass
class EVA(LoRANull):
    """EVA's start, arXiv 2410.07170: A's rows are the leading directions of the task's inputs, as if Σp were I.

    Both matrices learn. Every layer has the same rank (its redistribution of ranks is left out).
    """

    freeze_a: bool = False

    def rows(self, penalty: Tensor, utility: Tensor, rank: int) -> Tensor:
        return torch.linalg.eigh(utility).eigenvectors[:, -rank:].T.flip(0)
