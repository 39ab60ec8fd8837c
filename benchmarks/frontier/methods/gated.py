"""Ours, controls that take parts of it away, and the paper's own rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.frontier.ground import ALPHA, RANK, pairs_with
from benchmarks.frontier.methods.base import AdapterPair, Ground, Method
from benchmarks.frontier.methods.starts import FoLoRAStart
from folora_q.core import SpectralAdamW, SpectralGate
from folora_q.recipe.gate import GateSection, sketch_rank
from folora_q.recipe.gate_rules import DEFAULT_RULE
from folora_q.rules import AdamSettings, OptimizerContext, rule_of

# Of the mean variance; the paper gives none.
DENSE_RIDGE = 0.01


@dataclass
class Gated(Method):
    """The recipe's gate around AdamW (docs/method.md, section 4).

    Attributes:
        gate: settings of the recipe's section `gate`.
        r: the adapter's rank; its scale alpha / r stays as it is.
    """

    gate: dict[str, object] = field(default_factory=lambda: {"rule": DEFAULT_RULE})
    r: int = 2 * RANK
    kind: ClassVar[type[SpectralGate]] = SpectralGate

    @property
    def section(self) -> GateSection:
        return GateSection(**{"rank": sketch_rank(self.r)} | self.gate)

    def settings(self) -> dict[str, Any]:
        # The recipe's defaults too: when they change, these are other runs.
        return super().settings() | {"gate": self.section.model_dump()}

    def lora(self, ground: Ground) -> dict[str, Any]:
        return {"r": self.r, "lora_alpha": ALPHA * self.r // RANK}

    def start(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        self.of_layers = ground.gates(model, self.section, self.kind)
        self.rule = rule_of(self.section)
        self.rule.initialize(pairs, self.of_layers, self.section)
        self.of_layers = self.rule.before_training(pairs, self.of_layers)

    def optimizer(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> Optimizer:
        context = OptimizerContext(
            section=self.section,
            adapters=pairs_with(self.of_layers, pairs),
            configured=lambda: self.adamw(model),
            adam=AdamSettings(lr=self.learning_rate),
        )
        return self.rule.build_optimizer(context)


@dataclass
class SharesShuffled(Gated):
    """The control: the same directions and the same shares of a step, but each direction gets another one's share."""

    def start(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        super().start(ground, model, pairs)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            lengths = torch.cat([pair.a.norm(dim=1) for pair in pairs])
            dealt = lengths[torch.randperm(len(lengths), generator=generator).to(lengths.device)]
            for pair, others in zip(pairs, dealt.split([len(pair.a) for pair in pairs]), strict=True):
                pair.a.mul_((others / pair.a.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))[:, None])


class PenaltyOnlyGate(SpectralGate):
    """γ measures the penalty alone: every direction counts as equally useful."""

    def __init__(self, **state: Any) -> None:
        even = torch.eye(len(state["utility_gram"]), dtype=torch.float64)
        super().__init__(**state | {"utility_gram": even, "utility_tail": 1.0})


class UtilityOnlyGate(SpectralGate):
    """γ measures the utility alone: every direction counts as equally costly (Σp = I)."""

    def __init__(self, **state: Any) -> None:
        even = torch.eye(len(state["penalty_gram"]), dtype=torch.float64)
        super().__init__(**state | {"penalty_gram": even, "penalty_tail": 1.0})


@dataclass
class PenaltyOnly(Gated):
    """The quotient's numerator taken away."""

    kind: ClassVar[type[SpectralGate]] = PenaltyOnlyGate


@dataclass
class UtilityOnly(Gated):
    """The quotient's denominator taken away."""

    kind: ClassVar[type[SpectralGate]] = UtilityOnlyGate


@dataclass
class FoLoRA(FoLoRAStart):
    """FoLoRA as the paper has it (arXiv 2606.00132): its start, spectral Adam on A, dense covariances, AdamW on B."""

    gate_lambda: float = 1.0
    floor: float = 0.3

    def optimizer(self, ground: Ground, model: PeftModel, pairs: Sequence[AdapterPair]) -> Optimizer:
        covariances = ground.covariances(model)
        gates: dict[str, SpectralGate] = {}
        last: tuple[Tensor, Tensor] | None = None
        for pair in pairs:
            if (both := covariances[pair.name]) is not last:
                last, gate = both, dense_gate(*both, self.gate_lambda, self.floor).to(ground.base.device)
            gates[pair.name] = gate
        return SpectralAdamW(pairs_with(gates, pairs), lr=self.learning_rate)


def dense_gate(penalty: Tensor, utility: Tensor, gate_lambda: float, floor: float) -> SpectralGate:
    """A gate whose basis is the whole space; nothing lies outside, so its tails are not used."""
    return SpectralGate.from_state_dict(
        {
            "basis": torch.eye(len(penalty)),
            "penalty_gram": penalty,
            "utility_gram": utility,
            "penalty_tail": 1.0,
            "utility_tail": 1.0,
            "ridge": DENSE_RIDGE,
            "utility_ridge": DENSE_RIDGE,
            "gate_lambda": gate_lambda,
            "floor": floor,
            "sharpness": 1.0,
        }
    )
