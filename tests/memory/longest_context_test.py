"""The longest sequences that fit a card."""

from __future__ import annotations

import pytest

from folora_q.memory.estimate import estimate
from folora_q.memory.longest_context import SMALLEST_BATCHES, STEP, longest_context
from folora_q.memory.shapes import shape_of
from folora_q.recipe import Recipe
from tests.memory.recipes import LLAMA_8B, a_recipe

LLAMA = shape_of(LLAMA_8B)
FROZEN = {"gate": {"rule": "frozen"}}


def with_length(length: int, offloading: bool) -> Recipe:
    training = {
        "max_length": length,
        "per_device_train_batch_size": 1,
        "activation_checkpointing": True,
        "activation_offloading": offloading,
    }
    smallest = {name: values | FROZEN.get(name, {}) for name, values in SMALLEST_BATCHES.items()}
    return a_recipe(training=training, **smallest)


@pytest.mark.parametrize("gib", [8, 12, 24])
@pytest.mark.parametrize("offloading", [False, True])
def test_it_fits_and_longer_ones_do_not(gib: float, offloading: bool) -> None:
    longest = longest_context(a_recipe(**FROZEN), LLAMA, gib, offloading)
    assert longest > 1000 and longest % STEP == 0
    assert estimate(with_length(longest, offloading), LLAMA).fits(gib)
    assert not estimate(with_length(longest + STEP, offloading), LLAMA).fits(gib)


def test_offloading_lets_longer_ones_fit_and_fills_the_host() -> None:
    lengths = [longest_context(a_recipe(**FROZEN), LLAMA, 12, offloading) for offloading in (False, True)]
    assert lengths[1] > 1.2 * lengths[0]
    training = {}
    for offloading in (False, True):
        found = estimate(with_length(lengths[0], offloading), LLAMA)
        training[offloading] = next(stage for stage in found.stages if stage.name == "training")
    moved = training[False].on_device - training[True].on_device
    assert 0 < moved < training[True].on_host - training[False].on_host


def test_a_card_that_is_too_small() -> None:
    assert longest_context(a_recipe(**FROZEN), LLAMA, 4, True) == 0
