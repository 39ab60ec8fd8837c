"""Look at data for which there is no recipe yet: columns, format, and the number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from folora_q.data.column_guess import Guess, guess_fields, guess_labelled, guess_pairs
from folora_q.data.examples import Text
from folora_q.data.formats import detect_format
from folora_q.data.loading import examine, first_examples
from folora_q.data.rows import Row, RowError
from folora_q.data.sources import read_source
from folora_q.recipe.dataset import FormatName, Source
from folora_q.recipe.objectives import ObjectiveName

# Rows that are checked, and rows that are counted: with more, one epoch has more than enough steps.
CHECKED_ROWS, MAX_COUNTED_ROWS = 100, 20_000


@dataclass(frozen=True)
class FirstLook:
    """Facts about a source that a first recipe depends on.

    Attributes:
        rows: the number of usable rows, at most MAX_COUNTED_ROWS.
        unusable: the number of rows that cannot be used.
        all_counted: whether these are all.
        characters: the length of the rows, for plain text.
    """

    format: FormatName
    rows: int
    unusable: int
    all_counted: bool
    characters: int | None = None


def columns_of(source: Source) -> list[str]:
    """Return the columns of a source's first rows, in order.

    Raises:
        UserError: it cannot be read.
    """
    return list(dict.fromkeys(column for row in _first_rows(source) for column in row.values))


def guess_for(source: Source) -> Guess | None:
    """Guess the fields of pairs, of labelled answers, or of columns that match no known format; None if they match one.

    Raises:
        UserError: it cannot be read, or nothing can be guessed.
    """
    rows = _first_rows(source)
    values = [row.values for row in rows]
    if (compared := guess_pairs(values) or guess_labelled(values)) is not None:
        return compared
    try:
        detect_format(rows[0], source)
    except RowError:
        guess = guess_fields(values)
        if guess is None:
            raise
        return guess
    return None


def look_at(source: Source, objective: ObjectiveName) -> FirstLook:
    """Check the first rows of a source, and count all.

    Args:
        objective: what the rows are for.

    Raises:
        UserError: it cannot be read, or one of its first rows cannot be used.
    """
    examine(source, CHECKED_ROWS, "raise", objective)
    facts = examine(source, MAX_COUNTED_ROWS, "skip", objective)
    characters = None
    if facts.shape == "text":
        examples = first_examples(source, MAX_COUNTED_ROWS, "skip", objective)
        characters = sum(len(example.text) for example in examples if isinstance(example, Text))
    return FirstLook(facts.shape, facts.rows, facts.read - facts.rows, facts.read < MAX_COUNTED_ROWS, characters)


def _first_rows(source: Source) -> list[Row]:
    rows = []
    for row in islice(read_source(source), CHECKED_ROWS):
        if isinstance(row, RowError):
            raise row
        rows.append(row)
    return rows
