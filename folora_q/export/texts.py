"""Choose text for the verification of a merge: the run's held-out text, and general text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.calibration.sample_cache import read_samples
from folora_q.data.encode import Encoder
from folora_q.data.examples import has_chats
from folora_q.data.loading import read_task_data
from folora_q.data.tokens import IGNORED
from folora_q.errors import UserError
from folora_q.evaluation.loss import GENERAL_TEXTS, text_windows
from folora_q.recipe import Recipe
from folora_q.runs.folder import RunFolder

# The number of sequences of each kind, and their maximum length in tokens.
SEQUENCES = 4
LENGTH = 64


@dataclass(frozen=True)
class Amount:
    """The number of held-out rows of the task, and their maximum length in tokens."""

    rows: int = SEQUENCES
    length: int = LENGTH


@dataclass(frozen=True)
class CheckTexts:
    """Token ids, and a description of their origin.

    Attributes:
        labels: for each sequence, the tokens that the task trains; IGNORED elsewhere, and in all other text.
    """

    sequences: list[list[int]]
    labels: list[list[int]]
    origin: str


def check_texts(adapter: Path, tokenizer: Tokenizer, task_amount: Amount | None = None) -> CheckTexts:
    """Return held-out task rows and held-out sampled text of the adapter's run, and always general text."""
    general = _unlabelled([ids for ids in text_windows(GENERAL_TEXTS["prose"], tokenizer, LENGTH)][:SEQUENCES])
    run = RunFolder(adapter.parent)
    if not run.manifest.exists() or adapter != run.adapter:
        return CheckTexts(*_unzipped(general), "general text")
    recipe = run.read_recipe()
    samples = read_samples(run.proxy, len(tokenizer)) or []
    proxy = _unlabelled([sample.ids[:LENGTH] for sample in samples[recipe.proxy.num_samples :]][:SEQUENCES])
    task = _held_out_rows(recipe, tokenizer, task_amount or Amount())
    parts = {"held-out rows of the task": task, "held-out text sampled from the base": proxy, "general text": general}
    named = [name for name, rows in parts.items() if rows]
    # In turn, so that a limit keeps some of each.
    in_turn = [row for rows in zip_longest(*parts.values()) for row in rows if row]
    return CheckTexts(*_unzipped(in_turn), ", ".join(named))


Row = tuple[list[int], list[int]]


def _unlabelled(texts: list[list[int]]) -> list[Row]:
    return [(ids, [IGNORED] * len(ids)) for ids in texts]


def _unzipped(rows: list[Row]) -> tuple[list[list[int]], list[list[int]]]:
    return [ids for ids, _ in rows], [labels for _, labels in rows]


def _held_out_rows(recipe: Recipe, tokenizer: Tokenizer, amount: Amount) -> list[Row]:
    """Return the first held-out rows as the run encoded them; none if the data are gone."""
    training = recipe.training
    try:
        examples = read_task_data(recipe.data, training.seed, training.objective).heldout[: amount.rows]
        encoder = Encoder(
            tokenizer,
            assistant_only_loss=training.assistant_only_loss,
            completion_only_loss=training.completion_only_loss,
            without_thought=recipe.data.without_thought,
        )
        if has_chats(examples):
            encoder.prepare_chats()
        encoded = [row for example in examples for row in encoder(example)]
        return [(row.input_ids[: amount.length], row.labels[: amount.length]) for row in encoded]
    except (UserError, OSError):
        return []
