"""Choose text for the verification of a merge: the run's held-out text, and general text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedTokenizerBase as Tokenizer

from folora_q.calibration.sample_cache import read_samples
from folora_q.data.encode import Encoder
from folora_q.data.formats import Chat
from folora_q.data.loading import read_task_data
from folora_q.errors import UserError
from folora_q.evaluation.loss import GENERAL_TEXTS, text_windows
from folora_q.recipe import Recipe
from folora_q.runs.folder import RunFolder

# The number of sequences of each kind, and their maximum length in tokens.
SEQUENCES = 4
LENGTH = 64


@dataclass(frozen=True)
class CheckTexts:
    """Token ids, and a description of their origin."""

    sequences: list[list[int]]
    origin: str


def check_texts(adapter: Path, tokenizer: Tokenizer) -> CheckTexts:
    """Return held-out task rows and held-out sampled text of the adapter's run, and always general text."""
    general = [ids for ids in text_windows(GENERAL_TEXTS["prose"], tokenizer, LENGTH)][:SEQUENCES]
    run = RunFolder(adapter.parent)
    if not run.manifest.exists() or adapter != run.adapter:
        return CheckTexts(general, "general text")
    recipe = run.read_recipe()
    samples = read_samples(run.proxy, len(tokenizer)) or []
    proxy = [sample.ids[:LENGTH] for sample in samples[recipe.proxy.num_samples :]][:SEQUENCES]
    task = _held_out_rows(recipe, tokenizer)
    parts = {"held-out rows of the task": task, "held-out text sampled from the base": proxy, "general text": general}
    named = [name for name, ids in parts.items() if ids]
    in_turn = [ids for row in zip_longest(*parts.values()) for ids in row if ids]  # so that a limit keeps some of each
    return CheckTexts(in_turn, ", ".join(named))


def _held_out_rows(recipe: Recipe, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the first held-out rows as the run encoded them; none if the data are gone."""
    try:
        examples = read_task_data(recipe.data, recipe.training.seed).heldout[:SEQUENCES]
        encoder = Encoder(tokenizer)
        if any(isinstance(example, Chat) for example in examples):
            encoder.prepare_chats()
        return [encoded.input_ids[:LENGTH] for example in examples for encoded in encoder(example)]
    except (UserError, OSError):
        return []
