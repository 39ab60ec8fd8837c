"""Rule `step`: every step of the recipe's optimizer passes through the gate (docs/method.md, section 4)."""

from __future__ import annotations

from torch.optim import Optimizer

from folora_q.core import GatedOptimizer
from folora_q.rules.base import OptimizerContext, Rule


class StepRule(Rule):
    """Wraps the recipe's optimizer in a GatedOptimizer."""

    name = "step"

    def build_optimizer(self, context: OptimizerContext) -> Optimizer:
        return GatedOptimizer(
            context.configured(),
            context.adapters,
            gate_a="a_step" in context.section.places,
            gate_b="b_step" in context.section.places,
            refresh_every=context.section.refresh_every,
            on_failure=context.on_failure,
        )
