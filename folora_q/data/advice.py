"""Warnings about the length of a run and of its measurements, from the tokenized data."""

from __future__ import annotations

from math import ceil

from folora_q.data.examples import Text
from folora_q.data.task_data import TaskTokens
from folora_q.recipe.schema import Recipe
from folora_q.recipe.size_advice import heldout_advice, step_advice


def size_warnings(recipe: Recipe, data: TaskTokens) -> list[str]:
    """Warn about few steps and few held-out rows, each with a fix."""
    train, heldout = data.train.counts, data.heldout.counts
    sequences = train.sequences
    if recipe.training.packing:  # the exact number is known only after packing
        sequences = min(sequences, ceil(train.tokens / recipe.training.max_length))
    plain_text = any(isinstance(example, Text) for example in data.task.heldout)
    found = (
        step_advice(recipe.training, sequences),
        heldout_advice(recipe.data, train.sequences, heldout.sequences, plain_text),
    )
    return [advice for advice in found if advice is not None]
