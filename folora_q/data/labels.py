"""Labels that say whether an answer is desirable."""

from __future__ import annotations

from typing import Any

from folora_q.data.column_guess import LABEL_COLUMNS
from folora_q.data.fields import Fields
from folora_q.data.rows import RowError

# Our name for the column, and LLaMA-Factory's.
LABEL, TAG = LABEL_COLUMNS
WORDS = {"true": True, "1": True, "false": False, "0": False}


def read_label(value: Any) -> bool | None:
    """Return what a label means; None if it is neither a truth value, 0 or 1, nor one of these as text."""
    if isinstance(value, str):
        return WORDS.get(value.strip().lower())
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    return None


def label_of(fields: Fields) -> bool:
    """Return whether a row's answer is desirable.

    Raises:
        RowError: the row has no label, or one with another value.
    """
    column = fields.column(LABEL, TAG) or fields.source.column(LABEL)
    desirable = read_label(fields.get(LABEL, TAG))
    if desirable is None:
        raise RowError(
            fields.where,
            f"`{column}` must be true for a desirable answer or false for an undesirable one, not "
            f"{str(fields.row.values[column])[:40]!r}",
        )
    return desirable
