"""Layers that no text reaches: they keep the A that PEFT drew, and are named."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from folora_q.calibration.collect import StatisticsSettings, build_gates
from folora_q.data.tokens import batches
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.progress import StageTimer
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.gate import GateSection
from folora_q.recipe.schema import ModelSection
from folora_q.rules import rule_of
from tests.calibration.collect_test import sequences
from tests.conftest import Silent

CPU = Hardware(torch.device("cpu"), torch.float32, "a test")


@pytest.mark.parametrize("rule", ["frozen", "step"])
def test_an_idle_expert_keeps_its_random_a_and_is_named(rule: str, tiny_folder: Path) -> None:
    base = load_model(ModelSection(model_name_or_path=str(tiny_folder)), CPU)
    block = base.model.model.layers[1].mlp
    block.experts = torch.nn.ModuleList([copy.deepcopy(block.up_proj)])  # as code that comes with a model may have them
    model = attach_adapter(base, AdapterSection(r=4), seed=0)
    pairs = adapter_pairs(model)
    before = {pair.name: pair.a.clone() for pair in pairs}
    section, progress = GateSection(rule=rule, rank=8), Silent()
    texts = [list(batches(sequences(seed), 4, CPU.device)) for seed in (1, 2)]
    gates = build_gates(model, *texts, StatisticsSettings(section), StageTimer(progress))
    rule_of(section).initialize(pairs, gates, section)
    idle = "model.layers.1.mlp.experts.0"
    assert gates.keys() == before.keys() - {idle}
    assert {pair.name for pair in pairs if torch.equal(pair.a, before[pair.name])} == {idle}
    assert any(note.endswith(f"keep their random A: {idle}") for note in progress.notes)
