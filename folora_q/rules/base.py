"""The interface of gate rules: initialize A, prepare training, build the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch.nn import Parameter
from torch.optim import Optimizer

from folora_q.core import SpectralGate
from folora_q.core.optimizer import raise_when_too_many
from folora_q.models.adapters import AdapterPair
from folora_q.recipe.gate import GateSection
from folora_q.recipe.gate_rules import GATE_RULES, GateRule, RuleName
from folora_q.rules.initialize import initialize_from_gates


@dataclass(frozen=True)
class AdamSettings:
    """The recipe's settings of Adam, for a rule with its own optimizer."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class OptimizerContext:
    """What a rule builds its optimizer from.

    Attributes:
        adapters: (A, B, gate) of every gated layer.
        configured: makes the recipe's optimizer over all trained parameters.
        ungated: trained parameters of layers without a gate.
        on_failure: called when B's gates cannot be solved for, with the number of failures in a row and the error.
    """

    section: GateSection
    adapters: Sequence[tuple[Parameter, Parameter, SpectralGate]]
    configured: Callable[[], Optimizer]
    adam: AdamSettings
    ungated: Sequence[Parameter] = ()
    on_failure: Callable[[int, Exception], None] = raise_when_too_many


class Rule(ABC):
    """A gate rule. Its facts, which need no PyTorch, are in `folora_q.recipe.gate_rules`."""

    name: RuleName

    @property
    def facts(self) -> GateRule:
        """The rule's entry in the registry of recipes."""
        return GATE_RULES[self.name]

    def initialize(self, pairs: Sequence[AdapterPair], gates: Mapping[str, SpectralGate], section: GateSection) -> None:
        """Initialize every A that has a gate, if `gate.places` asks for it. B is zero, so the model does not change."""
        if "a_start" in section.places:
            initialize_from_gates(pairs, gates, leading=section.start == "leading")

    def before_training(
        self, pairs: Sequence[AdapterPair], gates: Mapping[str, SpectralGate]
    ) -> Mapping[str, SpectralGate]:
        """Freeze what the rule does not train, and return the gates on the device where training needs them."""
        return gates

    @abstractmethod
    def build_optimizer(self, context: OptimizerContext) -> Optimizer:
        """Return the optimizer of all trained parameters."""
