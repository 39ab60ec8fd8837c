"""Name the columns, and the keys of turns, that are not used."""

from __future__ import annotations

from collections.abc import Iterable

from folora_q.data.formats import ALSO, COLUMNS, FIELDS, Fields, shape_of
from folora_q.data.rows import Row
from folora_q.data.turns import EMPTY, unused_keys
from folora_q.recipe.dataset import Shape, Source

# Our names for the columns that hold turns.
TURNS: dict[Shape, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages", "conversations"),),
    "sharegpt": (("messages", "conversations"),),
    "prompt_completion": (("prompt",), ("completion",)),
}


def filled_columns(row: Row, source: Source) -> set[str]:
    """Return the columns of a usable row that hold something, and unread keys of its turns as `messages[].key`."""
    found = {name for name, value in row.values.items() if value not in EMPTY}
    fields = Fields(row, source)
    for column in filter(None, (fields.column(*names) for names in TURNS.get(shape_of(row, source), ()))):
        if isinstance(turns := row.values[column], list):
            found |= {f"{column}[].{key}" for key in unused_keys(turns, source)}
    return found


def unused_columns(columns: Iterable[str], shape: Shape, source: Source) -> list[str]:
    """Return the columns of a source that rows of this shape do not use."""
    columns = set(columns)
    names = (COLUMNS[shape] | FIELDS[shape] | ALSO.get(shape, set())) - {"role", "content"}
    if shape in ("messages", "sharegpt"):  # the first of the two that exists
        names |= {"messages"} if source.column("messages") in columns else {"conversations"}
        names -= {"conversations"} if "messages" in names & columns else set()
    return sorted(columns - set(map(source.column, names)))
