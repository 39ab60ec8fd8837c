"""A first run has at least 100 steps, or says why not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folora_q.recipe.new import SIZES, Answers
from folora_q.recipe.run_length import MIN_STEPS, Amount, run_length
from folora_q.recipe.size_advice import MAX_EPOCHS
from folora_q.recipe.training import TrainingSection


def training(rows: int = 1, passes: int = 16) -> TrainingSection:
    return TrainingSection(output_dir="r", per_device_train_batch_size=rows, gradient_accumulation_steps=passes)


@settings(max_examples=300, deadline=None)
@given(rows=st.integers(1, 20_000), card=st.sampled_from(list(SIZES)))
def test_there_are_enough_steps_or_a_reason(rows: int, card: str) -> None:
    found = Answers("org/m", "d.jsonl", "messages", card, "r", Amount(rows)).length
    held = max(1, round(rows * found.eval_size)) if found.eval_size < 1 else int(found.eval_size)
    batch, passes, *_ = SIZES[card]
    chosen = training(batch, found.accumulation).model_copy(update={"num_train_epochs": found.epochs})
    steps = chosen.steps_for(max(1, rows - held))
    assert f"{steps:,} step" in found.note
    assert found.accumulation <= passes and 1 <= found.epochs <= MAX_EPOCHS
    assert (steps < MIN_STEPS) == ("fewer than 100: add rows" in found.note)
    assert found.evaluation_steps * 4 <= steps or found.evaluation_steps == 1
    assert held < rows or rows == 1


@pytest.mark.parametrize(
    ("rows", "eval_size", "epochs", "accumulation", "note"),
    [
        (38, 7, 10, 4, "38 rows, 7 of them held out; 10 epochs in batches of 4: 80 steps, fewer than 100: add rows"),
        (60, 12, 9, 4, "60 rows, 12 of them held out; 9 epochs in batches of 4: 108 steps"),
        (700, 0.05, 1, 6, "700 rows, 35 of them held out; 1 epoch in batches of 6: 111 steps"),
        (10_000, 0.05, 1, 16, "10,000 rows, 500 of them held out; 1 epoch in batches of 16: 594 steps"),
    ],
)
def test_what_is_chosen_for_some_numbers(
    rows: int, eval_size: float, epochs: int, accumulation: int, note: str
) -> None:
    found = run_length(Amount(rows), training())
    assert (found.eval_size, found.epochs, found.accumulation) == (eval_size, epochs, accumulation)
    assert found.note.startswith(note)


def test_rows_that_are_not_counted_keep_the_defaults() -> None:
    found = run_length(Amount(), training())
    assert (found.eval_size, found.epochs, found.accumulation) == (0.05, 1, 16)
    assert "not counted" in found.note


def test_more_rows_than_are_counted_are_at_least_so_many() -> None:
    note = run_length(Amount(20_000, all_counted=False), training()).note
    assert re.fullmatch(r"over 20,000 rows, .*: at least 1,188 steps", note)


def test_plain_text_is_counted_in_tokens() -> None:
    found = run_length(Amount(60, characters=4_000_000), training())
    assert "about 1,000,000 tokens of text" in found.note and "about" in found.note
    assert found.eval_size == 0.05
