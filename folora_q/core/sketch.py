"""One-pass sketch of an activation covariance, and its exact projection onto a small basis.

Shapes: n tokens, d input features, l sketch columns (rank + oversampling), m columns of a basis.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from folora_q.core.spectrum import LowRankCovariance

# All layers of a width share one test matrix: in a 7B model 128 copies of it would be as large as the sketches.
_TEST_MATRICES: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()
# Rows converted at a time: a batch in float32, and in float64 for its energy, would be larger than the sketches.
ROWS = 512
NOT_FINITE = "the activations hold a NaN or an infinity"


class TokenSums:
    """The count and the energy Σᵢ ||xᵢ||² of tokens, with further sums that a subclass adds up in `_add`.

    Args:
        dim: d, the width of the activations.
        sums: a tensor with the device and the dtype of the sums.
    """

    def __init__(self, dim: int, sums: Tensor) -> None:
        self.dim, self._sums = dim, sums
        self.energy_sum: Tensor = torch.zeros((), dtype=torch.float64, device=sums.device)
        self.count = 0

    @property
    def energy(self) -> float:
        """Σᵢ ||xᵢ||²; not finite if an unchecked update held a NaN or an infinity."""
        return self.energy_sum.item()

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None, check: bool = True) -> None:
        """Add tokens.

        Args:
            x: (..., d) activations of any floating type.
            mask: (...,) bool; rows where it is False are ignored, whatever they contain.
            check: look for a NaN or an infinity first, for which the host waits for the device. Otherwise `energy`
                shows it afterwards.

        Raises:
            ValueError: x is not d wide, or `check` found a NaN or an infinity; nothing is added.
        """
        rows = _unmasked(x, mask, self.dim)
        energy = _energy(rows, self._sums.dtype)
        if check and not energy.item() < float("inf"):
            raise ValueError(NOT_FINITE)
        self.energy_sum += energy
        with _exact_float32(rows.device.type):
            for part in rows.split(ROWS):
                self._add(part.to(self._sums))
        self.count += rows.shape[0]

    def _add(self, part: Tensor) -> None:
        raise NotImplementedError

    def sums(self) -> list[Tensor]:
        """Return all tensors that are sums over tokens: those of several processes can be added up."""
        return [self.energy_sum, self._sums]


class CovarianceSketch(TokenSums):
    """A randomized Nyström sketch of Σ = E[x xᵀ], updated batch by batch.

    It keeps Y = Σᵢ xᵢ (xᵢᵀΩ) for a fixed orthonormal test matrix Ω (d, l), the energy Σᵢ ||xᵢ||², and the count: d x l
    numbers instead of d x d. An update is two matrix products, and the sum of the sketches of two batches or two
    processes is the sketch of all their tokens. With l >= d it is exact.

    Args:
        dim: d, the width of the activations.
        rank: k, the number of directions that `covariance` returns (at most d).
        oversampling: columns beyond the rank, which make the leading directions accurate.
        seed: of the test matrix; only sketches with the same seed can be merged.
        dtype: of the sums. Inputs of any floating type are converted; float32 resolves eigenvalues down to about
            1e-7 of the largest, which matters where a few channels are 10³ times the others.

    Source: Tropp et al. 2017, arXiv 1706.05736; docs/method.md, section 6.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        oversampling: int = 16,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if dim < 1 or rank < 1 or oversampling < 0:
            raise ValueError(f"need dim >= 1, rank >= 1, oversampling >= 0, got {dim}, {rank}, {oversampling}")
        self.rank, self.seed = min(rank, dim), seed
        self.columns = min(rank + oversampling, dim)
        self.test_matrix = _test_matrix(dim, self.columns, seed, torch.device(device), dtype)
        self.product = torch.zeros(dim, self.columns, device=device, dtype=dtype)  # Y
        super().__init__(dim, self.product)

    def _add(self, part: Tensor) -> None:
        self.product.addmm_(part.T, part @ self.test_matrix)

    def merge(self, other: CovarianceSketch) -> None:
        """Add another sketch's tokens to this one.

        Raises:
            ValueError: the two differ in dim, rank, oversampling or seed.
        """
        mine, theirs = ({"dim": s.dim, "rank": s.rank, "columns": s.columns, "seed": s.seed} for s in (self, other))
        if mine != theirs:
            raise ValueError(f"cannot merge a sketch of {theirs} into one of {mine}")
        self.product += other.product.to(self.product)
        self.energy_sum += other.energy_sum.to(self.energy_sum)
        self.count += other.count

    def covariance(self) -> LowRankCovariance:
        """Return the rank-k approximation of the mean E[x xᵀ], with the rest of the trace as an isotropic tail.

        Solved in float64 on the CPU, with a shift against rounding (Tropp et al. 2017, Algorithm 3): Y_ν = Y + νΩ,
        ΩᵀY_ν = LLᵀ, F = Y_ν L⁻ᵀ = U S Rᵀ, λ = S² - ν.

        Raises:
            ValueError: no token has been seen.
        """
        if self.count == 0:
            raise ValueError("a covariance needs at least one token, the sketch has seen none")
        omega = self.test_matrix.double().cpu()
        product = self.product.double().cpu() / self.count
        trace = self.energy / self.count
        basis, eigenvalues = _nystrom(product, omega, torch.finfo(self.product.dtype).eps)
        basis, eigenvalues = basis[:, : self.rank].clone(), eigenvalues[: self.rank]  # a view would keep all l columns
        outside = self.dim - self.rank
        tail = max((trace - float(eigenvalues.sum())) / outside, 0.0) if outside else 0.0
        return LowRankCovariance(basis, eigenvalues, tail, trace, self.count)


