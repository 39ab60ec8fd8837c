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
        where: file and line, for messages.
        values: values by column.
    """

    where: str
    values: dict[str, Any]


class RowError(UserError):
    """A row that cannot be used. Readers yield these among the rows, so that the others can still be used.

    Args:
        where: file and line.
        reason: what is wrong, naming the field; no full stop.
    """

    def __init__(self, where: str, reason: str, hint: str | None = None) -> None:
        super().__init__(f"{where}: {reason}", hint or "correct it, or set data.on_error: skip to leave such rows out")
        self.where = where
        self.reason = reason


@dataclass
class ErrorPolicy(Generic[Item]):
    """Treats rows that cannot be used as `data.on_error` says: raises the first, or collects them.

    Attributes:
        skip: collect them.
        skipped: the errors collected so far.
    """

    skip: bool
    skipped: list[RowError] = field(default_factory=list)

    def pass_on(self, items: Iterable[Item | RowError]) -> Iterator[Item]:
        """Yield the items that can be used."""
        for item in items:
            if not isinstance(item, RowError):
                yield item
            elif self.skip:
                self.skipped.append(item)
            else:
                raise item


def kind_of(value: Any) -> str:
    """Describe the type of a value, for messages."""
    names = {type(None): "null", str: "text", list: "a list", dict: "an object", bool: "true or false"}
    names |= dict.fromkeys((int, float), "a number")
    return names.get(type(value), f"a {type(value).__name__}") if value != [] else "an empty list"
