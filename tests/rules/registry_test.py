"""A gate rule that was added in one place only is found here, or at import; no code compares rules by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch

import folora_q
from folora_q.core import GatedOptimizer, SpectralAdamW
from folora_q.memory.estimate import estimate
from folora_q.memory.shapes import shape_of
from folora_q.models.adapters import adapter_pairs, attach_adapter
from folora_q.models.hardware import Hardware
from folora_q.models.load import load_model
from folora_q.recipe.adapter import AdapterSection
from folora_q.recipe.gate import GateSection
from folora_q.recipe.gate_rules import GATE_RULES, RuleName, default_learning_rate, defaults_by_rule
from folora_q.recipe.schema import ModelSection
from folora_q.rules import RULES, AdamSettings, OptimizerContext, rule_of
from tests.conftest import random_gate
from tests.memory.recipes import MISTRAL_7B, a_recipe

HOUSE = Path(folora_q.__file__).parent
METHOD = HOUSE.parent / "docs" / "method.md"
CPU = Hardware(torch.device("cpu"), torch.float32, "a test")
RATE = 1e-3


@pytest.fixture(params=GATE_RULES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_rule_has_a_name_code_and_a_paragraph(name: str) -> None:
    assert name in get_args(RuleName) and RULES[name].name == name and RULES[name].facts is GATE_RULES[name]
    assert (HOUSE / "rules" / f"{name}.py").exists()
    assert re.search(rf"^(## .*rules? .*`{name}`|\*\*`gate\.rule: {name}`)", METHOD.read_text("utf-8"), re.MULTILINE)
    assert GATE_RULES[name].summary in GateSection.model_fields["rule"].description


def test_a_recipe_that_names_a_rule_gets_its_defaults(name: str) -> None:
    section, rule = GateSection.model_validate({"rule": name}), GATE_RULES[name]
    assert (tuple(section.places), section.ridge, section.utility_ridge) == (
        rule.places,
        rule.ridge,
        rule.utility_ridge,
    )
    assert default_learning_rate({"rule": name}) == rule.learning_rate
    random_start = GateSection.model_validate({"rule": name, "start": "random"})
    assert tuple(random_start.places) == (rule.random_places or rule.places)


def test_the_optimizer_trains_what_the_facts_say(name: str, tiny_folder: Path) -> None:
    model = attach_adapter(
        load_model(ModelSection(model_name_or_path=str(tiny_folder)), CPU), AdapterSection(r=4), seed=0
    )
    pairs, section = adapter_pairs(model), GateSection.model_validate({"rule": name, "rank": 8})
    rule, gates = rule_of(section), {pair.name: random_gate(pair.module.in_features) for pair in pairs[1:]}
    rule.initialize(pairs, gates, section)
    gates = rule.before_training(pairs, gates)
    assert gates.keys() == {pair.name for pair in pairs[1:]}
    inner: list[torch.optim.Optimizer] = []

    def configured() -> torch.optim.Optimizer:
        inner.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE))
        return inner[-1]

    adapters = [(pair.a, pair.b, gates[pair.name]) for pair in pairs[1:]]
    optimizer = rule.build_optimizer(
        OptimizerContext(section, adapters, configured, AdamSettings(RATE), [pairs[0].a, pairs[0].b])
    )
    kinds = {"any": torch.optim.AdamW, "wrapped": GatedOptimizer, "own": SpectralAdamW}
    assert type(optimizer) is kinds[rule.facts.optimizer] and bool(inner) is (rule.facts.optimizer != "own")
    before = {pair.name: (pair.a.clone(), pair.b.clone()) for pair in pairs}
    for _ in range(2):  # B is zero at first, and A's gradient with it
        model(input_ids=torch.arange(3, 35)[None], labels=torch.arange(3, 35)[None]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for pair in pairs:
        a, b = before[pair.name]
        assert not torch.equal(pair.b, b), pair.name
        assert torch.equal(pair.a, a) is not rule.facts.trains_a, pair.name


def test_the_memory_estimate_knows_what_a_rule_holds(name: str) -> None:
    rule = GATE_RULES[name]
    shape = shape_of(MISTRAL_7B)
    training, without = (
        {stage.name: stage for stage in estimate(a_recipe(gate=gate), shape).stages}["training"].device
        for gate in ({"rule": name}, {"enabled": False})
    )
    assert (training["gradients"] < without["gradients"]) is not rule.trains_a
    assert (training["gates"] > 0) is (rule.optimizer != "any")


def test_no_other_code_compares_rules_by_name() -> None:
    """Ask the registry for the fact instead, so that a new rule needs no change elsewhere."""
    compared = re.compile(r"""\brule\b["')\]]*\s*(==|!=|in|not in)\s""")
    allowed = {HOUSE / "recipe" / "gate_rules.py", HOUSE / "rules" / "__init__.py"}
    found = [
        f"{path.relative_to(HOUSE.parent)}:{number}: {line.strip()}"
        for folder in (HOUSE, HOUSE.parent / "benchmarks")
        for path in folder.rglob("*.py")
        if path not in allowed
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if compared.search(line) and not line.lstrip().startswith("#") and " for rule in" not in line
    ]
    assert found == []


def test_defaults_are_written_by_rule() -> None:
    written = defaults_by_rule(lambda rule: rule.ridge).split("), ")
    assert written[0].startswith("0.1 (frozen") and written[1].startswith("0.01 (step, spectral")
    assert defaults_by_rule(lambda rule: rule.places).startswith("[a_start, b_step] (frozen")
    assert "2e-3 (frozen" in defaults_by_rule(lambda rule: rule.learning_rate)