class ProjectedCovariance(TokenSums):
    """The exact S = P₀ᵀΣP₀ (m, m) in a given orthonormal basis P₀ (d, m), updated batch by batch, and optionally ΣP₀.

    S makes every reported quotient the true quotient of its direction (Rayleigh-Ritz; docs/method.md, section 6). ΣP₀
    (d, m) shows how far each is from a solution of the full problem (`refined_basis`).
    """

    def __init__(
        self,
        basis: Tensor,
        with_image: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.basis = basis.to(device=device, dtype=dtype)
        self.image = torch.zeros_like(self.basis) if with_image else None
        self.gram = torch.zeros(basis.shape[1], basis.shape[1], device=device, dtype=dtype)
        super().__init__(basis.shape[0], self.gram)

    def _add(self, part: Tensor) -> None:
        coordinates = part @ self.basis
        self.gram.addmm_(coordinates.T, coordinates)
        if self.image is not None:
            self.image.addmm_(part.T, coordinates)

    def sums(self) -> list[Tensor]:
        return [*super().sums(), *([self.image] if self.image is not None else [])]

    def mean(self) -> Tensor:
        """Return S = P₀ᵀ E[x xᵀ] P₀, (m, m) float64 on the CPU."""
        if self.count == 0:
            raise ValueError("a covariance needs at least one token, the projection has seen none")
        return self.gram.double().cpu() / self.count

    def mean_image(self) -> Tensor:
        """Return E[x xᵀ] P₀, (d, m) on the CPU."""
        if self.count == 0 or self.image is None:
            raise ValueError("the image was not collected: set with_image, and add tokens")
        return (self.image / self.count).cpu()


def _unmasked(x: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Return the rows of x that count, (n, d), without conversion."""
    if x.shape[-1] != dim:
        raise ValueError(f"expected activations of width {dim}, got shape {tuple(x.shape)}")
    rows = x.reshape(-1, dim)
    return rows if mask is None else rows[mask.reshape(-1).to(rows.device)]


def _energy(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Σ||x||² in float64, of the values in the accumulator's dtype; on the device of the rows.

    The sum overflows if any value is NaN, infinite or far too large, so one reduction detects them all. Norms of rows
    are computed in that dtype, which is twenty times as fast as float64 on a CPU.
    """
    norms = [torch.linalg.vector_norm(part.to(dtype), dim=-1) for part in rows.split(ROWS)]
    return torch.cat(norms).double().square().sum()


def _test_matrix(dim: int, columns: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return Ω (dim, columns): random orthonormal columns, the same on every machine for a seed."""
    key = (dim, columns, seed, device, dtype)
    omega = _TEST_MATRICES.get(key)
    if omega is None:
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(dim, columns, generator=generator, dtype=torch.float64)
        omega = torch.linalg.qr(gaussian).Q.to(device=device, dtype=dtype)
        _TEST_MATRICES[key] = omega
    return omega


def _nystrom(product: Tensor, omega: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return eigenvectors (d, l) and eigenvalues (l,), descending, of Y (ΩᵀY)⁻¹ Yᵀ, stabilized by the shift ν."""
    shift = eps * float(torch.linalg.matrix_norm(product)) + torch.finfo(torch.float64).tiny
    while True:
        shifted = product + shift * omega
        core = omega.T @ shifted
        factor, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
        if not bool(failed):
            break
        shift *= 10  # rounding made the core indefinite; the shift is subtracted again below
    half = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T  # F = Y_ν L⁻ᵀ
    basis, singular, _ = torch.linalg.svd(half, full_matrices=False)
    return basis, (singular.square() - shift).clamp_min(0)


@contextmanager
def _exact_float32(device_type: str) -> Iterator[None]:
    """Compute float32 products in full precision: TF32 and bf16 keep 3 digits, too few for small eigenvalues."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
