"""Read how a run spent its forgetting budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from folora_q.storage.untrusted import finite

# Keys of gate.budget: what each limits, and the texts on which that was measured.
KINDS = (
    ("kl", "KL from the base", "the texts that steer the budget, which the tables leave out"),
    ("forgetting", "rise of the loss on real text", "real text that the tables show too"),
)


@dataclass(frozen=True)
class SpentBudget:
    """A budget and what was spent, in nats per token.

    Attributes:
        of: what is limited, for display.
        texts: the texts on which it was measured, for display.
        predicted: (step, value) as logged, from the penalty.
        measured: (step, value) on the texts that steer the budget; only finished runs have them.
        kept: what the update that was kept spent, as measured; None before the end, and in runs of earlier versions.
    """

    limit: float
    of: str
    texts: str
    predicted: list[tuple[int, float]]
    measured: list[tuple[int, float]]
    kept: float | None = None

    @property
    def spent(self) -> float | None:
        """What the update spends: as measured at the end, or as last measured, or predicted."""
        if self.kept is not None:
            return self.kept
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
    for key, of, texts in KINDS:
        if (limit := finite(budget.get(key))) is not None and limit > 0:
            record = manifest.get("budget")
            record = record if isinstance(record, dict) else {}
            measured = record.get("measured")
            logged = [(line.get("step"), line.get("budget_spent")) for line in metrics]
            points = _points(measured if isinstance(measured, list) else [])
            return SpentBudget(limit, of, texts, _points(logged), points, finite(record.get("spent")))
    return None


def _points(pairs: Iterable[Any]) -> list[tuple[int, float]]:
    """Return the valid (step, value) pairs by step; of a step that occurs twice, the last."""
    found: dict[int, float] = {}
    for pair in pairs:
        step, value = pair if isinstance(pair, list | tuple) and len(pair) == 2 else (None, None)
        if isinstance(step, int) and (number := finite(value)) is not None:
            found[step] = number
    return sorted(found.items())
