"""The columns of a row, looked up by our names, and what several formats make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from folora_q.data.examples import Chat
from folora_q.data.rows import Row, RowError, kind_of
from folora_q.data.tools import Tool, parse_tools
from folora_q.data.turns import Turn
from folora_q.recipe.dataset import Source


@dataclass(frozen=True)
class Fields:
    """A row's columns, looked up by our names."""

    row: Row
    source: Source

    @property
    def where(self) -> str:
        return self.row.where

    def column(self, *names: str) -> str | None:
        """Return the row's column for the first of our names that has one.

        A column that `fields` maps to another name is not found under its own.
        """
        fields = self.source.fields
        mapped = set(fields.values())
        for name in names:
            column = self.source.column(name)
            if column in self.row.values and (name in fields or column not in mapped):
                return column
        return None

    def get(self, *names: str) -> Any:
        """Return the value of a required column, looked up by these names."""
        column = self.column(*names)
        if column is not None:
            return self.row.values[column]
        wanted = self.source.column(names[0])
        raise RowError(
            self.where, f"the column `{wanted[:40]}` is missing; the columns are {listed_columns(self.row.values)}"
        )

    def text(self, name: str, *others: str, required: bool = True) -> str:
        """Return the text of a column; "" if it is not required and absent or null.

        Args:
            others: further names that the column may have.
        """
        column = self.column(name, *others)
        theirs = column or self.source.column(name)
        value = None if column is None else self.row.values[column]
        if value is None and not required:
            return ""
        if column is None:
            self.get(name)
        if not isinstance(value, str):
            raise RowError(self.where, f"`{theirs}` must be text, not {kind_of(value)}")
        if required and not value.strip():
            raise RowError(self.where, f"`{theirs}` is empty")
        return value

    def instruction(self, required: bool = True) -> str:
        """Return the instruction, followed by its `input` if there is one; "" if it is not required and absent."""
        asked, more = self.text("instruction", required=required), self.text("input", required=False)
        return f"{asked}\n\n{more}" if asked.strip() and more.strip() else asked

    def tools(self) -> list[Tool] | None:
        """Return the tools that the row offers, if any."""
        column = self.column("tools", "functions")
        return None if column is None else parse_tools(self.row.values[column], self.where, column)


def chat_of(fields: Fields, turns: list[Turn], context: int = 0) -> Chat:
    """Return turns as a chat, of which the first `context` are never trained on."""
    unlearned = tuple(
        index for index, turn in enumerate(turns) if turn.message["role"] == "assistant" and not turn.learned
    )
    return Chat(fields.where, [turn.message for turn in turns], context, fields.tools(), unlearned)


def listed_columns(columns: Mapping[str, Any]) -> str:
    """List the names of a row's columns, shortened for a message."""
    return ", ".join(sorted(str(name)[:40] for name in columns)[:8]) or "none"
