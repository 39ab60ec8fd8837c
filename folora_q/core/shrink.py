"""Shrink an update along directions of low quotient: the least penalty for the task gain that is given up.

Near ΔW = s B A let the loss of task gain be ½ tr((ΔW' - ΔW) Σt (ΔW' - ΔW)ᵀ) and the penalty ½ tr(ΔW' H ΔW'ᵀ). The sum
of both, the penalty weighted by μ, is least at ΔW' = ΔW Pᵀ, where P has the values γ / (γ + μ): the gate itself, with
λ = μ, sharpness 1 and no floor. So the update keeps its rank, and only A changes.

In the gate's coordinates direction i of the rows has an energy eᵢ, and after shrinking the penalty is Σ sᵢ² eᵢ, summed
over directions and layers. `strength_for` inverts that: which μ leaves a given penalty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from folora_q.core.gate import RANK_JITTER, SpectralGate
from folora_q.core.spectrum import generalized_eigenproblem

# Bisection in log μ: from no shrinking to none left, to 1e-3 of a power of ten.
LEAST, MOST, STEPS = -12.0, 12.0, 16


@dataclass(frozen=True)
class Energies:
    """The penalty of an update by direction, over all layers.

    Attributes:
        quotients: γ of every direction, (n,) float64.
        penalties: its share of tr(ΔW H ΔWᵀ), (n,) float64, in one unit for all layers.
    """

    quotients: Tensor
    penalties: Tensor

    @property
    def penalty(self) -> float:
        """The penalty of the complete update."""
        return float(self.penalties.sum())

    def shrunk(self, strength: float) -> float:
        """Return the penalty that is left with a strength μ."""
        values = self.quotients / (self.quotients + strength) if strength else torch.ones_like(self.quotients)
        return float((values.square() * self.penalties).sum())

    def strength_for(self, penalty: float) -> float:
        """Return the least strength μ that leaves at most this penalty; 0 if the update has no more."""
        if penalty >= self.penalty:
            return 0.0
        low, high = LEAST, MOST
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.shrunk(10**middle) <= penalty else (middle, high)
        return 10**high


def together(parts: Iterable[Energies]) -> Energies:
    """Return the energies of several layers as one."""
    parts = list(parts)
    return Energies(torch.cat([part.quotients for part in parts]), torch.cat([part.penalties for part in parts]))


def energies(gate: SpectralGate, a: Tensor, b: Tensor) -> Energies:
    """Return the penalty of ΔW = B A by the gate's directions, the complement as one direction.

    Args:
        a: (r, d). b: (o, r), times the adapter's scale.
    """
    rows = a.to(gate.basis)
    inside = (rows @ gate.basis).double().cpu()
    gram = (b.T @ b).double().cpu()  # tr(B X Bᵀ) = tr(BᵀB X)
    coordinates = inside @ gate.metric @ gate.vectors  # c = V⁻¹ a with V⁻¹ = VᵀH
    of_directions = ((gram @ coordinates) * coordinates).sum(0)
    outside = (rows @ rows.T).double().cpu() - inside @ inside.T
    of_complement = (gram * outside).sum() * (gate.penalty_tail + gate.ridge)
    penalties = torch.cat([of_directions, of_complement[None]]).clamp_min(0) * gate.unit
    complement = torch.tensor([gate.complement_quotient], dtype=torch.float64)
    return Energies(torch.cat([gate.quotients, complement]), penalties)


def shrinking(gate: SpectralGate) -> SpectralGate:
    """Return a gate with the same quotients, whose `with_lambda(μ).apply(A)` shrinks A."""
    return SpectralGate.from_state_dict(gate.state_dict() | {"sharpness": 1.0, "floor": 0.0})


class FrozenRows:
    """Layers with a frozen A, in which shrinking changes B alone: the same trade-off within the space of A's rows.

    ΔW' = B K A is best with K = U (U + μH)⁻¹, where H = A (Σp + τI) Aᵀ and U = A (Σt + τ'I) Aᵀ are r x r.

    Args:
        layers: (A, B, gate, scale) of each layer; all A have the same rank.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor, SpectralGate, float]]) -> None:
        self.factors = [b for _, b, _, _ in layers]
        sides = [_rank_forms(a, gate, scale) for a, _, gate, scale in layers]
        self.metric, utility = (torch.stack(side) for side in zip(*sides, strict=True))
        self.quotients, self.vectors = generalized_eigenproblem(utility, self.metric)
        self._coordinates = self.metric @ self.vectors  # c = V⁻¹ a with V⁻¹ = VᵀH

    def energies(self) -> Energies:
        """Return the penalty of the present B by direction; one synchronization with the device."""
        grams = torch.stack([b.detach().T @ b.detach() for b in self.factors]).double().cpu()
        penalties = ((grams @ self._coordinates) * self._coordinates).sum(-2).clamp_min(0)
        return Energies(self.quotients.flatten(), penalties.flatten())

    def shrink(self, strength: float) -> None:
        """Shrink every B with a strength μ."""
        values = self.quotients / (self.quotients + strength)
        kept = (self._coordinates * values[:, None, :]) @ self.vectors.mT
        for b, k in zip(self.factors, kept, strict=True):
            b.data.copy_(b.detach() @ k.to(b))


def _rank_forms(a: Tensor, gate: SpectralGate, scale: float) -> tuple[Tensor, Tensor]:
    """Return H and U of a layer, (r, r) float64, in the unit that all layers share."""
    a = a.detach()
    gram = (a @ a.T).double().cpu()
    penalty, utility = gate.forms(a.to(gate.basis.device))
    unit = gate.unit * scale**2
    penalty = (penalty + gate.ridge * gram) * unit
    jitter = RANK_JITTER * penalty.diagonal().mean() + torch.finfo(torch.float64).tiny  # rows of A may be zero
    identity = torch.eye(len(a), dtype=torch.float64)
    return penalty + jitter * identity, (utility + gate.utility_ridge * gram) * unit + jitter * identity
