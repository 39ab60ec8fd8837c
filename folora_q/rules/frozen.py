"""Rule `frozen`: A is fixed to the gate's leading directions, and B is trained (docs/method.md, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.optim import Optimizer

from folora_q.core import SpectralGate, gates_on
from folora_q.models.adapters import AdapterPair, freeze_lora_a
from folora_q.recipe.gate import GateSection
from folora_q.rules.base import OptimizerContext, Rule
from folora_q.rules.initialize import initialize_in_shares


class FrozenRule(Rule):
    """Gates B's steps through the lengths of A's rows: no basis on the device, and no extra product per step."""

    name = "frozen"

    def initialize(self, pairs: Sequence[AdapterPair], gates: Mapping[str, SpectralGate], section: GateSection) -> None:
        if section.scales_rows:
            initialize_in_shares(pairs, gates, in_nats=section.weighted)
        else:
            super().initialize(pairs, gates, section)

    def before_training(
        self, pairs: Sequence[AdapterPair], gates: Mapping[str, SpectralGate]
    ) -> Mapping[str, SpectralGate]:
        freeze_lora_a(pairs)
        return gates_on(gates, "cpu")  # no step needs them

    def build_optimizer(self, context: OptimizerContext) -> Optimizer:
        return context.configured()
