"""FoLoRA as its paper describes it: its start, spectral Adam on A, dense covariances, AdamW on B."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.frontier.methods.moved_start import MovedStart
from benchmarks.frontier.testbed import Testbed, pairs_with
from folora_q.core import SpectralAdamW, SpectralGate
from folora_q.models.adapters import AdapterPair

# As a share of the mean variance; the paper gives no value.
DENSE_RIDGE = 0.01


@dataclass
class FoLoRAStart(MovedStart):
    """FoLoRA's start (Appendix B.3): A₀ = U⊥ᵀ, B₀ = W U⊥, with U⊥ the r last eigenvectors of Σp."""

    name: ClassVar[str] = "FoLoRA's start"
    paper: ClassVar[str] = "arXiv 2606.00132"

    def factors(self, weight: Tensor, penalty: Tensor, utility: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        u = torch.linalg.eigh(penalty).eigenvectors[:, :rank]
        return u.T, weight @ u


@dataclass
class FoLoRA(FoLoRAStart):
    """FoLoRA with dense covariances and a gate on A's optimizer."""

    name: ClassVar[str] = "FoLoRA, as published"
    learning_rates: ClassVar[tuple[float, ...]] = (3e-4, 1e-3, 3e-3)
    gate_lambda: float = 1.0
    floor: float = 0.3

    def optimizer(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> Optimizer:
        covariances = testbed.covariances(model)
        gates: dict[str, SpectralGate] = {}
        last: tuple[Tensor, Tensor] | None = None
        for pair in pairs:
            if (both := covariances[pair.name]) is not last:
                last, gate = both, dense_gate(*both, self.gate_lambda, self.floor).to(testbed.base.device)
            gates[pair.name] = gate
        return SpectralAdamW(pairs_with(gates, pairs), lr=self.learning_rate)


def dense_gate(penalty: Tensor, utility: Tensor, gate_lambda: float, floor: float) -> SpectralGate:
    """Return a gate whose basis spans the whole space, so that its tails are not used."""
    return SpectralGate.from_state_dict(
        {
            "basis": torch.eye(len(penalty)),
            "penalty_gram": penalty,
            "utility_gram": utility,
            "penalty_tail": 1.0,
            "utility_tail": 1.0,
            "ridge": DENSE_RIDGE,
            "utility_ridge": DENSE_RIDGE,
            "gate_lambda": gate_lambda,
            "floor": floor,
            "sharpness": 1.0,
        }
    )
