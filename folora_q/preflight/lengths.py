"""Find rows that exceed training.max_length, from the tokenizer's file. Needs neither transformers nor a chat template.

A row is counted without what the chat template adds, except one token for the end of each turn. So a row that is found
too long is too long; others may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from folora_q.data.examples import Chat, Completion, Example, Labelled, Preference, Text
from folora_q.data.loading import first_examples
from folora_q.errors import UserError
from folora_q.memory.config import files_here
from folora_q.recipe import Recipe
from folora_q.recipe.paths import is_hub_dataset, is_remote

# Fewer rows than this share are not worth a warning: `preview` and `train` count them.
MIN_SHARE = 0.05
TOKENIZER = "tokenizer.json"
CONSEQUENCES = {"drop": "left out", "truncate": "cut", "split": "split"}


@dataclass(frozen=True)
class _Lengths:
    """Number of rows, how many are too long, and the smallest lengths that the shortest and the longest can have."""

    rows: int
    over: int
    shortest: int
    longest: int


def examine_lengths(recipe: Recipe, rows: int | None) -> list[str]:
    """Return warnings about rows that exceed the recipe's maximum length.

    Args:
        rows: number of rows of each source to read; None reads all.

    Raises:
        UserError: every row of the training data exceeds it, or one does and the recipe forbids that.
    """
    limit, overlong = recipe.training.max_length, recipe.data.overlong
    examples: list[Example] = []
    for source in recipe.data.train_dataset:
        if not is_hub_dataset(source) and not is_remote(source.path):
            examples += first_examples(source, rows, recipe.data.on_error, recipe.training.objective)
    found = _lengths(recipe, [example for example in examples if not _is_split(example, overlong)], limit)
    if found is None or not found.over:
        return []
    key, longest = f"training.max_length is {limit:,}", f"the longest at least {found.longest:,}"
    if overlong == "raise":
        raise UserError(
            f"{key}, and {found.over:,} of {found.rows:,} rows have more tokens, {longest}",
            "raise training.max_length, or set data.overlong to drop or truncate",
        )
    if found.over == found.rows and overlong == "drop":
        raise UserError(
            f"{key}, and every one of {found.rows:,} rows has more tokens: the shortest at least {found.shortest:,}, "
            f"{longest}",
            f"raise training.max_length to {found.longest:,} or more, or set data.overlong: truncate",
        )
    if found.over < MIN_SHARE * found.rows:
        return []
    return [
        f"{key}, and {found.over:,} of {found.rows:,} rows have more tokens ({longest}): "
        f"they are {CONSEQUENCES[overlong]} (data.overlong)"
    ]


def _is_split(example: Example, overlong: str) -> bool:
    return isinstance(example, Text) and overlong == "split"


def _lengths(recipe: Recipe, examples: Sequence[Example], limit: int) -> _Lengths | None:
    """Return the lengths of examples; None if none can be too long, or the tokenizer is not on this machine."""
    texts = [_texts(example) for example in examples]
    longest = max((sum(len(text.encode("utf-8", "replace")) + 1 for text in parts) for parts in texts), default=0)
    if longest <= limit:  # no token is shorter than a byte
        return None
    folder = files_here(recipe.model.model_name_or_path, recipe.model.revision)
    if folder is None or (counts := _counted(folder / TOKENIZER, texts)) is None:
        return None
    return _Lengths(len(counts), sum(count > limit for count in counts), min(counts), max(counts))


def _counted(tokenizer_file: Path, texts: Sequence[Sequence[str]]) -> list[int] | None:
    """Return a lower bound of each example's number of tokens; None if the tokenizer cannot be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    except Exception:  # tokenizers raises a plain Exception; loading the model's tokenizer will report it
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [
        sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in parts) + max(0, len(parts) - 1)
        for parts in texts
    ]


def _texts(example: Example) -> list[str]:
    match example:
        case Chat():
            return [str(message.get("content") or "") for message in example.messages]
        case Completion():
            return [example.prompt + example.completion]
        case Text():
            return [example.text]
        case Labelled():
            return _texts(example.answer)
        case Preference():  # the longer one
            return max(map(_texts, (example.chosen, example.rejected)), key=lambda parts: sum(map(len, parts)))
