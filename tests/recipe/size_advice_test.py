"""Runs that are too short are told of with the change that mends them, and the change does mend them."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folora_q.recipe.dataset import DataSection
from folora_q.recipe.size_advice import FEW_STEPS, MIN_TEXTS, heldout_advice, step_advice
from folora_q.recipe.training import TrainingSection


def training(**keys: object) -> TrainingSection:
    return TrainingSection.model_validate({"output_dir": "run", **keys})


def data(**keys: object) -> DataSection:
    return DataSection.model_validate({"train_dataset": "a.jsonl", **keys})


def test_forty_rows_by_init_for_a_12_gb_card() -> None:
    section = training(per_device_train_batch_size=1, gradient_accumulation_steps=16)
    assert section.steps_for(40) == 3
    assert step_advice(section, 40) == (
        "40 training sequences give 3 steps, which teach little: set training.gradient_accumulation_steps to 4 and "
        "training.num_train_epochs to 5, for 50 steps"
    )


@pytest.mark.parametrize(
    ("sequences", "keys", "told"),
    [
        (
            3,
            {},
            "3 training sequences give 1 step, which teaches little: add rows; with these, even 10 epochs are 10 steps",
        ),
        (
            400,
            {},
            "400 training sequences give 25 steps, which teach little: set training.gradient_accumulation_steps to 2,",
        ),
        (400, {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}, "to 2, for 50 steps"),
        (10_000, {"max_steps": 5}, "training.max_steps: 5 steps, which teach little: raise it to 50 or more"),
        (800, {}, None),
        (1, {"max_steps": 50}, None),
    ],
)
def test_few_steps_are_told_with_what_helps(sequences: int, keys: dict[str, object], told: str | None) -> None:
    found = step_advice(training(**keys), sequences)
    assert found is None if told is None else found is not None and told in found


@settings(max_examples=300, deadline=None)
@given(
    sequences=st.integers(1, 3000),
    rows=st.integers(1, 32),
    passes=st.integers(1, 64),
    epochs=st.floats(0.05, 20),
)
def test_what_is_proposed_gives_the_steps_that_it_says(sequences: int, rows: int, passes: int, epochs: float) -> None:
    keys = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes, "num_train_epochs": epochs}
    section = training(**keys)
    found = step_advice(section, sequences)
    assert found is None or ("1 training sequence gives" in found) == (sequences == 1)
    if found is None:
        assert section.steps_for(sequences) >= FEW_STEPS
        return
    assert f"{section.steps_for(sequences)} step" in found
    changes = re.findall(r"training\.(\w+) to (\d+)", found)
    if not changes:
        assert "add rows" in found
        return
    mended = section.model_copy(update={name: int(value) for name, value in changes})
    assert mended.steps_for(sequences) >= FEW_STEPS
    assert f"for {mended.steps_for(sequences)} steps" in found
    assert rows * mended.gradient_accumulation_steps >= min(4, rows * passes), "no step becomes noise"


@pytest.mark.parametrize(
    ("train", "heldout", "keys", "text", "told"),
    [
        (95, 5, {}, False, "Set data.eval_size to 20"),
        (36, 2, {}, False, "Add rows, or name a data.eval_dataset"),
        (190, 10, {}, True, "Set data.eval_size to 0.1"),
        (500, 4, {"eval_dataset": "b.jsonl"}, False, "Name more of them in data.eval_dataset"),
        (500, 4, {"max_eval_samples": 4}, False, "Raise data.max_eval_samples to 20 or more"),
        (500, 1, {"max_eval_samples": 1}, False, "Raise data.max_eval_samples to 20 or more"),
        (500, MIN_TEXTS, {}, False, None),
    ],
)
def test_few_held_out_rows_are_told_with_what_helps(
    train: int, heldout: int, keys: dict[str, object], text: bool, told: str | None
) -> None:
    found = heldout_advice(data(**keys), train, heldout, text)
    assert found is None if told is None else found is not None and found.endswith(told)
    assert found is None or re.match(rf"{heldout} held-out rows? (is|are) too few for confidence intervals", found)


@given(sequences=st.integers(1, 5000), rows=st.integers(1, 8), passes=st.integers(1, 8), epochs=st.floats(0.1, 4))
def test_steps_are_counted_as_transformers_counts_them(sequences: int, rows: int, passes: int, epochs: float) -> None:
    """As `Trainer.set_initial_training_values` has it, for a loader that keeps its last batch."""
    loader = math.ceil(sequences / rows)
    an_epoch = max(loader // passes + int(loader % passes > 0), 1)
    keys = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": passes, "num_train_epochs": epochs}
    assert training(**keys).steps_for(sequences) == math.ceil(epochs * an_epoch)
