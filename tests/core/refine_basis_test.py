"""The refined basis against the dense problem: Rayleigh-Ritz values that only grow, towards the whole space's."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from folora_q.core import SpectralGate
from folora_q.core.refine_basis import refined_basis
from tests.core import dense
from tests.core.gate_test import D, tokens

RIDGES = {"ridge": 0.02, "utility_ridge": 0.01}
RANK = 4
quick = settings(max_examples=25, deadline=None, derandomize=True)


def texts(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Σp and Σt of unlike texts, (D, D), each divided by its mean variance."""
    return tuple(torch.from_numpy(dense.normalized(dense.covariance(tokens(s)))) for s in (seed, seed + 1000))


def solved_in(basis: torch.Tensor, penalty: torch.Tensor, utility: torch.Tensor) -> SpectralGate:
    grams = basis.T @ penalty @ basis, basis.T @ utility @ basis
    return SpectralGate(basis, *grams, 1.0, 1.0, **RIDGES, gate_lambda=1.0, floor=0.0, sharpness=1.0)


def refined(basis: torch.Tensor, penalty: torch.Tensor, utility: torch.Tensor, rank: int = RANK) -> torch.Tensor:
    gate = solved_in(basis, penalty, utility)
    return refined_basis(gate, (penalty @ basis, utility @ basis), rank)


def some_basis(seed: int, m: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, m, generator=generator, dtype=torch.float64)).Q


@given(seed=st.integers(0, 99), m=st.sampled_from([RANK, 7, 12, D - 1, D]), rank=st.integers(1, RANK))
@quick
def test_it_is_orthonormal_keeps_what_was_there_and_adds_no_more_than_asked(seed, m, rank) -> None:
    basis = some_basis(seed, m)
    more = refined(basis, *texts(seed), rank=rank)
    assert m <= more.shape[1] <= min(m + rank, D)
    torch.testing.assert_close(more[:, :m], basis, rtol=0, atol=0)
    torch.testing.assert_close(more.T @ more, torch.eye(more.shape[1], dtype=torch.float64), rtol=0, atol=1e-10)


@given(seed=st.integers(0, 99), m=st.sampled_from([RANK, 7, 12]))
@quick
def test_each_step_brings_the_largest_quotients_nearer_to_the_dense_ones(seed, m) -> None:
    penalty, utility = texts(seed)
    wanted, _ = dense.quotients(penalty.numpy(), utility.numpy(), *RIDGES.values())
    basis, found = some_basis(seed, m), []
    for _ in range(4):
        found.append(solved_in(basis, penalty, utility).quotients[:RANK].numpy())
        basis = refined(basis, penalty, utility)
    for before, after in zip(found, found[1:], strict=False):
        assert (after >= before * (1 - 1e-9)).all(), "a larger space has no smaller quotients"
        assert (after <= wanted[:RANK] * (1 + 1e-9)).all(), "no space has larger ones than the whole"
    assert found[1][0] > found[0][0] * 1.01, "the first step finds something"
    assert found[-1][0] > 0.5 * wanted[0]


def test_it_finds_more_than_chance_would() -> None:
    gains = []
    for seed in range(20):
        both, basis = texts(seed), some_basis(seed, 6)
        by_chance = torch.linalg.qr(torch.cat([basis, some_basis(seed + 1, 2 * RANK)], dim=1)).Q
        for _ in range(2):
            basis = refined(basis, *both)
        gains.append(solved_in(basis, *both).quotients[0] / solved_in(by_chance, *both).quotients[0])
    assert sum(gains) / len(gains) > 1.9


def test_a_basis_that_holds_the_answer_gets_nothing_new() -> None:
    penalty, utility = texts(0)
    _, vectors = dense.quotients(penalty.numpy(), utility.numpy(), *RIDGES.values())
    basis = torch.linalg.qr(torch.from_numpy(vectors[:, :RANK].copy())).Q
    before = solved_in(basis, penalty, utility)
    more = refined(basis, penalty, utility)
    # What rounding leaves of the residual is normalized and may be added; it must find nothing.
    after = solved_in(more, penalty, utility)
    torch.testing.assert_close(after.quotients[:RANK], before.quotients[:RANK], rtol=1e-9, atol=0)
