"""Read how a run spent its forgetting budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from folora_q.storage.untrusted import finite


@dataclass(frozen=True)
class SpentBudget:
    """A budget and what was spent, in nats per token.

    Attributes:
        of: what is limited, for display.
        predicted: (step, value) as logged, from the penalty.
        measured: (step, value) on the texts that steer the budget; only finished runs have them.
    """

    limit: float
    of: str
    predicted: list[tuple[int, float]]
    measured: list[tuple[int, float]]

    @property
    def spent(self) -> float | None:
        """What was measured last, or predicted if nothing was measured."""
        known = self.measured or self.predicted
        return known[-1][1] if known else None


def spent_budget(
    recipe: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]], manifest: Mapping[str, Any]
) -> SpentBudget | None:
    """Return a run's budget; None if its recipe has none."""
    gate = recipe.get("gate")
    budget = gate.get("budget") if isinstance(gate, dict) else None
    if not isinstance(budget, dict):
        return None
    for key, of in (("kl", "KL from the base"), ("forgetting", "rise of the loss on real text")):
        if (limit := finite(budget.get(key))) is not None and limit > 0:
            record = manifest.get("budget")
            measured = record.get("measured") if isinstance(record, dict) else None
            logged = [(line.get("step"), line.get("budget_spent")) for line in metrics]
            return SpentBudget(limit, of, _points(logged), _points(measured if isinstance(measured, list) else []))
    return None


def _points(pairs: Iterable[Any]) -> list[tuple[int, float]]:
    """Return the valid (step, value) pairs by step; of a step that occurs twice, the last."""
    found: dict[int, float] = {}
    for pair in pairs:
        step, value = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
        if isinstance(step, int) and (number := finite(value)) is not None:
            found[step] = number
    return sorted(found.items())
