"""Dense float64 references, written from the papers' formulas with numpy and scipy. Nothing of folora_q is imported."""

from __future__ import annotations

import numpy as np
from scipy.linalg import eigh

Array = np.ndarray


def covariance(x: Array) -> Array:
    """E[x xᵀ] of the rows of x, (n, d) -> (d, d)."""
    x = np.asarray(x, dtype=np.float64)
    return x.T @ x / len(x)


def normalized(sigma: Array) -> Array:
    """Divided by its mean variance."""
    return sigma / (np.trace(sigma) / len(sigma))


def quotients(penalty: Array, utility: Array, ridge: float, utility_ridge: float) -> tuple[Array, Array]:
    """γ (d,) descending and V (d, d) with VᵀHV = I, for normalized covariances with their ridges."""
    identity = np.eye(len(penalty))
    gamma, v = eigh(normalized(utility) + utility_ridge * identity, normalized(penalty) + ridge * identity)
    return gamma[::-1], v[:, ::-1]


def gate_values(gamma: Array, gate_lambda: float, floor: float = 0.0, sharpness: float = 1.0) -> Array:
    """s(γ) = max(γᵖ / (γᵖ + λᵖ), s_min)."""
    return np.maximum(gamma**sharpness / (gamma**sharpness + gate_lambda**sharpness), floor)


def gate_matrix(v: Array, values: Array) -> Array:
    """P = V diag(s) V⁻¹."""
    return v @ np.diag(values) @ np.linalg.inv(v)


def rank_gate_matrix(a: Array, penalty: Array, utility: Array, settings: dict[str, float]) -> Array:
    """The r x r gate that multiplies a step of B from the right: the same problem, restricted to the rows of A."""
    identity = np.eye(len(penalty))
    h = a @ (normalized(penalty) + settings["ridge"] * identity) @ a.T
    u = a @ (normalized(utility) + settings["utility_ridge"] * identity) @ a.T
    gamma, v = eigh(u, h)
    return gate_matrix(v, gate_values(gamma, settings["gate_lambda"], settings["floor"], settings["sharpness"])).T


def no_longer(steps: Array, gate: Array) -> Array:
    """steps @ gate, each row at most as long as it was."""
    gated = steps @ gate
    before, after = (np.linalg.norm(rows, axis=1, keepdims=True) for rows in (steps, gated))
    return gated * np.minimum(1.0, before / after)


class Adam:
    """Adam's direction m̂ / (√v̂ + ε), Algorithm 1 of arXiv 1412.6980."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        self.betas, self.eps = betas, eps
        self.m: Array | float = 0.0
        self.v: Array | float = 0.0
        self.t = 0

    def direction(self, gradient: Array) -> Array:
        one, two = self.betas
        self.t += 1
        self.m = one * self.m + (1 - one) * gradient
        self.v = two * self.v + (1 - two) * gradient**2
        return (self.m / (1 - one**self.t)) / (np.sqrt(self.v / (1 - two**self.t)) + self.eps)


class ComplementAdam:
    """Adam in the H-normalized coordinates Ḡ = G Q / √h of an even complement: no momentum, one second moment a row.

    Q, (d, c), is an orthonormal basis of the complement, h its penalty with the ridge and s its gate value.
    """

    def __init__(self, q: Array, h: float, value: float, lr: float, beta2: float = 0.999, eps: float = 1e-8) -> None:
        self.v_c, self.value, self.lr, self.beta2, self.eps = q / np.sqrt(h), value, lr, beta2, eps
        self.second: Array | float = 0.0
        self.t = 0

    def step(self, gradient: Array) -> Array:
        self.t += 1
        coordinates = gradient @ self.v_c
        self.second = self.beta2 * self.second + (1 - self.beta2) * (coordinates**2).mean(1, keepdims=True)
        scale = np.sqrt(self.second / (1 - self.beta2**self.t)) + self.eps
        return -self.lr * self.value * coordinates / scale @ self.v_c.T


class SpectralAdam:
    """FoLoRA's five lines for A: Ḡ = G V; m̄; v̄; ΔĀ = -η m̂ / (√v̂ + ε) diag(s̃); ΔA = ΔĀ Vᵀ, with decoupled decay."""

    def __init__(self, v: Array, values: Array, lr: float, weight_decay: float = 0.0) -> None:
        self.basis, self.values, self.lr, self.weight_decay = v, values, lr, weight_decay
        self.adam = Adam()

    def step(self, a: Array, gradient: Array) -> Array:
        gradient_bar = gradient @ self.basis
        step_bar = -self.lr * self.adam.direction(gradient_bar) * self.values
        return a * (1 - self.lr * self.weight_decay) + step_bar @ self.basis.T
