"""The mathematics: covariance sketches, their generalized quotient, and the gate on optimizer steps.

Imports only PyTorch, so that it can be used in any training loop.
"""

from folora_q.core.gate import SpectralGate, gates_on, normalizers
from folora_q.core.optimizer import GatedOptimizer, SpectralAdamW
from folora_q.core.refine_basis import refined_basis
from folora_q.core.sketch import CovarianceSketch, ProjectedCovariance
from folora_q.core.spectrum import LowRankCovariance, joint_basis

__all__ = [
    "CovarianceSketch",
    "GatedOptimizer",
    "LowRankCovariance",
    "ProjectedCovariance",
    "SpectralAdamW",
    "SpectralGate",
    "gates_on",
    "joint_basis",
    "normalizers",
    "refined_basis",
]
