"""Warnings about the length of a run, of its measurements and about its labels, from the tokenized data."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from folora_q.data.examples import Text
from folora_q.data.pairs import DESIRABLE
from folora_q.data.task_data import TaskTokens
from folora_q.recipe.schema import Recipe
from folora_q.recipe.size_advice import heldout_advice, step_advice
from folora_q.recipe.training import TrainingSection

# How many times as much desirable answers may count as undesirable ones without a warning. The authors of KTO advise 1
# to 4/3 (arXiv 2402.01306, equation 8); a little less than 1 is no reason for a warning.
MIN_BALANCE, MAX_BALANCE = 3 / 4, 4 / 3


def size_warnings(recipe: Recipe, data: TaskTokens) -> list[str]:
    """Warn about few steps, few held-out rows and unbalanced labels, each with a fix."""
    train, heldout = data.train.counts, data.heldout.counts
    sequences = train.sequences
    if recipe.training.packing:  # the exact number is known only after packing
        sequences = min(sequences, ceil(train.tokens / recipe.training.max_length))
    plain_text = any(isinstance(example, Text) for example in data.task.heldout)
    found = [
        step_advice(recipe.training, sequences),
        heldout_advice(recipe.data, train.sequences, heldout.sequences, plain_text),
    ]
    if recipe.training.objective == "kto":
        found.append(balance_advice(recipe.training, data.train.sequences[DESIRABLE]))
    return [advice for advice in found if advice is not None]


def balance_advice(training: TrainingSection, desirable: Sequence[bool]) -> str | None:
    """Warn if desirable answers count far more or far less than undesirable ones."""
    good = sum(desirable)
    bad = len(desirable) - good
    if not (good and bad):
        return (
            f"all {len(desirable):,} training rows have the label {'true' if good else 'false'}: KTO learns from the "
            "difference between desirable and undesirable answers"
        )
    balance = good * training.desirable_weight / (bad * training.undesirable_weight)
    if MIN_BALANCE <= balance <= MAX_BALANCE:
        return None
    name, weight = "undesirable_weight", training.undesirable_weight * balance
    if balance < 1:
        name, weight = "desirable_weight", training.desirable_weight / balance
    return (
        f"{good:,} of the training rows are desirable and {bad:,} undesirable, so with these weights desirable ones "
        f"count {balance:.2g} times as much (KTO's authors advise 1 to 4/3): set training.{name}={weight:.3g}"
    )
