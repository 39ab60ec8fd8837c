"""A stack does what its gates do one by one."""

from __future__ import annotations

import pytest
import torch

from folora_q.core import SpectralGate
from folora_q.core.batched_gates import stacks
from tests.conftest import random_gate

WIDTHS = (12, 12, 20, 12, 12)
RANKS = (3, 3, 4, 3, 2)


def some_gates(dtype: torch.dtype = torch.float32) -> list[SpectralGate]:
    """Five adapters: the first two share a gate, one is wider, one has another strength, one another rank."""
    shared, wide = random_gate(12, rank=4, gate_lambda=2.0), random_gate(20, rank=4)
    shared, wide, other = (g.to("cpu", dtype) for g in (shared, wide, random_gate(12, rank=4, gate_lambda=0.3)))
    return [shared, shared, wide, other, shared]


def rows(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(r, d, generator=generator) for r, d in zip(RANKS, WIDTHS, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_corrects_and_solves_as_its_gates_do(dtype: torch.dtype) -> None:
    gates, steps = some_gates(dtype), rows(0)
    corrections = [gate.correction(step) for gate, step in zip(gates, steps, strict=True)]
    solved = [gate.rank_gate(step) for gate, step in zip(gates, steps, strict=True)]
    seen: list[int] = []
    made = stacks(gates, RANKS)
    for stack in made:
        stacked = torch.stack([steps[index] for index in stack.indices])
        found = stack.correction(stacked)
        for index, correction, k in zip(stack.indices, found, stack.rank_gates(stacked), strict=True):
            assert torch.allclose(
                correction, corrections[index], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
            )
            assert torch.allclose(k, solved[index], atol=1e-4), index
            seen.append(index)
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert sorted(stack.indices for stack in made) == [[0, 1], [2], [3], [4]]


def test_gates_of_one_shape_are_one_stack_and_their_bases_stand_in_memory_once() -> None:
    gates = [random_gate(12, rank=4, gate_lambda=value) for value in (0.5, 1.0, 2.0)]
    alone = [gate.dense() for gate in gates]
    [stack] = stacks(gates, [3, 3, 3])
    assert all(gate.basis.untyped_storage().data_ptr() == stack.basis.untyped_storage().data_ptr() for gate in gates)
    assert all(torch.equal(gate.dense(), before) for gate, before in zip(gates, alone, strict=True))


def test_an_adapter_that_is_not_finite_is_named_as_such() -> None:
    gates = [random_gate(12, rank=4)]
    [stack] = stacks(gates, [3])
    with pytest.raises(ValueError, match="NaN or an infinity"):
        stack.rank_gates(torch.full((1, 3, 12), torch.nan))
