"""Rows as they are stored in files, each with its location, and what to do with rows that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from folora_q.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Row:
    """One object of a file.

    Attributes:
        where: its file and line, for messages.
        values: by column.
    """

    where: str
    values: dict[str, Any]


class RowError(UserError):
    """One row cannot be used. Readers hand these on among the rows, so that the rest can be used all the same.

    Args:
        where: its file and line.
        reason: what is wrong with it, naming the field; no full stop.
    """

    def __init__(self, where: str, reason: str, hint: str | None = None) -> None:
        super().__init__(f"{where}: {reason}", hint or "correct it, or set data.on_error: skip to leave such rows out")
        self.where = where
        self.reason = reason


@dataclass
class ErrorPolicy(Generic[Item]):
    """What `data.on_error` says to do with rows that cannot be used: raise the first, or collect them.

    Attributes:
        skip: collect them.
        skipped: those collected so far.
    """

    skip: bool
    skipped: list[RowError] = field(default_factory=list)

    def pass_on(self, items: Iterable[Item | RowError]) -> Iterator[Item]:
        """The items that can be used."""
        for item in items:
            if not isinstance(item, RowError):
                yield item
            elif self.skip:
                self.skipped.append(item)
            else:
                raise item


def kind_of(value: Any) -> str:
    """What a value is, for messages."""
    names = {type(None): "null", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    names |= dict.fromkeys((int, float), "a number")
    return names.get(type(value), f"a {type(value).__name__}") if value != [] else "an empty list"
