"""Low-rank covariances with an isotropic tail, and the generalized eigenproblem in their joint subspace.

Letters (the paper's, arXiv 2606.00132): Σp penalty covariance, Σt utility covariance, H = Σp + τI with ridge τ,
Σt v = γ H v with quotient γ. Ours: P₀ (d x m) the joint basis, S = P₀ᵀΣP₀ a covariance inside it, tail σ outside it.
All matrices here are small and computed in float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Directions of Σt's basis that Σp's basis already spans up to this fraction are not added again.
SPANNED_TOLERANCE = 1e-6
# Added to the diagonal, relative to its mean, if the solver does not converge; float64 resolves 1e-16.
NUDGE = 1e-13


@dataclass(frozen=True)
class LowRankCovariance:
    """Σ = U diag(λ) Uᵀ + tail (I - UUᵀ): the leading directions, and the rest of the trace spread evenly.

    Attributes:
        basis: U, (dim, k) float64, orthonormal columns.
        eigenvalues: λ, (k,) float64, descending, in units of the activations' variance.
        tail: the variance in each direction outside the basis.
        trace: tr Σ, exact (summed, not sketched).
        count: the number of tokens seen.
    """

    basis: Tensor
    eigenvalues: Tensor
    tail: float
    trace: float
    count: int

    @property
    def dim(self) -> int:
        return self.basis.shape[0]

    @property
    def mean_variance(self) -> float:
        """tr(Σ) / d, the unit of ridges and quotients."""
        return self.trace / self.dim

    @property
    def captured(self) -> float:
        """The share of the trace inside the basis, between 0 and 1."""
        return float(self.eigenvalues.sum()) / self.trace if self.trace > 0 else 1.0

    def project(self, basis: Tensor) -> Tensor:
        """Return PᵀΣP for an orthonormal P (dim, m), (m, m) float64."""
        basis = basis.double()
        inner = self.basis.T @ basis  # UᵀP, (k, m)
        return (inner.T * (self.eigenvalues - self.tail)) @ inner + self.tail * (basis.T @ basis)

    def dense(self) -> Tensor:
        """Return Σ as a (dim, dim) float64 matrix, for tests and small models."""
        return self.project(torch.eye(self.dim, dtype=torch.float64))


def joint_basis(penalty: LowRankCovariance, utility: LowRankCovariance) -> Tensor:
    """Return P₀ = orth[Up, Ut], (d, m) float64 with m <= kp + kt.

    Up's directions come first and are always kept: otherwise the most protected directions would be in the complement
    and be treated as average ones.
    """
    up, ut = penalty.basis, utility.basis
    residual = ut - up @ (up.T @ ut)
    residual = residual - up @ (up.T @ residual)  # twice is enough: orthogonal to rounding
    left, singular, _ = torch.linalg.svd(residual, full_matrices=False)
    return torch.cat([up, left[:, singular > SPANNED_TOLERANCE]], dim=1)


def generalized_eigenproblem(utility: Tensor, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """Solve S_t v = γ H v for symmetric S_t and positive definite H, both (m, m).

    Returns:
        (γ, V): quotients (m,) descending and V (m, m) with VᵀHV = I and VᵀS_tV = diag(γ), float64.

    Raises:
        ValueError: H is not positive definite; a larger ridge makes it so.
        LinAlgError: the solver did not converge, even with a perturbed matrix.

    Source: FoLoRA section 3, V = H^(-1/2) R. The Cholesky factor is used instead of the symmetric root: V is the same
    up to the signs of its columns, and nothing is inverted.
    """
    utility, penalty = utility.double(), penalty.double()
    factor, failed = torch.linalg.cholesky_ex((penalty + penalty.mT) / 2)
    if bool(failed.any()):
        raise ValueError("the penalty covariance is not positive definite; use a larger ridge")
    half = torch.linalg.solve_triangular(factor, (utility + utility.mT) / 2, upper=False)
    whitened = torch.linalg.solve_triangular(factor, half.mT, upper=False)  # L⁻¹ S_t L⁻ᵀ
    quotients, rotation = _eigh((whitened + whitened.mT) / 2)
    vectors = torch.linalg.solve_triangular(factor.mT, rotation, upper=True)
    return quotients.flip(-1).clamp_min(0), vectors.flip(-1)


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Call torch.linalg.eigh; LAPACK's divide and conquer fails for a few matrices, but not for perturbed ones."""
    try:
        return torch.linalg.eigh(symmetric)
    except torch.linalg.LinAlgError:
        mean = symmetric.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None, None]
        return torch.linalg.eigh(symmetric + NUDGE * mean * torch.eye(symmetric.shape[-1], dtype=symmetric.dtype))
