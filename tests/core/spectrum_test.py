from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh

from folora_q.core import LowRankCovariance, joint_basis
from folora_q.core.spectrum import generalized_eigenproblem

quick = settings(max_examples=25, deadline=None, derandomize=True)


def low_rank(d: int, k: int, seed: int, tail: float = 0.1) -> LowRankCovariance:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q
    eigenvalues = torch.rand(k, generator=generator, dtype=torch.float64).sort(descending=True).values + tail
    return LowRankCovariance(basis, eigenvalues, tail, float(eigenvalues.sum()) + tail * (d - k), 10)


def spd(m: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(m, 2 * m))
    return x @ x.T / m + 1e-3 * np.eye(m)


@given(seed=st.integers(0, 99), d=st.integers(4, 30), kp=st.integers(1, 20), kt=st.integers(1, 20))
@quick
def test_the_joint_basis_is_orthonormal_spans_both_and_starts_with_the_penaltys(seed, d, kp, kt) -> None:
    penalty, utility = low_rank(d, min(kp, d), seed), low_rank(d, min(kt, d), seed + 100)
    p0 = joint_basis(penalty, utility)
    m = p0.shape[1]
    assert m == min(d, min(kp, d) + min(kt, d))
    assert torch.allclose(p0.T @ p0, torch.eye(m, dtype=torch.float64), atol=1e-10)
    assert torch.equal(p0[:, : penalty.basis.shape[1]], penalty.basis)
    for basis in (penalty.basis, utility.basis):
        assert torch.allclose(p0 @ (p0.T @ basis), basis, atol=1e-8)


def test_directions_that_both_have_are_kept_once() -> None:
    penalty = low_rank(20, 6, 0)
    assert joint_basis(penalty, penalty).shape == (20, 6)
    turned = LowRankCovariance(penalty.basis.flip(1)[:, :4], penalty.eigenvalues[:4], 0.0, 1.0, 1)
    assert joint_basis(penalty, turned).shape == (20, 6)


def test_a_projection_is_that_of_the_dense_matrix() -> None:
    covariance = low_rank(20, 6, 0)
    expected = covariance.basis @ torch.diag(covariance.eigenvalues) @ covariance.basis.T + covariance.tail * (
        torch.eye(20, dtype=torch.float64) - covariance.basis @ covariance.basis.T
    )
    assert torch.allclose(covariance.dense(), expected)
    p = low_rank(20, 9, 1).basis
    assert torch.allclose(covariance.project(p), p.T @ expected @ p)
    assert covariance.trace == pytest.approx(float(torch.trace(expected)))
    assert covariance.mean_variance == pytest.approx(covariance.trace / 20)


@given(seed=st.integers(0, 99), m=st.integers(1, 24))
@quick
def test_the_eigenproblem_is_solved(seed: int, m: int) -> None:
    penalty, utility = spd(m, seed), spd(m, seed + 100)
    gamma, v = generalized_eigenproblem(torch.tensor(utility), torch.tensor(penalty))
    v = v.numpy()
    assert np.allclose(v.T @ penalty @ v, np.eye(m), atol=1e-8)
    assert np.allclose(v.T @ utility @ v, np.diag(gamma.numpy()), atol=1e-8 * float(gamma[0]))
    assert np.allclose(gamma.numpy(), eigh(utility, penalty, eigvals_only=True)[::-1], rtol=1e-8)


def test_a_penalty_that_is_singular_asks_for_a_ridge() -> None:
    with pytest.raises(ValueError, match="larger ridge"):
        generalized_eigenproblem(torch.eye(2), torch.tensor([[1.0, 1.0], [1.0, 1.0]]) - 1e-9 * torch.eye(2))


@pytest.mark.parametrize("batched", [False, True])
def test_a_solver_that_does_not_converge_is_given_a_neighbour(monkeypatch, batched: bool) -> None:
    utility, penalty = torch.tensor(spd(8, 1)), torch.tensor(spd(8, 2))
    if batched:
        utility, penalty = (torch.stack([each, 2 * each]) for each in (utility, penalty))
    expected, _ = generalized_eigenproblem(utility, penalty)
    solve, calls = torch.linalg.eigh, []

    def fails_once(matrix: torch.Tensor) -> object:
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_once)
    found, vectors = generalized_eigenproblem(utility, penalty)
    assert len(calls) == 2 and torch.allclose(found, expected, rtol=1e-10)
    metric = vectors.mT @ penalty @ vectors
    assert torch.allclose(metric, torch.eye(8, dtype=torch.float64).expand_as(metric), atol=1e-9)

    def fails(matrix: torch.Tensor) -> object:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(torch.linalg.LinAlgError):
        generalized_eigenproblem(utility, penalty)
