"""Find the longest sequences that a run can train on with a card's memory."""

from __future__ import annotations

from typing import Any

from folora_q.memory.estimate import MemoryEstimate, estimate
from folora_q.memory.shapes import ModelShape
from folora_q.recipe import Recipe

# Lengths are multiples of this, up to the longest context of any model.
STEP, MAX_LENGTH = 16, 2**20
# What does not change results, as small as it can be. GiB for the sketches that are in memory together.
SMALLEST_BATCHES: dict[str, dict[str, Any]] = {
    "gate": {"batch_size": 1},
    "evaluation": {"batch_size": 1},
    "proxy": {"batch_size": 1, "statistics_memory": 0.25},
}


def longest_context(recipe: Recipe, shape: ModelShape, gib: float, offloading: bool) -> int:
    """Return the longest `training.max_length` that fits, with one sequence at a time in every stage; 0 if none fits.

    Args:
        gib: memory of the GPU.
        offloading: with `training.activation_offloading`.
    """
    fitting, failing = 0, MAX_LENGTH // STEP + 1
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if _memory(recipe, shape, middle * STEP, offloading).fits(gib):
            fitting = middle
        else:
            failing = middle
    return fitting * STEP


def _memory(recipe: Recipe, shape: ModelShape, length: int, offloading: bool) -> MemoryEstimate:
    """Return the estimate with sequences of a length, in the smallest batches."""
    changes = SMALLEST_BATCHES | {
        "training": {
            "max_length": length,
            "per_device_train_batch_size": 1,
            "activation_checkpointing": True,
            "activation_offloading": offloading,
        }
    }
    return estimate(recipe.changed(changes), shape)
