"""Gate rules, one file each: how a rule initializes A, what it trains, and which optimizer it builds."""

from __future__ import annotations

from folora_q.recipe.gate import GateSection
from folora_q.recipe.gate_rules import GATE_RULES
from folora_q.rules.base import AdamSettings, OptimizerContext, Rule
from folora_q.rules.frozen import FrozenRule
from folora_q.rules.spectral import SpectralRule
from folora_q.rules.step import StepRule

__all__ = ["RULES", "AdamSettings", "OptimizerContext", "Rule", "rule_of"]

RULES: dict[str, Rule] = {rule.name: rule for rule in (FrozenRule(), StepRule(), SpectralRule())}
if RULES.keys() != GATE_RULES.keys():
    raise TypeError(f"recipe/gate_rules.py has {sorted(GATE_RULES)}, folora_q.rules has {sorted(RULES)}")


def rule_of(section: GateSection) -> Rule:
    """Return the rule that a recipe's section `gate` names."""
    return RULES[section.rule]
