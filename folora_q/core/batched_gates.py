"""Apply and solve gates of equal shape together: a model has hundreds, and kernel launches would dominate the time.

Shapes: n gates, s adapters that share each, r rows of an A, d input features, m directions of a basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from folora_q.core.gate import SpectralGate, rank_gates


class GateStack:
    """n gates of equal shape, each for s adapters of rank r. Their bases become views of one tensor.

    Args:
        gates: with bases (d, m) on one device and in one dtype.
        indices: of all n s adapters, gate by gate.
    """

    def __init__(self, gates: Sequence[SpectralGate], indices: Sequence[int]) -> None:
        self.gates, self.indices = list(gates), list(indices)
        self.basis = _pooled(gates, "basis")  # (n, d, m)
        self.core = _pooled(gates, "core")  # (n, m, m)
        self.grams = [_pooled(gates, name)[:, None] for name in ("penalty_gram", "utility_gram")]  # (n, 1, m, m)
        self.tails, self.ridges = (
            torch.tensor([[getattr(gate, name) for gate in gates] for name in names], dtype=torch.float64)[
                ..., *[None] * 3
            ]
            for names in (("penalty_tail", "utility_tail"), ("ridge", "utility_ridge"))
        )  # (2, n, 1, 1, 1)
        shift = [gate.complement_value - 1 for gate in gates]
        self.shift = torch.tensor(shift, device=self.basis.device, dtype=torch.float32)[:, None, None]

    def correction(self, steps: Tensor) -> Tensor:
        """Return steps @ (P - I)ᵀ of all adapters, (n s, r, d) in the order of `indices`: `SpectralGate.correction`."""
        rows = steps.view(len(self.gates), -1, steps.shape[-1])  # (n, s r, d)
        inside = rows.to(self.basis) @ self.basis @ self.core.mT @ self.basis.mT
        return (self.shift.to(rows) * rows + inside.to(rows)).view_as(steps)

    def rank_gates(self, a: Tensor) -> Tensor:
        """Return (n s, r, r) for the present A's, (n s, r, d): `SpectralGate.rank_gate` of each adapter.

        Raises:
            ValueError: an A holds a NaN or an infinity.
        """
        if not bool(torch.isfinite(a).all()):
            raise ValueError("A holds a NaN or an infinity")
        a = a.view(len(self.gates), -1, *a.shape[1:])  # (n, s, r, d)
        inside = (a.to(self.basis) @ self.basis[:, None]).double().cpu()
        gram = (a @ a.mT).double().cpu()
        outside = gram - inside @ inside.mT
        penalty, utility = (
            inside @ grams @ inside.mT + tail * outside + ridge * gram
            for grams, tail, ridge in zip(self.grams, self.tails, self.ridges, strict=True)
        )
        solved = rank_gates(penalty, utility, lambda quotients: torch.stack(
            [gate.gate_of(row) for gate, row in zip(self.gates, quotients, strict=True)]))  # fmt: skip
        return solved.flatten(0, 1).to(a)


def _pooled(gates: Sequence[SpectralGate], name: str) -> Tensor:
    """Stack a tensor of every gate, (n, ...), and make the gates' own tensors views of it."""
    pooled = torch.stack([getattr(gate, name) for gate in gates])
    for gate, part in zip(gates, pooled, strict=True):
        setattr(gate, name, part)
    return pooled


def stacks(gates: Sequence[SpectralGate], ranks: Sequence[int]) -> list[GateStack]:
    """Group the gates of a model's adapters into as few stacks as their shapes allow.

    Args:
        gates: of every adapter; adapters that share a gate have the same object.
        ranks: r of every adapter.
    """
    members: dict[tuple[int, int], list[int]] = {}
    for index, (gate, rank) in enumerate(zip(gates, ranks, strict=True)):
        members.setdefault((id(gate), rank), []).append(index)
    groups: dict[tuple, list[list[int]]] = {}
    for indices in members.values():
        gate = gates[indices[0]]
        key = (*gate.basis.shape, len(indices), ranks[indices[0]], gate.basis.device, gate.basis.dtype)
        groups.setdefault(key, []).append(indices)
    return [GateStack([gates[indices[0]] for indices in group], sum(group, [])) for group in groups.values()]
