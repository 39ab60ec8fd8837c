"""Shrinking an update against the dense solution of the trade-off, in float64."""

from __future__ import annotations

import pytest
import torch

from folora_q.core.shrink import FrozenRows, energies, shrinking, together
from tests.core.gate_test import SETTINGS, D, covariance, gate_of, rows


def dense_sides(seed: int = 0, rank: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Σt and H with their ridges, each relative to its own mean variance."""
    penalty, utility = covariance(seed, rank), covariance(seed + 1, rank)
    h = penalty.dense().double() / penalty.mean_variance + SETTINGS["ridge"] * torch.eye(D)
    return utility.dense().double() / utility.mean_variance + SETTINGS["utility_ridge"] * torch.eye(D), h


@pytest.mark.parametrize("strength", [0.0, 0.03, 0.7, 20.0])
def test_the_shrunk_update_minimizes_lost_gain_plus_penalty(strength: float) -> None:
    gate, (utility, h) = shrinking(gate_of()), dense_sides()
    a, b = rows(dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = b @ a @ utility @ torch.linalg.inv(utility + strength * h)
    found = b @ gate.with_lambda(strength).apply(a)
    assert torch.allclose(found, expected, atol=1e-5)


def test_energies_say_what_penalty_is_left() -> None:
    gate, (_, h) = shrinking(gate_of()), dense_sides()
    a, b = rows(dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = energies(gate, a, b)
    for strength in (0.0, 0.1, 1.0, 10.0):
        update = b @ gate.with_lambda(strength).apply(a)
        assert found.shrunk(strength) == pytest.approx(float((update @ h * update).sum()) * gate.unit, rel=1e-5)
    assert found.penalty == pytest.approx(found.shrunk(0.0))


@pytest.mark.parametrize("share", [0.9, 0.25, 1e-3])
def test_the_strength_for_a_penalty_is_found_over_all_layers(share: float) -> None:
    parts = [energies(gate_of(seed), rows(seed=seed), torch.eye(5)) for seed in (0, 4)]
    both = together(parts)
    wanted = share * both.penalty
    strength = both.strength_for(wanted)
    left = sum(part.shrunk(strength) for part in parts)
    assert wanted * 0.99 <= left <= wanted
    assert both.strength_for(2 * both.penalty) == 0


def test_with_a_frozen_a_the_best_b_is_found() -> None:
    """The minimum over B' of lost gain plus penalty, by its normal equations in float64."""
    a = rows(dtype=torch.float64)
    b = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    utility, h = dense_sides()
    scale, strength = 2.0, 0.7
    frozen = FrozenRows([(a, changed := b.clone(), gate_of(), scale)])
    before = frozen.energies()
    frozen.shrink(strength)
    u, m = a @ utility @ a.T, a @ h @ a.T
    assert torch.allclose(changed, b @ u @ torch.linalg.inv(u + strength * m), atol=1e-4)
    update = scale * changed @ a
    left = float((update @ h * update).sum()) * gate_of().unit
    assert before.shrunk(strength) == pytest.approx(left, rel=1e-4)
    assert frozen.energies().penalty == pytest.approx(left, rel=1e-4)
