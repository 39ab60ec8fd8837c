"""The gate in its small form against the same gate written densely."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh

from folora_q.core import CovarianceSketch, LowRankCovariance, SpectralGate, joint_basis
from folora_q.core.spectrum import generalized_eigenproblem
from tests.core import dense

D = 24
SETTINGS = {"ridge": 0.1, "utility_ridge": 0.02, "gate_lambda": 1.5, "floor": 0.05, "sharpness": 1.0}
quick = settings(max_examples=25, deadline=None, derandomize=True)


def tokens(seed: int, d: int = D, n: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, d) @ frame.T


def covariance(seed: int, rank: int = 6, d: int = D, scale: float = 1.0) -> LowRankCovariance:
    sketch = CovarianceSketch(d, rank, oversampling=d, dtype=torch.float64)
    sketch.update(tokens(seed, d) * scale)
    return sketch.covariance()


def gate_of(seed: int = 0, rank: int = 6, **changes) -> SpectralGate:
    return SpectralGate.from_covariances(covariance(seed, rank), covariance(seed + 1, rank), **{**SETTINGS, **changes})


def dense_gate(seed: int = 0, rank: int = 6, **changes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """γ, V and P of the whole d x d problem of the same low-rank-plus-tail covariances."""
    s = {**SETTINGS, **changes}
    gamma, v = dense.quotients(
        covariance(seed, rank).dense().numpy(),
        covariance(seed + 1, rank).dense().numpy(),
        s["ridge"],
        s["utility_ridge"],
    )
    return gamma, v, dense.gate_matrix(v, dense.gate_values(gamma, s["gate_lambda"], s["floor"], s["sharpness"]))


def rows(count: int = 5, seed: int = 9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(
    seed=st.integers(0, 99),
    rank=st.sampled_from([1, 3, 6, 11, 12, 24]),
    gate_lambda=st.floats(0.01, 100),
    floor=st.sampled_from([0.0, 0.3]),
    sharpness=st.floats(0.5, 4),
)
@quick
def test_the_small_problem_has_the_answer_of_the_dense_one(seed, rank, gate_lambda, floor, sharpness) -> None:
    changes = {"gate_lambda": gate_lambda, "floor": floor, "sharpness": sharpness}
    gate = gate_of(seed, rank, **changes)
    gamma, _, p = dense_gate(seed, rank, **changes)
    found = torch.cat([gate.quotients, torch.full((gate.complement_size,), gate.complement_quotient)])
    assert np.allclose(found.sort(descending=True).values.numpy(), gamma, rtol=1e-6)
    assert np.allclose(gate.dense().numpy(), p, atol=2e-6 * max(1, np.abs(p).max()))
    assert torch.allclose(gate.apply(rows()).double(), rows().double() @ torch.tensor(p).T, atol=1e-4)


def test_the_gate_is_oblique() -> None:
    gate = gate_of()
    _, v, p = dense_gate()
    orthogonal_mistake = v @ np.diag(dense.gate_values(dense_gate()[0], 1.5, 0.05)) @ v.T
    assert np.abs(gate.dense().numpy() - p).max() < 1e-5
    assert np.abs(p - p.T).max() > 0.01
    assert np.abs(p - orthogonal_mistake).max() > 0.1


def test_values_follow_the_formula() -> None:
    for changes in ({}, {"floor": 0.3}, {"sharpness": 3.0}, {"gate_lambda": 20.0}):
        gate = gate_of(**changes)
        s = {**SETTINGS, **changes}
        expected = dense.gate_values(gate.quotients.numpy(), s["gate_lambda"], s["floor"], s["sharpness"])
        assert np.allclose(gate.values.numpy(), expected)
        complement = np.array([gate.complement_quotient])
        assert gate.complement_value == pytest.approx(
            dense.gate_values(complement, s["gate_lambda"], s["floor"], s["sharpness"])[0]
        )
    hard = gate_of(sharpness=1e4, floor=0.0)
    assert set(hard.values.round().tolist()) == {0.0, 1.0}
    assert torch.isfinite(hard.dense()).all()


def test_a_quotient_of_one_means_as_present_in_the_task_as_in_the_models_text() -> None:
    same = covariance(0)
    gate = SpectralGate.from_covariances(same, same, ridge=0.1, utility_ridge=0.1, gate_lambda=1.0)
    assert torch.allclose(gate.quotients, torch.ones_like(gate.quotients))
    assert gate.complement_quotient == pytest.approx(1.0)
    assert torch.allclose(gate.dense(), 0.5 * torch.eye(D, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_strength_zero_the_gate_is_exactly_the_identity(dtype: torch.dtype) -> None:
    gate = gate_of(gate_lambda=0.0)
    a = rows(dtype=dtype)
    assert torch.equal(gate.apply(a), a)
    assert torch.equal(gate.rank_gate(rows()), torch.eye(5))
    assert torch.equal(gate.to("cpu", torch.bfloat16).apply(a), a)


@given(seed=st.integers(0, 99), scale=st.floats(1e-3, 1e3))
@quick
def test_the_scale_of_activations_does_not_matter(seed: int, scale: float) -> None:
    gate = gate_of(seed)
    scaled = SpectralGate.from_covariances(covariance(seed, scale=scale), covariance(seed + 1, scale=7.0), **SETTINGS)
    assert torch.allclose(scaled.quotients, gate.quotients, rtol=1e-5)
    assert torch.allclose(scaled.dense(), gate.dense(), atol=1e-5)


@given(seed=st.integers(0, 99), gate_lambda=st.floats(0.01, 100))
@quick
def test_a_gated_step_never_costs_more(seed: int, gate_lambda: float) -> None:
    """In coordinates c of V the cost is ||c||², and the gate only shrinks c."""
    gate = gate_of(seed, gate_lambda=gate_lambda)
    step = rows(seed=seed).double()
    ridge = SETTINGS["ridge"]

    def cost(x: torch.Tensor) -> float:
        return float(gate.penalty(x) + ridge * x.square().sum())

    assert cost(gate.apply(step)) <= cost(step) * (1 + 1e-6)


def test_penalty_and_utility_are_dense_traces() -> None:
    gate, step = gate_of(), rows()
    for found, sigma in ((gate.penalty, covariance(0)), (gate.utility, covariance(1))):
        expected = np.trace(step.double().numpy() @ dense.normalized(sigma.dense().numpy()) @ step.double().numpy().T)
        assert float(found(step)) == pytest.approx(expected, rel=1e-5)


def test_exact_grams_give_the_true_quotients_of_their_directions() -> None:
    penalty, utility = covariance(0), covariance(1)
    p0 = joint_basis(penalty, utility)
    true_p, true_t = (torch.tensor(dense.covariance(tokens(seed))) for seed in (0, 1))
    gate = SpectralGate.from_covariances(penalty, utility, grams=(p0.T @ true_p @ p0, p0.T @ true_t @ p0), **SETTINGS)
    v = (p0 @ gate.vectors).numpy()
    h = dense.normalized(true_p.numpy()) + SETTINGS["ridge"] * np.eye(D)
    u = dense.normalized(true_t.numpy()) + SETTINGS["utility_ridge"] * np.eye(D)
    quotients = np.einsum("di,de,ei->i", v, u, v) / np.einsum("di,de,ei->i", v, h, v)
    assert np.allclose(gate.quotients.numpy(), quotients, rtol=1e-6)
    without = gate_of()
    assert not torch.allclose(without.quotients, gate.quotients, rtol=1e-3)
    outside = np.trace(true_p.numpy()) - np.trace((p0.T @ true_p @ p0).numpy())
    assert gate.penalty_tail == pytest.approx(outside / (D - p0.shape[1]) / (np.trace(true_p.numpy()) / D), rel=1e-5)


def test_another_strength_is_the_gate_built_anew_and_solves_nothing(monkeypatch) -> None:
    gate, anew = gate_of(), gate_of(gate_lambda=7.0)
    monkeypatch.setattr("folora_q.core.gate.generalized_eigenproblem", lambda *a: pytest.fail("solved again"))
    changed = gate.with_lambda(7.0)
    assert torch.equal(changed.values, anew.values)
    assert torch.equal(changed.core, anew.core)
    assert changed.complement_value == anew.complement_value
    assert gate.gate_lambda == 1.5, "the old gate stays as it is"


def test_a_square_basis_has_no_complement() -> None:
    gate = gate_of(rank=D)
    assert gate.complement_size == 0
    gamma, _, p = dense_gate(rank=D)
    assert np.allclose(gate.quotients.numpy(), gamma, rtol=1e-6)
    assert np.allclose(gate.dense().numpy(), p, atol=1e-5)


@given(seed=st.integers(0, 99), r=st.integers(1, 8), gate_lambda=st.floats(0.01, 100))
@quick
def test_the_rank_gate_is_the_dense_quotient_restricted_to_as_rows(seed: int, r: int, gate_lambda: float) -> None:
    a = rows(r, seed, torch.float64)
    s = {**SETTINGS, "gate_lambda": gate_lambda}
    sigmas = (covariance(0).dense().numpy(), covariance(1).dense().numpy())
    expected = dense.rank_gate_matrix(a.numpy(), *sigmas, s)
    assert np.allclose(gate_of(gate_lambda=gate_lambda).rank_gate(a).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    "make", [lambda a: a[[0, 1, 1]], lambda a: a * torch.tensor([[1.0], [0.0], [2.0]]), torch.zeros_like]
)
def test_rows_of_a_that_are_parallel_or_zero_still_have_a_rank_gate(make) -> None:
    a = make(rows(3))
    found = gate_of().rank_gate(a)
    assert found.dtype == a.dtype
    assert torch.isfinite(found).all()
    assert float(torch.linalg.matrix_norm(found, 2)) < 10


def test_a_that_is_not_finite_has_no_rank_gate() -> None:
    a = rows()
    a[1, 2] = float("nan")
    with pytest.raises(ValueError, match="A holds a NaN"):
        gate_of().rank_gate(a)


def test_a_gate_survives_a_file_bit_for_bit(tmp_path) -> None:
    gate = gate_of()
    torch.save(gate.state_dict(), tmp_path / "gate.pt")
    again = SpectralGate.from_state_dict(torch.load(tmp_path / "gate.pt", weights_only=True))
    for name in ("basis", "core", "quotients", "values", "vectors"):
        assert torch.equal(getattr(again, name), getattr(gate, name))
    assert torch.equal(again.apply(rows()), gate.apply(rows()))


def test_in_bfloat16_the_gate_is_close_and_keeps_the_rows_type() -> None:
    gate = gate_of()
    half = gate.to("cpu", torch.bfloat16)
    assert half.basis.dtype == half.core.dtype == torch.bfloat16
    assert gate.basis.dtype == torch.float32
    found = half.apply(rows())
    assert found.dtype == torch.float32
    assert float((found - gate.apply(rows())).norm() / rows().norm()) < 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ridge": 0.0}, "ridge > 0"),
        ({"utility_ridge": -1.0}, "utility_ridge >= 0"),
        ({"gate_lambda": -1.0}, "gate_lambda >= 0"),
        ({"floor": 1.5}, "floor"),
        ({"sharpness": 0.0}, "sharpness"),
        ({"grams": (torch.eye(3), torch.eye(3))}, r"grams must be \(12, 12\)"),
    ],
)
def test_parameters_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate_of(**changes)


def test_covariances_of_two_widths_and_negative_strengths_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in width: 24 and 25"):
        SpectralGate.from_covariances(covariance(0), covariance(0, d=25))
    with pytest.raises(ValueError, match="gate_lambda >= 0"):
        gate_of().with_lambda(-1)


@given(seed=st.integers(0, 99), rank=st.sampled_from([2, 6, 12, 24]), count=st.integers(1, 8))
@quick
def test_leading_rows_span_the_largest_quotients_of_the_dense_problem(seed, rank, count) -> None:
    gate = gate_of(seed, rank)
    found = gate.leading_rows(count).double()
    wanted, _, _ = dense_gate(seed, rank)
    better = int((gate.quotients > gate.complement_quotient).sum()) if gate.complement_size else D - 1
    assert len(found) == min(count, better)
    torch.testing.assert_close(found @ found.T, torch.eye(len(found), dtype=torch.float64), rtol=0, atol=1e-5)
    penalty, utility = gate.forms(found)
    identity = torch.eye(len(found), dtype=torch.float64)
    inside, _ = generalized_eigenproblem(
        utility + SETTINGS["utility_ridge"] * identity, penalty + SETTINGS["ridge"] * identity
    )
    np.testing.assert_allclose(inside, wanted[: len(found)], rtol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@given(seed=st.integers(0, 99), count=st.integers(1, D))
@quick
def test_gated_rows_are_spectral_coordinates_times_their_share(seed, count, scale) -> None:
    """Of the dense problem, in the units of the activations: rows √γᵢ vᵢ with vᵢᵀ(Σp + τI)vⱼ = 1 if i = j, else 0."""
    penalty, utility = covariance(seed, D, scale=scale), covariance(seed + 1, D, scale=scale)
    gate = SpectralGate.from_covariances(penalty, utility, ridge=0.1, utility_ridge=0.02, one_unit=True)
    found = gate.gated_rows(count).double().numpy()
    sp, st_ = penalty.dense().numpy(), utility.dense().numpy()
    h = sp + 0.1 * np.trace(sp) / D * np.eye(D)
    u = st_ + 0.02 * np.trace(st_) / D * np.eye(D)
    gamma = eigh(u, h, eigvals_only=True)[::-1][:count]
    np.testing.assert_allclose(found @ h @ found.T, np.diag(gamma), atol=1e-5 * gamma.max())
    np.testing.assert_allclose(found @ u @ found.T, np.diag(gamma**2), atol=1e-5 * gamma.max() ** 2)


def test_no_lengths_of_rows_buy_more_gain_for_a_penalty() -> None:
    """Adam's steps are equally long in every coordinate, so the gain of shares s is Σ sᵢ √uᵢ, the penalty Σ sᵢ² pᵢ."""
    gate = gate_of(rank=D)
    a = gate.gated_rows(8).double()
    penalty, utility = gate.forms(a)
    p = penalty.diagonal() + gate.ridge * a.square().sum(1)
    u = utility.diagonal() + gate.utility_ridge * a.square().sum(1)

    def worth(shares: torch.Tensor) -> float:
        return float((shares * u.sqrt()).sum() ** 2 / (shares.square() * p).sum())

    best = worth(torch.ones(8, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    others = [torch.rand(8, generator=generator, dtype=torch.float64) + 0.1 for _ in range(200)]
    assert all(worth(shares) < best for shares in others)
    assert best == pytest.approx(float(gate.quotients[:8].sum()), rel=1e-5)


def test_a_gate_that_lets_all_pass_alike_has_no_leading_rows() -> None:
    assert gate_of(gate_lambda=0.0).leading_rows(4).shape == (0, D)
    assert gate_of(rank=24, gate_lambda=0.0).leading_rows(4).shape == (0, D)
    assert gate_of(floor=1.0).leading_rows(4).shape == (0, D)
