"""Measure what a forgetting budget limits, on the texts that a run monitors."""

from __future__ import annotations

from collections.abc import Callable

from folora_q.evaluation.divergence import HeldOutText
from folora_q.recipe.gate import BudgetSection
from folora_q.runs.results import TextResult
from folora_q.training.budget import Spent
from folora_q.training.fault_tolerant_trainer import Monitored

Comparing = Callable[[HeldOutText], TextResult]


def measuring_of(section: BudgetSection, monitored: Monitored, compare: Comparing) -> Callable[[bool], Spent]:
    """Return the function that measures what a budget limits; called with True, it reads all of the texts.

    Args:
        compare: compares the model with its base on a text.
    """
    return _Rise(monitored, compare) if section.kl is None else _KL(monitored, compare)


class _KL:
    """The KL from the base on model-generated text."""

    def __init__(self, monitored: Monitored, compare: Comparing) -> None:
        assert monitored.generated_text is not None, "a run with a budget has such text"
        self.few, self.further, self.compare = monitored.generated_text, monitored.further_text, compare

    def __call__(self, complete: bool) -> Spent:
        few = self.compare(self.few)
        if not complete or self.further is None:
            return Spent(few.kl.value)
        parts = few, self.compare(self.further)
        tokens = sum(part.tokens for part in parts)
        return Spent(few.kl.value, sum(part.kl.value * part.tokens for part in parts) / tokens)


class _Rise:
    """The mean rise of the loss on real text, always on the same windows."""

    def __init__(self, monitored: Monitored, compare: Comparing) -> None:
        self.texts, self.compare = monitored.real_text, compare

    def __call__(self, complete: bool) -> Spent:
        rises = [self.compare(text).loss.change.value for text in self.texts]
        return Spent(sum(rises) / len(rises))
