"""The gate: which directions of an update pass, by task utility per unit of forgetting penalty.

    Σt v = γ H v        H = Σp + τI        quotient γ(v) = vᵀΣt v / vᵀH v
    s(γ) = max(γᵖ / (γᵖ + λᵖ), s_min)      gate constant λ, sharpness p, floor s_min
    P = V diag(s) V⁻¹                      oblique: it is not V diag(s) Vᵀ

Inside the joint basis P₀ (d, m) the problem is m x m. Outside it both covariances are isotropic, so the complement has
one quotient and one value, and P = s_c I + P₀ M P₀ᵀ with a small M: two thin products per step.

Source: FoLoRA (arXiv 2606.00132) section 3 for quotient and gate; docs/method.md, section 6, for the sketched form.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from folora_q.core.spectrum import LowRankCovariance, generalized_eigenproblem, joint_basis

# Added to the r x r penalty, relative to its mean diagonal: parallel rows of A would make it singular.
RANK_JITTER = 1e-6


class SpectralGate:
    """The operator P for the input space of one layer, and the gate for the rows of B from the same quotient.

    Built with `from_covariances` or `from_state_dict`. Covariances are divided by their own mean variance: γ = 1
    means "as present in the task as in model-generated text".

    Attributes:
        basis: P₀, (d, m), in the gate's dtype, on the gate's device.
        quotients: γ, (m,) float64 descending.
        complement_quotient: γ of every direction outside the basis.
        values: s(γ), (m,) float64, and complement_value for the complement.
        unit: the mean variance by which Σp was divided; it makes the penalties of several layers comparable.
    """

    def __init__(
        self,
        basis: Tensor,
        penalty_gram: Tensor,
        utility_gram: Tensor,
        penalty_tail: float,
        utility_tail: float,
        *,
        ridge: float,
        utility_ridge: float,
        gate_lambda: float,
        floor: float,
        sharpness: float,
        unit: float = 1.0,
    ) -> None:
        if ridge <= 0 or utility_ridge < 0:
            raise ValueError(f"need ridge > 0 and utility_ridge >= 0, got {ridge} and {utility_ridge}")
        if gate_lambda < 0 or not 0 <= floor <= 1 or sharpness <= 0:
            raise ValueError(
                f"need gate_lambda >= 0, 0 <= floor <= 1, sharpness > 0, got {gate_lambda}, {floor}, {sharpness}"
            )
        self.basis = basis
        self.penalty_gram, self.utility_gram = penalty_gram.double(), utility_gram.double()
        self.penalty_tail, self.utility_tail = float(penalty_tail), float(utility_tail)
        self.ridge, self.utility_ridge = float(ridge), float(utility_ridge)
        self.gate_lambda, self.floor, self.sharpness = float(gate_lambda), float(floor), float(sharpness)
        self.unit = float(unit)

        identity = torch.eye(self.penalty_gram.shape[0], dtype=torch.float64)
        self.quotients, self.vectors = generalized_eigenproblem(
            self.utility_gram + utility_ridge * identity, self.metric
        )
        # The complement of a square basis is empty; a quotient of 1 there is never used.
        self.complement_size = basis.shape[0] - basis.shape[1]
        self.complement_quotient = (self.utility_tail + utility_ridge) / (self.penalty_tail + ridge)
        self._set_values()

    @classmethod
    def from_covariances(
        cls,
        penalty: LowRankCovariance,
        utility: LowRankCovariance,
        ridge: float = 0.1,
        utility_ridge: float = 0.0,
        gate_lambda: float = 1.0,
        floor: float = 0.0,
        sharpness: float = 1.0,
        basis: Tensor | None = None,
        grams: tuple[Tensor, Tensor] | None = None,
        one_unit: bool = False,
    ) -> SpectralGate:
        """Solve for the quotients of two covariances of equal width.

        Args:
            penalty: Σp, of text on which the model should not change.
            utility: Σt, of the task's text.
            ridge, utility_ridge: τ, relative to each covariance's mean variance.
            gate_lambda: λ >= 0; at quotient λ half of the step passes. With 0 every useful direction passes.
            floor: s_min in [0, 1].
            sharpness: p > 0.
            basis: P₀ (d, m), orthonormal; by default `joint_basis(penalty, utility)`.
            grams: exact (P₀ᵀΣpP₀, P₀ᵀΣtP₀), each (m, m), from a second pass over the text; by default those of the
                sketches.
            one_unit: both covariances have the same unit (Fisher-weighted ones do, in all layers), so both are divided
                by the mean variance of Σp.

        Raises:
            ValueError: the widths differ, a parameter is out of range, or the grams are not (m, m).
        """
        if penalty.dim != utility.dim:
            raise ValueError(f"the covariances differ in width: {penalty.dim} and {utility.dim}")
        basis = joint_basis(penalty, utility) if basis is None else basis
        m = basis.shape[1]
        sp, st = grams if grams is not None else (penalty.project(basis), utility.project(basis))
        if sp.shape != (m, m) or st.shape != (m, m):
            raise ValueError(f"the grams must be ({m}, {m}), got {tuple(sp.shape)} and {tuple(st.shape)}")
        of_penalty, of_utility = normalizers(penalty, utility, one_unit)
        return cls(
            basis.float(),
            sp.double() / of_penalty,
            st.double() / of_utility,
            _tail(sp, penalty) / of_penalty,
            _tail(st, utility) / of_utility,
            ridge=ridge,
            utility_ridge=utility_ridge * (utility.mean_variance or 1.0) / of_utility,
            gate_lambda=gate_lambda,
            floor=floor,
            sharpness=sharpness,
            unit=of_penalty,
        )

    @property
    def metric(self) -> Tensor:
        """H inside the basis, (m, m)."""
        return self.penalty_gram + self.ridge * torch.eye(len(self.penalty_gram), dtype=torch.float64)

    def _set_values(self) -> None:
        self.values = self.gate_of(self.quotients)
        self.complement_value = float(self.gate_of(torch.tensor(self.complement_quotient, dtype=torch.float64)))
        # M = V diag(s - s_c) V⁻¹ inside the basis, with V⁻¹ = VᵀH; zero, exactly, when all values are equal.
        core = (self.vectors * (self.values - self.complement_value)) @ (self.vectors.T @ self.metric)
        self.core = core.to(self.basis)

    def gate_of(self, quotients: Tensor) -> Tensor:
        """Return s(γ), computed from γ/λ so that a large sharpness neither overflows nor gives ∞/∞."""
        if self.gate_lambda == 0:
            return torch.ones_like(quotients)
        odds = (quotients / self.gate_lambda).pow(self.sharpness)
        return (1 - 1 / (1 + odds)).clamp_min(self.floor)

    def truncated(self, rank: int) -> SpectralGate:
        """Return the gate in the space of its `rank` largest quotients, (d, 2 rank): their V and HV.

        They stay solutions there, and P acts on them as before; the rest of the basis joins the complement.
        """
        if 2 * rank >= self.basis.shape[1]:
            return self
        leading = self.vectors[:, :rank]
        inside = torch.linalg.qr(torch.cat([leading, self.metric @ leading], 1)).Q
        state = self.state_dict() | {"basis": (self.basis.double().cpu() @ inside).to(self.basis)}
        for side in ("penalty", "utility"):
            gram = state[f"{side}_gram"]
            narrow = state[f"{side}_gram"] = inside.T @ gram @ inside
            dropped = float(gram.diagonal().sum() - narrow.diagonal().sum())
            outside = self.basis.shape[0] - narrow.shape[0]
            state[f"{side}_tail"] = (state[f"{side}_tail"] * self.complement_size + dropped) / outside
        return type(self)(**state)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> SpectralGate:
        """Return the gate with P₀ and M on a device and in a dtype; bfloat16 halves their memory."""
        moved = copy.copy(self)
        moved.basis = self.basis.to(device=device, dtype=dtype)
        moved.core = self.core.to(device=device, dtype=dtype)
        return moved

    def with_lambda(self, gate_lambda: float) -> SpectralGate:
        """Return a gate with the same quotients and another λ; nothing is solved again."""
        if gate_lambda < 0:
            raise ValueError(f"need gate_lambda >= 0, got {gate_lambda}")
        changed = copy.copy(self)
        changed.gate_lambda = float(gate_lambda)
        changed._set_values()
        return changed

    def correction(self, rows: Tensor) -> Tensor:
        """Return rows @ (P - I)ᵀ, (r, d): the gate's change to a step; exactly zero if every value is 1."""
        inside = (rows.to(self.basis) @ self.basis) @ self.core.T @ self.basis.T
        return (self.complement_value - 1) * rows + inside.to(rows)

    def apply(self, rows: Tensor) -> Tensor:
        """Return rows @ Pᵀ, (r, d) -> (r, d), in the rows' dtype."""
        return rows + self.correction(rows)

    def dense(self) -> Tensor:
        """Return P as a (d, d) float64 matrix, for tests."""
        basis, core = self.basis.double().cpu(), self.core.double().cpu()
        identity = torch.eye(basis.shape[0], dtype=torch.float64)
        return self.complement_value * identity + basis @ core @ basis.T

    def leading_rows(self, count: int) -> Tensor:
        """Return orthonormal rows, (at most count, d) float32, that span the directions with the largest values.

        Their values exceed that of the complement, so there may be fewer than `count`: none if all values are equal.
        """
        order = self.values.sort(descending=True, stable=True).indices
        least = self.complement_value if self.complement_size else self.values.min()
        order = order[self.values[order] > least]
        vectors = self.basis.double().cpu() @ self.vectors[:, order[:count]]
        return torch.linalg.qr(vectors).Q.T.to(self.basis.device, torch.float32)

    def gated_rows(self, count: int) -> Tensor:
        """Return the leading directions, each scaled to its share of a step, (at most count, d) float32.

        Row i is √γᵢ vᵢ / √unit. As rows of a frozen A they make Adam's step of B, whose entries have equal size, a step
        in spectral coordinates (docs/method.md, section 3) with direction i gated by √γᵢ: of all shares this gives the
        most task gain Σ sᵢ √uᵢ for a penalty Σ sᵢ² pᵢ, within a layer and, thanks to the unit, across layers.
        """
        shares = (self.quotients[:count] / self.unit).sqrt()
        rows = self.basis.double().cpu() @ (self.vectors[:, :count] * shares)
        return rows.T.to(self.basis.device, torch.float32)

    def penalty(self, rows: Tensor) -> Tensor:
        """Return tr(rows Σp rowsᵀ), a float64 scalar, with the normalized covariance and without the ridge."""
        return self._trace(rows, self.penalty_gram, self.penalty_tail)

    def utility(self, rows: Tensor) -> Tensor:
        """Return tr(rows Σt rowsᵀ), a float64 scalar, with the normalized covariance and without the ridge."""
        return self._trace(rows, self.utility_gram, self.utility_tail)

    def forms(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return (rows Σp rowsᵀ, rows Σt rowsᵀ), both (r, r) float64 on the CPU, normalized and without the ridges."""
        inside = (rows.to(self.basis) @ self.basis).double().cpu()
        outside = (rows @ rows.T).double().cpu() - inside @ inside.T
        return (
            inside @ self.penalty_gram @ inside.T + self.penalty_tail * outside,
            inside @ self.utility_gram @ inside.T + self.utility_tail * outside,
        )

    def _trace(self, rows: Tensor, gram: Tensor, tail: float) -> Tensor:
        """Return tr(rows Σ rowsᵀ) for Σ = P₀ gram P₀ᵀ + tail (I - P₀P₀ᵀ), without the (r, r) product."""
        inside = (rows.to(self.basis) @ self.basis).double().cpu()
        outside = rows.square().sum(dtype=torch.float64).cpu() - inside.square().sum()
        return ((inside @ gram) * inside).sum() + tail * outside

    def rank_gate(self, a: Tensor) -> Tensor:
        """Return the gate for steps of B, given the present A.

        A step dB has the penalty tr(dB (A Σp Aᵀ) dBᵀ): the d-dimensional problem restricted to A's rows. A changes
        during training, so the result becomes outdated; callers refresh it (`GatedOptimizer(refresh_every=...)`).

        Args:
            a: (r, d), the adapter's down-projection, any floating type.

        Returns:
            (r, r) in A's dtype and on its device; multiply a step of B, (o, r), by it from the right. The identity if
            every quotient is far above λ.

        Raises:
            ValueError: A holds a NaN or an infinity.

        Source: docs/method.md, section 4, place 3.
        """
        a = a.detach()
        if not bool(torch.isfinite(a).all()):
            raise ValueError("A holds a NaN or an infinity")
        gram = (a @ a.T).double().cpu()
        penalty, utility = self.forms(a)
        return rank_gates(penalty + self.ridge * gram, utility + self.utility_ridge * gram, self.gate_of).to(a)

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors and numbers that define the gate, for safetensors or `weights_only` loading."""
        return {
            "basis": self.basis,
            "penalty_gram": self.penalty_gram,
            "utility_gram": self.utility_gram,
            "penalty_tail": self.penalty_tail,
            "utility_tail": self.utility_tail,
            "ridge": self.ridge,
            "utility_ridge": self.utility_ridge,
            "gate_lambda": self.gate_lambda,
            "floor": self.floor,
            "sharpness": self.sharpness,
            "unit": self.unit,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> SpectralGate:
        """Rebuild a gate; bit for bit the same on the same machine."""
        return cls(**state)


def gates_on(gates: Mapping[str, SpectralGate], device: torch.device | str) -> dict[str, SpectralGate]:
    """Return gates by layer on a device; layers that shared a gate share it again."""
    moved = {id(gate): gate.to(device) for gate in gates.values()}
    return {layer: moved[id(gate)] for layer, gate in gates.items()}


def rank_gates(penalty: Tensor, utility: Tensor, gate_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return K = V diag(s) V⁻¹, transposed so that it multiplies steps of B from the right, (..., r, r) float64.

    Args:
        penalty, utility: A (Σp + τI) Aᵀ and A (Σt + τI) Aᵀ.
        gate_of: s(γ) of quotients (..., r).
    """
    identity = torch.eye(penalty.shape[-1], dtype=torch.float64)
    jitter = RANK_JITTER * penalty.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(torch.float64).tiny
    penalty = penalty + jitter[..., None, None] * identity
    quotients, vectors = generalized_eigenproblem(utility, penalty)
    # A step's row b has coordinates VᵀHb, so the gated row is bᵀ (V diag(s) VᵀH)ᵀ; around I, exact where s = 1.
    change = penalty @ (vectors * (gate_of(quotients) - 1)[..., None, :]) @ vectors.mT
    return identity + change


def normalizers(penalty: LowRankCovariance, utility: LowRankCovariance, one_unit: bool = False) -> tuple[float, float]:
    """Return the numbers by which a gate divides Σp and Σt; see `SpectralGate.from_covariances`."""
    return penalty.mean_variance or 1.0, (penalty if one_unit else utility).mean_variance or 1.0


def _tail(gram: Tensor, covariance: LowRankCovariance) -> float:
    """Return the mean variance outside the basis: the trace minus that of the gram."""
    outside = covariance.dim - gram.shape[0]
    if outside == 0:
        return covariance.mean_variance
    return max(covariance.trace - float(gram.diagonal().sum()), 0.0) / outside
