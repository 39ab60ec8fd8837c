"""Measure what a forgetting budget limits, on the texts that a run monitors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    return partial(_rise if section.kl is None else _kl, monitored, compare)


def _kl(monitored: Monitored, compare: Comparing, complete: bool) -> Spent:
    """Measure the KL from the base on model-generated text."""
    assert monitored.generated_text is not None, "a run with a budget has such text"
    few = compare(monitored.generated_text)
    if not complete or monitored.further_text is None:
        return Spent(few.kl.value)
    parts = few, compare(monitored.further_text)
    tokens = sum(part.tokens for part in parts)
    return Spent(few.kl.value, sum(part.kl.value * part.tokens for part in parts) / tokens)


def _rise(monitored: Monitored, compare: Comparing, complete: bool) -> Spent:
    """Measure the mean rise of the loss on real text, always on the same windows."""
    rises = [compare(text).loss.change.value for text in monitored.real_text]
    return Spent(sum(rises) / len(rises))
