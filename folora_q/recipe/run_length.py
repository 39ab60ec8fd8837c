"""Choose the length of a first run by the number of its rows: what is held out, epochs, batches and evaluations."""

from __future__ import annotations

from dataclasses import dataclass

from folora_q.recipe.size_advice import FEW_ROWS, MAX_EPOCHS, reach
from folora_q.recipe.training import TrainingSection

# The number of optimizer steps that a first run should have.
MIN_STEPS = 100
SHARE = 0.05
# Of few rows this share is held out, since an interval from one or two rows says nothing.
SHARE_OF_FEW = 0.2
# Evaluations are this many steps apart, the largest number of which leaves at least MIN_EVALUATIONS.
EVERY, MIN_EVALUATIONS = (500, 250, 200, 100, 50, 25, 20, 10, 5, 2, 1), 4
# Without a count of the rows.
USUAL_EVERY = 50
CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class RunLength:
    """The length of a run.

    Attributes:
        eval_size: `data.eval_size`: a share, or a number of rows.
        evaluation_steps: `evaluation.steps`.
        note: what it comes to, in one line, and why it is not longer.
    """

    eval_size: float
    epochs: int
    accumulation: int
    evaluation_steps: int
    note: str


@dataclass(frozen=True)
class Amount:
    """How much data there is.

    Attributes:
        rows: the number of rows; None if they were not counted.
        all_counted: whether there are no more.
        characters: the length of plain text, which is packed into sequences.
    """

    rows: int | None = None
    all_counted: bool = True
    characters: int | None = None


def run_length(amount: Amount, training: TrainingSection) -> RunLength:
    """Choose the length of a run for which `training` has the batch size and the maximum length."""
    accumulation = training.gradient_accumulation_steps
    if amount.rows is None:
        note = "rows on a hub are not counted: `folora-q preview` says how many steps they are"
        return RunLength(SHARE, 1, accumulation, USUAL_EVERY, note)
    eval_size = _held_out(amount.rows) if amount.characters is None else SHARE
    held = max(1, round(amount.rows * eval_size)) if eval_size < 1 else int(eval_size)
    sequences, counted = max(1, amount.rows - held), f"{amount.rows:,} rows, {held:,} of them held out"
    if amount.characters is not None:
        tokens = amount.characters * (1 - SHARE) / CHARACTERS_PER_TOKEN
        sequences = max(1, round(tokens / training.max_length))
        counted = f"about {amount.characters // CHARACTERS_PER_TOKEN:,} tokens of text"
    longer = reach(training, sequences, MIN_STEPS)
    steps, epochs = longer.steps_for(sequences), round(longer.num_train_epochs)
    batch = longer.per_device_train_batch_size * longer.gradient_accumulation_steps
    every = next(number for number in EVERY if number * MIN_EVALUATIONS <= steps or number == 1)
    least = "at least " if not amount.all_counted else "about " if amount.characters is not None else ""
    several = f"{epochs} epochs" if epochs > 1 else "1 epoch"
    counted = counted if amount.all_counted else f"over {counted}"
    note = f"{counted}; {several} in batches of {batch}: {least}{steps:,} step{'s' * (steps != 1)}"
    if steps < MIN_STEPS:
        note += f", fewer than {MIN_STEPS}: add rows, since more than {MAX_EPOCHS} epochs would only memorize these"
    return RunLength(eval_size, epochs, longer.gradient_accumulation_steps, every, note)


def _held_out(rows: int) -> float:
    """Return `data.eval_size`: the usual share if that is enough rows, else a number."""
    if rows * SHARE >= FEW_ROWS:
        return SHARE
    return max(1, min(FEW_ROWS, int(rows * SHARE_OF_FEW)))
