"""Warnings about runs that are too short or measured on too little, each with a fix."""

from __future__ import annotations

from math import ceil

from folora_q.recipe.dataset import DataSection
from folora_q.recipe.training import TrainingSection

# With fewer steps little is learned. The number of held-out rows that is proposed where there are too few.
FEW_STEPS, FEW_ROWS = 50, 20
# With fewer texts or rows there is no confidence interval: its coverage would be too low (evaluation/intervals.py).
MIN_TEXTS = 12
# The smallest batch per step that is proposed for more steps, and the most epochs that are proposed.
MIN_BATCH_SIZE, MAX_EPOCHS = 4, 10


def step_advice(training: TrainingSection, sequences: int) -> str | None:
    """Warn if a run on this number of sequences has few steps; None if it has enough."""
    steps = training.steps_for(sequences)
    if steps >= FEW_STEPS:
        return None
    if training.max_steps is not None:
        return f"training.max_steps: {_steps(steps)} little: raise it to {FEW_STEPS} or more"
    found = f"{_count(sequences, 'training sequence', 'give')} {_steps(steps)} little: "
    longer = reach(training, sequences, FEW_STEPS)
    most = longer.steps_for(sequences)
    if most < FEW_STEPS:
        return f"{found}add rows; with these, even {MAX_EPOCHS} epochs are {most} steps"
    changes = [
        f"training.{name} to {getattr(longer, name):g}"
        for name in ("gradient_accumulation_steps", "num_train_epochs")
        if getattr(longer, name) != getattr(training, name)
    ]
    return f"{found}set {' and '.join(changes)}, for {most} steps"


def reach(training: TrainingSection, sequences: int, steps: int) -> TrainingSection:
    """Return the settings with which a run has at least `steps` steps: smaller batches first, then more epochs.

    If that is not possible, it has the most that are proposed: MAX_EPOCHS with batches of MIN_BATCH_SIZE.
    """
    rows, passes = training.per_device_train_batch_size, training.gradient_accumulation_steps
    least = ceil(min(MIN_BATCH_SIZE, rows * passes) / rows)
    more = range(1, MAX_EPOCHS + 1)
    for epochs in (training.num_train_epochs, *(count for count in more if count > training.num_train_epochs)):
        for fewer in range(passes, least - 1, -1):
            changed = _with(training, fewer, epochs)
            if changed.steps_for(sequences) >= steps:
                return changed
    return _with(training, least, max(MAX_EPOCHS, training.num_train_epochs))


def heldout_advice(data: DataSection, train: int, heldout: int, plain_text: bool = False) -> str | None:
    """Warn if little is held out; None if it is enough.

    Args:
        train, heldout: numbers of sequences.
        plain_text: they are pieces of documents, of which a share is held out, not a number.
    """
    if heldout >= MIN_TEXTS:
        return None
    found = f"{_count(heldout, 'held-out row', 'are')} too few for confidence intervals, and the best step is chance. "
    if data.max_eval_samples is not None and data.max_eval_samples <= heldout:
        return f"{found}Raise data.max_eval_samples to {FEW_ROWS} or more"
    if data.eval_dataset is not None:
        return f"{found}Name more of them in data.eval_dataset"
    total = train + heldout
    if total < 2 * FEW_ROWS:
        return f"{found}Add rows, or name a data.eval_dataset"
    size = f"{ceil(100 * FEW_ROWS / total) / 100:g}" if plain_text else f"{FEW_ROWS}"
    return f"{found}Set data.eval_size to {size}"


def _with(training: TrainingSection, passes: int, epochs: float) -> TrainingSection:
    return training.model_copy(update={"gradient_accumulation_steps": passes, "num_train_epochs": epochs})


def _steps(count: int) -> str:
    return "1 step, which teaches" if count == 1 else f"{count} steps, which teach"


def _count(number: int, what: str, verb: str) -> str:
    """Return a number with noun and verb, e.g. "1 row is" or "2 rows are"."""
    one = {"are": "is", "give": "gives"}[verb]
    return f"{number:,} {what} {one}" if number == 1 else f"{number:,} {what}s {verb}"
