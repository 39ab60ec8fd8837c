"""Rule `spectral`: Adam in the gate's coordinates, as in the FoLoRA paper (docs/method.md, section 5)."""

from __future__ import annotations

from dataclasses import asdict

from torch.optim import Optimizer

from folora_q.core import SpectralAdamW
from folora_q.rules.base import OptimizerContext, Rule


class SpectralRule(Rule):
    """Trains A by spectral Adam, and all other parameters by AdamW."""

    name = "spectral"

    def build_optimizer(self, context: OptimizerContext) -> Optimizer:
        return SpectralAdamW(
            context.adapters,
            complement=context.section.complement,
            others=context.ungated,
            **asdict(context.adam),
        )
