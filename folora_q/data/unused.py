"""Name the columns, and the keys of turns, that are not used."""

from __future__ import annotations

from collections.abc import Iterable

from folora_q.data.fields import Fields
from folora_q.data.formats import FORMATS
from folora_q.data.rows import Row
from folora_q.data.turns import EMPTY, unused_keys
from folora_q.recipe.dataset import FormatName, Source


def filled_columns(row: Row, name: FormatName, source: Source) -> set[str]:
    """Return the columns of a usable row that hold something, and unread keys of its turns as `messages[].key`."""
    found = {name for name, value in row.values.items() if value not in EMPTY}
    fields = Fields(row, source)
    for column in filter(None, (fields.column(*names) for names in FORMATS[name].turns)):
        if isinstance(turns := row.values[column], list):
            found |= {f"{column}[].{key}" for key in unused_keys(turns, source)}
    return found


def unused_columns(columns: Iterable[str], name: FormatName, source: Source) -> list[str]:
    """Return the columns of a source that rows of this format do not use."""
    columns = set(columns)
    known = FORMATS[name]
    names = {*known.columns, *known.fields, *known.unmapped} - {"role", "content"}
    if known.turns == FORMATS["messages"].turns:  # the first of the two columns that exists
        names |= {"messages"} if source.column("messages") in columns else {"conversations"}
        names -= {"conversations"} if "messages" in names & columns else set()
    return sorted(columns - set(map(source.column, names)))
