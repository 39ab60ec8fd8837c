"""Initializations of A from gates, on the tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import LoadedModel, load_model
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.schema import ModelSection
from folora_q.rules.initialize import initialize_from_gates, initialize_in_shares
from tests.conftest import random_gate

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
IDS = torch.arange(3, 35).reshape(2, 16)


def load(folder: Path) -> LoadedModel:
    return load_model(ModelSection(model_name_or_path=str(folder)), CPU)


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("r", [4, 12])
def test_a_gated_start_keeps_the_norm_and_the_model_as_it_is(tiny_folder: Path, leading: bool, r: int) -> None:
    base = load(tiny_folder)
    with torch.no_grad():
        expected = base.model(input_ids=IDS).logits
    model = attach_adapter(base, AdapterSection(r=r), seed=0)
    pairs = adapter_pairs(model)
    gates = {pair.name: random_gate(pair.module.in_features) for pair in pairs[1:]}
    before = {pair.name: pair.a.detach().clone() for pair in pairs}
    initialize_from_gates(pairs, gates, leading)
    assert torch.equal(pairs[0].a, before[pairs[0].name]), "a layer without a gate keeps its start"
    for pair in pairs[1:]:
        gate, old = gates[pair.name], before[pair.name]
        assert torch.isclose(pair.a.norm(), old.norm())
        assert not torch.allclose(pair.a, old, rtol=1e-2)
        if leading:
            found = gate.leading_rows(r)
            assert 0 < len(found) <= r
            gram = pair.a @ pair.a.T * (r / old.norm() ** 2)
            assert torch.allclose(gram, torch.eye(r), atol=1e-5), "orthogonal and equally long, found or not"
        rows = found if leading else gate.apply(old)
        cosine = torch.nn.functional.cosine_similarity(pair.a[: len(rows)], rows, dim=1)
        assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-5)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("in_nats", [False, True])
def test_rows_in_shares_have_the_proportions_of_their_gates(tiny_folder: Path, in_nats: bool) -> None:
    model = attach_adapter(load(tiny_folder), AdapterSection(r=4), seed=0)
    pairs = adapter_pairs(model)
    gates = {pair.name: random_gate(pair.module.in_features) for pair in pairs[1:]}
    for number, gate in enumerate(gates.values()):
        gate.unit = 1.0 + number  # layers differ in what a step costs
    before = {pair.name: pair.a.detach().clone() for pair in pairs}
    initialize_in_shares(pairs, gates, in_nats)
    assert torch.equal(pairs[0].a, before[pairs[0].name]), "a layer without a gate keeps its start"
    scales, cost = [], 0.0
    for pair in pairs[1:]:
        gate, rows = gates[pair.name], gates[pair.name].gated_rows(4)
        scales.append(float((pair.a.norm() / rows.norm()).detach()))
        assert torch.allclose(pair.a, rows * scales[-1], atol=1e-6)
        assert in_nats or torch.isclose(pair.a.norm(), before[pair.name].norm())
        cost += gate.unit * (gate.penalty(pair.a) + gate.ridge * pair.a.double().square().sum()).item()
    assert (max(scales) / min(scales) < 1 + 1e-5) is in_nats
    assert not in_nats or cost == pytest.approx(1.0, rel=1e-4), "a step of rate 1 costs half a nat"


def test_rows_for_which_a_gate_has_no_direction_are_zero(tiny_folder: Path) -> None:
    model = attach_adapter(load(tiny_folder), AdapterSection(r=40), seed=0)
    pairs = adapter_pairs(model)
    gates = {pair.name: random_gate(pair.module.in_features) for pair in pairs}
    initialize_in_shares(pairs, gates, in_nats=True)
    for pair in pairs:
        found = len(gates[pair.name].quotients)
        assert found < 40 and bool((pair.a[:found].norm(dim=1) > 0).all()) and pair.a[found:].abs().max().item() == 0
