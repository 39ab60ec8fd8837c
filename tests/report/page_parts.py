"""A page taken apart: its tables by class, and what stands in it as text. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr"}


@dataclass
class Cell:
    """One cell: its text, and the values of its <data> elements."""

    text: str = ""
    values: list[str] = field(default_factory=list)


@dataclass
class Parts(HTMLParser):
    """Feed it a page."""

    tables: dict[str, list[list[Cell]]] = field(default_factory=dict)
    text: str = ""
    tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.table: list[list[Cell]] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.attributes += given.items()
        if "id" in given:
            self.ids.append(given["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = self.tables.setdefault(given.get("class", ""), [])
        elif tag == "tr" and self.table is not None:
            self.table.append([])
        elif tag in ("td", "th") and self.table is not None:
            self.table[-1].append(Cell())
        elif tag == "data" and self.table is not None:
            self.table[-1][-1].values.append(given["value"])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()
        if tag == "table":
            self.table = None

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data
        if self.table and self.table[-1] and self.open and self.open[-1] in ("td", "th", "small", "data"):
            self.table[-1][-1].text += data


def parts_of(html: str) -> Parts:
    """Parse a page; every element must be closed where it should."""
    parts = Parts()
    parts.feed(html)
    parts.close()
    assert parts.open == []
    return parts
