"""How a step is cut: the same step whatever the card, the fastest way that fits, and what the recipe fixes stays."""

from __future__ import annotations

import pytest

from folora_q.block_sizes import STATISTICS_TOKENS
from folora_q.memory.estimate import estimate
from folora_q.memory.micro_batches import plan_step
from folora_q.memory.shapes import shape_of
from tests.memory.recipes import MISTRAL_7B, a_recipe

MISTRAL = shape_of(MISTRAL_7B)
BATCH = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 6, "max_length": 1024}


@pytest.mark.parametrize("gib", [12, 16, 24, 80])
def test_the_step_is_the_recipes_on_every_card(gib: float) -> None:
    plan = plan_step(a_recipe(training=BATCH), MISTRAL, gib)
    assert plan.rows * plan.passes == 24
    assert plan.memory == estimate(plan.recipe, MISTRAL) and plan.memory.fits(gib)
    assert plan.recipe.training.recomputes_on(gpu=True) == plan.recompute
    unchanged = {"per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing"}
    recipe = a_recipe(training=BATCH)
    assert plan.recipe.training.model_dump(exclude=unchanged) == recipe.training.model_dump(exclude=unchanged)


def test_sampling_statistics_and_evaluation_take_as_much_at_a_time_as_fits() -> None:
    plans = [plan_step(a_recipe(training=BATCH), MISTRAL, gib).recipe for gib in (8, 12, 24, 80)]
    tokens, texts = (
        [value or 0 for value in values]
        for values in zip(*((plan.gate.batch_tokens, plan.proxy.batch_size) for plan in plans), strict=True)
    )
    assert tokens == sorted(tokens) and texts == sorted(texts)
    assert tokens[-1] == STATISTICS_TOKENS and texts[-1] == 96, "288 texts in three equal batches"
    assert tokens[0] < STATISTICS_TOKENS or texts[0] < 96
    for plan, gib in zip(plans, (8, 12, 24, 80), strict=True):
        found = estimate(plan, MISTRAL)
        assert all(found.fits(gib, stage) for stage in ("sampling", "statistics", "evaluation"))
    fixed = a_recipe(training=BATCH | {"auto_batch_size": False})
    planned = plan_step(fixed, MISTRAL, 80).recipe
    assert (planned.gate, planned.proxy) == (fixed.gate, fixed.proxy)


def test_more_memory_is_never_slower_and_is_used() -> None:
    plans = [plan_step(a_recipe(training=BATCH), MISTRAL, gib) for gib in (12, 16, 24, 80)]
    times = [plan.time for plan in plans]
    assert times == sorted(times, reverse=True) and times[-1] < 0.85 * times[0]
    assert plans[0].recompute and not plans[-1].recompute


def test_no_other_cut_that_fits_is_expected_to_be_faster() -> None:
    recipe = a_recipe(training=BATCH)
    chosen = plan_step(recipe, MISTRAL, 16)
    for rows in (1, 2, 3, 4, 6, 8, 12, 24):
        for recompute in (False, True):
            fixed = BATCH | {
                "per_device_train_batch_size": rows,
                "gradient_accumulation_steps": 24 // rows,
                "activation_checkpointing": recompute,
                "auto_batch_size": False,
            }
            other = plan_step(a_recipe(training=fixed), MISTRAL, 16)
            assert (other.rows, other.passes, other.recompute) == (rows, 24 // rows, recompute), "the recipe fixes it"
            assert other.time >= chosen.time or not other.memory.fits(16)


def test_what_fits_nowhere_gets_the_smallest_plan() -> None:
    long = BATCH | {"max_length": 32_768}
    plan = plan_step(a_recipe(training=long), MISTRAL, 6)
    one = {"per_device_train_batch_size": 1, "activation_checkpointing": True}
    assert not plan.memory.fits(6)
    smallest = a_recipe(training=long | one, evaluation={"batch_size": 1}, proxy={"batch_size": 1})
    assert plan.recompute and plan.memory.peak == estimate(smallest, MISTRAL).peak
