"""Refine a basis towards the directions of largest quotient: one step of a block eigensolver.

    r = Σt v - γ H v          the residual in the full space of a solution (γ, v) inside the basis P
    P' = orth[P, r]

The largest quotients are where Σp is small, which no sketch of Σp or of Σt shows. Each step reads both texts once, for
ΣpP and ΣtP. A preconditioner (the sketch's H) would change nothing: all that it contains about H is in P.

Source: Davidson's method in blocks (J. Comput. Phys. 17, 1975); docs/method.md, section 6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from folora_q.core.gate import SpectralGate
from folora_q.core.spectrum import SPANNED_TOLERANCE


def refined_basis(gate: SpectralGate, images: tuple[Tensor, Tensor], rank: int) -> Tensor:
    """Return [P, new directions], (d, m + at most rank) float64, orthonormal.

    Args:
        gate: solved in P with the exact grams.
        images: (ΣpP, ΣtP), each (d, m), in the gate's units (`normalizers`).
        rank: how many of the largest quotients to improve.
    """
    basis, leading = gate.basis.double().cpu(), gate.vectors[:, :rank]
    vectors = basis @ leading
    penalty, utility = (image.double() for image in images)
    useful = utility @ leading + gate.utility_ridge * vectors
    costly = penalty @ leading + gate.ridge * vectors
    residual = useful - costly * gate.quotients[:rank]
    residual = residual / residual.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    for _ in range(2):  # twice is enough: orthogonal to rounding
        residual = residual - basis @ (basis.T @ residual)
    left, singular, _ = torch.linalg.svd(residual, full_matrices=False)
    return torch.cat([basis, left[:, singular > SPANNED_TOLERANCE]], dim=1)
