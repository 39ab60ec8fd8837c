"""This project's gate, and controls that each leave out a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch.optim import Optimizer

from benchmarks.frontier.methods.base import Method
from benchmarks.frontier.testbed import ALPHA, RANK, Testbed, pairs_with
from folora_q.core import SpectralGate
from folora_q.models.adapters import AdapterPair
from folora_q.recipe.gate import GateSection, sketch_rank
from folora_q.recipe.gate_rules import DEFAULT_RULE
from folora_q.rules import AdamSettings, OptimizerContext, rule_of


@dataclass
class Gated(Method):
    """The recipe's gate around AdamW (docs/method.md, section 4).

    Attributes:
        gate: settings of the recipe's section `gate`.
        r: the adapter's rank; the scale alpha / r is the same for every rank.
        kind: the class of the gates.
    """

    name: ClassVar[str] = "ours"
    paper: ClassVar[str] = "docs/method.md; the quotient and the gate are FoLoRA's, arXiv 2606.00132"
    learning_rates: ClassVar[tuple[float, ...]] = (1e-3, 2e-3, 4e-3, 8e-3)
    gate: dict[str, object] = field(default_factory=lambda: {"rule": DEFAULT_RULE})
    r: int = 2 * RANK
    kind: ClassVar[type[SpectralGate]] = SpectralGate

    @property
    def section(self) -> GateSection:
        """The recipe's section `gate`, with its defaults."""
        return GateSection.model_validate({"rank": sketch_rank(self.r)} | self.gate)

    def settings(self) -> dict[str, Any]:
        # With the recipe's defaults: when these change, the runs are different ones.
        return super().settings() | {"gate": self.section.model_dump()}

    def lora(self, testbed: Testbed) -> dict[str, Any]:
        return {"r": self.r, "lora_alpha": ALPHA * self.r // RANK}

    def start(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        self.rule = rule_of(self.section)
        gates = testbed.gates(model, self.section, self.kind)
        self.rule.initialize(pairs, gates, self.section)
        self.layer_gates: Mapping[str, SpectralGate] = self.rule.before_training(pairs, gates)

    def optimizer(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> Optimizer:
        context = OptimizerContext(
            section=self.section,
            adapters=pairs_with(self.layer_gates, pairs),
            configured=lambda: self.adamw(model),
            adam=AdamSettings(lr=self.learning_rate),
        )
        return self.rule.build_optimizer(context)


@dataclass
class SharesShuffled(Gated):
    """The same directions and the same shares of a step as `Gated`, with the shares permuted among the directions."""

    name: ClassVar[str] = "control: shares shuffled"

    def start(self, testbed: Testbed, model: PeftModel, pairs: Sequence[AdapterPair]) -> None:
        super().start(testbed, model, pairs)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            lengths = torch.cat([pair.a.norm(dim=1) for pair in pairs])
            dealt = lengths[torch.randperm(len(lengths), generator=generator).to(lengths.device)]
            for pair, others in zip(pairs, dealt.split([len(pair.a) for pair in pairs]), strict=True):
                pair.a.mul_((others / pair.a.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny))[:, None])


class PenaltyOnlyGate(SpectralGate):
    """A gate by the penalty only: every direction counts as equally useful (Σt = I)."""

    def __init__(self, **state: Any) -> None:
        even = torch.eye(len(state["utility_gram"]), dtype=torch.float64)
        super().__init__(**state | {"utility_gram": even, "utility_tail": 1.0})


class UtilityOnlyGate(SpectralGate):
    """A gate by the utility only: every direction counts as equally costly (Σp = I)."""

    def __init__(self, **state: Any) -> None:
        even = torch.eye(len(state["penalty_gram"]), dtype=torch.float64)
        super().__init__(**state | {"penalty_gram": even, "penalty_tail": 1.0})


@dataclass
class PenaltyOnly(Gated):
    """The gate without the quotient's numerator."""

    name: ClassVar[str] = "control: Σt = I"
    kind: ClassVar[type[SpectralGate]] = PenaltyOnlyGate


@dataclass
class UtilityOnly(Gated):
    """The gate without the quotient's denominator."""

    name: ClassVar[str] = "control: Σp = I"
    kind: ClassVar[type[SpectralGate]] = UtilityOnlyGate
