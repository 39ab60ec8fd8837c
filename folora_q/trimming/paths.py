"""Paths from an adapter to its base: at each point a share of the update's penalty is left.

A new path needs an entry in `PATHS`; measuring, the table and the picture read it from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor

from folora_q.core import SpectralGate
from folora_q.core.shrink import Energies, energies, shrinking, together
from folora_q.errors import UserError
from folora_q.models.adapters import ADAPTER, AdapterPair, adapter_pairs

Factors = dict[str, tuple[Tensor, Tensor]]


class Update:
    """The update of a model's adapter, which can be shrunk and restored.

    Args:
        model: with one LoRA adapter.
        gates: by adapted layer, with the statistics of the task and of model-generated text; a layer without one is
            scaled.

    Raises:
        UserError: an adapted layer does more than y = W x + s B A x.
    """

    def __init__(self, model: PeftModel, gates: Mapping[str, SpectralGate]) -> None:
        self.pairs = adapter_pairs(model)
        if other := next((pair for pair in self.pairs if ADAPTER in pair.module.lora_variant), None):
            raise UserError(f"{other.name} has a variant of LoRA, such as DoRA, whose update is not a product B A")
        shared = {id(gate): shrinking(gate) for gate in gates.values()}
        self.gates = {pair.name: shared[id(gates[pair.name])] for pair in self.pairs if pair.name in gates}
        self.factors = self.present()
        self.energies: Energies = together(self._energies(pair) for pair in self.pairs if pair.name in self.gates)

    def _energies(self, pair: AdapterPair) -> Energies:
        a, b = self.factors[pair.name]
        return energies(self.gates[pair.name], a, b * pair.scale)

    def present(self) -> Factors:
        """Return a copy of the factors that the model has now."""
        return {pair.name: (pair.a.detach().clone(), pair.b.detach().clone()) for pair in self.pairs}

    @contextmanager
    def replaced(self, factors: Factors) -> Iterator[None]:
        """Let the model have these factors within this context."""
        self._set(factors)
        try:
            yield
        finally:
            self._set(self.factors)

    def at(self, path: str, share: float) -> AbstractContextManager[None]:
        """Let the model have the update at a point of a path within this context."""
        return self.replaced(PATHS[path].shrink(self, share))

    def _set(self, factors: Factors) -> None:
        for pair in self.pairs:
            for parameter, value in zip((pair.a, pair.b), factors[pair.name], strict=True):
                parameter.data.copy_(value)


@dataclass(frozen=True)
class Path:
    """A way to shrink an update.

    Attributes:
        label: for tables and pictures.
        shrink: returns the factors with which the given share of the penalty is left.
    """

    label: str
    shrink: Callable[[Update, float], Factors]


def _by_quotients(update: Update, share: float) -> Factors:
    """Shrink rows of A by their directions' quotients; those of layers without statistics like an average direction."""
    strength = update.energies.strength_for(share * update.energies.penalty)
    shrunk = {}
    for name, (a, b) in update.factors.items():
        gate = update.gates.get(name)
        rows = a / (1 + strength) if gate is None else gate.with_lambda(strength).apply(a)
        shrunk[name] = (rows, b)
    return shrunk


def _by_scale(update: Update, share: float) -> Factors:
    return {name: (a * share**0.5, b) for name, (a, b) in update.factors.items()}


BY_QUOTIENTS, BY_SCALE = "quotients", "scale"
PATHS = {
    BY_QUOTIENTS: Path("shrunk by quotients", _by_quotients),
    BY_SCALE: Path("scaled", _by_scale),
}
